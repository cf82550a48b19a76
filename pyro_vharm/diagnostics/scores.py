"""Scores of the complete data per particle and unit, and what posterior particles make of them.

With G = ∇ log p(v, h; θ), the score of a unit is E[G] and its observed information is
E[−∇² log p(v, h; θ)] − Cov[G], both under the posterior (Fisher's and Louis's identities).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.errors import NotTwiceDifferentiableError

__all__ = ["Directions", "PosteriorScores", "coordinate_directions", "score_particles"]


@dataclass(frozen=True)
class Directions:
    """Directions in which the parameters may move, in unconstrained coordinates.

    Attributes:
        leaves: the parameters, as an optimiser sees them.
        vectors: shape ``(direction, element)``, over the elements of all leaves in order.
    """

    leaves: Sequence[Tensor]
    vectors: Tensor

    @property
    def size(self) -> int:
        """The number k of directions."""
        return len(self.vectors)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector over all elements, in the shapes of the leaves."""
        parts = vector.split([leaf.numel() for leaf in self.leaves])
        pairs = zip(parts, self.leaves, strict=True)
        return [part.view_as(leaf).to(leaf) for part, leaf in pairs]

    def step(self, coefficients: Tensor) -> list[Tensor]:
        """Σ_i c_i direction_i, in the shapes of the leaves."""
        return self.split(coefficients @ self.vectors)

    def along(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Products of a gradient by leaf with every direction, shape ``(direction,)``."""
        pairs = zip(gradients, self.leaves, strict=True)
        flat = [(torch.zeros_like(leaf) if g is None else g).reshape(-1) for g, leaf in pairs]
        return self.vectors @ torch.cat(flat).to(self.vectors)


def coordinate_directions(leaves: Sequence[Tensor]) -> Directions:
    """Every element of every leaf by itself."""
    count = sum(leaf.numel() for leaf in leaves)
    return Directions(leaves, torch.eye(count, dtype=torch.float64, device=leaves[0].device))


class PosteriorScores(NamedTuple):
    """What the particles of some units say about ∇ℓ and −∇²ℓ, along k directions.

    Attributes:
        per_unit: E[G] of each unit, the score, shape ``(unit, k)``.
        noise: covariance of the sum of `per_unit`, from the particles, shape ``(k, k)``.
        curvature: Σ_u E[−∇² log p(v, h; θ)], shape ``(k, k)``.
        spread: Σ_u Cov[G], what not seeing h takes from the information, shape ``(k, k)``.
        complete: Σ_u E[G Gᵀ], the information if h were seen, shape ``(k, k)``.
    """

    per_unit: Tensor
    noise: Tensor
    curvature: Tensor
    spread: Tensor
    complete: Tensor

    @property
    def total(self) -> Tensor:
        """The score of all units, shape ``(k,)``."""
        return self.per_unit.sum(0)

    @property
    def observed_information(self) -> Tensor:
        """−∇²ℓ by Louis's identity, shape ``(k, k)``."""
        return self.curvature - self.spread

    def joined(self, other: PosteriorScores) -> PosteriorScores:
        """Of these units and of others."""
        units = torch.cat([self.per_unit, other.per_unit])
        return PosteriorScores(units, *(a + b for a, b in zip(self[1:], other[1:], strict=True)))


def score_particles(
    log_joint: Tensor, shares: Tensor, directions: Directions, *, random: bool, dilution: Tensor
) -> PosteriorScores:
    """Scores and information of one batch of units, from its weighted particles.

    One pass in reverse and one more for each direction give the derivative of every particle's log
    joint density along it; as many more give the curvature.

    The noise of a self-normalised estimate Σ w̃ G is Σ w̃² (G − Ḡ)² by the delta method; a
    covariance under such weights is Σ w̃ (G − Ḡ)² / (1 − Σ w̃²).

    Args:
        log_joint: log p(v, h; θ), shape ``(particle, unit)``, with its graph.
        shares: normalised weights, the same shape.
        directions: along which to differentiate.
        random: whether the particles were drawn; nodes of quadrature have no noise.
        dilution: factor on the noise of each unit, for draws that depend on each other,
            shape ``(unit,)``.

    Raises:
        NotTwiceDifferentiableError: if an operation in the model has no second derivative.

    Source: "Finding the Observed Information Matrix When Using the EM Algorithm", Louis (1982).
    """
    used = torch.where(shares > 0, log_joint, 0.0)  # log p may be −∞ where nothing weighs
    slopes, curvature = _derivatives(used, shares, directions)
    per_unit = (shares[..., None] * slopes).sum(0)
    centred = slopes - per_unit
    squared = shares.square()
    left = 1 - squared.sum(0) if random else torch.ones_like(dilution)
    left = left.clamp(min=torch.finfo(left.dtype).eps)
    spread = _outer(shares / left, centred)
    noise = _outer(squared * dilution / left, centred) if random else torch.zeros_like(spread)
    complete = _outer(torch.ones_like(dilution)[None], per_unit[None]) + spread
    return PosteriorScores(per_unit, noise, curvature, spread, complete)


def _outer(weights: Tensor, vectors: Tensor) -> Tensor:
    """Σ_pu weights_pu x_pu x_puᵀ, shape ``(k, k)``."""
    flat = vectors.flatten(0, 1)
    return (weights.reshape(-1, 1) * flat).T @ flat


def _derivatives(
    log_joint: Tensor, shares: Tensor, directions: Directions
) -> tuple[Tensor, Tensor]:
    """∂ log p / ∂ direction per particle and unit, ``(particle, unit, k)``, and −∇² of the mean.

    The gradient of Σ c_pu log p_pu is linear in c, so that its derivative with respect to c is the
    slope of every particle at once; and with c the shares, its derivative with respect to θ is the
    curvature.
    """
    weights = shares.detach().clone().requires_grad_()
    leaves = list(directions.leaves)
    gradients = torch.autograd.grad(
        (weights * log_joint).sum(), leaves, create_graph=True, allow_unused=True
    )
    slopes, curvature = [], []
    for vector in directions.vectors:
        pairs = zip(gradients, directions.split(vector), strict=True)
        moved = [(g * part).sum() for g, part in pairs if g is not None and bool(part.any())]
        total = torch.stack(moved).sum() if moved else weights.new_zeros(())
        slope, *seconds = _second(total, [weights, *leaves])
        if slope is None and float(total.detach()) != 0:
            raise _not_twice("a gradient does not depend on what it was taken of")
        slopes.append(torch.zeros_like(weights) if slope is None else slope)
        curvature.append(-directions.along(seconds))
    stacked = torch.stack([slope.detach() for slope in slopes], -1).to(directions.vectors)
    matrix = torch.stack(curvature)
    return stacked, (matrix + matrix.T) / 2


def _second(total: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not total.requires_grad:
        return [None] * len(leaves)
    try:
        return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _not_twice(str(error)) from error


def _not_twice(reason: str) -> NotTwiceDifferentiableError:
    return NotTwiceDifferentiableError(
        "the model's log density must be twice differentiable in its parameters, and torch says: "
        f"{reason}"
    )
