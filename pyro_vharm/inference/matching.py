"""Coordinates matched to the bulk of a density that is known on a tensor grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vharm.inference.compass_search import Points
from pyro_vharm.inference.coordinates import SinhCoordinates
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.tensor_grid import TensorGrid

__all__ = ["match_coordinates"]

_TOO_FAR, _TOO_WIDE, _TOO_TILTED = 0.7, 1.6, 0.4
_TAIL = 0.16  # share of the mass beyond a standard deviation on either side
_CLIP = 3.0
_RELEVANT = 10.0  # nats below the highest peak down to which peaks count


def match_coordinates(
    coordinates: SinhCoordinates, grid: TensorGrid, peaks: Points
) -> tuple[SinhCoordinates, Tensor]:
    """Coordinates about medians, scaled by quantiles and turned by correlations, on a grid.

    A node stands for its cell, so that a peak within one cell is given that cell's width. Scales
    are by quantiles and correlations of clipped deviations, as tails may have no moments. Peaks
    that were climbed and lie farther apart widen the scale, so that far ones are not drawn in.

    Args:
        coordinates: those of the grid.
        grid: all units of them.
        peaks: what was climbed.

    Returns:
        the coordinates, and which units' old ones are far from them.
    """
    shares = torch.softmax(grid.values.flatten(0, -2), 0).reshape(grid.values.shape)
    shares = torch.where(torch.isfinite(shares), shares, 1 / math.prod(grid.counts))
    shares = shares.to(grid.lines[0].dtype)
    marginals = [_marginal(shares, (axis,)) for axis in range(len(grid.lines))]
    quantiles = [_quantiles(*pair) for pair in zip(grid.lines, marginals, strict=True)]
    below, median, above = coordinates.whitened(torch.stack(quantiles, -1))
    below, median, above = _widened(below, median, above, coordinates, peaks)
    own = coordinates.gaussian
    least = 64 * torch.finfo(shares.dtype).eps * (1 + own.mean.abs())
    width = 0.5 * (above - below)
    width = torch.maximum(width, least / own.scale_tril.diagonal(dim1=1, dim2=2))
    correlation = _correlation(coordinates, grid, shares, median, width)
    turn = width[..., None] * torch.linalg.cholesky(correlation)
    matched = UnitGaussian(own.unwhiten(median[None])[0], own.scale_tril @ turn)
    tilt = correlation.tril(-1).abs().amax((-1, -2))
    off = (median.abs() > _TOO_FAR) | (width.log().abs() > math.log(_TOO_WIDE))
    return SinhCoordinates(matched), off.any(-1) | (tilt > _TOO_TILTED)


def _marginal(shares: Tensor, axes: tuple[int, ...]) -> Tensor:
    others = [axis for axis in range(shares.dim() - 1) if axis not in axes]
    return shares.sum(others) if others else shares


def _quantiles(line: Tensor, marginal: Tensor) -> Tensor:
    """Three quantiles of one coordinate, shape ``(3, unit)``; mass is even within a cell."""
    levels = torch.tensor([_TAIL, 0.5, 1 - _TAIL], dtype=line.dtype, device=line.device)
    upto = marginal.T.contiguous().cumsum(-1)
    index = torch.searchsorted(upto, levels.expand(len(upto), 3).contiguous())
    index = index.clamp(max=len(line) - 1)
    mass = marginal.T.gather(1, index).clamp(min=torch.finfo(line.dtype).tiny)
    part = ((levels - upto.gather(1, index)) / mass + 0.5).clamp(-0.5, 0.5)
    return (line[0] + (line[1] - line[0]) * (index + part).T).contiguous()


def _widened(
    below: Tensor, median: Tensor, above: Tensor, coordinates: SinhCoordinates, peaks: Points
) -> tuple[Tensor, Tensor, Tensor]:
    """The same three, or the middle of high peaks and a quarter of their distance about it."""
    at = coordinates.gaussian.whiten(peaks.latents)
    high = (peaks.log_joint >= peaks.log_joint.amax(0) - _RELEVANT)[..., None]
    first = torch.where(high, at, math.inf).amin(0)
    last = torch.where(high, at, -math.inf).amax(0)
    middle, reach = 0.5 * (first + last), 0.25 * (last - first)
    apart = reach > 0.5 * (above - below)
    return (
        torch.where(apart, middle - reach, below),
        torch.where(apart, middle, median),
        torch.where(apart, middle + reach, above),
    )


def _correlation(
    coordinates: SinhCoordinates, grid: TensorGrid, shares: Tensor, median: Tensor, width: Tensor
) -> Tensor:
    """Correlation of clipped deviations from the median, shape ``(unit, dim, dim)``."""
    dim, deviations, variances = len(grid.lines), [], []
    for axis, line in enumerate(grid.lines):
        deviation = (coordinates.whitened(line) - median[:, axis]) / width[:, axis]
        deviations.append(deviation.clamp(-_CLIP, _CLIP))
        cell = grid.steps[:, axis] * coordinates.log_slope(line).exp() / width[:, axis]
        square = deviations[-1].square() + cell.clamp(max=_CLIP).square() / 12
        variances.append((_marginal(shares, (axis,)) * square).sum(0))
    correlation = torch.eye(dim, dtype=shares.dtype, device=shares.device)
    correlation = correlation.repeat(shares.shape[-1], 1, 1)
    for i in range(dim):
        for j in range(i):
            pair = _marginal(shares, (j, i))
            product = torch.einsum("jiu,ju,iu->u", pair, deviations[j], deviations[i])
            correlation[:, i, j] = product / (variances[i] * variances[j]).sqrt()
            correlation[:, j, i] = correlation[:, i, j]
    return correlation
