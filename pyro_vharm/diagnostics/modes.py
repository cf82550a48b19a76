"""Modes of a posterior, found by climbing from its draws."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.peaks import ascend, peaks_of
from pyro_vharm.model.densities import UnitDensities

__all__ = ["Modes", "find_modes"]

_STEPS = 150


class Modes(NamedTuple):
    """The modes of each unit's density on the unconstrained scale that climbs from draws reached.

    Attributes:
        masses: share of the settled draws from which a mode was reached, the highest mode first;
            0 where a unit has fewer; shape ``(unit, mode)``.
        locations: shape ``(mode, unit, dim)``.
        num_settled: draws of each unit whose climb came to rest, shape ``(unit,)``.
        num_climbs: draws of each unit that a climb began from.
    """

    masses: Tensor
    locations: Tensor
    num_settled: Tensor
    num_climbs: int

    @property
    def counts(self) -> Tensor:
        """How many modes were reached, shape ``(unit,)``."""
        return (self.masses > 0).sum(-1)

    @property
    def errors(self) -> Tensor:
        """Standard error of the masses, √(π (1 − π) / n), shape ``(unit, mode)``."""
        return (self.masses * (1 - self.masses) / self.num_settled[:, None]).sqrt()

    def unseen_mass(self, delta: float = 0.05) -> Tensor:
        """A mode with more mass than this is missed with probability at most delta, ``(unit,)``.

        With n draws, one of mass π is missed with probability (1 − π)ⁿ.
        """
        return 1 - delta ** (1 / self.num_settled)

    @property
    def share_with_several(self) -> tuple[float, float]:
        """The share of units found to have more than one mode, and its standard error.

        The error is that of repeating the climbs from other draws on the same units: one with
        masses π is found again with probability 1 − Σ πⁿ.
        """
        found = (self.counts > 1).double()
        again = 1 - (self.masses.double() ** self.num_settled[:, None]).sum(-1)
        again = torch.where(found > 0, again, 0.0)
        variance = float((again * (1 - again)).sum())
        return float(found.mean()), math.sqrt(variance) / len(found)


def find_modes(densities: UnitDensities, draws: Tensor, gaussian: UnitGaussian) -> Modes:
    """Climb from posterior draws to maxima of p(h | v; θ), and tell these apart.

    Each climb is a quasi-Newton ascent of its own, in coordinates that a Gaussian whitens. Two
    maxima count as one where along the straight line between them the log density does not fall
    0.1 nats below the lower of them.

    Args:
        densities: of the units.
        draws: independent posterior draws, shape ``(draw, unit, dim)``.
        gaussian: of each unit's posterior.
    """
    ascent = ascend(densities, gaussian, gaussian.whiten(draws), _STEPS)
    masses, locations = [], []
    count = ascent.settled.sum(0)
    for peak in peaks_of(densities, gaussian, ascent):
        masses.append(peak.same.sum(0) / count)
        locations.append(gaussian.unwhiten(peak.at[None])[0])
    if not masses:
        empty = torch.zeros_like(gaussian.mean)
        return Modes(empty[:, :0], empty[None, :0], count, len(draws))
    return Modes(torch.stack(masses, -1).nan_to_num(), torch.stack(locations), count, len(draws))
