"""Modes of a posterior, found by climbing from its draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.model.densities import UnitDensities

__all__ = ["Modes", "find_modes"]

_STEPS, _SHRINKAGE, _LEAST_STEP = 150, 0.3, 1e-3
_ARMIJO = 1e-4  # least share of the gain that the slope foresees
_SETTLED, _DONE = 1e-3, 1e-6  # nats that a quadratic model still sees to gain
_VALLEY = 0.1  # nats by which the density must fall between two modes
_POINTS_BETWEEN = 15
_ROWS_PER_PASS = 2**17


class Modes(NamedTuple):
    """The modes of each unit's density on the unconstrained scale that climbs from draws reached.

    Attributes:
        masses: share of the settled draws from which a mode was reached, the highest mode first;
            0 where a unit has fewer; shape ``(unit, mode)``.
        locations: shape ``(mode, unit, dim)``.
        num_settled: draws of each unit whose climb came to rest, shape ``(unit,)``.
        num_climbs: draws of each unit that a climb began from.
    """

    masses: Tensor
    locations: Tensor
    num_settled: Tensor
    num_climbs: int

    @property
    def counts(self) -> Tensor:
        """How many modes were reached, shape ``(unit,)``."""
        return (self.masses > 0).sum(-1)

    @property
    def errors(self) -> Tensor:
        """Standard error of the masses, √(π (1 − π) / n), shape ``(unit, mode)``."""
        return (self.masses * (1 - self.masses) / self.num_settled[:, None]).sqrt()

    def unseen_mass(self, delta: float = 0.05) -> Tensor:
        """A mode with more mass than this is missed with probability at most delta, ``(unit,)``.

        With n draws, one of mass π is missed with probability (1 − π)ⁿ.
        """
        return 1 - delta ** (1 / self.num_settled)

    @property
    def share_with_several(self) -> tuple[float, float]:
        """The share of units found to have more than one mode, and its standard error.

        The error is that of repeating the climbs from other draws on the same units: one with
        masses π is found again with probability 1 − Σ πⁿ.
        """
        found = (self.counts > 1).double()
        again = 1 - (self.masses.double() ** self.num_settled[:, None]).sum(-1)
        again = torch.where(found > 0, again, 0.0)
        variance = float((again * (1 - again)).sum())
        return float(found.mean()), math.sqrt(variance) / len(found)


def find_modes(densities: UnitDensities, draws: Tensor, gaussian: UnitGaussian) -> Modes:
    """Climb from posterior draws to maxima of p(h | v; θ), and tell these apart.

    Each climb is a quasi-Newton ascent (BFGS) of its own, in coordinates that a Gaussian whitens.
    Two maxima count as one where along the straight line between them the log density does not
    fall 0.1 nats below the lower of them.

    Args:
        densities: of the units.
        draws: independent posterior draws, shape ``(draw, unit, dim)``.
        gaussian: of each unit's posterior.
    """
    at, height, settled = _climb(densities, gaussian.whiten(draws), gaussian)
    left, masses, locations = settled.clone(), [], []
    count = settled.sum(0)
    while bool(left.any()):
        index = height.masked_fill(~left, -math.inf).argmax(0)
        top = at.gather(0, index[None, :, None].expand(1, -1, at.shape[-1]))
        same = left & _no_valley(densities, gaussian, at, height, top)
        same |= left & (torch.arange(len(left), device=index.device)[:, None] == index)
        masses.append(same.sum(0) / count)
        locations.append(gaussian.unwhiten(top)[0])
        left &= ~same
    if not masses:
        empty = torch.zeros_like(gaussian.mean)
        return Modes(empty[:, :0], empty[None, :0], count, len(draws))
    return Modes(torch.stack(masses, -1).nan_to_num(), torch.stack(locations), count, len(draws))


class _Climb(NamedTuple):
    """State of every climb: the first three in whitened coordinates."""

    at: Tensor
    gradient: Tensor
    curvature: Tensor  # estimate of the inverse of minus the Hessian, positive definite
    height: Tensor
    step: Tensor

    @property
    def direction(self) -> Tensor:
        """Where a Newton step would lead."""
        return torch.einsum("puij,puj->pui", self.curvature, self.gradient)

    @property
    def foreseen(self) -> Tensor:
        """Twice the gain of that step, by the quadratic model."""
        return (self.gradient * self.direction).sum(-1)


def _climb(
    densities: UnitDensities, at: Tensor, gaussian: UnitGaussian
) -> tuple[Tensor, Tensor, Tensor]:
    """Where climbs end, how high, and whether they came to rest."""
    height, gradient = _slope(densities, gaussian, at)
    eye = torch.eye(at.shape[-1], dtype=at.dtype, device=at.device)
    state = _Climb(at, gradient, eye.expand(*at.shape, -1), height, torch.ones_like(height))
    for _ in range(_STEPS):
        state = _step(densities, gaussian, state)
        if bool((state.foreseen < _DONE).all()):
            break
    settled = torch.isfinite(state.height) & (state.foreseen < 2 * _SETTLED)
    return state.at, state.height, settled


def _step(densities: UnitDensities, gaussian: UnitGaussian, state: _Climb) -> _Climb:
    """Try one step, and learn from it, or try a shorter one next.

    Source: "Numerical Optimization", Nocedal, Wright (2006), chapter 6.
    """
    moved = state.step[..., None] * state.direction
    height, gradient = _slope(densities, gaussian, state.at + moved)
    up = height >= state.height + _ARMIJO * state.step * state.foreseen
    change = state.gradient - gradient
    product = (moved * change).sum(-1)
    learns = up & (product > 1e-10)
    updated = _updated(state.curvature, moved, change, product.masked_fill(~learns, 1.0))
    curvature = torch.where(learns[..., None, None], updated, state.curvature)
    stuck = ~up & (state.step < _LEAST_STEP)
    eye = torch.eye(moved.shape[-1], dtype=moved.dtype, device=moved.device)
    forgets = (up & ~learns) | stuck
    curvature = torch.where(forgets[..., None, None], eye, curvature)
    shorter = _SHRINKAGE * state.step
    step = torch.where(stuck, _LEAST_STEP / (1 + state.gradient.norm(dim=-1)), shorter)
    return _Climb(
        torch.where(up[..., None], state.at + moved, state.at),
        torch.where(up[..., None], gradient, state.gradient),
        curvature,
        torch.where(up, height, state.height),
        torch.where(up, torch.ones_like(step), step),
    )


def _updated(curvature: Tensor, moved: Tensor, change: Tensor, product: Tensor) -> Tensor:
    """The BFGS update of an inverse Hessian by a step s and the change y of the slope."""
    share = moved / product[..., None]
    eye = torch.eye(moved.shape[-1], dtype=moved.dtype, device=moved.device)
    left = eye - share[..., :, None] * change[..., None, :]
    return left @ curvature @ left.mT + share[..., :, None] * moved[..., None, :]


def _slope(
    densities: UnitDensities, gaussian: UnitGaussian, whitened: Tensor
) -> tuple[Tensor, Tensor]:
    """Log joint density and its gradient in whitened coordinates; NaN counts as −∞."""
    values, gradients = [], []
    for part in whitened.split(max(_ROWS_PER_PASS // densities.num_units, 1)):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            value = densities.log_joint(gaussian.unwhiten(leaf))
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        values.append(value.detach())
        gradients.append(gradient)
    return torch.cat(values).nan_to_num(nan=-math.inf), torch.cat(gradients).nan_to_num()


def _no_valley(
    densities: UnitDensities, gaussian: UnitGaussian, at: Tensor, height: Tensor, top: Tensor
) -> Tensor:
    """Whether the line from each end to the top stays as high as the end, ``(draw, unit)``."""
    lowest = height
    for share in torch.linspace(0, 1, _POINTS_BETWEEN + 2)[1:-1].tolist():
        between = gaussian.unwhiten(at + share * (top - at))
        passes = between.split(max(_ROWS_PER_PASS // densities.num_units, 1))
        with torch.no_grad():
            found = torch.cat([densities.log_joint(part) for part in passes])
        lowest = torch.minimum(lowest, found.nan_to_num(nan=-math.inf))
    return lowest > height - _VALLEY
