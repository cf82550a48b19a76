"""Moments and entropies of weighted particles, with their errors.

Every measure is a smooth function of sums over blocks of particles. Random blocks are independent:
leaving out one at a time (the jackknife) gives a measure its standard error, and removes its bias
of order one over the number of particles. The nodes of a grid are two blocks: every second one
along each axis, and the rest; without the rest they are the rule before the last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Blocks",
    "Measured",
    "Weighted",
    "grid_blocks",
    "measure_moments",
    "random_blocks",
    "standardise",
]

_FEWEST_BLOCKS, _MOST_BLOCKS = 16, 32


class Measured(NamedTuple):
    """Numbers with their errors, of one shape.

    Attributes:
        values: corrected for the first-order bias, where they are random.
        errors: standard errors; for quadrature, what the last two rules differ by.
    """

    values: Tensor
    errors: Tensor


class Blocks(NamedTuple):
    """Blocks of particles, and which of them enter a measure.

    Attributes:
        members: particle indices of each block.
        versions: 1 where a block enters, shape ``(version, block)``; the first row takes all.
        random: whether the blocks are random, of equal size and independent.
    """

    members: Sequence[Tensor]
    versions: Tensor
    random: bool

    def combine(self, by_block: Tensor) -> Tensor:
        """Sums over blocks ``(block, *)`` as sums of each version ``(version, *)``."""
        combined: Tensor = torch.tensordot(self.versions.to(by_block), by_block, 1)
        return combined

    @property
    def num_particles(self) -> Tensor:
        """How many particles enter each version."""
        return self.combine(torch.tensor([len(one) for one in self.members]).double())

    def measured(self, versions: Tensor, num_squares: int | None = None) -> Measured:
        """A measure and its error from its value in each version, shape ``(version, *)``.

        With B random blocks and θ₋ᵦ the value without one: B θ − (B − 1) mean(θ₋ᵦ), and
        √((B − 1)/B Σ (θ₋ᵦ − mean)²). A measure that is a sum of K squares hardly changes to first
        order where all are near 0; then its error is that of squares of normal numbers, whose sum
        has a variance of 2/K times its squared mean, and what that adds to the measure is the bias
        b = (B − 1) (mean(θ₋ᵦ) − θ). So 2 b² / K is added below the root.

        Args:
            versions: of the measure.
            num_squares: K, for a measure that is a sum of squares of numbers that may be near 0.

        Source: "Bias and confidence in not-quite large samples", Tukey (1958).
        """
        whole, without = versions[0], versions[1:]
        if not self.random:
            return Measured(whole, (whole - without[0]).abs())
        count, mean = len(without), without.mean(0)
        spread = (without - mean).square().sum(0) * (count - 1) / count
        bias = (count - 1) * (mean - whole)
        if num_squares:
            spread = spread + 2 * bias.square() / num_squares
        return Measured(whole - bias, spread.sqrt())


def random_blocks(num_particles: int, group_size: int) -> Blocks:
    """Up to 32 blocks of equal size, each of whole groups of particles that depend on each other.

    So many that the fewest particles are left over; those enter no block.
    """
    num_groups = num_particles // group_size
    least = min(_FEWEST_BLOCKS, num_groups)
    counts = range(least, min(_MOST_BLOCKS, num_groups) + 1)
    best = max(counts, key=lambda count: (num_groups // count * count, count))
    size = num_groups // best * group_size
    versions = torch.cat([torch.ones(1, best), 1 - torch.eye(best)])
    return Blocks(torch.arange(best * size).split(size), versions, random=True)


def grid_blocks(num_nodes: int, dim: int) -> Blocks:
    """Every second node along each axis of a grid with as many nodes on each, and the rest."""
    count = round(num_nodes ** (1 / dim))
    number = torch.arange(num_nodes)
    odd = torch.stack([number // count**axis % count % 2 for axis in range(dim)]).sum(0) > 0
    members = [number[~odd], number[odd]]
    return Blocks(members, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), random=False)


class Weighted(NamedTuple):
    """Weighted particles, each coordinate of each unit shifted and scaled to mean 0 and variance 1.

    Attributes:
        standard: shape ``(particle, unit, dim)``.
        weights: proportional to 1/particle · exp(log weight), shape ``(particle, unit)``.
        log_joint: log p(v, h; θ) in the original coordinates, shape ``(particle, unit)``.
        mean: shape ``(unit, dim)``.
        scale: shape ``(unit, dim)``.
        log_scale_of_weights: log of what the weights were divided by, shape ``(unit,)``.
        log_evidence: where weights do not give it, shape ``(unit,)``.
    """

    standard: Tensor
    weights: Tensor
    log_joint: Tensor
    mean: Tensor
    scale: Tensor
    log_scale_of_weights: Tensor
    log_evidence: Tensor | None = None


def standardise(
    latents: Tensor, log_weights: Tensor, log_joint: Tensor, log_evidence: Tensor | None = None
) -> Weighted:
    """Weighted particles in double precision, with coordinates of mean 0 and variance 1.

    Args:
        latents: shape ``(particle, unit, dim)``.
        log_weights: shape ``(particle, unit)``, whose mean weight is p(v; θ).
        log_joint: log p(v, h; θ), shape ``(particle, unit)``.
        log_evidence: log p(v; θ) per unit, where the weights do not give it.
    """
    latents, log_joint = latents.double(), log_joint.double()
    log_total = torch.logsumexp(log_weights.double(), 0)
    weights = torch.exp(log_weights.double() - log_total)
    mean = torch.einsum("pu,pui->ui", weights, latents)
    centred = latents - mean
    scale = torch.einsum("pu,pui->ui", weights, centred.square()).sqrt()
    return Weighted(
        centred / scale,
        weights,
        log_joint,
        mean,
        scale,
        log_total - math.log(len(latents)),
        None if log_evidence is None else log_evidence.double(),
    )


def measure_moments(particles: Weighted, blocks: Blocks) -> dict[str, Tensor]:
    """Entropy and what follows from moments, in every version, shape ``(version, unit, …)``.

    * ``entropy``: H = log Ẑ − E[log p(v, h)], of the whole posterior.
    * ``non_gaussianity``: KL(p ‖ N(m, S)) = ½ log det(2πe S) − H.
    * ``gaussian_dependence``: ½ (Σ log S_ii − log det S), the total correlation of N(m, S).
    * ``effective_rank``: exp of the entropy of the eigenvalues of S, divided by their sum ("The
      effective rank: a measure of effective dimensionality", Roy, Vetterli, 2007).
    * ``mean``, ``sd``, ``skewness``, ``excess_kurtosis``: of each coordinate, ``(…, dim)``.
    """
    dim = particles.standard.shape[-1]
    share = (blocks.num_particles / len(particles.standard)).to(particles.weights)
    weight = blocks.combine(torch.stack([particles.weights[one].sum(0) for one in blocks.members]))
    covariance, powers = _central_moments(particles, blocks, weight)
    safe = particles.log_joint.masked_fill(particles.weights == 0, 0.0)
    mean_log_joint = _summed(particles, blocks, "pu,pu->u", safe) / weight
    log_evidence = particles.log_evidence
    if log_evidence is None:
        log_evidence = particles.log_scale_of_weights + (weight / share[:, None]).log()
    entropy = log_evidence - mean_log_joint
    log_det = torch.linalg.slogdet(covariance).logabsdet
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    volume = log_det + 2 * particles.scale.log().sum(-1)
    scaled = particles.scale[:, :, None] * covariance * particles.scale[:, None, :]
    return {
        "entropy": entropy,
        "non_gaussianity": 0.5 * (dim * math.log(2 * math.pi * math.e) + volume) - entropy,
        "gaussian_dependence": 0.5 * (variances.log().sum(-1) - log_det),
        "effective_rank": _effective_rank(scaled),
        "mean": particles.mean + particles.scale * powers[0],
        "sd": particles.scale * variances.sqrt(),
        "skewness": powers[2] / variances**1.5,
        "excess_kurtosis": powers[3] / variances**2 - 3.0,
    }


def _summed(particles: Weighted, blocks: Blocks, equation: str, values: Tensor) -> Tensor:
    """Weighted sums over the particles of each version."""
    parts = [
        torch.einsum(equation, particles.weights[members], values[members])
        for members in blocks.members
    ]
    return blocks.combine(torch.stack(parts))


def _central_moments(
    particles: Weighted, blocks: Blocks, weight: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Covariance ``(version, unit, dim, dim)``; mean, and central moments 2 to 4 of coordinates."""
    z = particles.standard
    parts = [
        torch.einsum("pu,pui,puj->uij", particles.weights[one], z[one], z[one])
        for one in blocks.members
    ]
    outer = blocks.combine(torch.stack(parts)) / weight[..., None, None]
    raw = [
        _summed(particles, blocks, "pu,pui->ui", z**power) / weight[..., None]
        for power in (1, 2, 3, 4)
    ]
    mean, second, third, fourth = raw
    covariance = outer - mean[..., :, None] * mean[..., None, :]
    central = (
        mean,
        second - mean**2,
        third - 3 * mean * second + 2 * mean**3,
        fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4,
    )
    return covariance, central


def _effective_rank(covariance: Tensor) -> Tensor:
    share = torch.linalg.eigvalsh(covariance).clamp(min=0.0)
    share = share / share.sum(-1, keepdim=True)
    return torch.exp(torch.special.entr(share).sum(-1))
