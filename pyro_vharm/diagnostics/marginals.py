"""Marginals of weighted particles: how far from Gaussian each is, and whether it has a dip."""

from __future__ import annotations

import math
from typing import NamedTuple

import diptest
import numpy as np
import torch
from torch import Tensor

from pyro_vharm.diagnostics.weighted_moments import Blocks, Weighted

__all__ = ["dips", "marginal_negentropies", "quantiles", "with_principal_axes"]

_BINS = 512
_REACH = 12.0  # standard deviations beyond which weight is counted at the end
_MARGIN = 6.0  # kernel widths beyond the outermost particles
_LEAST_WIDTH = 0.05
_RULES = ((1.0, 16), (0.7, 8))  # share of the frequencies, bins per node


class _Bins(NamedTuple):
    """A line of bins for each coordinate of each unit, shape ``(unit, dim)`` each."""

    low: Tensor
    cell: Tensor
    number: int

    @property
    def frequencies(self) -> Tensor:
        """Of the discrete Fourier transform, ``(unit, dim, frequency)``."""
        line: Tensor = torch.fft.rfftfreq(self.number, dtype=self.cell.dtype)
        return 2 * math.pi * line.to(self.cell.device) / self.cell[..., None]

    def entropy(self, mass: Tensor, kernel: Tensor) -> Tensor:
        """Of the density with so much mass in each bin, smoothed by a kernel's transform."""
        smooth: Tensor = torch.fft.irfft(torch.fft.rfft(mass) * kernel, n=self.number).clamp(
            min=0.0
        )
        smooth = smooth / smooth.sum(-1, keepdim=True)
        entropy: Tensor = torch.special.entr(smooth).sum(-1)
        return entropy + self.cell.log()


def marginal_negentropies(particles: Weighted, blocks: Blocks, sizes: Tensor) -> Tensor:
    """KL of each marginal to its matched Gaussian, ``(version, unit, dim)``, in nats.

    Of random particles, marginals are smoothed by a Gaussian kernel, which takes the matched
    Gaussian along: by the data processing inequality the result is at most KL(p_i ‖ N(m_i, S_ii)),
    and 0 for a Gaussian. Of a grid, on which the trapezoidal rule has converged, marginals are
    known up to the highest frequency that its nodes carry; the second version has fewer of those,
    and coarser bins.

    Args:
        particles: with standardised coordinates.
        blocks: of them.
        sizes: effective number of particles, which sets the kernel's width; shape ``(unit,)``.
    """
    if not blocks.random:
        return _grid_negentropies(particles)
    z = particles.standard.clamp(-_REACH, _REACH)
    width = (0.7 * sizes.double() ** -0.2).clamp(min=_LEAST_WIDTH)
    width = width[:, None].expand(z.shape[1:])
    bins = _bins(z, _MARGIN * width, _BINS)
    kernel = torch.exp(-0.5 * (bins.frequencies * width[..., None]).square())
    parts = [_binned(particles.weights[one], z[one], bins) for one in blocks.members]
    mass = blocks.combine(torch.stack(parts))
    mass = mass / mass.sum(-1, keepdim=True)
    place = torch.arange(bins.number, dtype=z.dtype, device=z.device)
    first, second = (mass * place).sum(-1), (mass * place.square()).sum(-1)
    variance = (second - first.square()) * bins.cell.square() + width.square()
    return _gaussian_entropy(variance) - bins.entropy(mass, kernel)


def _grid_negentropies(particles: Weighted) -> Tensor:
    z, dim = particles.standard, particles.standard.shape[-1]
    count = round(len(z) ** (1 / dim))
    steps = torch.stack([(z[count**axis] - z[0]).abs() for axis in range(dim)]).amax(0)
    versions = []
    for share, bins_per_node in _RULES:
        bins = _bins(z, steps, bins_per_node * count * dim)
        binning = torch.sinc(bins.frequencies * bins.cell[..., None] / (2 * math.pi)).square()
        kernel = (bins.frequencies <= share * math.pi / steps[..., None]) / binning
        entropy = bins.entropy(_binned(particles.weights, z, bins), kernel)
        versions.append(_gaussian_entropy(torch.ones_like(entropy)) - entropy)
    return torch.stack(versions)


def _gaussian_entropy(variance: Tensor) -> Tensor:
    return 0.5 * (2 * math.pi * math.e * variance).log()


def _bins(z: Tensor, margin: Tensor, count: int) -> _Bins:
    low, high = z.amin(0) - margin, z.amax(0) + margin
    return _Bins(low, (high - low) / (count - 1), count)


def _binned(weights: Tensor, z: Tensor, bins: _Bins) -> Tensor:
    """Weight in each bin, shared between the two bins next to each particle."""
    position = (z - bins.low) / bins.cell
    left = position.floor().clamp(0, bins.number - 2)
    right_share = position - left
    shape = (*z.shape[1:], bins.number)
    mass = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
    for index, share in ((left, 1 - right_share), (left + 1, right_share)):
        part = (weights[..., None] * share).movedim(0, -1)
        mass.scatter_add_(-1, index.long().movedim(0, -1), part)
    return mass


def with_principal_axes(particles: Weighted) -> Tensor:
    """Coordinates, then projections on the eigenvectors of the covariance, if there are several.

    Shape ``(particle, unit, axis)``, the coordinates shifted and scaled as they are.
    """
    z, scale = particles.standard, particles.scale
    if z.shape[-1] == 1:
        return z
    covariance = torch.einsum("pu,pui,puj->uij", particles.weights, scale * z, scale * z)
    axes = torch.linalg.eigh(covariance).eigenvectors
    return torch.cat([z, torch.einsum("pui,uia->pua", scale * z, axes)], -1)


def quantiles(values: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    """Quantiles of weighted marginals, at as many levels as particles are effective.

    The weighted distribution function is made continuous between particles, so that no two are
    equal because a particle has a large weight.

    Args:
        values: shape ``(particle, unit, axis)``.
        weights: normalised, shape ``(particle, unit)``.
        sizes: effective number of particles, shape ``(unit,)``.

    Returns:
        shape ``(level, unit, axis)``, rising; NaN beyond the levels of a unit.
    """
    counts = sizes.floor().clamp(min=4).long().tolist()
    columns, masses = values.double().cpu().numpy(), weights.double().cpu().numpy()
    found = np.full((max(counts), *columns.shape[1:]), np.nan)
    for unit, count in enumerate(counts):
        levels = (np.arange(count) + 0.5) / count
        for axis in range(columns.shape[2]):
            order = columns[:, unit, axis].argsort()
            sorted_masses = masses[order, unit]
            below = sorted_masses.cumsum() - 0.5 * sorted_masses
            found[:count, unit, axis] = np.interp(levels, below, columns[order, unit, axis])
    return torch.from_numpy(found).to(values.device)


def dips(points: Tensor) -> tuple[Tensor, Tensor]:
    """Hartigan's dip of each marginal, with its p-value, shape ``(unit, axis)`` each.

    The p-value is that of as many draws without weights as there are points; NaN where all weight
    is on one particle.

    Args:
        points: rising `quantiles`, shape ``(level, unit, axis)``.

    Source: "The Dip Test of Unimodality", Hartigan, Hartigan (1985).
    """
    columns = points.flatten(1).T.cpu().numpy()
    found = [_dip(column[~np.isnan(column)]) for column in columns]
    pairs = torch.tensor(found, dtype=torch.float64, device=points.device)
    pairs = pairs.reshape(*points.shape[1:], 2)
    return pairs[..., 0], pairs[..., 1]


def _dip(points: np.ndarray) -> tuple[float, float]:
    if len(points) == 0:
        return math.nan, math.nan
    statistic, p_value = diptest.diptest(points, sort_x=False)
    return float(statistic), float(p_value)
