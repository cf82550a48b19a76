"""The region of integration of each unit: coordinates, and a box in them that holds its density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.compass_search import Points, climb, draw_scouts
from pyro_vharm.inference.coordinates import SinhCoordinates
from pyro_vharm.inference.matching import match_coordinates
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.inference.tensor_grid import TensorGrid, evaluate, even_lines
from pyro_vharm.model.densities import UnitDensities

__all__ = ["COARSE", "FARTHEST", "Box", "Region", "find_region"]

COARSE = {1: 129, 2: 33, 3: 17}  # nodes per dimension while the box moves
FARTHEST = 16.0  # the largest coordinate; about 1e12 standard deviations
_DEPTH = 20.0  # nats below the maximum at which the density is cut off: e⁻²⁰ ≈ 2e-9
_MOST_MATCHES = 8


class Box(NamedTuple):
    """Ends of each unit's box, shape ``(unit, dim)`` each."""

    low: Tensor
    high: Tensor

    def select(self, units: Tensor) -> Box:
        """That of some of the units."""
        return Box(self.low[units], self.high[units])

    def replace(self, units: Tensor, other: Box) -> Box:
        """With that of some of the units replaced."""
        return Box(*(a.index_copy(0, units, b) for a, b in zip(self, other, strict=True)))


class Region(NamedTuple):
    """Where each unit's density lies.

    Attributes:
        coordinates: matched to the centre, width and tilt of its bulk.
        box: in these coordinates, with the density at its faces far below the maximum.
        peaks: every peak that was climbed; a rule that meets none of its height is wrong.
    """

    coordinates: SinhCoordinates
    box: Box
    peaks: Points

    def select(self, units: Tensor) -> Region:
        """That of some of the units."""
        coordinates, box, peaks = self
        return Region(coordinates.select(units), box.select(units), peaks.select(units))

    def replace(self, units: Tensor, other: Region) -> Region:
        """With coordinates and box of some of the units replaced."""
        coordinates = self.coordinates.replace(units, other.coordinates)
        return self._replace(coordinates=coordinates, box=self.box.replace(units, other.box))


def find_region(
    densities: UnitDensities,
    start: StartDensity,
    select: Callable[[Tensor], UnitDensities] | None,
    num_steps: int,
) -> Region:
    """Find every unit's box from draws of the start density and the peaks that are climbed to.

    The box grows while a face lies within 20 nats of the maximum on a coarse grid, and shrinks to
    what holds density. Once it rests, the coordinates are matched to the density on that grid, and
    the box is sought anew in them, so that a narrow or tilted posterior that the start density
    knew nothing of is seen in its own width.

    Args:
        densities: the units, of one to three dimensions.
        start: where to look first.
        select: gives the densities of some of the units alone, where they can be had.
        num_steps: most steps of growing, shrinking and matching.
    """
    scouts = draw_scouts(densities, start)
    peaks = climb(densities, start, scouts)
    known = Points(*(torch.cat(pair) for pair in zip(scouts, peaks, strict=True)))
    coordinates = SinhCoordinates(start.gaussian)
    region = Region(coordinates, _with_margin(_hull_of_points(coordinates, known)), peaks)
    pending = torch.arange(densities.num_units, device=densities.device)
    matches = torch.zeros_like(pending)
    for _ in range(num_steps):
        everyone = select is None or len(pending) == densities.num_units
        part = densities if select is None or everyone else select(pending)
        may_match = matches[pending] < _MOST_MATCHES
        own, rests, again = _improve(part, region.select(pending), known.select(pending), may_match)
        region = region.replace(pending, own)
        matches[pending] += again
        if bool(rests.all()):
            break
        pending = pending if select is None else pending[~rests]
    return region


def _improve(
    densities: UnitDensities, region: Region, known: Points, may_match: Tensor
) -> tuple[Region, Tensor, Tensor]:
    """Move each unit's box, or match its coordinates if the box rests.

    Returns:
        the region, which units need no more, and which were matched.
    """
    coordinates = region.coordinates
    lines = even_lines(*region.box, COARSE[densities.dim])
    units = torch.arange(densities.num_units, device=densities.device)
    grid = TensorGrid(units, lines, evaluate(densities, coordinates, lines))
    at = coordinates.of(known.latents)
    values = known.log_joint + coordinates.log_abs_det(at)
    floor = torch.maximum(grid.highest, values.amax(0)) - _DEPTH
    moved, rests = _move(region.box, _hull(grid, grid.values >= floor, at, values >= floor))
    region = region._replace(box=moved)
    matched, off = match_coordinates(coordinates, grid, region.peaks)
    again = rests & off & may_match
    some = again.nonzero().flatten()
    if len(some):
        own, points = matched.select(some), _points_near(coordinates, grid, floor, known, some)
        box = _with_margin(_hull_of_points(own, points))
        region = region.replace(some, region.select(some)._replace(coordinates=own, box=box))
    return region, rests & ~again, again


def _move(box: Box, hull: Box) -> tuple[Box, Tensor]:
    """Grow where a face is high, shrink to what holds density; and which units need neither."""
    span = box.high - box.low
    cell = span / (COARSE[span.shape[-1]] - 1)
    below = (hull.low <= box.low) & (box.low > -FARTHEST)
    above = (hull.high >= box.high) & (box.high < FARTHEST)
    low = torch.where(below, hull.low - 0.5 * span, hull.low - cell)
    high = torch.where(above, hull.high + 0.5 * span, hull.high + cell)
    moved = _within_reach(Box(low, high))
    shrunk = (moved.high - moved.low) < 0.8 * span
    rests = ~(below | above | shrunk).any(-1)
    low, high = (torch.where(rests[:, None], *ends) for ends in zip(box, moved, strict=True))
    return Box(low, high), rests


def _hull(grid: TensorGrid, near: Tensor, at: Tensor, near_known: Tensor) -> Box:
    """The smallest box around the nodes and known points that are near the highest."""
    low = torch.where(near_known[..., None], at, math.inf).amin(0)
    high = torch.where(near_known[..., None], at, -math.inf).amax(0)
    for axis, line in enumerate(grid.lines):
        others = [other for other in range(len(grid.lines)) if other != axis]
        met = near.sum(others) > 0 if others else near
        lowest = torch.where(met, line, math.inf).amin(0)
        highest = torch.where(met, line, -math.inf).amax(0)
        low[:, axis] = torch.minimum(low[:, axis], lowest)
        high[:, axis] = torch.maximum(high[:, axis], highest)
    return Box(low, high)


def _hull_of_points(coordinates: SinhCoordinates, points: Points) -> Box:
    at = coordinates.of(points.latents)
    values = points.log_joint + coordinates.log_abs_det(at)
    near = (values >= values.amax(0) - _DEPTH)[..., None]
    low = torch.where(near, at, math.inf).amin(0)
    return Box(low, torch.where(near, at, -math.inf).amax(0))


def _points_near(
    coordinates: SinhCoordinates, grid: TensorGrid, floor: Tensor, known: Points, some: Tensor
) -> Points:
    """The nodes near the highest, and the known points, of some of the units."""
    grid, coordinates, known = grid.select(some), coordinates.select(some), known.select(some)
    values = grid.values.flatten(0, -2)
    index = (values >= floor[some]).any(-1).nonzero().flatten()
    at = grid.nodes(index)
    log_joint = values[index] - coordinates.log_abs_det(at)
    nodes = Points(coordinates.latents(at), log_joint)
    return Points(*(torch.cat(pair) for pair in zip(known, nodes, strict=True)))


def _with_margin(hull: Box) -> Box:
    margin = (0.1 * (hull.high - hull.low)).clamp(min=0.5)
    return _within_reach(Box(hull.low - margin, hull.high + margin))


def _within_reach(box: Box) -> Box:
    return Box(*(end.clamp(-FARTHEST, FARTHEST) for end in box))
