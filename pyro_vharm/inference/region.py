"""The region of integration of each unit: coordinates, and a box in them that holds its density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.coordinates import SinhCoordinates, log_joint
from pyro_vharm.inference.start import StartDensity, UnitGaussian
from pyro_vharm.model.densities import UnitDensities

__all__ = ["COARSE", "Box", "Peaks", "Region", "find_region"]

_DEPTH = 25.0  # nats below the maximum at which the density is cut off: e⁻²⁵ ≈ 1e-11
_FARTHEST = 120.0  # the largest coordinate; about 1e13 standard deviations
_SCOUTS = 512
_CLIMBERS, _CLIMBING_STEPS = 8, 60
COARSE = {1: 129, 2: 33, 3: 17}  # nodes per dimension
_MOST_FRAMES = 4
_TOO_FAR, _TOO_WIDE, _TOO_TILTED = 0.7, 1.6, 0.4
_TAIL = 0.16  # share of the mass on either side of a standard deviation
_CLIP = 3.0


class Box(NamedTuple):
    """Ends of each unit's box, shape ``(unit, dim)`` each."""

    low: Tensor
    high: Tensor

    def select(self, units: Tensor) -> Box:
        """That of some of the units."""
        return Box(self.low[units], self.high[units])


class Peaks(NamedTuple):
    """Points that are high, and what was climbed from some of them.

    Attributes:
        latents: unconstrained, shape ``(point, unit, dim)``.
        log_joint: log p(v, h; θ) there, shape ``(point, unit)``.
    """

    latents: Tensor
    log_joint: Tensor

    def select(self, units: Tensor) -> Peaks:
        """Those of some of the units."""
        return Peaks(self.latents[:, units], self.log_joint[:, units])


class Region(NamedTuple):
    """Where each unit's density lies.

    Attributes:
        coordinates: matched to the centre, width and tilt of its bulk.
        box: in these coordinates, with the density at its faces far below the maximum.
        peaks: every peak that was climbed; a rule that meets none of its height is wrong.
    """

    coordinates: SinhCoordinates
    box: Box
    peaks: Peaks

    def select(self, units: Tensor) -> Region:
        """That of some of the units."""
        return Region(*(part.select(units) for part in self))


class _Step(NamedTuple):
    """One step of the search.

    Attributes:
        coordinates: matched anew, for some units.
        box: moved, or laid anew in those.
        matched: which units have new coordinates.
        rests: which units are done.
    """

    coordinates: SinhCoordinates
    box: Box
    matched: Tensor
    rests: Tensor


def find_region(
    densities: UnitDensities,
    start: StartDensity,
    select: Callable[[Tensor], UnitDensities] | None,
    num_steps: int,
) -> Region:
    """Find every unit's box from draws of the start density and the peaks that they climb to.

    The box grows while a face lies within 25 nats of the maximum on a coarse grid, and shrinks to
    what holds density. Once it rests, the coordinates are matched to quantiles and correlations
    on that grid, and the box is sought anew in them, so that a narrow or tilted posterior that the
    start density knew nothing of is seen in its own width.

    Args:
        densities: the units, of one to three dimensions.
        start: where to look first.
        select: gives the densities of some of the units alone, where they can be had.
        num_steps: most steps of growing, shrinking and matching.
    """
    scouts, peaks = _scout(densities, start)
    coordinates = SinhCoordinates(start.gaussian)
    region = Region(coordinates, _first_box(coordinates, scouts), peaks)
    frames = torch.ones(densities.num_units, dtype=torch.long, device=densities.device)
    pending = torch.arange(densities.num_units, device=densities.device)
    for _ in range(num_steps):
        whole = select is None or len(pending) == densities.num_units
        part = densities if select is None or whole else select(pending)
        step = _improve(part, region.select(pending), scouts.select(pending), frames[pending])
        region = _update(region, pending, step)
        frames[pending] += step.matched
        left = pending[~step.rests]
        if not len(left):
            break
        pending = left if select is not None else pending
    return region


def _improve(densities: UnitDensities, region: Region, scouts: Peaks, frames: Tensor) -> _Step:
    """Move the box; match the coordinates where it rests."""
    coordinates, box = region.coordinates, region.box
    grid = _grid(box, COARSE[densities.dim])
    latents = coordinates.latents(grid)
    found = Peaks(latents, log_joint(densities, latents))
    points = Peaks(*(torch.cat(pair) for pair in zip(scouts, found, strict=True)))
    moved, rests = _move(coordinates, box, points)
    gaussian, off = _match(coordinates, grid, box, found)
    again = rests & off & (frames < _MOST_FRAMES)
    matched = SinhCoordinates(_where(again, gaussian, coordinates.gaussian))
    fresh = _first_box(matched, points)
    low, high = (torch.where(again[:, None], *ends) for ends in zip(fresh, moved, strict=True))
    return _Step(matched, Box(low, high), again, rests & ~again)


def _scout(densities: UnitDensities, start: StartDensity) -> tuple[Peaks, Peaks]:
    """Draws of the start density with what the best of them reach, and the latter alone.

    Climbing is by compass search in whitened latents: each climber tries a step of its own length
    along each axis both ways, takes the best, and doubles the length on success or halves it.
    """
    drawn = start.sample(densities, _SCOUTS)
    values = log_joint(densities, drawn)
    count, num_units, dim = drawn.shape
    top = values.topk(_CLIMBERS, 0).indices
    spread = torch.randint(count, (_CLIMBERS, num_units), device=drawn.device)
    index = torch.cat([top, spread])
    height = values.gather(0, index)
    at = start.gaussian.whiten(drawn.gather(0, index[..., None].expand(-1, -1, dim)))
    eye = torch.eye(dim, dtype=drawn.dtype, device=drawn.device)
    compass = torch.cat([eye, -eye])
    length = torch.full_like(height, 0.5)
    for _ in range(_CLIMBING_STEPS):
        tried = at + length[..., None] * compass[:, None, None]
        heights = log_joint(densities, start.gaussian.unwhiten(tried.flatten(0, 1)))
        highest, which = heights.unflatten(0, tried.shape[:2]).max(0)
        up = highest > height
        moved = tried.gather(0, which[None, ..., None].expand(1, -1, -1, dim))[0]
        at = torch.where(up[..., None], moved, at)
        height = torch.where(up, highest, height)
        length = torch.where(up, 2.0 * length, 0.5 * length)
    peaks = Peaks(start.gaussian.unwhiten(at), height)
    return Peaks(torch.cat([drawn, peaks.latents]), torch.cat([values, height])), peaks


def _first_box(coordinates: SinhCoordinates, scouts: Peaks) -> Box:
    hull = _hull(coordinates, scouts)
    margin = (0.1 * (hull.high - hull.low)).clamp(min=0.5)
    return _within_reach(Box(hull.low - margin, hull.high + margin))


def _move(coordinates: SinhCoordinates, box: Box, points: Peaks) -> tuple[Box, Tensor]:
    """Grow where a face is high, shrink to what holds density; and which units need neither."""
    hull, span = _hull(coordinates, points), box.high - box.low
    cell = span / (COARSE[span.shape[-1]] - 1)
    below = (hull.low <= box.low) & (box.low > -_FARTHEST)
    above = (hull.high >= box.high) & (box.high < _FARTHEST)
    low = torch.where(below, hull.low - 0.5 * span, hull.low - cell)
    high = torch.where(above, hull.high + 0.5 * span, hull.high + cell)
    moved = _within_reach(Box(low, high))
    shrunk = (moved.high - moved.low) < 0.8 * span
    rests = ~(below | above | shrunk).any(-1)
    low, high = (torch.where(rests[:, None], *ends) for ends in zip(box, moved, strict=True))
    return Box(low, high), rests


def _hull(coordinates: SinhCoordinates, points: Peaks) -> Box:
    """The smallest box around the points whose density is within reach of the highest."""
    at = coordinates.of(points.latents)
    values = points.log_joint + coordinates.log_abs_det(at)
    highest = at.gather(0, values.argmax(0)[None, :, None].expand(1, -1, at.shape[-1]))
    near = torch.where((values > values.amax(0) - _DEPTH)[..., None], at, highest)
    return Box(near.amin(0), near.amax(0))


def _within_reach(box: Box) -> Box:
    return Box(*(end.clamp(-_FARTHEST, _FARTHEST) for end in box))


def _grid(box: Box, count: int) -> Tensor:
    """Tensor grid of each unit's box, shape ``(count ** dim, unit, dim)``."""
    dim = box.low.shape[-1]
    line = torch.linspace(0, 1, count, dtype=box.low.dtype, device=box.low.device)
    unit_grid = torch.cartesian_prod(*[line] * dim).reshape(-1, 1, dim)
    return box.low + (box.high - box.low) * unit_grid


def _match(
    coordinates: SinhCoordinates, grid: Tensor, box: Box, found: Peaks
) -> tuple[UnitGaussian, Tensor]:
    """A Gaussian with the medians, quantile widths and correlations of the density on a grid.

    A node stands for its cell, so that a peak within one cell is given that cell's width. Widths
    are by quantiles and correlations of clipped deviations, as tails may have no moments.

    Returns:
        the Gaussian, and which units' coordinates are far from it.
    """
    share = torch.softmax(found.log_joint + coordinates.log_abs_det(grid), 0)
    share = torch.where(torch.isfinite(share), share, 1 / len(share))
    cell = (box.high - box.low) / (COARSE[grid.shape[-1]] - 1)
    below, median, above = coordinates.whitened(_quantiles(share, box, cell))
    own = coordinates.gaussian
    floor = 64 * torch.finfo(share.dtype).eps * (1 + own.mean.abs())
    width = torch.maximum(0.5 * (above - below), floor / own.scale_tril.diagonal(dim1=1, dim2=2))
    deviation = ((coordinates.whitened(grid) - median) / width).clamp(-_CLIP, _CLIP)
    within = (cell * coordinates.slope(grid) / width).clamp(max=_CLIP).square() / 12
    product = torch.einsum("pu,pui,puj->uij", share, deviation, deviation)
    product = product + torch.diag_embed(torch.einsum("pu,pui->ui", share, within))
    scale = product.diagonal(dim1=1, dim2=2).sqrt()
    correlation = product / (scale[:, :, None] * scale[:, None, :])
    turn = width[..., None] * torch.linalg.cholesky(correlation)
    matched = UnitGaussian(own.unwhiten(median[None])[0], own.scale_tril @ turn)
    tilt = (correlation - torch.diag_embed(correlation.diagonal(dim1=1, dim2=2))).abs()
    off = (median.abs() > _TOO_FAR) | (width.log().abs() > math.log(_TOO_WIDE))
    return matched, off.any(-1) | (tilt > _TOO_TILTED).any(-1).any(-1)


def _quantiles(share: Tensor, box: Box, cell: Tensor) -> Tensor:
    """Three quantiles of each coordinate, shape ``(3, unit, dim)``, from shares of grid nodes."""
    dim, num_units = box.low.shape[-1], share.shape[-1]
    shaped = share.reshape(*[COARSE[dim]] * dim, num_units)
    wanted = torch.tensor([_TAIL, 0.5, 1 - _TAIL], dtype=share.dtype, device=share.device)
    found = []
    for axis in range(dim):
        others = [other for other in range(dim) if other != axis]
        marginal = (shaped.sum(others) if others else shaped).T.contiguous()
        upto = marginal.cumsum(-1)
        index = torch.searchsorted(upto, wanted.expand(num_units, 3).contiguous())
        index = index.clamp(max=marginal.shape[-1] - 1)
        mass = marginal.gather(1, index).clamp(min=torch.finfo(share.dtype).tiny)
        part = ((wanted - upto.gather(1, index)) / mass + 0.5).clamp(-0.5, 0.5)
        found.append(box.low[:, axis, None] + cell[:, axis, None] * (index + part))
    return torch.stack(found, -1).transpose(0, 1)


def _where(condition: Tensor, one: UnitGaussian, other: UnitGaussian) -> UnitGaussian:
    mean = torch.where(condition[:, None], one.mean, other.mean)
    return UnitGaussian(
        mean, torch.where(condition[:, None, None], one.scale_tril, other.scale_tril)
    )


def _update(region: Region, units: Tensor, step: _Step) -> Region:
    """The region with some units' coordinates and boxes replaced."""
    old, new = region.coordinates.gaussian, step.coordinates.gaussian
    gaussian = UnitGaussian(
        old.mean.index_copy(0, units, new.mean),
        old.scale_tril.index_copy(0, units, new.scale_tril),
    )
    ends = (a.index_copy(0, units, b) for a, b in zip(region.box, step.box, strict=True))
    return region._replace(coordinates=SinhCoordinates(gaussian), box=Box(*ends))
