"""Schedules of temperatures: where along the annealing path to stop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_vharm.errors import InputError

__all__ = [
    "AdaptiveSchedule",
    "LinearSchedule",
    "Schedule",
    "SigmoidSchedule",
    "ThermodynamicLength",
]


class ThermodynamicLength(NamedTuple):
    """How far apart the densities of the path lie, as a pilot measured it per unit.

    The length from 0 to β is ∫₀^β sd_{f_b}[log p(v, h; θ) − log f_0(h)] db; measured as the sum of
    √log(1 + V) over short steps whose weights have relative variance V, which a few particles of
    next to no weight leave as it is. With T steps of equal length Λ/T and perfect mixing, log
    weights have variance Λ²/T, the least there can be.

    Attributes:
        temperatures: β at the knots, rising from 0 to 1, shape ``(knot, unit)``.
        lengths: the length up to each knot, shape ``(knot, unit)``.

    Source: "Using thermodynamic integration to calculate the posterior probability in Bayesian
    model selection problems", Calderhead, Girolami (2009); "Annealing between distributions by
    averaging moments", Grosse, Maddison, Salakhutdinov (2013).
    """

    temperatures: Tensor
    lengths: Tensor

    @classmethod
    def unmeasured(cls, like: Tensor) -> ThermodynamicLength:
        """Of which nothing is known but the ends, for units like those of a ``(unit,)`` tensor."""
        ends = torch.stack([torch.zeros_like(like), torch.ones_like(like)])
        return cls(ends, torch.zeros_like(ends))

    def select(self, units: Tensor) -> ThermodynamicLength:
        """That of some of the units."""
        return ThermodynamicLength(self.temperatures[:, units], self.lengths[:, units])


class Schedule(Protocol):
    """Places temperatures along the path."""

    @property
    def needs_length(self) -> bool:
        """Whether a pilot must measure the path first."""
        ...

    def place(self, num_steps: int, length: ThermodynamicLength) -> Tensor:
        """0 = β_0 < … < β_T = 1 for every unit, shape ``(T + 1, unit)``."""
        ...


@dataclass(frozen=True)
class LinearSchedule:
    """β_t = t / T.

    >>> one_unit = torch.tensor([[0.0], [1.0]])
    >>> LinearSchedule().place(2, ThermodynamicLength(one_unit, one_unit)).flatten().tolist()
    [0.0, 0.5, 1.0]
    """

    needs_length = False

    def place(self, num_steps: int, length: ThermodynamicLength) -> Tensor:
        """Equal steps for every unit."""
        return _even(num_steps, length)


@dataclass(frozen=True)
class SigmoidSchedule:
    """β_t ∝ σ(δ (2t/T − 1)), shifted and scaled to run from 0 to 1: short steps at both ends.

    Args:
        steepness: δ.

    Source: "Sandwiching the marginal likelihood using bidirectional Monte Carlo", Grosse,
    Ghahramani, Adams (2015).
    """

    steepness: float = 4.0
    needs_length = False

    def __post_init__(self) -> None:
        if self.steepness <= 0:
            raise InputError(f"steepness must be positive, not {self.steepness}")

    def place(self, num_steps: int, length: ThermodynamicLength) -> Tensor:
        """The same steps for every unit."""
        ramp = torch.sigmoid(self.steepness * (2 * _even(num_steps, length) - 1))
        return (ramp - ramp[0]) / (ramp[-1] - ramp[0])


@dataclass(frozen=True)
class AdaptiveSchedule:
    """Steps of equal thermodynamic length for each unit, with a share of equal steps mixed in.

    Args:
        even_share: share of β itself in the coordinate that is divided equally: the length is
            measured by few particles, and a stretch where they saw none must not become one step.
    """

    even_share: float = 0.1
    needs_length = True

    def __post_init__(self) -> None:
        if not 0 < self.even_share <= 1:
            raise InputError(f"even_share must lie in (0, 1], not {self.even_share}")

    def place(self, num_steps: int, length: ThermodynamicLength) -> Tensor:
        """Invert the share of the length travelled, unit by unit."""
        knots, total = length.temperatures, length.lengths[-1]
        travelled = torch.where(total > 0, length.lengths / total, knots)
        share = (1 - self.even_share) * travelled + self.even_share * knots
        even = _even(num_steps, length)
        right = torch.searchsorted(share.T.contiguous(), even.T.contiguous()).T
        right = right.clamp(1, len(knots) - 1)
        low, high = share.gather(0, right - 1), share.gather(0, right)
        start, stop = knots.gather(0, right - 1), knots.gather(0, right)
        rise = ((even - low) / (high - low).clamp(min=math.ulp(1.0))).clamp(0, 1)
        placed = start + rise * (stop - start)
        placed[0], placed[-1] = 0.0, 1.0
        return placed


def _even(num_steps: int, length: ThermodynamicLength) -> Tensor:
    like = length.lengths
    line = torch.linspace(0, 1, num_steps + 1, dtype=like.dtype, device=like.device)
    return line[:, None].repeat(1, like.shape[1])
