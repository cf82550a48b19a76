"""The inference gap ℓ(θ) − L(θ, q), and its split into the family's share and the encoder's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pyro_vharm.diagnostics.activity import ActiveUnits, check_threshold, measure_activity
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference.agreement import Confirmation
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.evidence import Evidence, estimate_evidence
from pyro_vharm.learning.family_fitting import check_families, family_elbos
from pyro_vharm.learning.refit import Refit, elbo_over_batches, refitted_elbo
from pyro_vharm.learning.unit_families import GuideFamily
from pyro_vharm.model.data import Data
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import html_table, nats, shown, text_table

__all__ = ["InferenceGap", "inference_gap", "measure_gap"]


@dataclass(frozen=True)
class InferenceGap:
    """How far the ELBO is from the log evidence at one θ, in nats.

    Attributes:
        evidence: ℓ(θ), with its bounds.
        elbo: L(θ, q) per unit; ``None`` for a guide that holds continuous latents as points.
        refitted_elbo: L with the guide's family refitted to each unit; ``None`` where the family
            could not be freed.
        families: L of other families, fitted to each unit, by name, from the poorest family up.
        active_units: which latent dims are in use; ``None`` where it was not measured, or is
            undefined, as for one joint unit.
    """

    evidence: Evidence
    elbo: UnitEstimates | None
    refitted_elbo: UnitEstimates | None
    families: Mapping[str, UnitEstimates] = field(default_factory=dict)
    active_units: ActiveUnits | None = None

    @property
    def gap(self) -> UnitEstimates | None:
        """G = ℓ(θ) − L(θ, q) = KL(q ‖ p(h | v; θ)) per unit."""
        return None if self.elbo is None else self.evidence.per_unit - self.elbo

    @property
    def approximation(self) -> UnitEstimates | None:
        """A = ℓ(θ) − max over the family of L(θ, ·); an upper bound, as a refit only comes near."""
        return None if self.refitted_elbo is None else self.evidence.per_unit - self.refitted_elbo

    @property
    def amortization(self) -> UnitEstimates | None:
        """G − A: what one q per unit would gain over the guide as it is; a lower bound."""
        if self.refitted_elbo is None or self.elbo is None:
            return None
        return self.refitted_elbo - self.elbo

    def family_gap(self, name: str) -> UnitEstimates:
        """ℓ(θ) − L of one of `families`: an upper bound on that family's approximation gap.

        Raises:
            InputError: if no family of that name was fitted.
        """
        return self.evidence.per_unit - self._family(name)

    def family_gain(self, name: str) -> UnitEstimates | None:
        """L of one of `families` less L of the guide: what it would gain at this θ, from below.

        Raises:
            InputError: if no family of that name was fitted.
        """
        found = self._family(name)
        return None if self.elbo is None else found - self.elbo

    def _family(self, name: str) -> UnitEstimates:
        if name not in self.families:
            raise InputError(
                f"name must be of a family that was fitted, {list(self.families)}, not {name!r}; "
                "ask inference_gap for it by families="
            )
        return self.families[name]

    def __str__(self) -> str:
        ladder = [self._ladder()] if self.families else []
        used = [] if self.active_units is None else [self.active_units.summary]
        return "\n".join([self._table(), *ladder, *used])

    def _ladder(self) -> str:
        """The gap of each family, and what it would gain over the guide."""
        rows = []
        for name in self.families:
            gap, gain = self.family_gap(name).total(), self.family_gain(name)
            numbers = nats(gap.value), nats(gap.mc_error), nats(gap.per_unit.value, 4)
            change = "unknown" if gain is None else shown(gain.total(), 3)
            rows.append([f"  {name}", *numbers, change])
        header = ["gap of a family for each unit", "total", "mc error", "per unit", "gain on guide"]
        note = (
            "The gain is in ELBO at this θ, from below; what learning would then gain is another "
            "question."
        )
        return "\n".join(["", text_table(header, rows), note])

    def _table(self) -> str:
        entries = [
            ("log evidence", self.evidence.per_unit),
            ("ELBO", self.elbo),
            ("inference gap", self.gap),
            ("  approximation", self.approximation),
            ("  amortization", self.amortization),
        ]
        rows = []
        for name, units in entries:
            if units is None:
                rows.append([name, "unknown", "", ""])
                continue
            total = units.total()
            numbers = nats(total.value), nats(total.mc_error), nats(total.per_unit.value, 4)
            rows.append([name, *numbers])
        return text_table(["nats", "total", "mc error", "per unit"], rows)

    def _repr_html_(self) -> str:
        return html_table(str(self))


def inference_gap(
    model: PyroFunction,
    guide: PyroFunction,
    data: Data,
    *,
    method: InferenceMethod | None = None,
    refit: Refit | None = None,
    families: Sequence[GuideFamily] = (),
    active_threshold: float = 0.01,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> InferenceGap:
    """G = ℓ(θ) − L(θ, q) = approximation + amortization, at the present parameters, in nats.

    The approximation gap is what remains when the guide's own family is refitted to each unit;
    the amortization gap is the rest. The refit can only approach the best of the family, so the
    first is an upper bound and the second a lower one, up to Monte Carlo error. The gaps of
    `families` are upper bounds in the same way, and each rung starts from the one below.

    Args:
        model: a trained Pyro model; discrete latents without a guide site are summed out.
        guide: its trained guide.
        data: positional arguments as a tuple, keyword arguments as a Mapping, or an iterable of
            batches.
        method: the inference method for ℓ; see `log_evidence`.
        refit: how to refit, and how finely to evaluate the ELBO.
        families: families of q to fit to each unit as well, such as `MeanField`, `FullRank` and
            `Flow`: the curve of the gap against the family. Discrete latents are summed out.
        active_threshold: see `ActiveUnits`.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, before any long work.

    Source: "Inference Suboptimality in Variational Autoencoders", Cremer, Li, Duvenaud (2018).

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vharm import FullRank, MeanField, Refit
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(h.sum(-1), 0.5), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(0.4 * x[:, None], 0.5).expand([len(x), 2]).to_event(1))
    >>> gap = inference_gap(model, guide, (torch.tensor([1.0, -2.0]),), refit=Refit(30),
    ...     families=[MeanField(), FullRank()], progress=False)
    >>> exact = torch.tensor(25 / 9).log()  # 2 units, ½ log (P₁₁ P₂₂ / det P) each
    >>> bool(abs(gap.family_gap("mean field").total().value - exact) < 0.2)
    True
    >>> bool(abs(gap.family_gap("full rank").total().value) < 0.1)
    True
    """
    if guide is None:
        raise InputError("inference_gap needs the guide whose ELBO it compares with the evidence")
    check_threshold(active_threshold)
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        if not problem.densities[0].has_guide_density:
            raise InputError(
                "the guide holds continuous latents as point masses (Delta), so "
                "E_q[log p − log q] is a joint log density, no bound, and has no gap; "
                "learning_harm says what learning lost, or use a guide with a density, such as "
                "AutoNormal"
            )
        check_families(families, problem)
        chosen, refit = choose_method(problem.densities, method), refit or Refit()
        found = measure_gap(problem, chosen, refit, families=families, progress=progress)
        used = measure_activity(problem, refit.num_particles, active_threshold)
        return replace(found, active_units=used)


def measure_gap(
    problem: Problem,
    choice: Choice,
    refit: Refit,
    *,
    families: Sequence[GuideFamily] = (),
    progress: bool,
) -> InferenceGap:
    """`inference_gap` for a problem that is prepared, at the parameters it holds now."""
    return InferenceGap(
        evidence=estimate_evidence(
            problem.densities, choice, confirmation=Confirmation(), progress=progress
        ),
        elbo=elbo_over_batches(problem, refit.num_particles),
        refitted_elbo=refitted_elbo(problem, refit, progress=progress),
        families=family_elbos(problem, families, refit, progress=progress),
    )
