"""A grid of even spacing over each unit's posterior, from nodes that say where it lies."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles

__all__ = ["MOST_GRID_DIMS", "even_grid"]

MOST_GRID_DIMS = 2
_DEPTH = 32.0  # nats below the highest node at which the posterior is cut off: e⁻³² ≈ 1e-14
_FIRST, _MOST = {1: 513, 2: 65}, {1: 2**14 + 1, 2: 513}
_AGREED = 1e-7
_MARGIN = 0.05
_ROWS_PER_PASS = 2**20


def even_grid(densities: UnitDensities, run: Particles) -> Particles:
    """As many nodes on each axis, evenly spaced, in coordinates whitened by the moments.

    Quadrature places its nodes where they serve its rule. Marginal densities, cells and every
    second node are easier had on an even grid, whose trapezoidal rule converges faster than any
    power of the spacing for a density that vanishes at its ends. The spacing is halved until two
    rules agree to 1e-7 nats; the error of a unit is what they differ by.

    Args:
        densities: units of one or two continuous dimensions.
        run: quadrature nodes with their log weights.
    """
    with torch.no_grad():
        gaussian, low, high = _box(run)
        count, previous = _FIRST[densities.dim], None
        while True:
            line = torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)
            shares = torch.cartesian_prod(*[line] * densities.dim).reshape(-1, 1, densities.dim)
            nodes = gaussian.unwhiten(low + (high - low) * shares)
            values = _log_joint(densities, nodes) + gaussian.log_abs_det
            log_cell = ((high - low) / (count - 1)).log().sum(-1)
            log_evidence = torch.logsumexp(values, 0) + log_cell
            if previous is not None:
                error = (log_evidence - previous).abs()
                if bool((error < _AGREED).all()) or count >= _MOST[densities.dim]:
                    break
            previous, count = log_evidence, 2 * count - 1
    log_weights = values + log_cell + math.log(len(nodes))
    return replace(run, unconstrained=nodes, log_weights=log_weights, numerical_error=error)


def _box(run: Particles) -> tuple[UnitGaussian, Tensor, Tensor]:
    """The posterior's moments, and the ends of a box around it in coordinates whitened by them."""
    shares = run.log_weights.softmax(0)
    mean = (shares[..., None] * run.unconstrained).sum(0)
    apart = run.unconstrained - mean
    covariance = torch.einsum("pu,pui,puj->uij", shares, apart, apart)
    gaussian = UnitGaussian(mean, torch.linalg.cholesky(covariance))
    positions = gaussian.whiten(run.unconstrained)
    inside = (run.log_weights > run.log_weights.amax(0) - _DEPTH)[..., None]
    low = torch.where(inside, positions, math.inf).amin(0)
    high = torch.where(inside, positions, -math.inf).amax(0)
    margin = _MARGIN * (high - low)
    return gaussian, low - margin, high + margin


def _log_joint(densities: UnitDensities, nodes: Tensor) -> Tensor:
    parts = nodes.split(max(_ROWS_PER_PASS // densities.num_units, 1))
    values = torch.cat([densities.log_joint(part) for part in parts])
    return values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
