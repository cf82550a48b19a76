"""Weighted posterior draws of many units at once, and the algebra of their log weights.

Every inference method returns `Particles`. Their log weights give the log evidence of each unit,
and, normalised, they stand for its posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from pyro_vharm.estimates import Kind, UnitEstimates, concatenate

__all__ = [
    "LEAST_DRAWS_FOR_SHAPE",
    "Particles",
    "by_blocks",
    "choose_num_replicates",
    "drop_nonfinite",
    "effective_sample_size",
    "heaviest",
    "join_units",
    "log_mean_exp",
    "log_mean_exp_error",
    "pareto_shape",
    "relative_variance",
    "replicate_totals",
    "resample",
    "systematic_resample",
    "tail_size",
]


LEAST_DRAWS_FOR_SHAPE = 100
_NEGLIGIBLE = 1e-12
_TAIL_RANGE = math.log(2.0)
_WEIGHTS_AT_ONCE = 2**16
_UNIT_DIMS = {
    **dict.fromkeys(("unconstrained", "log_weights", "reverse_log_weights"), 1),
    **dict.fromkeys(("pilot_variance", "numerical_error", "acceptance", "num_steps"), 0),
    **dict.fromkeys(("pareto_shapes", "rhat", "chain_sizes"), 0),
}


@dataclass(frozen=True)
class Particles:
    """Weighted draws of the latents of each unit, given v and θ.

    With P particles, E[(1/P) Σ_p exp(log_weights[p, u])] = p(v_u; θ) for every unit u, unless
    `log_evidence` is given.

    Attributes:
        unconstrained: latents on the unconstrained scale, shape ``(particle, unit, dim)``.
        log_weights: in nats, shape ``(particle, unit)``.
        kind: ``ESTIMATED`` for random particles, ``NUMERICAL`` for quadrature nodes,
            ``CONDITIONAL`` for the draws of chains.
        group_size: so many consecutive particles depend on each other, as they were resampled
            together; groups are independent.
        pilot_variance: var(w)/mean(w)² of the mean weight w of a group, as an independent pilot
            saw it, shape ``(unit,)``; decides into how many replicates the particles are split.
        reverse_log_weights: log weights of runs back from posterior draws to the start density,
            with E[exp(−·)] = 1/p(v_u; θ) if those draws were exact, shape ``(particle, unit)``.
        numerical_error: error estimate of log p(v_u; θ) by quadrature, shape ``(unit,)``.
        log_evidence: of methods that do not average weights; the weights, equal, then only stand
            for the posterior.
        acceptance: mean acceptance probability of the transitions, shape ``(unit,)``.
        num_steps: temperatures after the start, shape ``(unit,)``.
        pareto_shapes: k̂ of all weights drawn, shape ``(unit,)``; see `pareto_shape`.
        rhat: largest R̂ among the latents of each unit, shape ``(unit,)``, for chains.
        chain_sizes: least effective number of draws among the latents of each unit, bulk and
            tail, shape ``(unit,)``, for chains.
        num_nonfinite: how many weights were not finite and so count as zero.
    """

    unconstrained: Tensor
    log_weights: Tensor
    kind: Kind
    group_size: int = 1
    pilot_variance: Tensor | None = None
    reverse_log_weights: Tensor | None = None
    numerical_error: Tensor | None = None
    log_evidence: UnitEstimates | None = None
    acceptance: Tensor | None = None
    num_steps: Tensor | None = None
    pareto_shapes: Tensor | None = None
    rhat: Tensor | None = None
    chain_sizes: Tensor | None = None
    num_nonfinite: int = 0

    @property
    def independent_log_weights(self) -> Tensor:
        """Log of the mean weight of each group of dependent particles, ``(group, unit)``."""
        if self.group_size == 1:
            return self.log_weights
        return log_mean_exp(self.log_weights.unflatten(0, (-1, self.group_size)), dim=1)


def join_units(parts: Iterable[tuple[Tensor, Particles]], num_units: int) -> Particles:
    """Particles of all units from those of parts, each given with the indices of its units.

    Parts are put in place as they come: of a generator, no more than one is held twice.
    """
    whole: dict[str, Tensor] = {}
    evidence: list[tuple[Tensor, UnitEstimates]] = []
    first, dropped = None, 0
    for units, run in parts:
        if len(units) == num_units and bool((units.diff() > 0).all()):
            return run
        first, dropped = first or run, dropped + run.num_nonfinite
        for name, dim in _UNIT_DIMS.items():
            field = getattr(run, name)
            if field is None:
                continue
            if name not in whole:
                shape = (*field.shape[:dim], num_units, *field.shape[dim + 1 :])
                whole[name] = field.new_full(shape, math.nan)
            whole[name].index_copy_(dim, units, field)
        if run.log_evidence is not None:
            evidence.append((units, run.log_evidence))
    assert first is not None, "there are units, so there are parts"
    joined = replace(first, **whole, num_nonfinite=dropped)  # type: ignore[arg-type]
    if not evidence:
        return joined
    order = torch.cat([units for units, _ in evidence]).argsort()
    return replace(joined, log_evidence=concatenate([one for _, one in evidence]).take(order))


def heaviest(run: Particles) -> tuple[Tensor, Tensor]:
    """The particles that carry each unit's posterior, and their shares of it, heaviest first.

    Units that need fewer than others repeat their heaviest one with a share of 0, since log p may
    be −∞ at a particle that weighs nothing, and 0 · ∞ would spoil a gradient.

    Returns:
        latents ``(particle, unit, dim)``, and shares ``(particle, unit)`` that sum to 1.
    """
    shares = torch.softmax(run.log_weights, 0)
    count = int((shares > _NEGLIGIBLE).sum(0).max())
    shares, index = shares.topk(count, 0)
    light = shares <= _NEGLIGIBLE
    index = torch.where(light, index[:1], index)[..., None]
    latents = run.unconstrained.gather(0, index.expand(-1, -1, run.unconstrained.shape[-1]))
    return latents, shares.masked_fill(light, 0.0)


def by_blocks(function: Callable[..., Tensor], *log_weights: Tensor) -> Tensor:
    """A function of log weights ``(particle, unit)`` with a value per unit, some units at a time.

    So what it computes on the way takes no memory that grows with the units.
    """
    size = max(_WEIGHTS_AT_ONCE // len(log_weights[0]), 1)
    parts = zip(*(one.split(size, 1) for one in log_weights), strict=True)
    return torch.cat([function(*part) for part in parts], -1)


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Log (1/P) Σ exp(log_weights) along a dim.

    >>> float(log_mean_exp(torch.tensor([0.0, 0.0])))
    0.0
    """
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² over particles, shape ``(unit,)`` (Kong, 1992)."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def tail_size(num_draws: int) -> int:
    """How many of the largest weights `pareto_shape` is fitted to."""
    return math.floor(3 * num_draws**0.5) if num_draws > 225 else num_draws // 5


def pareto_shape(log_weights: Tensor, num_draws: int | None = None) -> Tensor:
    """Shape k̂ of a generalised Pareto distribution fitted to the largest weights of each unit.

    Weights have about 1/k moments. Above 0.7 their mean and its standard error are not to be
    trusted at any practical number of particles. −∞ where the largest weights lie within a factor
    of two, as then there is no tail: what is fitted to the noise on a level top means nothing. ∞
    where none is finite.

    Args:
        log_weights: shape ``(particle, unit)``; at least the `tail_size` + 1 largest.
        num_draws: how many there were; all that are given, if left out.

    Source: "Pareto Smoothed Importance Sampling", Vehtari, Simpson, Gelman, Yao, Gabry (2024).
    """
    missing = 0 if num_draws is None else num_draws - len(log_weights)
    units = log_weights.detach().to("cpu", torch.float64).T.numpy()
    shapes = [_pareto_shape_of_one(unit[np.isfinite(unit)], missing) for unit in units]
    return torch.tensor(shapes, dtype=log_weights.dtype, device=log_weights.device)


def _pareto_shape_of_one(finite: np.ndarray, missing: int) -> float:
    if len(finite) == 0:
        return math.inf
    count = len(finite) + missing
    if np.ptp(np.sort(finite)[-(tail_size(count) + 1) :]) < _TAIL_RANGE:
        return -math.inf
    small = np.full(missing, finite.min())  # the fit looks at the largest only
    try:
        _, shape = array_stats.psislw(-np.concatenate([small, finite]))  # minus, as for LOO
    except ValueError:  # nothing to fit
        return -math.inf
    return float(shape)


def relative_variance(log_weights: Tensor) -> Tensor:
    """var(w) / mean(w)² over particles, unbiased in the numerator, shape ``(unit,)``."""
    count = log_weights.shape[0]
    if count < 2:
        return torch.full_like(log_weights[0], math.inf)
    ratio = count / effective_sample_size(log_weights) - 1.0
    return ratio.clamp(min=0.0) * count / (count - 1)


def log_mean_exp_error(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Standard error and first-order bias correction of `log_mean_exp`, shape ``(unit,)`` each.

    With V the relative variance of one weight, the delta method gives sd(log Ẑ) ≈ √(V/P) and
    E[log Ẑ] − log Z ≈ −V/(2P); the correction to add is V/(2P), at most ½ nat and a bit.
    """
    variance = relative_variance(log_weights) / log_weights.shape[0]
    return variance.sqrt(), 0.5 * variance


def drop_nonfinite(log_weights: Tensor, *, reverse: bool = False) -> tuple[Tensor, int]:
    """Let non-finite weights count as zero in their own direction, which keeps the bound's side.

    Forward, w = 0 can only lower Ẑ; in reverse, 1/w = 0 can only raise the upper bound.

    Returns:
        the log weights, and how many were changed (a forward log weight of −∞ is a proper zero).
    """
    zero = math.inf if reverse else -math.inf
    bad = ~torch.isfinite(log_weights) & (log_weights != zero)
    return log_weights.masked_fill(bad, zero), int(bad.sum())


def replicate_totals(log_weights: Tensor, num_replicates: int, *, reverse: bool = False) -> Tensor:
    """Total over units of log Ẑ in each of M independent groups of particles, shape ``(M,)``.

    Forward, log Ẑ = log mean w per unit. In reverse, log Ẑ = −log mean (1/w).
    """
    sign = -1.0 if reverse else 1.0

    def totals(some: Tensor) -> Tensor:
        groups = some.reshape(num_replicates, -1, some.shape[1])
        return sign * log_mean_exp(sign * groups, dim=1).double().sum(-1, keepdim=True)

    return by_blocks(totals, log_weights).sum(-1)


def choose_num_replicates(
    total_relative_variance: float, num_particles: int, delta: float = 0.05
) -> int:
    """The number M of replicates, dividing P, that is expected to lose least of the certificate.

    With V = Σ_u var(w_u)/mean(w_u)², a replicate of P/M particles has sd ≈ √(V M/P) and bias
    ≈ −V M/(2P), the minimum over M lies about √(2 log M) sd below the mean, and the slack is
    log(1/δ)/M. V must come from a pilot, so that M does not depend on the weights it groups.

    >>> choose_num_replicates(0.0, 16), choose_num_replicates(100.0, 16)
    (16, 1)
    """

    def loss(replicates: int) -> float:
        variance = total_relative_variance * replicates / num_particles
        below = math.sqrt(2 * math.log(replicates) * variance)
        return math.log(1 / delta) / replicates + below + 0.5 * variance

    divisors = [m for m in range(1, num_particles + 1) if num_particles % m == 0]
    return min(divisors, key=loss) if math.isfinite(total_relative_variance) else 1


def resample(values: Tensor, log_weights: Tensor) -> Tensor:
    """Draw as many particles from each unit's weighted ones, independently, with replacement.

    A unit all of whose weights are zero keeps its particles with equal weights.

    Args:
        values: shape ``(particle, unit, dim)``.
        log_weights: shape ``(particle, unit)``.
    """
    index = torch.multinomial(_probabilities(log_weights), values.shape[0], replacement=True).T
    return values.gather(0, index.unsqueeze(-1).expand_as(values))


def systematic_resample(log_weights: Tensor) -> Tensor:
    """Indices of resampled particles by one uniform number per unit, shape ``(particle, unit)``.

    Particle p is taken N W_p times in expectation, and at least ⌊N W_p⌋ times. A unit all of whose
    weights are zero keeps every particle.

    Source: "Monte Carlo filter and smoother for non-Gaussian nonlinear state space models",
    Kitagawa (1996).

    >>> systematic_resample(torch.tensor([[0.0], [-torch.inf], [0.0], [0.0]]).double()).unique()
    tensor([0, 2, 3])
    """
    count = len(log_weights)
    edges = _probabilities(log_weights).cumsum(-1)
    ruler = torch.arange(count, dtype=edges.dtype, device=edges.device)
    offset = torch.rand(len(edges), 1, dtype=edges.dtype, device=edges.device)
    at = (ruler + offset) / count * edges[:, -1:]
    return torch.searchsorted(edges, at, right=True).clamp(max=count - 1).T


def _probabilities(log_weights: Tensor) -> Tensor:
    """Normalised weights, ``(unit, particle)``; equal where all are zero. NaN counts as zero."""
    log_weights = log_weights.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    no_weight = torch.isneginf(log_weights).all(0)
    return torch.softmax(log_weights.masked_fill(no_weight, 0.0), 0).T.contiguous()
