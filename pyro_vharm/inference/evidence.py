"""Log evidence of every unit, with bounds on the total and what each rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Bound, Kind, UnitEstimates, concatenate
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.enumeration import Enumeration
from pyro_vharm.inference.quadrature import Quadrature
from pyro_vharm.model.data import Data
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.particles import (
    Particles,
    choose_num_replicates,
    effective_sample_size,
    log_mean_exp,
    log_mean_exp_error,
    pareto_shape,
    replicate_totals,
)
from pyro_vharm.tables import html_table, text_table

__all__ = ["Evidence", "InferenceMethod", "choose_method", "estimate_evidence", "log_evidence"]


_LARGEST_SHAPE = 0.7
_LEAST_PARTICLES_FOR_SHAPE = 100


class InferenceMethod(Protocol):
    """Turns the densities of a batch of units into particles."""

    def run(self, densities: UnitDensities, *, progress: bool = False) -> Particles:
        """Particles of every unit, whose weights give its log evidence."""
        ...


@dataclass(frozen=True)
class Evidence:
    """Log evidence ℓ = Σ_u log p(v_u; θ), in nats.

    Attributes:
        per_unit: estimates of log p(v_u; θ), corrected for the first-order bias of the logarithm.
        lower_replicates: totals of independent stochastic lower bounds, shape ``(M,)``;
            ``None`` for quadrature and enumeration.
        upper_replicates: totals of independent stochastic upper bounds, shape ``(M,)``, from runs
            that start at chain output; ``None`` where the method has none.
        effective_sizes: effective sample size of each unit's weights, shape ``(unit,)``.
        num_particles: weights per unit.
        acceptance: mean acceptance probability per unit, ``None`` without transitions.
        num_nonfinite: weights that were not finite and count as zero.
        method: the method's settings.
        pareto_shapes: k̂ of each unit's weights, see `pareto_shape`, where there are at least 100
            particles and no upper bound; above 0.7 a unit is not to be trusted.
    """

    per_unit: UnitEstimates
    lower_replicates: Tensor | None
    upper_replicates: Tensor | None
    effective_sizes: Tensor
    num_particles: int
    acceptance: Tensor | None
    num_nonfinite: int
    method: str
    pareto_shapes: Tensor | None = None

    def lower(self, delta: float = 0.05) -> Bound:
        """A lower bound on the total that fails with probability at most delta.

        For M replicates, P(min_m log Ẑ_m > ℓ + log(1/δ)/M) ≤ δ by Markov's inequality, since
        each Ẑ_m is unbiased for exp(ℓ). Quadrature gives its value less its error.
        """
        if self.lower_replicates is None:
            total = self.per_unit.total()
            return Bound(total.value - total.mc_error, "lower", total.kind, 1.0)
        slack = math.log(1 / delta) / len(self.lower_replicates)
        value = float(self.lower_replicates.min()) - slack
        return Bound(value, "lower", Kind.CERTIFIED, 1 - delta)

    def upper(self, delta: float = 0.05) -> Bound | None:
        """An upper bound on the total, mirrored; conditional on the chains, or ``None``."""
        if self.lower_replicates is None:
            total = self.per_unit.total()
            return Bound(total.value + total.mc_error, "upper", total.kind, 1.0)
        if self.upper_replicates is None:
            return None
        slack = math.log(1 / delta) / len(self.upper_replicates)
        value = float(self.upper_replicates.max()) + slack
        return Bound(value, "upper", Kind.CONDITIONAL, 1 - delta)

    def __str__(self) -> str:
        total = self.per_unit.total()
        upper = self.upper()
        rows = [
            ["estimate", f"{total.value:.3f}", f"± {total.mc_error:.3f}", str(total.kind)],
            _bound_row("lower bound", self.lower()),
            *([] if upper is None else [_bound_row("upper bound", upper)]),
        ]
        per_unit = total.per_unit
        footer = [
            f"{total.num_units} units, {per_unit.value:.4f} nats each, by {self.method}",
        ]
        if self.lower_replicates is not None:
            footer.append(
                f"effective sample size: median {float(self.effective_sizes.median()):.1f}, least "
                f"{float(self.effective_sizes.min()):.1f} of {self.num_particles}"
            )
        if self.acceptance is not None:
            footer.append(f"acceptance: mean {float(self.acceptance.mean()):.2f}")
        if self.pareto_shapes is not None:
            above = int((self.pareto_shapes > _LARGEST_SHAPE).sum())
            footer.append(
                f"Pareto k̂: largest {float(self.pareto_shapes.max()):.2f}, above {_LARGEST_SHAPE} "
                f"in {above} units" + (": these are not to be trusted" if above else "")
            )
        if self.num_nonfinite:
            footer.append(f"{self.num_nonfinite} weights were not finite and count as zero")
        return "\n".join([text_table(["log evidence", "nats", "", "kind"], rows), *footer])

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _bound_row(name: str, bound: Bound) -> list[str]:
    return [name, f"{bound.value:.3f}", f"{bound.confidence:.0%}", str(bound.kind)]


def choose_method(
    densities: Sequence[UnitDensities], method: InferenceMethod | None = None
) -> InferenceMethod:
    """The user's method; or, by continuous dimensions: none, enumeration; to two, quadrature.

    Annealing beyond.

    Raises:
        InputError: if the method is not one, or all latents are discrete and it is another than
            enumeration.
    """
    if densities[0].dim == 0:
        if method is not None and not isinstance(method, Enumeration):
            raise InputError(
                f"all latents are discrete, so the evidence is exact by Enumeration(); leave out "
                f"method={method!r}"
            )
        return Enumeration()
    if method is not None:
        if not callable(getattr(method, "run", None)) or isinstance(method, type):
            raise InputError(
                f"method must be an inference method, such as AnnealedImportanceSampling(), not "
                f"{method!r}"
            )
        return method
    if densities[0].dim <= 2:
        return Quadrature()
    return AnnealedImportanceSampling()


def estimate_evidence(
    densities: Sequence[UnitDensities],
    method: InferenceMethod,
    *,
    progress: bool = False,
    delta: float = 0.05,
) -> Evidence:
    """Log evidence over all batches, at the parameters that the model holds now.

    Args:
        densities: one entry per batch.
        method: the inference method.
        progress: show a bar.
        delta: the failure probability for which the number of replicates is chosen.
    """
    single = len(densities) == 1
    bar = tqdm(
        densities, desc="evidence", disable=single or not progress or None, delay=2, leave=False
    )
    runs = [method.run(batch, progress=progress and single) for batch in bar]
    per_unit, sizes = zip(*(_estimate(run) for run in runs), strict=True)
    lower = upper = None
    if runs[0].kind > Kind.NUMERICAL:
        pilot = [run.pilot_variance for run in runs if run.pilot_variance is not None]
        variance = float(torch.cat(pilot).sum()) if len(pilot) == len(runs) else math.inf
        count = choose_num_replicates(variance, len(runs[0].log_weights), delta)
        lower = _sum_replicates([run.log_weights for run in runs], count, reverse=False)
        reverse = [r.reverse_log_weights for r in runs if r.reverse_log_weights is not None]
        if len(reverse) == len(runs):
            upper = _sum_replicates(reverse, count, reverse=True)
    acceptance = [run.acceptance for run in runs if run.acceptance is not None]
    return Evidence(
        per_unit=concatenate(per_unit),
        lower_replicates=lower,
        upper_replicates=upper,
        effective_sizes=torch.cat(sizes),
        num_particles=len(runs[0].log_weights),
        acceptance=torch.cat(acceptance) if acceptance else None,
        num_nonfinite=sum(run.num_nonfinite for run in runs),
        method=str(method),
        pareto_shapes=_shapes(runs),
    )


def _shapes(runs: Sequence[Particles]) -> Tensor | None:
    first = runs[0]
    few = len(first.log_weights) < _LEAST_PARTICLES_FOR_SHAPE
    if few or first.numerical_error is not None or first.reverse_log_weights is not None:
        return None
    return torch.cat([pareto_shape(run.log_weights) for run in runs])


def _estimate(run: Particles) -> tuple[UnitEstimates, Tensor]:
    value, size = log_mean_exp(run.log_weights), effective_sample_size(run.log_weights)
    if run.numerical_error is not None:
        zero = torch.zeros_like(value)
        return UnitEstimates(value, zero, run.kind, run.numerical_error), size
    error, correction = log_mean_exp_error(run.log_weights)
    estimate = UnitEstimates(value + correction, error, run.kind, _disagreement(run))
    return estimate, size


def _disagreement(run: Particles) -> Tensor | None:
    """Half of what forward and reverse runs differ by in total, shared equally among the units.

    The delta method knows only of the weights that were seen: its error is at most about a nat
    per unit however poor the run. What both directions, each corrected for its first-order bias,
    disagree by in total is a measure of the bias that is left, and biases add up over units.
    """
    if run.reverse_log_weights is None:
        return None
    _, correction = log_mean_exp_error(run.log_weights)
    forward = log_mean_exp(run.log_weights) + correction
    _, correction = log_mean_exp_error(-run.reverse_log_weights)
    reverse = -log_mean_exp(-run.reverse_log_weights) - correction
    share = 0.5 * (reverse - forward).nan_to_num(nan=torch.inf).mean().abs()
    return share.expand_as(forward)


def _sum_replicates(log_weights: Sequence[Tensor], count: int, *, reverse: bool) -> Tensor:
    totals = [replicate_totals(part, count, reverse=reverse) for part in log_weights]
    return torch.stack(totals).sum(0)


def log_evidence(
    model: PyroFunction,
    data: Data,
    *,
    guide: PyroFunction | None = None,
    method: InferenceMethod | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Evidence:
    """Log evidence Σ_u log p(v_u; θ) at the parameters that the model holds now, in nats.

    Args:
        model: a Pyro model; discrete latents are summed out.
        data: positional arguments as a tuple, keyword arguments as a Mapping, or an iterable of
            batches.
        guide: a trained guide; its draws say where to look. Without one, the prior does.
        method: `Quadrature`, `AnnealedImportanceSampling` or `ImportanceSampling`; by default the
            first for units of one or two continuous latent dimensions, the second beyond, and
            `Enumeration` where all latents are discrete.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, before any long work.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> x = torch.tensor([0.5, -1.0], dtype=torch.float64)
    >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x).sum()
    >>> evidence = log_evidence(model, (x,), progress=False)
    >>> abs(evidence.per_unit.total().value - float(exact)) < 1e-5
    True
    """
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        chosen = choose_method(problem.densities, method)
        return estimate_evidence(problem.densities, chosen, progress=progress)
