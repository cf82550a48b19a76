"""The inference gap ℓ(θ) − L(θ, q), and its split into the family's share and the encoder's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference.agreement import Confirmation
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.evidence import Evidence, estimate_evidence
from pyro_vharm.learning.refit import Refit, elbo_over_batches, refitted_elbo
from pyro_vharm.model.data import Data
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["InferenceGap", "inference_gap", "measure_gap"]


@dataclass(frozen=True)
class InferenceGap:
    """How far the ELBO is from the log evidence at one θ, in nats.

    Attributes:
        evidence: ℓ(θ), with its bounds.
        elbo: L(θ, q) per unit; ``None`` for a guide that holds continuous latents as points.
        refitted_elbo: L with the guide's family refitted to each unit; ``None`` where the family
            could not be freed.
    """

    evidence: Evidence
    elbo: UnitEstimates | None
    refitted_elbo: UnitEstimates | None

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

    def __str__(self) -> str:
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
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> InferenceGap:
    """G = ℓ(θ) − L(θ, q) = approximation + amortization, at the present parameters, in nats.

    The approximation gap is what remains when the guide's own family is refitted to each unit;
    the amortization gap is the rest. The refit can only approach the best of the family, so the
    first is an upper bound and the second a lower one, up to Monte Carlo error.

    Args:
        model: a trained Pyro model; discrete latents without a guide site are summed out.
        guide: its trained guide.
        data: positional arguments as a tuple, keyword arguments as a Mapping, or an iterable of
            batches.
        method: the inference method for ℓ; see `log_evidence`.
        refit: how to refit, and how finely to evaluate the ELBO.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, before any long work.

    Source: "Inference Suboptimality in Variational Autoencoders", Cremer, Li, Duvenaud (2018).
    """
    if guide is None:
        raise InputError("inference_gap needs the guide whose ELBO it compares with the evidence")
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        if not problem.densities[0].has_guide_density:
            raise InputError(
                "the guide holds continuous latents as point masses (Delta), so "
                "E_q[log p − log q] is a joint log density, no bound, and has no gap; "
                "learning_harm says what learning lost, or use a guide with a density, such as "
                "AutoNormal"
            )
        chosen = choose_method(problem.densities, method)
        return measure_gap(problem, chosen, refit or Refit(), progress=progress)


def measure_gap(problem: Problem, choice: Choice, refit: Refit, *, progress: bool) -> InferenceGap:
    """`inference_gap` for a problem that is prepared, at the parameters it holds now."""
    return InferenceGap(
        evidence=estimate_evidence(
            problem.densities, choice, confirmation=Confirmation(), progress=progress
        ),
        elbo=elbo_over_batches(problem, refit.num_particles),
        refitted_elbo=refitted_elbo(problem, refit, progress=progress),
    )
