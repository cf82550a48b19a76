"""The trapezoidal rule on a tensor grid, with all that may be wrong with it."""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.region import Region
from pyro_vharm.inference.tensor_grid import TensorGrid

__all__ = ["TrapezoidalRule", "apply_rule"]

_OPEN = 15.0  # a face within so many nats of the maximum leaves mass outside that nobody saw
_UNSEEN = 1.0  # nats by which a peak that was climbed may stick out of the nodes around it
_RELEVANT = 10.0  # nats below the maximum down to which peaks are looked at
_UNRESOLVED = 1e-3  # nats by which two rules may differ before they prove nothing
_CAUTION = 4.0  # times what slow convergence lets expect, which is known to a small factor
_WALL = 1e-7  # neighbouring nodes may differ by this factor before there is a wall between


class TrapezoidalRule(NamedTuple):
    """What the trapezoidal rule on a grid says of each unit.

    Attributes:
        log_evidence: shape ``(unit,)``.
        log_cell: log volume of a cell, ``(unit,)``.
        changes: error by the spacing along each axis, in nats, ``(axis, unit)``.
        outside: what mass beyond each face could add, in nats, ``(2 axis, unit)``.
        rounding: of a log density of this size, which no finer rule removes, ``(unit,)``.
        missed: whether a peak that was climbed sticks out of the nodes around it, ``(unit,)``.
        unknown: whether the density is high beside a node where it is no number, ``(unit,)``.
    """

    log_evidence: Tensor
    log_cell: Tensor
    changes: Tensor
    outside: Tensor
    rounding: Tensor
    missed: Tensor
    unknown: Tensor

    @property
    def change(self) -> Tensor:
        """Error by the spacing, in nats, shape ``(unit,)``."""
        return self.changes.sum(0)

    @property
    def error(self) -> Tensor:
        """In nats, shape ``(unit,)``; infinite where nothing is known."""
        blind = ~(self.change <= _UNRESOLVED) | self.missed | self.unknown
        return (self.change + self.outside.sum(0) + self.rounding).masked_fill(blind, math.inf)

    def select(self, some: Tensor) -> TrapezoidalRule:
        """What it says of some of the units."""
        return TrapezoidalRule(*(part[..., some] for part in self))


def apply_rule(grid: TensorGrid, region: Region) -> TrapezoidalRule:
    """The rule, how it changes with the spacing along each axis, and what may lie outside."""
    highest = grid.highest
    heights = (grid.values - highest).exp()
    axes = range(len(grid.counts))
    marginals = [
        heights.sum(others) if (others := [b for b in axes if b != a]) else heights for a in axes
    ]
    total = marginals[0].sum(0)
    outside = [
        _beyond(grid, axis, end, marginal[end] / total, highest)
        for axis, marginal in enumerate(marginals)
        for end in (0, -1)
    ]
    log_cell = grid.steps.log().sum(-1)
    return TrapezoidalRule(
        log_evidence=highest + total.log() + log_cell,
        log_cell=log_cell,
        changes=torch.stack(
            [
                torch.maximum(_change(marginal / total), _change_of_lines(heights, axis, total))
                for axis, marginal in enumerate(marginals)
            ]
        ),
        outside=torch.stack(outside),
        rounding=_rounding(grid, highest),
        missed=_misses_a_peak(grid, region.select(grid.units), highest),
        unknown=_borders_the_unknown(grid, highest),
    )


def _change(shares: Tensor) -> Tensor:
    """Error of a rule from how far rules of more than its spacing are off.

    The change to twice the spacing bounds the error of a smooth density by far, and may be small
    by chance for one with a kink or a jump. There errors fall by a constant factor with each
    halving; so, at least what the largest errors of all rules of three and six times the spacing
    then let expect, (3 / 6)^log₂3 being 1 / 3. A wall between two nodes may lie at either.

    Args:
        shares: of the nodes along one axis in the total, shape ``(node, unit)``.
    """
    twice, thrice, sixfold = (
        torch.stack([(by * shares[i::by].sum(0)).log().abs() for i in range(by)]).amax(0)
        for by in (2, 3, 6)
    )
    thrice, sixfold = thrice.clamp(max=1.0), sixfold.clamp(min=1e-30, max=1.0)
    expected = _CAUTION * thrice * (thrice / sixfold) ** math.log2(3)
    low, high = (pick(shares[1:], shares[:-1]) for pick in (torch.minimum, torch.maximum))
    walls = torch.where(low < _WALL * high, high, 0.0).sum(0)
    return torch.maximum(twice, expected) + walls


def _change_of_lines(heights: Tensor, axis: int, total: Tensor) -> Tensor:
    """What twice the spacing changes on each line along an axis, without regard to sign.

    Lines through the neck of a funnel, or a ridge aslant to the axes, are off by much while their
    sum is not.
    """
    every = heights.sum(axis)
    even = heights[(slice(None),) * axis + (slice(0, None, 2),)].sum(axis)
    off = (2 * even - every).abs()
    return torch.log1p((off.flatten(0, -2).sum(0) if off.dim() > 1 else off) / total)


def _beyond(grid: TensorGrid, axis: int, end: int, share: Tensor, highest: Tensor) -> Tensor:
    """What mass beyond a face could add: as many more cells like the outermost as there are.

    Tails fall exponentially in the coordinates or faster. Infinite where the face is so high that
    the density need not fall at all outside.
    """
    face = grid.values.select(axis, end).reshape(-1, len(grid.units)).amax(0)
    outside = torch.log1p(grid.counts[axis] * share)
    return outside.masked_fill(~(face <= highest - _OPEN), math.inf)


def _rounding(grid: TensorGrid, highest: Tensor) -> Tensor:
    """By the coarser dtype of latents and density: data may be double where latents are not."""
    dtypes = (grid.lines[0].dtype, highest.dtype)
    return 16 * max(torch.finfo(dtype).eps for dtype in dtypes) * (1 + highest.abs())


def _misses_a_peak(grid: TensorGrid, region: Region, highest: Tensor) -> Tensor:
    """Whether a peak that was climbed sticks out of the corners of its cell."""
    at = region.coordinates.of(region.peaks.latents)
    heights = region.peaks.log_joint + region.coordinates.log_abs_det(at)
    strides = torch.tensor(
        [math.prod(grid.counts[a + 1 :]) for a in range(at.shape[-1])], device=at.device
    )
    most = torch.tensor(grid.counts, device=at.device) - 2
    low = torch.stack([line[0] for line in grid.lines], -1)
    corner = ((at - low) / grid.steps).floor().nan_to_num().long()
    corner = torch.minimum(corner.clamp(min=0), most)
    around = torch.full_like(heights, -math.inf)
    values = grid.values.flatten(0, -2)
    for shift in product((0, 1), repeat=at.shape[-1]):
        index = ((corner + torch.tensor(shift, device=at.device)) * strides).sum(-1)
        around = torch.maximum(around, values.gather(0, index))
    relevant = heights > highest - _RELEVANT
    return (relevant & (heights > around + _UNSEEN)).any(0)


def _borders_the_unknown(grid: TensorGrid, highest: Tensor) -> Tensor:
    unknown, found = grid.unknown, torch.zeros_like(highest, dtype=torch.bool)
    if not bool(unknown.any()):
        return found
    high = grid.values > highest - _OPEN
    for axis, count in enumerate(grid.counts):
        for one, other in ((high, unknown), (unknown, high)):
            beside = one.narrow(axis, 0, count - 1) & other.narrow(axis, 1, count - 1)
            found |= beside.flatten(0, -2).any(0)
    return found
