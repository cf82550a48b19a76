"""Tensor grids of nodes, laid for each unit in its own coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.coordinates import SinhCoordinates, log_joint
from pyro_vharm.model.densities import UnitDensities

__all__ = ["TensorGrid", "evaluate", "even_lines"]

_ROWS_AT_ONCE = 2**21


class TensorGrid(NamedTuple):
    """Some units on a tensor grid of as many nodes for each.

    Attributes:
        units: their indices.
        lines: the coordinates of the nodes along each axis, evenly spaced, ``(node, unit)``.
        values: log density per volume of coordinates at the nodes, ``(*nodes, unit)``.
    """

    units: Tensor
    lines: tuple[Tensor, ...]
    values: Tensor

    @property
    def counts(self) -> tuple[int, ...]:
        """Nodes along each axis."""
        return tuple(self.values.shape[:-1])

    @property
    def steps(self) -> Tensor:
        """Spacing along each axis, ``(unit, dim)``."""
        return torch.stack([line[1] - line[0] for line in self.lines], -1)

    @property
    def highest(self) -> Tensor:
        """Largest value of each unit."""
        return self.values.flatten(0, -2).amax(0)

    @property
    def unknown(self) -> Tensor:
        """Where the density is no number; see `log_joint`."""
        return self.values.isfinite() & (self.values < 0.5 * torch.finfo(self.values.dtype).min)

    def select(self, some: Tensor) -> TensorGrid:
        """The grid of some of its units."""
        lines = tuple(line[:, some] for line in self.lines)
        return TensorGrid(self.units[some], lines, self.values[..., some])

    def nodes(self, index: Tensor) -> Tensor:
        """Coordinates of the nodes with these flat indices, ``(node, unit, dim)``."""
        return _nodes(self.lines, index)


def even_lines(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, ...]:
    """So many evenly spaced coordinates between ends of shape ``(unit, dim)``, for each axis."""
    line = torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)[:, None]
    return tuple(a + (b - a) * line for a, b in zip(low.T, high.T, strict=True))


def evaluate(
    densities: UnitDensities, coordinates: SinhCoordinates, lines: Sequence[Tensor]
) -> Tensor:
    """Log density at the nodes of a tensor grid, ``(*nodes, unit)``, in passes.

    Transforms are applied along each axis, not at each node.
    """
    counts, num_units = [len(line) for line in lines], densities.num_units
    whitened = [coordinates.whitened(line) for line in lines]
    every = torch.arange(math.prod(counts), device=densities.device)
    values = [
        log_joint(densities, coordinates.gaussian.unwhiten(_nodes(whitened, index)))
        for index in every.split(max(_ROWS_AT_ONCE // num_units, 1))
    ]
    grid = torch.cat(values).reshape(*counts, num_units) + coordinates.gaussian.log_abs_det
    for axis, line in enumerate(lines):
        shape = [1] * len(counts)
        shape[axis] = len(line)
        grid += coordinates.log_slope(line).reshape(*shape, num_units)
    return grid


def _nodes(lines: Sequence[Tensor], index: Tensor) -> Tensor:
    along = torch.unravel_index(index, tuple(len(line) for line in lines))
    return torch.stack([line[i] for line, i in zip(lines, along, strict=True)], -1)
