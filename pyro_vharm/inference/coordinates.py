"""Coordinates for quadrature: whitened by a Gaussian per unit, with tails drawn in by sinh."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.model.densities import UnitDensities

__all__ = ["SinhCoordinates", "log_joint"]

_ROWS_PER_PASS = 2**18
_SCALE = 4.0  # standard deviations up to which the coordinates are about linear


@dataclass(frozen=True)
class SinhCoordinates:
    """t with h = m + L s sinh(sinh(t / s)), axis by axis of the whitened latents.

    Within s standard deviations they are about linear, so that a Gaussian stays one. Beyond, an
    algebraic tail falls doubly exponentially, and the trapezoidal rule in t converges
    exponentially for it too ("Double Exponential Formulas for Numerical Integration", Takahasi,
    Mori, 1974; "The Exponentially Convergent Trapezoidal Rule", Trefethen, Weideman, 2014).

    Attributes:
        gaussian: m and L of each unit.
    """

    gaussian: UnitGaussian

    def whitened(self, at: Tensor) -> Tensor:
        """L⁻¹ (h − m) at the coordinates."""
        return _SCALE * torch.sinh(torch.sinh(at / _SCALE))

    def latents(self, at: Tensor) -> Tensor:
        """Unconstrained latents at coordinates ``(particle, unit, dim)``."""
        return self.gaussian.unwhiten(self.whitened(at))

    def of(self, latents: Tensor) -> Tensor:
        """Coordinates of latents ``(particle, unit, dim)``."""
        return _SCALE * torch.asinh(torch.asinh(self.gaussian.whiten(latents) / _SCALE))

    def log_slope(self, at: Tensor) -> Tensor:
        """Log of whitened latents per coordinate, of the same shape."""
        once = at / _SCALE
        return _log_cosh(once) + _log_cosh(torch.sinh(once))

    def log_abs_det(self, at: Tensor) -> Tensor:
        """Log volume of latents per volume of coordinates, shape ``(particle, unit)``."""
        return self.log_slope(at).sum(-1) + self.gaussian.log_abs_det

    def select(self, units: Tensor) -> SinhCoordinates:
        """Those of some of the units."""
        return SinhCoordinates(self.gaussian.select(units))

    def replace(self, units: Tensor, other: SinhCoordinates) -> SinhCoordinates:
        """With those of some of the units replaced."""
        return SinhCoordinates(self.gaussian.replaced(units, other.gaussian))


def _log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x) - math.log(2)


def log_joint(densities: UnitDensities, latents: Tensor) -> Tensor:
    """Log p(v, h; θ) in passes of bounded memory.

    The least number of the dtype, which weighs nothing, stands where it is no number or +∞, and
    says that it is not known.
    """
    per_pass = max(_ROWS_PER_PASS // densities.num_units, 1)
    values = torch.cat([densities.log_joint(part) for part in latents.split(per_pass)])
    unknown = torch.finfo(values.dtype).min
    return values.nan_to_num(nan=unknown, posinf=unknown, neginf=-math.inf)
