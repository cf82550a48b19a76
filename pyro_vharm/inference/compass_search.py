"""Draws where a density may be high, and the peaks that are climbed to from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.coordinates import log_joint
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.model.densities import UnitDensities

__all__ = ["Points", "climb", "draw_scouts"]

_SCOUTS = 512
_HIGHEST, _SPREAD = 4, 12
_NUM_STEPS = 60


class Points(NamedTuple):
    """Points with the density at them.

    Attributes:
        latents: unconstrained, shape ``(point, unit, dim)``.
        log_joint: log p(v, h; θ) there, shape ``(point, unit)``.
    """

    latents: Tensor
    log_joint: Tensor

    def select(self, units: Tensor) -> Points:
        """Those of some of the units."""
        return Points(self.latents[:, units], self.log_joint[:, units])


def draw_scouts(densities: UnitDensities, start: StartDensity) -> Points:
    """Draws of the start density."""
    drawn = start.sample(densities, _SCOUTS)
    return Points(drawn, log_joint(densities, drawn))


def climb(densities: UnitDensities, start: StartDensity, scouts: Points) -> Points:
    """Peaks reached from the highest scouts and from draws of the prior, ``(climber, unit)``.

    Several draws of the prior, so that one reaches a mode that the start density does not know.
    Each climber tries a step of its own length along each axis of the whitened latents both ways,
    takes the best, and doubles the length on success or halves it (compass search).
    """
    dim = scouts.latents.shape[-1]
    top = scouts.log_joint.topk(_HIGHEST, 0).indices[..., None].expand(-1, -1, dim)
    first = torch.cat([scouts.latents.gather(0, top), densities.draw_prior(_SPREAD)])
    at, height = start.gaussian.whiten(first), log_joint(densities, first)
    eye = torch.eye(dim, dtype=at.dtype, device=at.device)
    compass = torch.cat([eye, -eye])
    length = torch.full_like(at[..., 0], 0.5)
    for _ in range(_NUM_STEPS):
        tried = at + length[..., None] * compass[:, None, None]
        heights = log_joint(densities, start.gaussian.unwhiten(tried.flatten(0, 1)))
        highest, which = heights.unflatten(0, tried.shape[:2]).max(0)
        up = highest > height
        moved = tried.gather(0, which[None, ..., None].expand(1, -1, -1, dim))[0]
        at = torch.where(up[..., None], moved, at)
        height = torch.where(up, highest, height)
        length = torch.where(up, 2.0 * length, 0.5 * length)
    return Points(start.gaussian.unwhiten(at), height)
