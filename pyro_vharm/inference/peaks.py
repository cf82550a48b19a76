"""Peaks of densities: quasi-Newton climbs, and which of their ends are one peak."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.model.densities import UnitDensities

__all__ = ["SETTLED", "Ascent", "Peak", "ascend", "peaks_of"]

_SHRINKAGE, _LEAST_STEP = 0.3, 1e-3
_ARMIJO = 1e-4  # least share of the gain that the slope foresees
SETTLED = 2e-3  # twice the nats that a quadratic model still sees to gain
_VALLEY = 0.1  # nats by which the density must fall between two peaks
_POINTS_BETWEEN = 15
_ROWS_PER_PASS = 2**17


class Ascent(NamedTuple):
    """State of climbs, one for each climber of each unit: all in whitened coordinates but heights.

    Attributes:
        at: where they are, shape ``(climber, unit, dim)``.
        gradient: of the log density there.
        curvature: estimate of the inverse of minus the Hessian, positive definite, shape
            ``(climber, unit, dim, dim)``.
        height: log p(v, h; θ), shape ``(climber, unit)``.
        step: share of a Newton step to try next.
    """

    at: Tensor
    gradient: Tensor
    curvature: Tensor
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

    @property
    def settled(self) -> Tensor:
        """Which climbs came to rest, shape ``(climber, unit)``."""
        return torch.isfinite(self.height) & (self.foreseen < SETTLED)


class Peak(NamedTuple):
    """One peak of each unit.

    Attributes:
        at: whitened coordinates, shape ``(unit, dim)``.
        curvature: estimate of the inverse of minus the Hessian there, ``(unit, dim, dim)``.
        same: which climbs end there, shape ``(climber, unit)``; none for a unit with fewer peaks.
    """

    at: Tensor
    curvature: Tensor
    same: Tensor


def ascend(
    densities: UnitDensities,
    gaussian: UnitGaussian,
    at: Tensor,
    num_steps: int,
    tolerance: float = 1e-6,
) -> Ascent:
    """Climb the posterior density of each unit by BFGS.

    Args:
        densities: the units.
        gaussian: whose coordinates climbs go in.
        at: where they begin, whitened, shape ``(climber, unit, dim)``.
        num_steps: most steps.
        tolerance: twice the gain in nats below which no climb goes on.

    Source: "Numerical Optimization", Nocedal, Wright (2006), chapter 6.
    """
    height, gradient = _slope(densities, gaussian, at)
    eye = torch.eye(at.shape[-1], dtype=at.dtype, device=at.device)
    state = Ascent(at, gradient, eye.expand(*at.shape, -1), height, torch.ones_like(height))
    for _ in range(num_steps):
        state = _step(densities, gaussian, state)
        if bool((state.foreseen < tolerance).all()):
            break
    return state


def peaks_of(densities: UnitDensities, gaussian: UnitGaussian, ascent: Ascent) -> Iterator[Peak]:
    """The peaks where climbs came to rest, the highest of each unit first.

    Two ends are one peak where along the straight line between them the log density does not fall
    0.1 nats below the lower of them.
    """
    left, at = ascent.settled, ascent.at
    every = torch.arange(len(left), device=left.device)[:, None]
    while bool(left.any()):
        index = ascent.height.masked_fill(~left, -math.inf).argmax(0)
        top = at.gather(0, index[None, :, None].expand(1, -1, at.shape[-1]))
        same = left & (_no_valley(densities, gaussian, ascent, top) | (every == index))
        unit = torch.arange(len(index), device=index.device)
        yield Peak(top[0], ascent.curvature[index, unit], same)
        left = left & ~same


def _step(densities: UnitDensities, gaussian: UnitGaussian, state: Ascent) -> Ascent:
    """Try one step, and learn from it, or try a shorter one next."""
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
    return Ascent(
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
    densities: UnitDensities, gaussian: UnitGaussian, ascent: Ascent, top: Tensor
) -> Tensor:
    """Whether the line from each end to the top stays as high as the end, ``(climber, unit)``."""
    lowest = ascent.height
    for share in torch.linspace(0, 1, _POINTS_BETWEEN + 2)[1:-1].tolist():
        between = gaussian.unwhiten(ascent.at + share * (top - ascent.at))
        passes = between.split(max(_ROWS_PER_PASS // densities.num_units, 1))
        with torch.no_grad():
            found = torch.cat([densities.log_joint(part) for part in passes])
        lowest = torch.minimum(lowest, found.nan_to_num(nan=-math.inf))
    return lowest > ascent.height - _VALLEY
