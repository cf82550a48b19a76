"""Quadrature over the one to three latent dimensions of a unit, on a grid that finds its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.region import COARSE, FARTHEST, Region, find_region
from pyro_vharm.inference.start import StartDensity, block_starts
from pyro_vharm.inference.tensor_grid import TensorGrid, evaluate, even_lines
from pyro_vharm.inference.trapezoidal import TrapezoidalRule, apply_rule
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_selector
from pyro_vharm.particles import Particles, join_units

__all__ = ["MOST_DIMENSIONS", "Quadrature"]

MOST_DIMENSIONS = max(COARSE)
_FIRST = {1: 61, 2: 43, 3: 31}  # nodes per dimension; one less is a multiple of six
_NEGLIGIBLE = 1e-12
_ROWS_AT_ONCE = 2**21
_MOST_ROWS = 2**26
_MOST_KEPT, _LEAST_KEPT = 2**23, 2**10


@dataclass(frozen=True)
class Quadrature:
    """Trapezoidal rule on a grid per unit, made finer along one axis at a time.

    For a smooth density that vanishes at the ends of the box the rule converges faster than any
    power of the spacing ("The Exponentially Convergent Trapezoidal Rule", Trefethen, Weideman,
    2014). The coordinates are whitened by the posterior's own width and tilt, and draw in tails by
    sinh, so that algebraic ones vanish too; see `SinhCoordinates`. The box starts around draws of
    guide and prior and the peaks that climbs from them reach, grows while a face lies within 20
    nats of the maximum, and shrinks to what holds density, so that a second mode under the prior
    is kept; see `find_region`.

    The error of a unit is the sum over axes of what twice the spacing changes on the lines along
    it, whatever their signs, or what slower convergence lets expect, plus what mass beyond the
    faces could add, plus rounding. It is infinite where that sum is more than 0.001 nats, where a
    peak that was climbed sticks out of the nodes around it by more than a nat, where the density
    at a face has not fallen by 15 nats, or where it is no number beside high density: then nothing
    is known. A mode that neither draws nor climbs nor the coarse grid meet stays unseen.

    Args:
        tolerance: nats per unit to which two rules must agree, or as far as rounding allows.
        max_nodes: most nodes per unit, fewer where very many units need them; a unit that has not
            converged by then says so by its error.
        num_box_steps: most steps of growing, shrinking and matching.
    """

    tolerance: float = 1e-6
    max_nodes: int = 2**21
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
            for units, block, own in block_starts(densities, size, 0.5, start):
                select = unit_selector(block)
                region = find_region(block, own, select, self.num_box_steps)
                for some, particles in self._refine(block, region, select, bar.update):
                    done.append((units[some], particles))
        return join_units(_of_one_size(done), densities.num_units)

    def _refine(
        self,
        densities: UnitDensities,
        region: Region,
        select: Callable[[Tensor], UnitDensities] | None,
        report: Callable[[int], object],
    ) -> list[tuple[Tensor, Particles]]:
        """Widen or halve along the axis that needs it most, of the units that need it."""
        pending, done = [_first_grid(densities, region)], []
        spent = pending[0].values.numel()
        while pending:
            cheapest = min(range(len(pending)), key=lambda i: math.prod(pending[i].counts))
            grid = pending.pop(cheapest)
            rule = apply_rule(grid, region)
            move, ends = self._next_move(grid, rule)
            if select is None and not bool(ends.all()):
                move, ends = move[~ends].mode().values.expand_as(move), torch.zeros_like(ends)
            too_many = 2 * math.prod(grid.counts) > self.max_nodes
            ends = ends | too_many | (spent + grid.values.numel() > _MOST_ROWS)
            if bool(ends.any()):
                some = ends.nonzero().flatten()
                done.append(_finish(grid, rule, region, some, densities.num_units))
                report(len(some))
            for kind in move[~ends].unique().tolist():
                some = ((move == kind) & ~ends).nonzero().flatten()
                pending.append(_refined(densities, select, grid.select(some), kind, region))
                spent += pending[-1].values.numel() - len(some) * math.prod(grid.counts)
        return done

    def _next_move(self, grid: TensorGrid, rule: TrapezoidalRule) -> tuple[Tensor, Tensor]:
        """What each unit needs most, and which need nothing.

        Moves are the axes to halve, then the faces to push out, two for each axis.
        """
        tolerance = rule.rounding.clamp(min=self.tolerance)
        ends = torch.stack([line[i].abs() for line in grid.lines for i in (0, -1)])
        open_by = rule.outside.masked_fill(ends >= FARTHEST, 0.0)
        widens = open_by.amax(0) > 0.1 * tolerance / len(open_by)
        dim = len(grid.counts)
        small = 1e-9 / torch.tensor(grid.counts, device=tolerance.device)[:, None]
        axis = (rule.changes.nan_to_num(nan=0.0) + small).argmax(0)
        move = torch.where(widens, dim + open_by.argmax(0), axis)
        return move, ~widens & (rule.change < tolerance) & ~rule.missed


def _first_grid(densities: UnitDensities, region: Region) -> TensorGrid:
    lines = even_lines(*region.box, _FIRST[densities.dim])
    units = torch.arange(densities.num_units, device=densities.device)
    return TensorGrid(units, lines, evaluate(densities, region.coordinates, lines))


def _refined(
    densities: UnitDensities,
    select: Callable[[Tensor], UnitDensities] | None,
    grid: TensorGrid,
    move: int,
    region: Region,
) -> TensorGrid:
    """Add the midpoints along one axis, or nodes beyond one face."""
    dim, units = len(grid.counts), grid.units
    axis = move if move < dim else (move - dim) // 2
    line = grid.lines[axis]
    if move < dim:
        new = 0.5 * (line[1:] + line[:-1])
    else:
        beyond = torch.arange(1, len(line) // 4 + 1, dtype=line.dtype, device=line.device)[:, None]
        step = line[1] - line[0]
        new = line[-1] + step * beyond if (move - dim) % 2 else line[0] - step * beyond
    part = densities if select is None or len(units) == densities.num_units else select(units)
    added = evaluate(part, region.coordinates.select(units), _with(grid.lines, axis, new))
    line = torch.cat([line, new])
    order = line[:, 0].argsort()
    values = torch.cat([grid.values, added], axis).index_select(axis, order)
    return TensorGrid(units, _with(grid.lines, axis, line[order]), values)


def _with(lines: tuple[Tensor, ...], axis: int, line: Tensor) -> tuple[Tensor, ...]:
    return (*lines[:axis], line, *lines[axis + 1 :])


def _finish(
    grid: TensorGrid, rule: TrapezoidalRule, region: Region, some: Tensor, num_units: int
) -> tuple[Tensor, Particles]:
    """Particles of some units: their nodes, without those that weigh nothing."""
    grid, rule = grid.select(some), rule.select(some)
    values = grid.values.flatten(0, -2)
    floor = rule.log_evidence - rule.log_cell + math.log(_NEGLIGIBLE / len(values))
    kept = (~(values < floor)).any(1).nonzero().flatten()
    at, log_weights = grid.nodes(kept), values[kept] + rule.log_cell
    most = max(_MOST_KEPT // num_units, _LEAST_KEPT)
    if len(kept) > most:
        at, log_weights = _thin(at, log_weights, most)
    coordinates = region.coordinates.select(grid.units)
    run = Particles(
        unconstrained=coordinates.latents(at),
        log_weights=log_weights + math.log(len(at)),
        kind=Kind.NUMERICAL,
        numerical_error=rule.error,
        num_nonfinite=int(grid.unknown.sum()),
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
