"""Exact evidence of units whose latents are all discrete."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles

__all__ = ["Enumeration"]


@dataclass(frozen=True)
class Enumeration:
    """The sum of p(v, h; θ) over every value of the discrete latents of each unit: exact.

    Sums and products are ordered by Pyro so that chains and trees cost what a forward pass does.
    """

    def run(self, densities: UnitDensities, *, progress: bool = False) -> Particles:
        """Log p(v_u; θ) of every unit, as one particle without dimensions.

        Args:
            densities: the units.
            progress: not used; there is nothing to wait for.

        Raises:
            InputError: if a unit has continuous latents.
        """
        if densities.dim:
            raise InputError(
                f"Enumeration takes units whose latents are all discrete; these have "
                f"{densities.dim} continuous dimensions: use Quadrature or "
                "AnnealedImportanceSampling, in which the discrete ones are summed out"
            )
        latents = torch.empty(
            1, densities.num_units, 0, dtype=densities.dtype, device=densities.device
        )
        with torch.no_grad():
            log_weights = densities.log_joint(latents)
        error = torch.zeros_like(log_weights[0])
        return Particles(latents, log_weights, Kind.EXACT, numerical_error=error)
