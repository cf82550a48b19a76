"""Quadrature over the one to three latent dimensions of a unit, on a grid that finds its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.coordinates import log_joint
from pyro_vharm.inference.region import COARSE, Region, find_region
from pyro_vharm.inference.start import StartDensity, match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_blocks, unit_selector
from pyro_vharm.particles import Particles, join_units

__all__ = ["MOST_DIMENSIONS", "Quadrature"]

MOST_DIMENSIONS = max(COARSE)
_FIRST = 25  # nodes per dimension
_OPEN = 15.0  # a face within so many nats of the maximum leaves mass outside that nobody saw
_UNSEEN = 1.0  # nats by which a peak that was climbed may stick out of the nodes around it
_RELEVANT = 10.0  # nats below the maximum down to which peaks are looked at
_UNRESOLVED = 1e-3  # nats by which two rules may differ before they prove nothing
_NEGLIGIBLE = 1e-12
_ROWS_AT_ONCE = 2**22
_MOST_ROWS = 2**26
_MOST_KEPT, _LEAST_KEPT = 2**23, 2**10


class _Grid(NamedTuple):
    """Some units on a tensor grid of as many nodes for each.

    Attributes:
        units: their indices.
        lines: the coordinates of the nodes along each axis, ``(node, unit)``.
        values: log density at the nodes, ``(*nodes, unit)``.
    """

    units: Tensor
    lines: tuple[Tensor, ...]
    values: Tensor

    @property
    def counts(self) -> tuple[int, ...]:
        """Nodes along each axis."""
        return tuple(self.values.shape[:-1])

    def select(self, some: Tensor) -> _Grid:
        """The grid of some of its units."""
        lines = tuple(line[:, some] for line in self.lines)
        return _Grid(self.units[some], lines, self.values[..., some])


class _Rule(NamedTuple):
    """What the trapezoidal rule on a grid says of each unit.

    Attributes:
        log_evidence: shape ``(unit,)``.
        log_cell: log volume of a cell, ``(unit,)``.
        changes: nats by which twice the spacing along each axis changes it, ``(axis, unit)``.
        missed: whether a peak that was climbed sticks out of the nodes around it, ``(unit,)``.
    """

    log_evidence: Tensor
    log_cell: Tensor
    changes: Tensor
    missed: Tensor


@dataclass(frozen=True)
class Quadrature:
    """Trapezoidal rule on a grid per unit, made finer along one axis at a time.

    For a smooth density that vanishes at the ends of the box the rule converges faster than any
    power of the spacing ("The Exponentially Convergent Trapezoidal Rule", Trefethen, Weideman,
    2014). The coordinates are whitened by the posterior's own width and tilt, and draw in tails by
    sinh, so that algebraic ones vanish too; see `SinhCoordinates`. The box starts around draws of
    guide and prior and the peaks that climbs from them reach, grows while a face lies within 25
    nats of the maximum, and shrinks to what holds density, so that a second mode under the prior
    is kept; see `find_region`.

    The error of a unit is the sum over axes of what twice the spacing along that axis changes,
    plus what mass beyond the faces could add, plus rounding. It is infinite where the rules differ
    by more than 0.001 nats, where a peak that was climbed sticks out of the nodes around it by
    more than a nat, or where the density at a face has not fallen by 15 nats: then nothing is
    known. A mode that neither draws nor climbs nor the coarse grid meet stays unseen.

    Args:
        tolerance: nats per unit to which two rules must agree, or as far as rounding allows.
        max_nodes: most nodes per unit, fewer where very many units need them; a unit that has not
            converged by then says so by its error.
        num_box_steps: most steps of growing, shrinking and matching.
    """

    tolerance: float = 1e-6
    max_nodes: int = 2**20
    num_box_steps: int = 40

    def __post_init__(self) -> None:
        if self.tolerance <= 0:
            raise InputError(f"tolerance must be positive, not {self.tolerance}")
        if self.max_nodes < 32:
            raise InputError(f"max_nodes must be at least 32, not {self.max_nodes}")

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        progress: bool = False,
    ) -> Particles:
        """Integrate every unit's joint density over its latents.

        Args:
            densities: the units, of one to three latent dimensions each.
            start: where to look first; by default matched to guide draws, half of it prior.
            progress: show a bar.

        Raises:
            InputError: if a unit has more than three latent dimensions.
        """
        if densities.dim > MOST_DIMENSIONS:
            raise InputError(
                f"Quadrature takes units of one to three latent dimensions, not {densities.dim}; "
                "use AnnealedImportanceSampling"
            )
        start = match_start(densities, 0.5) if start is None else start
        size = max(_ROWS_AT_ONCE // COARSE[densities.dim] ** densities.dim, 1)
        done = []
        with (
            torch.no_grad(),
            tqdm(
                total=densities.num_units,
                desc="quadrature",
                unit="unit",
                disable=not progress or None,
                delay=2,
                leave=False,
            ) as bar,
        ):
            for units, block in unit_blocks(densities, size):
                select = unit_selector(block)
                region = find_region(block, start.select(units), select, self.num_box_steps)
                for some, particles in self._refine(block, region, select, bar.update):
                    done.append((units[some], particles))
        return join_units(_of_one_size(done))

    def _refine(
        self,
        densities: UnitDensities,
        region: Region,
        select: Callable[[Tensor], UnitDensities] | None,
        report: Callable[[int], object],
    ) -> list[tuple[Tensor, Particles]]:
        """Halve the spacing along the axis that needs it most, of the units that need it."""
        pending, done = [_first_grid(densities, region)], []
        while pending:
            grid = pending.pop()
            rule = _apply(grid, region)
            ends = self._has_converged(grid, rule)
            affordable = self.max_nodes // 2 >= math.prod(grid.counts)
            if not affordable or 2 * grid.values.numel() > _MOST_ROWS:
                ends = torch.ones_like(ends)
            if select is None:
                ends = ends.all().expand_as(ends)
            if bool(ends.any()):
                some = ends.nonzero().flatten()
                done.append(_finish(grid, rule, region, some, densities.num_units))
                report(len(some))
            worst = _axis_in_need(grid, rule)
            if select is None and not bool(ends.all()):
                worst = torch.full_like(worst, int(worst[~self._has_converged(grid, rule)].mode()[0]))
            for axis in range(len(grid.counts)):
                some = (~ends & (worst == axis)).nonzero().flatten()
                if len(some):
                    pending.append(_halve(densities, select, grid.select(some), axis, region))
        return done

    def _has_converged(self, grid: _Grid, rule: _Rule) -> Tensor:
        tolerance = _rounding(grid.values).clamp(min=self.tolerance)
        return (rule.changes.sum(0) < tolerance) & ~rule.missed


def _first_grid(densities: UnitDensities, region: Region) -> _Grid:
    line = torch.linspace(0, 1, _FIRST, dtype=densities.dtype, device=densities.device)[:, None]
    ends = zip(region.box.low.T, region.box.high.T, strict=True)
    lines = tuple(low + (high - low) * line for low, high in ends)
    units = torch.arange(densities.num_units, device=densities.device)
    return _Grid(units, lines, _evaluate(densities, region, lines))


def _halve(
    densities: UnitDensities,
    select: Callable[[Tensor], UnitDensities] | None,
    grid: _Grid,
    axis: int,
    region: Region,
) -> _Grid:
    """Add the midpoints along one axis."""
    units, line = grid.units, grid.lines[axis]
    part = select(units) if select is not None and len(units) < densities.num_units else densities
    between = 0.5 * (line[1:] + line[:-1])
    new = _evaluate(part, region.select(units), _with(grid.lines, axis, between))
    values = torch.cat([grid.values, new], axis)
    order = torch.cat([torch.arange(len(line)), torch.arange(len(between)) + 0.5]).argsort()
    order = order.to(line.device)
    line = torch.cat([line, between])[order]
    return _Grid(units, _with(grid.lines, axis, line), values.index_select(axis, order))


def _with(lines: tuple[Tensor, ...], axis: int, line: Tensor) -> tuple[Tensor, ...]:
    return (*lines[:axis], line, *lines[axis + 1 :])


def _evaluate(densities: UnitDensities, region: Region, lines: Sequence[Tensor]) -> Tensor:
    """Log density at the nodes of a tensor grid, ``(*nodes, unit)``, in passes."""
    counts, num_units = [len(line) for line in lines], densities.num_units
    every = torch.arange(math.prod(counts), device=densities.device)
    values = []
    for index in every.split(max(_ROWS_AT_ONCE // num_units, 1)):
        at = _nodes(lines, index)
        values.append(
            log_joint(densities, region.coordinates.latents(at)) + region.coordinates.log_abs_det(at)
        )
    return torch.cat(values).reshape(*counts, num_units)


def _nodes(lines: Sequence[Tensor], index: Tensor) -> Tensor:
    """The nodes of a tensor grid with these flat indices, ``(node, unit, dim)``."""
    along = torch.unravel_index(index, tuple(len(line) for line in lines))
    return torch.stack([line[i] for line, i in zip(lines, along, strict=True)], -1)


def _apply(grid: _Grid, region: Region) -> _Rule:
    """The rule, and how it changes with twice the spacing along each axis."""
    log_steps = torch.stack([(line[1] - line[0]).log() for line in grid.lines])
    highest = grid.values.flatten(0, -2).amax(0)
    heights = (grid.values - highest).exp()
    axes = tuple(range(len(grid.counts)))
    total = heights.sum(axes)
    halves = [heights.index_select(a, torch.arange(0, n, 2)).sum(axes) for a, n in enumerate(grid.counts)]
    changes = torch.stack([(2 * half / total).log().abs() for half in halves])
    log_cell = log_steps.sum(0)
    missed = _misses_a_peak(grid, region.select(grid.units), highest)
    return _Rule(highest + total.log() + log_cell, log_cell, changes, missed)


def _misses_a_peak(grid: _Grid, region: Region, highest: Tensor) -> Tensor:
    """Whether a peak that was climbed sticks out of the corners of its cell."""
    at = region.coordinates.of(region.peaks.latents)
    heights = region.peaks.log_joint + region.coordinates.log_abs_det(at)
    strides = torch.tensor([math.prod(grid.counts[a + 1 :]) for a in range(at.shape[-1])], device=at.device)
    most = torch.tensor(grid.counts, device=at.device) - 2
    step = torch.stack([line[1] - line[0] for line in grid.lines], -1)
    corner = ((at - region.box.low) / step).floor().nan_to_num().long()
    corner = torch.minimum(corner.clamp(min=0), most)
    around = torch.full_like(heights, -math.inf)
    values = grid.values.flatten(0, -2)
    for shift in product((0, 1), repeat=at.shape[-1]):
        index = ((corner + torch.tensor(shift, device=at.device)) * strides).sum(-1)
        around = torch.maximum(around, values.gather(0, index))
    relevant = heights > highest - _RELEVANT
    return (relevant & (heights > around + _UNSEEN)).any(0)


def _axis_in_need(grid: _Grid, rule: _Rule) -> Tensor:
    """The axis along which the rule changes most; the coarsest where it changes nowhere."""
    counts = torch.tensor(grid.counts, device=rule.changes.device, dtype=rule.changes.dtype)
    small = 1e-9 / counts[:, None]
    return (rule.changes.nan_to_num(nan=0.0) + small).argmax(0)


def _finish(
    grid: _Grid, rule: _Rule, region: Region, some: Tensor, num_units: int
) -> tuple[Tensor, Particles]:
    """Particles of some units: their nodes, without those that weigh nothing."""
    grid = grid.select(some)
    rule = _Rule(*(part[..., some] for part in rule))
    change = rule.changes.sum(0)
    error = change + _open_faces(grid) + _rounding(grid.values)
    error = error.masked_fill(~(change <= _UNRESOLVED) | rule.missed, math.inf)
    values = grid.values.flatten(0, -2)
    floor = rule.log_evidence - rule.log_cell + math.log(_NEGLIGIBLE / len(values))
    kept = (~(values < floor)).any(1).nonzero().flatten()
    at, log_weights = _nodes(grid.lines, kept), values[kept] + rule.log_cell
    most = max(_MOST_KEPT // num_units, _LEAST_KEPT)
    if len(kept) > most:
        at, log_weights = _thin(at, log_weights, most)
    coordinates = region.coordinates.select(grid.units)
    run = Particles(
        unconstrained=coordinates.latents(at),
        log_weights=log_weights + math.log(len(at)),
        kind=Kind.NUMERICAL,
        numerical_error=error,
    )
    return grid.units, run


def _thin(at: Tensor, log_weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Fewer nodes of equal weight and the same total, spaced evenly in cumulative weight."""
    total = torch.logsumexp(log_weights, 0)
    upto = (log_weights - total).exp().cumsum(0).T.contiguous()
    ruler = (torch.arange(count, dtype=upto.dtype, device=upto.device) + 0.5) / count
    index = torch.searchsorted(upto, ruler.expand(len(upto), count).contiguous() * upto[:, -1:])
    index = index.clamp(max=len(at) - 1).T[..., None].expand(-1, -1, at.shape[-1])
    return at.gather(0, index), (total - math.log(count)).expand(count, -1)


def _of_one_size(runs: Sequence[tuple[Tensor, Particles]]) -> list[tuple[Tensor, Particles]]:
    """As many particles everywhere, by some of no weight."""
    size = max(len(run.log_weights) for _, run in runs)
    return [(units, _filled_up(run, size)) for units, run in runs]


def _filled_up(run: Particles, size: int) -> Particles:
    count = len(run.log_weights)
    if count == size:
        return run
    filling = run.unconstrained[:1].expand(size - count, -1, -1)
    none = run.log_weights.new_full((size - count, run.log_weights.shape[1]), -math.inf)
    return replace(
        run,
        unconstrained=torch.cat([run.unconstrained, filling]),
        log_weights=torch.cat([run.log_weights + math.log(size / count), none]),
    )


def _open_faces(grid: _Grid) -> Tensor:
    """What mass beyond the faces could add: as many more cells like the outermost as there are.

    Algebraic tails fall exponentially in the coordinates, lighter ones faster. Infinite where a
    face is so high that the density need not fall at all outside.
    """
    values = grid.values.flatten(0, -2)
    total, highest = torch.logsumexp(values, 0), values.amax(0)
    outside = torch.zeros_like(total)
    for axis, count in enumerate(grid.counts):
        for end in (0, count - 1):
            face = grid.values.select(axis, end).reshape(-1, len(grid.units))
            outside = outside + count * torch.exp(torch.logsumexp(face, 0) - total)
            outside = outside.masked_fill(~(face.amax(0) <= highest - _OPEN), math.inf)
    return torch.log1p(outside)


def _rounding(values: Tensor) -> Tensor:
    """Rounding of a log density of this size, which no finer rule removes."""
    return 16 * torch.finfo(values.dtype).eps * (1 + values.flatten(0, -2).amax(0).abs())
