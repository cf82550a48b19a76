"""Weighted posterior draws of many units at once, and the algebra of their log weights.

Every inference method returns `Particles`. Their log weights give the log evidence of each unit,
and, normalised, they stand for its posterior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from arviz_stats.base import array_stats
from torch import Tensor

from pyro_vharm.estimates import Kind

__all__ = [
    "Particles",
    "choose_num_replicates",
    "drop_nonfinite",
    "effective_sample_size",
    "log_mean_exp",
    "log_mean_exp_error",
    "pareto_shape",
    "relative_variance",
    "replicate_totals",
    "resample",
]


@dataclass(frozen=True)
class Particles:
    """Weighted draws of the latents of each unit, given v and θ.

    With P particles, E[(1/P) Σ_p exp(log_weights[p, u])] = p(v_u; θ) for every unit u.

    Attributes:
        unconstrained: latents on the unconstrained scale, shape ``(particle, unit, dim)``.
        log_weights: in nats, shape ``(particle, unit)``.
        kind: ``ESTIMATED`` for random particles, ``NUMERICAL`` for quadrature nodes.
        pilot_variance: var(w)/mean(w)² of one weight as an independent pilot saw it, shape
            ``(unit,)``; decides into how many replicates the particles are split.
        reverse_log_weights: log weights of runs back from posterior draws to the start density,
            with E[exp(−·)] = 1/p(v_u; θ) if those draws were exact, shape ``(particle, unit)``.
        numerical_error: error estimate of log p(v_u; θ) by quadrature, shape ``(unit,)``.
        acceptance: mean acceptance probability of the transitions, shape ``(unit,)``.
        num_nonfinite: how many weights were not finite and so count as zero.
    """

    unconstrained: Tensor
    log_weights: Tensor
    kind: Kind
    pilot_variance: Tensor | None = None
    reverse_log_weights: Tensor | None = None
    numerical_error: Tensor | None = None
    acceptance: Tensor | None = None
    num_nonfinite: int = 0


def log_mean_exp(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Log (1/P) Σ exp(log_weights) along a dim.

    >>> float(log_mean_exp(torch.tensor([0.0, 0.0])))
    0.0
    """
    return torch.logsumexp(log_weights, dim) - math.log(log_weights.shape[dim])


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """(Σ w)² / Σ w² over particles, shape ``(unit,)`` (Kong, 1992)."""
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))


def pareto_shape(log_weights: Tensor) -> Tensor:
    """Shape k̂ of a generalised Pareto distribution fitted to the largest weights of each unit.

    Weights have about 1/k moments. Above 0.7 their mean and its standard error are not to be
    trusted at any practical number of particles. −∞ where the largest weights are equal, ∞ where
    none is finite.

    Args:
        log_weights: shape ``(particle, unit)``.

    Source: "Pareto Smoothed Importance Sampling", Vehtari, Simpson, Gelman, Yao, Gabry (2024).
    """
    units = log_weights.detach().to("cpu", torch.float64).T.numpy()
    shapes = [_pareto_shape_of_one(unit[np.isfinite(unit)]) for unit in units]
    return torch.tensor(shapes, dtype=log_weights.dtype, device=log_weights.device)


def _pareto_shape_of_one(finite: np.ndarray) -> float:
    if len(finite) == 0:
        return math.inf
    try:
        _, shape = array_stats.psislw(-finite)  # it takes minus the log weights, as for LOO
    except ValueError:  # all values of the tail are the same
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
    groups = log_weights.reshape(num_replicates, -1, log_weights.shape[1])
    sign = -1.0 if reverse else 1.0
    return sign * log_mean_exp(sign * groups, dim=1).double().sum(-1)


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
    no_weight = torch.isneginf(log_weights).all(0)
    log_weights = log_weights.masked_fill(no_weight, 0.0)
    probabilities = torch.softmax(log_weights, 0).T
    index = torch.multinomial(probabilities, values.shape[0], replacement=True).T
    return values.gather(0, index.unsqueeze(-1).expand_as(values))
