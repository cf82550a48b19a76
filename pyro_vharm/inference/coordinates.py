"""Coordinates for quadrature: whitened by a Gaussian per unit, with tails drawn in by sinh."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.inference.start import UnitGaussian
from pyro_vharm.model.densities import UnitDensities

__all__ = ["SinhCoordinates", "log_joint"]

_ROWS_PER_PASS = 2**18
_SCALE = 4.0  # standard deviations up to which the coordinates are about linear


@dataclass(frozen=True)
class SinhCoordinates:
    """t with h = m + L s sinh(t / s), axis by axis of the whitened latents.

    Within s standard deviations they are about linear, so that a Gaussian stays one. Beyond, a
    tail |h|^(−p) falls as exp(−(p − 1) |t| / s), and the trapezoidal rule in t converges
    exponentially for it too ("The Exponentially Convergent Trapezoidal Rule", Trefethen, Weideman,
    2014, section 14; "Double Exponential Formulas for Numerical Integration", Takahasi, Mori,
    1974).

    Attributes:
        gaussian: m and L of each unit.
    """

    gaussian: UnitGaussian

    def whitened(self, at: Tensor) -> Tensor:
        """L⁻¹ (h − m) at the coordinates."""
        return _SCALE * torch.sinh(at / _SCALE)

    def latents(self, at: Tensor) -> Tensor:
        """Unconstrained latents at coordinates ``(particle, unit, dim)``."""
        return self.gaussian.unwhiten(self.whitened(at))

    def of(self, latents: Tensor) -> Tensor:
        """Coordinates of latents ``(particle, unit, dim)``."""
        return _SCALE * torch.asinh(self.gaussian.whiten(latents) / _SCALE)

    def slope(self, at: Tensor) -> Tensor:
        """What a small step of each coordinate is in whitened latents, of the same shape."""
        return torch.cosh(at / _SCALE)

    def log_abs_det(self, at: Tensor) -> Tensor:
        """Log volume of latents per volume of coordinates, shape ``(particle, unit)``."""
        log_slope = torch.logaddexp(at / _SCALE, -at / _SCALE) - math.log(2)
        return log_slope.sum(-1) + self.gaussian.log_abs_det

    def select(self, units: Tensor) -> SinhCoordinates:
        """Those of some of the units."""
        return SinhCoordinates(self.gaussian.select(units))


def log_joint(densities: UnitDensities, latents: Tensor) -> Tensor:
    """Log p(v, h; θ) in passes of bounded memory; NaN counts as no density."""
    per_pass = max(_ROWS_PER_PASS // densities.num_units, 1)
    values = torch.cat([densities.log_joint(part) for part in latents.split(per_pass)])
    return values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
