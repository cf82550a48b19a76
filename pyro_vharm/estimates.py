"""Numbers in nats that carry their error, their kind and the side they bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Bound", "Estimate", "Kind", "UnitEstimates", "concatenate"]


class Kind(IntEnum):
    """What a number rests on, from strongest to weakest.

    * ``EXACT``: enumeration or algebra.
    * ``NUMERICAL``: quadrature, with an error estimate.
    * ``CERTIFIED``: a stochastic bound that holds with the stated confidence by E[Ẑ] = Z alone.
    * ``ESTIMATED``: a Monte Carlo estimate with its standard error.
    * ``CONDITIONAL``: holds if the chains it starts from reached the posterior.
    """

    EXACT = 0
    NUMERICAL = 1
    CERTIFIED = 2
    ESTIMATED = 3
    CONDITIONAL = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Bound:
    """A one-sided bound on a total, in nats.

    Attributes:
        value: the bound.
        side: ``"lower"`` or ``"upper"``.
        kind: what it rests on.
        confidence: the probability with which a stochastic bound holds.
    """

    value: float
    side: Literal["lower", "upper"]
    kind: Kind
    confidence: float

    def __str__(self) -> str:
        sign = "≥" if self.side == "lower" else "≤"
        return f"{sign} {self.value:.3f} ({self.confidence:.0%}, {self.kind})"


@dataclass(frozen=True)
class Estimate:
    """A total over units with its errors, in nats.

    Attributes:
        value: the total.
        mc_error: standard error from our own random numbers (for quadrature, its error estimate).
        num_units: the number of units summed.
        kind: what the value rests on.
        sampling_error: standard error from which units were held out, paired by unit; ``None``
            where the units are the whole population of interest.
    """

    value: float
    mc_error: float
    num_units: int
    kind: Kind
    sampling_error: float | None = None

    @property
    def per_unit(self) -> Estimate:
        """The mean over units, with the errors scaled alike."""
        scale = 1.0 / self.num_units
        sampling = None if self.sampling_error is None else self.sampling_error * scale
        return replace(
            self, value=self.value * scale, mc_error=self.mc_error * scale, sampling_error=sampling
        )

    @property
    def is_seen(self) -> bool:
        """Whether it is above 0 by more than two standard errors of our random numbers."""
        return self.value > 2 * self.mc_error

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.mc_error:.3f}"


@dataclass(frozen=True)
class UnitEstimates:
    """One number per unit with its Monte Carlo standard error, in nats.

    Attributes:
        values: shape ``(unit,)``.
        mc_errors: standard errors, shape ``(unit,)``; independent between units.
        kind: the weakest kind among the numbers that entered.
        systematic: allowances that add up over units instead of averaging out (quadrature error,
            half the disagreement of forward and reverse runs), shape ``(unit,)`` or ``None``.
        units_each: how many units each value stands for: all, where one can be had for the total
            only.
    """

    values: Tensor
    mc_errors: Tensor
    kind: Kind
    systematic: Tensor | None = None
    units_each: int = 1

    @property
    def num_units(self) -> int:
        """The number of units."""
        return self.values.shape[0] * self.units_each

    def take(self, units: Tensor) -> UnitEstimates:
        """Those of some of the units, by index."""
        systematic = None if self.systematic is None else self.systematic[units]
        return replace(
            self,
            values=self.values[units],
            mc_errors=self.mc_errors[units],
            systematic=systematic,
        )

    def with_errors_times(self, scale: float) -> UnitEstimates:
        """The same values with all errors multiplied."""
        return replace(self, mc_errors=scale * self.mc_errors, systematic=scale * self._allowance())

    def pooled(self) -> UnitEstimates:
        """All units as one value."""
        return UnitEstimates(
            values=self.values.sum(0, keepdim=True),
            mc_errors=self.mc_errors.square().sum(0, keepdim=True).sqrt(),
            kind=self.kind,
            systematic=self._allowance().sum(0, keepdim=True),
            units_each=self.num_units,
        )

    def total(self) -> Estimate:
        """The sum over units; standard errors add in quadrature, systematic ones add up."""
        random = float(self.mc_errors.double().square().sum().sqrt())
        systematic = 0.0 if self.systematic is None else float(self.systematic.double().sum())
        error = math.hypot(random, systematic)
        return Estimate(float(self.values.double().sum()), error, self.num_units, self.kind)

    @property
    def errors(self) -> Tensor:
        """Standard and systematic error of each unit together, shape ``(unit,)``."""
        return torch.hypot(self.mc_errors, self._allowance())

    def _allowance(self) -> Tensor:
        return torch.zeros_like(self.values) if self.systematic is None else self.systematic

    def heldout_total(self) -> Estimate:
        """The sum over held-out units, with the error from which units were held out.

        The sampling variance is n · var(values) less the Monte Carlo variance that is in it:
        differences of two models on the same units are paired before they come here.
        """
        n = len(self.values)
        if n < 2:
            return replace(self.total(), sampling_error=math.inf)
        noise = float(self.mc_errors.double().square().sum())
        variance = n * float(self.values.double().var()) - noise
        return replace(self.total(), sampling_error=math.sqrt(max(variance, 0.0)))

    def __sub__(self, other: UnitEstimates) -> UnitEstimates:
        """Difference of two estimates made from independent random numbers.

        Per unit where both are; of the totals where one is known in total only.
        """
        if self.units_each != other.units_each:
            return self.pooled() - other.pooled()
        return UnitEstimates(
            values=self.values - other.values,
            mc_errors=torch.hypot(self.mc_errors, other.mc_errors),
            kind=max(self.kind, other.kind),
            systematic=self._allowance() + other._allowance(),
            units_each=self.units_each,
        )


def concatenate(parts: Sequence[UnitEstimates]) -> UnitEstimates:
    """The units of several batches, one after the other."""
    return UnitEstimates(
        values=torch.cat([part.values for part in parts]),
        mc_errors=torch.cat([part.mc_errors for part in parts]),
        kind=max(part.kind for part in parts),
        systematic=torch.cat([part._allowance() for part in parts]),
        units_each=parts[0].units_each,
    )
