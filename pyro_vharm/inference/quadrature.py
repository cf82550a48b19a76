"""Quadrature over the one or two latent dimensions of a unit, in a box that finds its own place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.start import StartDensity, match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles

__all__ = ["Quadrature"]

_ROWS_PER_PASS = 2**20
_DEPTH = 32.0  # nats below the maximum at which the density is cut off: e⁻³² ≈ 1e-14
_OPEN = 15.0  # a face within so many nats of the maximum leaves mass outside that nobody saw
_UNSEEN = 1.0  # nats by which the highest node may miss the highest peak that was climbed
_UNRESOLVED = 1e-3  # nats by which the last two rules may differ before they prove nothing
_SCOUTS = 512
_CLIMBERS, _CLIMBING_STEPS = 8, 60
_MOST_ROWS = 2**26


class _Box(NamedTuple):
    """Ends of each unit's box in whitened coordinates, shape ``(unit, dim)`` each."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Quadrature:
    """Trapezoidal rule on a grid per unit, doubled until two rules agree.

    For a smooth density that vanishes at the ends of the box the rule converges faster than any
    power of the spacing ("The Exponentially Convergent Trapezoidal Rule", Trefethen, Weideman,
    2014). The box is laid in the coordinates of the start density's Gaussian. It starts around
    draws of guide and prior and the peaks that climbs from them reach, grows while a face lies
    within 32 nats of the maximum, and shrinks to what holds density, so that a second mode under
    the prior is kept. The error of a unit is the difference of its last two rules, plus what an
    open face could hide, plus rounding. It is infinite where the rules differ by more than 0.001
    nats, where no node comes near the highest peak, or where the density at a face has not fallen
    by 15 nats: then nothing is known.

    Args:
        tolerance: nats per unit to which two rules must agree, or as far as rounding allows.
        max_nodes: most nodes per dimension, fewer where there are very many units; a unit that
            has not converged by then says so by its error.
        num_box_steps: most steps of growing and shrinking.
    """

    tolerance: float = 1e-6
    max_nodes: int = 1024
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
            densities: the units, of one or two latent dimensions each.
            start: where to look first; by default matched to guide draws, half of it prior.
            progress: show a bar.

        Raises:
            InputError: if a unit has more than two latent dimensions.
        """
        if densities.dim > 2:
            raise InputError(
                f"Quadrature takes units of one or two latent dimensions, not {densities.dim}; use "
                "AnnealedImportanceSampling"
            )
        start = match_start(densities, 0.5) if start is None else start
        with torch.no_grad():
            box, peak = self._find_box(densities, start)
            return self._refine(densities, start, box, peak, progress)

    def _find_box(self, densities: UnitDensities, start: StartDensity) -> tuple[_Box, Tensor]:
        scouts, scout_values = _climb(
            densities, start, start.gaussian.whiten(start.sample(densities, _SCOUTS))
        )
        best = scout_values.argmax(0)[None, :, None].expand(1, -1, densities.dim)
        box = _pad(
            _hull(scouts, scout_values, scout_values.amax(0), scouts.gather(0, best)[0]), 0.5
        )
        for _ in range(self.num_box_steps):
            grid = _grid(box, _coarse(densities.dim))
            values = _log_density(densities, start, grid)
            points, heights = torch.cat([scouts, grid]), torch.cat([scout_values, values])
            hull = _hull(points, heights, heights.amax(0), box.low)
            cell = (box.high - box.low) / (_coarse(densities.dim) - 1)
            span = box.high - box.low
            low = torch.where(hull.low <= box.low, box.low - 0.5 * span, hull.low - cell)
            high = torch.where(hull.high >= box.high, box.high + 0.5 * span, hull.high + cell)
            grown = ((low < box.low) | (high > box.high)).any()
            shrunk = ((high - low) < 0.8 * span).any()
            box = _Box(low, high)
            if not bool(grown | shrunk):
                break
        return box, scout_values.amax(0)

    def _refine(
        self,
        densities: UnitDensities,
        start: StartDensity,
        box: _Box,
        peak: Tensor,
        progress: bool,
    ) -> Particles:
        count, previous = 32, None
        with tqdm(desc="quadrature", disable=not progress or None, delay=2, leave=False) as bar:
            while True:
                nodes = _grid(box, count)
                values = _log_density(densities, start, nodes)
                log_cell = ((box.high - box.low) / (count - 1)).log().sum(-1)
                log_evidence = torch.logsumexp(values, 0) + log_cell
                if previous is not None:
                    change = (log_evidence - previous).abs()
                    agreed = change < torch.clamp(_rounding(values), min=self.tolerance)
                    agreed &= values.amax(0) > peak - _UNSEEN
                    rows = values.numel() * 2**densities.dim
                    spent = 2 * count > self.max_nodes or rows > _MOST_ROWS
                    if bool(agreed.all()) or spent:
                        break
                previous, count = log_evidence, 2 * count
                bar.update()
        error = change + _open_faces(values, count, densities.dim) + _rounding(values)
        unresolved = (change > _UNRESOLVED) | (values.amax(0) < peak - _UNSEEN)
        error = error.masked_fill(unresolved, math.inf)
        return Particles(
            unconstrained=start.gaussian.unwhiten(nodes),
            log_weights=values + log_cell + math.log(len(nodes)),
            kind=Kind.NUMERICAL,
            numerical_error=error,
        )


def _climb(densities: UnitDensities, start: StartDensity, scouts: Tensor) -> tuple[Tensor, Tensor]:
    """Add to the scouts what the best of them reach by compass search, for narrow or far peaks.

    Each climber tries a step of its own length along each axis both ways, takes the best, and
    doubles the length on success or halves it.
    """
    values = _log_density(densities, start, scouts)
    count, num_units, dim = scouts.shape
    top = values.topk(_CLIMBERS, 0).indices
    spread = torch.randint(count, (_CLIMBERS, num_units), device=scouts.device)
    index = torch.cat([top, spread])[..., None].expand(-1, -1, dim)
    at, height = scouts.gather(0, index), values.gather(0, index[..., 0])
    eye = torch.eye(dim, dtype=scouts.dtype, device=scouts.device)
    compass = torch.cat([eye, -eye])
    length = torch.full_like(height, 0.5)
    for _ in range(_CLIMBING_STEPS):
        tried = at + length[..., None] * compass[:, None, None]
        heights = _log_density(densities, start, tried.flatten(0, 1)).unflatten(0, tried.shape[:2])
        highest, which = heights.max(0)
        up = highest > height
        moved = tried.gather(0, which[None, ..., None].expand(1, -1, -1, dim))[0]
        at = torch.where(up[..., None], moved, at)
        height = torch.where(up, highest, height)
        length = torch.where(up, 2.0 * length, 0.5 * length)
    return torch.cat([scouts, at]), torch.cat([values, height])


def _coarse(dim: int) -> int:
    return 129 if dim == 1 else 33


def _grid(box: _Box, count: int) -> Tensor:
    """Tensor grid of each unit's box, shape ``(count ** dim, unit, dim)``."""
    dim = box.low.shape[-1]
    line = torch.linspace(0, 1, count, dtype=box.low.dtype, device=box.low.device)
    unit_grid = torch.cartesian_prod(*[line] * dim).reshape(-1, 1, dim)
    return box.low + (box.high - box.low) * unit_grid


def _log_density(densities: UnitDensities, start: StartDensity, whitened: Tensor) -> Tensor:
    """Log joint density in whitened coordinates, in passes of bounded memory; NaN counts as 0."""
    per_pass = max(_ROWS_PER_PASS // densities.num_units, 1)
    passes = [
        densities.log_joint(start.gaussian.unwhiten(part)) for part in whitened.split(per_pass)
    ]
    values = torch.cat(passes) + start.gaussian.log_abs_det
    return values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _hull(points: Tensor, values: Tensor, peak: Tensor, otherwise: Tensor) -> _Box:
    """The smallest box around the points whose density is within reach of the peak."""
    high_enough = (values > peak - _DEPTH)[..., None]
    low = torch.where(high_enough, points, math.inf).amin(0)
    high = torch.where(high_enough, points, -math.inf).amax(0)
    found = torch.isfinite(low) & torch.isfinite(high)
    return _Box(torch.where(found, low, otherwise), torch.where(found, high, otherwise))


def _pad(box: _Box, least: float) -> _Box:
    margin = (0.25 * (box.high - box.low)).clamp(min=least)
    return _Box(box.low - margin, box.high + margin)


def _open_faces(values: Tensor, count: int, dim: int) -> Tensor:
    """What mass beyond the faces could add: as much as `count` more cells like the outermost.

    Infinite where a face is so high that the density need not fall at all outside.
    """
    shaped = values.reshape(*[count] * dim, -1)
    total, peak = torch.logsumexp(values, 0), values.amax(0)
    outside = torch.zeros_like(total)
    for axis in range(dim):
        for end in (0, count - 1):
            face = shaped.select(axis, end).reshape(-1, values.shape[-1])
            outside = outside + count * torch.exp(torch.logsumexp(face, 0) - total)
            outside = outside.masked_fill(face.amax(0) > peak - _OPEN, math.inf)
    return torch.log1p(outside)


def _rounding(values: Tensor) -> Tensor:
    """Rounding of a log density of this size, which no finer rule removes."""
    return 16 * torch.finfo(values.dtype).eps * (1 + values.amax(0).abs())
