"""Learning harm: how much log evidence the approximation cost, and what the excess proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_vharm.diagnostics.gap import InferenceGap, measure_gap
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.evidence import Evidence, estimate_evidence
from pyro_vharm.learning.attempts import given_reference
from pyro_vharm.learning.evidence_pair import EvidencePair, bounds_table
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.reference import Reference
from pyro_vharm.learning.refit import Refit, elbo_over_batches
from pyro_vharm.model.data import Data
from pyro_vharm.model.heldout import prepare_heldout
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import html_table, nats, text_table

__all__ = [
    "LearningHarm",
    "check_reference",
    "learning_harm",
    "measure_harm",
    "resolve_reference",
]


@dataclass(frozen=True)
class LearningHarm:
    """What learning lost, relative to a reference, in nats.

    Attributes:
        learned: the gap at θ̂ with the guide as trained, on training data.
        reference_gap: the gap at θ_ref with the guide retrained there, on training data.
        reference: θ_ref and where it came from.
        heldout: evidence of held-out units at both, ``None`` without held-out data.
        heldout_elbo: L(θ̂, q̂) of the held-out units; ``None`` without a guide there.
        notes: what could not be done, and why.
    """

    learned: InferenceGap
    reference_gap: InferenceGap
    reference: Reference
    heldout: EvidencePair | None
    heldout_elbo: UnitEstimates | None
    notes: tuple[str, ...]

    @property
    def train(self) -> EvidencePair:
        """Evidence of the training units at both parameters."""
        return EvidencePair(self.learned.evidence, self.reference_gap.evidence)

    @property
    def harm(self) -> Estimate:
        """ℓ(θ_ref) − ℓ(θ̂) on the training data."""
        return self.train.harm.total()

    @property
    def heldout_harm(self) -> Estimate | None:
        """The same on held-out data, with the error from which units were held out."""
        return None if self.heldout is None else self.heldout.harm.heldout_total()

    @property
    def reachability(self) -> UnitEstimates | None:
        """R = A(θ_ref): how far the family is from the reference's posteriors; an upper bound."""
        return self.reference_gap.approximation

    @property
    def excess(self) -> Estimate | None:
        """E = L(θ_ref, q refitted per unit) − L(θ̂, q̂), identically H + G − R.

        If positive, L was not maximised over θ and a q free for each unit; whether the trained
        guide could have followed is what `excess_retrained` says.
        """
        return _total_difference(self.reference_gap.refitted_elbo, self.learned.elbo)

    @property
    def excess_retrained(self) -> Estimate | None:
        """L(θ_ref, encoder retrained there) − L(θ̂, q̂): if positive, the optimiser is to blame.

        The user's own objective with the user's own guide has a better point than the one found.
        """
        return _total_difference(self.reference_gap.elbo, self.learned.elbo)

    @property
    def excess_refitted(self) -> Estimate | None:
        """L at θ_ref less L at θ̂, q refitted per unit at both: if positive, the encoder is.

        With a free q for each unit the objective prefers θ_ref, so the family alone did not
        bend learning away from it.
        """
        return _total_difference(self.reference_gap.refitted_elbo, self.learned.refitted_elbo)

    def ledger(self) -> dict[str, Estimate | None]:
        """The training data's ledger: from ℓ(θ_ref) down to L(θ̂, q̂), then R and the excess.

        The first six lines add up: each "=" line is the one above it less the "−" lines between.
        """
        return {
            "log evidence at reference": self.train.reference.per_unit.total(),
            "− learning harm": self.harm,
            "= log evidence as learned": self.train.learned.per_unit.total(),
            "− approximation gap": _total(self.learned.approximation),
            "− amortization gap": _total(self.learned.amortization),
            "= ELBO as learned": _total(self.learned.elbo),
            "inference gap": _total(self.learned.gap),
            "reachability gap": _total(self.reachability),
            "excess": self.excess,
            "excess, encoder retrained": self.excess_retrained,
            "excess, refitted at both ends": self.excess_refitted,
        }

    def heldout_ledger(self) -> dict[str, Estimate | None]:
        """The same for held-out data, without the split of the gap; empty without such data."""
        if self.heldout is None:
            return {}
        learned, elbo = self.heldout.learned.per_unit, self.heldout_elbo
        return {
            "log evidence at reference": self.heldout.reference.per_unit.heldout_total(),
            "− learning harm": self.heldout_harm,
            "= log evidence as learned": learned.heldout_total(),
            "− inference gap": None if elbo is None else (learned - elbo).heldout_total(),
            "= ELBO as learned": None if elbo is None else elbo.heldout_total(),
        }

    def __str__(self) -> str:
        parts = [_ledger_table("training data", self.harm.num_units, self.ledger())]
        parts += ["", bounds_table(self.train)]
        if self.heldout_harm is not None:
            held = _ledger_table(
                "held-out data", self.heldout_harm.num_units, self.heldout_ledger()
            )
            parts += ["", held]
        return "\n".join([*parts, *self.notes, *self.reference.notes])

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _total_difference(first: UnitEstimates | None, second: UnitEstimates | None) -> Estimate | None:
    return None if first is None or second is None else (first - second).total()


def _total(units: UnitEstimates | None) -> Estimate | None:
    return None if units is None else units.total()


def _ledger_table(title: str, num_units: int, ledger: Mapping[str, Estimate | None]) -> str:
    sampled = any(e is not None and e.sampling_error is not None for e in ledger.values())
    header = [f"{title}, " + ("one joint unit" if num_units == 1 else f"{num_units} units")]
    header += ["total", "mc error"]
    header += ["per unit"] if num_units > 1 else []
    header += ["sampling error"] if sampled else []
    header += ["kind"]
    rows = [_row(name, line, num_units > 1, sampled) for name, line in ledger.items()]
    return text_table(header, [row + [""] * (len(header) - len(row)) for row in rows])


def _row(name: str, total: Estimate | None, per_unit: bool, sampled: bool) -> list[str]:
    if total is None:
        return [name, "unknown"]
    unit = total.per_unit
    row = [name, nats(total.value), nats(total.mc_error)]
    row += [nats(unit.value, 4)] if per_unit else []
    row += [nats(unit.sampling_error or 0.0, 4)] if sampled else []
    return [*row, str(total.kind)]


def learning_harm(
    model: PyroFunction,
    guide: PyroFunction,
    data: Data,
    *,
    reference: Reference | Mapping[str, Any],
    heldout: Data | None = None,
    method: InferenceMethod | None = None,
    refit: Refit | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> LearningHarm:
    """H = ℓ(θ_ref) − ℓ(θ̂): a lower bound on what learning lost, up to the estimators' error.

    Args:
        model: a Pyro model with the parameters θ̂ that SVI ended at.
        guide: its trained guide.
        data: the training data.
        reference: from `learn_reference`, or θ_ref by name on the user-facing scale.
        heldout: data that neither learner saw.
        method: the inference method for ℓ; see `log_evidence`.
        refit: how to refit the guide per unit, and how finely to evaluate an ELBO.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where an argument breaks a constraint, before any long work.
    """
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        held, notes = prepare_heldout(problem, heldout)
        chosen = choose_method(problem.densities, method)
        refit = Refit() if refit is None else refit
        found = resolve_reference(problem, reference, GuideTraining(), progress=progress)
        learned = measure_gap(problem, chosen, refit, progress=progress)
        return measure_harm(problem, learned, found, held, notes, chosen, refit, progress=progress)


def resolve_reference(
    problem: Problem,
    reference: Reference | Mapping[str, Any],
    guide_training: GuideTraining,
    *,
    progress: bool,
) -> Reference:
    """A `Reference` from what the user hands in."""
    check_reference(problem, reference)
    if isinstance(reference, Reference):
        if reference.guide_values.keys() == problem.guide_parameters.leaves.keys():
            return reference
        reference = reference.parameters
    return given_reference(problem, reference, guide_training, progress=progress)


def check_reference(problem: Problem, reference: Reference | Mapping[str, Any]) -> None:
    """Refuse what does not fit the model, before any long work.

    Raises:
        InputError: if it is neither a `Reference` nor a mapping, or names, shapes or constraints
            are not those of the model.
    """
    if isinstance(reference, Reference):
        names = reference.model_values.keys()
        if names != problem.model_parameters.leaves.keys():
            raise InputError(
                f"reference has the parameters {sorted(names)}, the model "
                f"{sorted(problem.model_parameters.leaves)}"
            )
        return
    if not isinstance(reference, Mapping):
        raise InputError(
            "reference must be a Reference or a mapping from parameter names to values, not "
            f"{reference!r}"
        )
    problem.model_parameters.unconstrain(reference, "reference")


def measure_harm(
    problem: Problem,
    learned: InferenceGap,
    reference: Reference,
    heldout: Problem | None,
    notes: tuple[str, ...],
    choice: Choice,
    refit: Refit,
    *,
    progress: bool,
) -> LearningHarm:
    """`learning_harm` from a prepared problem, at whose parameters `learned` was measured."""
    theta, phi = problem.model_parameters, problem.guide_parameters
    held_learned, held_elbo = _heldout(heldout, choice, refit, progress)
    with theta.at(reference.model_values), phi.at(reference.guide_values):
        reference_gap = measure_gap(problem, choice, refit, progress=progress)
        held_reference, _ = _heldout(heldout, choice, refit, progress)
    pair = None
    if held_learned is not None and held_reference is not None:
        pair = EvidencePair(held_learned, held_reference)
    return LearningHarm(learned, reference_gap, reference, pair, held_elbo, notes)


def _heldout(
    heldout: Problem | None, choice: Choice, refit: Refit, progress: bool
) -> tuple[Evidence | None, UnitEstimates | None]:
    if heldout is None:
        return None, None
    evidence = estimate_evidence(heldout.densities, choice, progress=progress)
    if heldout.guide is None:
        return evidence, None
    return evidence, elbo_over_batches(heldout, refit.num_particles)
