"""Self-fulfilment: how far a training bent the model until the guide's family could hold it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pyro_vharm.diagnostics.trajectory import DiagnosedHistory
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate, Kind, UnitEstimates
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["GapParts", "SelfFulfilment", "self_fulfilment"]


@dataclass(frozen=True)
class GapParts:
    """The inference gap at one checkpoint, in nats, in total over the probe.

    Attributes:
        log_evidence: ℓ(θ).
        gap: G = ℓ(θ) − L(θ, q).
        approximation: A = ℓ(θ) − max over the family of L(θ, ·), an upper bound: what the model's
            posteriors keep from the family.
        amortization: G − A, a lower bound: what inference leaves undone within it.
    """

    log_evidence: Estimate
    gap: Estimate
    approximation: Estimate
    amortization: Estimate


@dataclass(frozen=True)
class SelfFulfilment:
    """A(θ) and G − A along a training, beside that of a reference from the same start.

    Attributes:
        trained: step → the parts of the gap, in order of steps.
        reference: the same of a better learner's training; empty without one.
    """

    trained: Mapping[int, GapParts]
    reference: Mapping[int, GapParts]

    @property
    def change(self) -> GapParts:
        """Last less first: ΔG = ΔA (the model bent) + Δ(G − A) (inference improved)."""
        return _change(self.trained)

    @property
    def reference_change(self) -> GapParts | None:
        """The same of the reference: how A moves where learning does not follow the family."""
        return _change(self.reference) if self.reference else None

    def __str__(self) -> str:
        count = next(iter(self.trained.values())).gap.num_units
        parts = [_table("as trained", self.trained, count)]
        if self.reference:
            parts += ["", _table("reference", self.reference, count)]
        return "\n".join([*parts, "", *self._conclusion()])

    def _conclusion(self) -> list[str]:
        first, last = min(self.trained), max(self.trained)
        change = self.change
        lines = [
            f"From step {first} to {last} the gap changed by {_shown(change.gap)} nats per unit: "
            f"{_shown(change.approximation)} as the",
            f"model bent toward the family, {_shown(change.amortization)} as inference improved.",
        ]
        other = self.reference_change
        if other is not None:
            lines.append(
                f"Under the reference's learning the approximation gap changed by "
                f"{_shown(other.approximation)}."
            )
        return lines

    def _repr_html_(self) -> str:
        return html_table(str(self))


def self_fulfilment(
    history: DiagnosedHistory, reference: DiagnosedHistory | None = None
) -> SelfFulfilment:
    """Split the fall of the inference gap along a training into the model's part and inference's.

    The gap G = ℓ(θ) − L(θ, q) falls in training for two reasons. Inference improves: q comes nearer
    the best of its family, G − A falls. And the model bends: A(θ), what even the best of the
    family is short of, falls, as the approximating assumption becomes true of the model. G alone
    does not tell them apart. A falls in exact learning too where the data ask for it: compare with
    a better learner's training from the same start.

    Args:
        history: checkpoints that `diagnose` has measured, at least two.
        reference: those of a better learner's training, such as ``reference.history``, diagnosed
            on the same probe.

    Raises:
        InputError: if fewer than two checkpoints are diagnosed, the family could not be refitted,
            or the two were diagnosed on other data.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vharm import Recorder, Refit, diagnose
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.tensor(0.0))
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(pyro.param("at", torch.tensor(2.0)), 0.7))
    >>> x = torch.ones(5)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), pyro.infer.Trace_ELBO())
    >>> recorder = Recorder(model, guide, every=20)
    >>> for step in range(21):
    ...     loss = svi.step(x)
    ...     recorder.record(step)
    >>> refit = Refit(num_steps=50, num_particles=200)
    >>> found = self_fulfilment(diagnose(recorder.history, (x,), refit=refit, progress=False))
    >>> found.change.gap.value < 0
    True
    """
    _check(history, "history")
    if reference is not None:
        _check(reference, "reference")
        if reference.settings.get("data") != history.settings.get("data"):
            raise InputError(
                "reference must be diagnosed on the same probe as history; call diagnose on both "
                "with the same data"
            )
    return SelfFulfilment(_parts(history), {} if reference is None else _parts(reference))


def _check(history: DiagnosedHistory, name: str) -> None:
    if not isinstance(history, DiagnosedHistory):
        raise InputError(f"{name} must come from diagnose(history, data), not {history!r}")
    if len(history.diagnoses) < 2:
        raise InputError(
            f"{name} must have at least two diagnosed checkpoints, not {len(history.diagnoses)}"
        )
    unknown = [step for step, found in history.diagnoses.items() if found.gap.approximation is None]
    if unknown:
        raise InputError(
            f"the approximation gap of {name} is unknown at the steps {unknown}: the guide's "
            "family could not be refitted to each unit, or the guide has no density"
        )


def _parts(history: DiagnosedHistory) -> dict[int, GapParts]:
    return {
        step: GapParts(
            found.gap.evidence.per_unit.total(),
            _total(found.gap.gap),
            _total(found.gap.approximation),
            _total(found.gap.amortization),
        )
        for step, found in sorted(history.diagnoses.items())
    }


def _total(units: UnitEstimates | None) -> Estimate:
    assert units is not None, "it was checked that the family was refitted"
    return units.total()


def _change(parts: Mapping[int, GapParts]) -> GapParts:
    """Checkpoints have random numbers of their own, so their errors add in quadrature."""
    first, last = parts[min(parts)], parts[max(parts)]
    names = ("log_evidence", "gap", "approximation", "amortization")
    return GapParts(*(_difference(getattr(last, n), getattr(first, n)) for n in names))


def _difference(last: Estimate, first: Estimate) -> Estimate:
    error = math.hypot(last.mc_error, first.mc_error)
    kind: Kind = max(last.kind, first.kind)
    return Estimate(last.value - first.value, error, last.num_units, kind)


def _table(title: str, parts: Mapping[int, GapParts], num_units: int) -> str:
    names = ["log evidence", "gap G", "approx. A", "± mc", "G − A"]
    rows = [
        [
            str(step),
            nats(found.log_evidence.per_unit.value, 4),
            nats(found.gap.per_unit.value, 4),
            nats(found.approximation.per_unit.value, 4),
            nats(found.approximation.per_unit.mc_error, 4),
            nats(found.amortization.per_unit.value, 4),
        ]
        for step, found in parts.items()
    ]
    units = "one joint unit" if num_units == 1 else f"nats per unit, {num_units} units"
    return text_table([f"{title} ({units})", *names], rows)


def _shown(estimate: Estimate) -> str:
    unit = estimate.per_unit
    return f"{unit.value:+.4f} ± {unit.mc_error:.4f}"
