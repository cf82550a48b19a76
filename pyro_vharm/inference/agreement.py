"""Whether a method that starts elsewhere finds the same log evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import t as student
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates, concatenate
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.choice import InferenceMethod
from pyro_vharm.inference.estimation import estimate_units
from pyro_vharm.inference.sequential import SequentialMonteCarlo
from pyro_vharm.inference.start import PriorStart, select_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_selector
from pyro_vharm.particles import Particles

__all__ = ["Agreement", "Confirmation", "confirm"]

_FAILURE_RATE = 1e-3
_MOST_BATCHES, _MOST_UNCUT = 2, 256
_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS, _GROUPS = 256, 1024, 2**16, 16

type Outcome = Literal["agrees", "contradicts", "undecided"]


@dataclass(frozen=True)
class Agreement:
    """What a second method, started elsewhere, says of some of the units.

    Attributes:
        first: log evidence of the units that were checked, by the method in question.
        second: the same by the other method, from random numbers of its own.
        degrees: degrees of freedom of the second's standard errors.
        tolerance: nats per unit within which the two must agree.
        method: the second method's settings.
    """

    first: UnitEstimates
    second: UnitEstimates
    degrees: int
    tolerance: float
    method: str

    @property
    def differences(self) -> UnitEstimates:
        """Second less first, per unit."""
        return self.second - self.first

    @property
    def outcome(self) -> Outcome:
        """Whether the second method agrees, contradicts, or cannot tell.

        It contradicts if it finds more evidence than the first, in total or in any unit, by more
        than their errors: then the first has missed mass. It agrees if the two are within
        tolerance per unit, errors included. If it finds less it may itself have missed mass, and
        where its own errors are large it says nothing.
        """
        apart, total = self.differences, self.differences.total()
        if total.value > self._limit(1) * total.mc_error:
            return "contradicts"
        if bool((apart.values > self._limit(len(apart.values)) * apart.errors).any()):
            return "contradicts"
        per_unit = total.per_unit
        within = abs(per_unit.value) + 2 * per_unit.mc_error <= self.tolerance
        return "agrees" if within else "undecided"

    @property
    def error_scale(self) -> float:
        """S ≥ 1, by which the first method's errors are to be multiplied.

        S = max(1, d/σ): by how many of its standard errors σ the second method finds a total d
        higher than the first's. A second that finds less may have missed mass itself and asks for
        nothing. It costs little where the errors are right: 8 % on average.

        Source: "The calculation of errors by the method of least squares", Birge (1932).
        """
        apart = self.differences.total()
        if not math.isfinite(apart.value) or not apart.mc_error > 0:
            return 1.0
        return max(1.0, apart.value / apart.mc_error)

    def _limit(self, comparisons: int) -> float:
        """How many standard errors may be chance."""
        return float(student.isf(_FAILURE_RATE / comparisons, self.degrees))

    def __str__(self) -> str:
        per_unit = self.differences.total().per_unit
        verb = {"agrees": "agrees", "contradicts": "contradicts", "undecided": "cannot tell"}
        return (
            f"{self.method} {verb[self.outcome]}: {per_unit.value:+.3f} ± {per_unit.mc_error:.3f} "
            f"nats per unit on {self.differences.num_units} units"
        )


@dataclass(frozen=True)
class Confirmation:
    """How log evidence is checked by a method that starts elsewhere.

    Chains that all miss a mode agree with each other, and so do their bounds. A method that comes
    from the prior may find it.

    Args:
        num_units: units to check, picked at random, from two batches at most.
        method: the second method. By default `SequentialMonteCarlo` from the prior; for a method
            that starts there itself, `AnnealedImportanceSampling` from a matched Gaussian.
        tolerance: nats per unit within which the two must agree, errors included; by default
            what losing half of the mass would cost.
    """

    num_units: int = 32
    method: InferenceMethod | None = None
    tolerance: float = math.log(2)

    def __post_init__(self) -> None:
        if self.num_units < 1:
            raise InputError(f"num_units must be at least 1, not {self.num_units}")
        if not self.tolerance > 0:
            raise InputError(f"tolerance must be positive, not {self.tolerance}")

    def second_to(self, method: InferenceMethod, densities: UnitDensities) -> InferenceMethod:
        """The second method for a first one, with more particles where the units are few."""
        if self.method is not None:
            return self.method
        if isinstance(getattr(method, "start", None), PriorStart):
            return AnnealedImportanceSampling(num_particles=64)
        count = densities.affordable(_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS)
        return SequentialMonteCarlo(count - count % _GROUPS, num_groups=_GROUPS)


def confirm(
    densities: Sequence[UnitDensities],
    first: Sequence[UnitEstimates],
    method: InferenceMethod,
    confirmation: Confirmation,
    progress: bool,
) -> Agreement | None:
    """Compare some units' log evidence with that of a second method.

    ``None`` where units cannot be run alone and are too many to run them all.

    Args:
        densities: one entry per batch.
        first: their log evidence.
        method: that gave it.
        confirmation: what to do.
        progress: show a bar.
    """
    batches = torch.randperm(len(densities))[:_MOST_BATCHES].tolist()
    wanted = -(-confirmation.num_units // len(batches))
    drawn = [_draw_units(densities[i], wanted) for i in batches]
    some = [(i, *found) for i, found in zip(batches, drawn, strict=True) if found is not None]
    if not some:
        return None
    second = confirmation.second_to(method, some[0][2])
    runs = [_run(densities[i], part, units, second, progress) for i, units, part in some]
    return Agreement(
        first=concatenate([first[i].take(units) for i, units, _ in some]),
        second=concatenate([estimate_units(run) for run in runs]),
        degrees=min(len(run.independent_log_weights) for run in runs) - 1,
        tolerance=confirmation.tolerance,
        method=str(second),
    )


def _draw_units(densities: UnitDensities, wanted: int) -> tuple[Tensor, UnitDensities] | None:
    """So many units at random, or all of them; ``None`` if they are many and stick together."""
    every = torch.arange(densities.num_units, device=densities.device)
    if densities.num_units <= wanted:
        return every, densities
    select = unit_selector(densities)
    if select is None:
        return (every, densities) if densities.num_units <= _MOST_UNCUT else None
    units = every[torch.randperm(densities.num_units, device=every.device)[:wanted]]
    return units, select(units)


def _run(
    densities: UnitDensities,
    part: UnitDensities,
    units: Tensor,
    method: InferenceMethod,
    progress: bool,
) -> Particles:
    if not isinstance(method, AnnealedImportanceSampling | SequentialMonteCarlo):
        return method.run(part, progress=progress)
    # units that run alone have no guide: they start where the whole batch says
    start = select_start(densities, method.start.prior_share, units)
    return method.run(part, start=start, progress=progress)
