"""Whether a method that starts elsewhere finds the same log evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import t as student

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates, concatenate
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.choice import InferenceMethod
from pyro_vharm.inference.estimation import estimate_units
from pyro_vharm.inference.sequential import SequentialMonteCarlo
from pyro_vharm.inference.start import PriorStart, match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_selector

__all__ = ["Agreement", "Confirmation", "confirm"]

_FAILURE_RATE = 1e-3
_MOST_BATCHES, _MOST_UNCUT = 2, 256

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
        tolerance: nats per unit within which the two must agree, errors included.
    """

    num_units: int = 32
    method: InferenceMethod | None = None
    tolerance: float = 0.3

    def __post_init__(self) -> None:
        if self.num_units < 1:
            raise InputError(f"num_units must be at least 1, not {self.num_units}")
        if not self.tolerance > 0:
            raise InputError(f"tolerance must be positive, not {self.tolerance}")

    def second_to(self, method: InferenceMethod) -> InferenceMethod:
        """The second method, for a first one."""
        if self.method is not None:
            return self.method
        if isinstance(getattr(method, "start", None), PriorStart):
            return AnnealedImportanceSampling(num_particles=32)
        return SequentialMonteCarlo()


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
    second = confirmation.second_to(method)
    batches = torch.randperm(len(densities))[:_MOST_BATCHES].tolist()
    wanted = -(-confirmation.num_units // len(batches))
    pairs = [_pair(densities[i], first[i], second, wanted, progress) for i in batches]
    known = [pair for pair in pairs if pair is not None]
    if not known:
        return None
    groups = min(degrees for _, _, degrees in known)
    return Agreement(
        first=concatenate([one for one, _, _ in known]),
        second=concatenate([other for _, other, _ in known]),
        degrees=groups - 1,
        tolerance=confirmation.tolerance,
        method=str(second),
    )


def _pair(
    densities: UnitDensities,
    first: UnitEstimates,
    method: InferenceMethod,
    wanted: int,
    progress: bool,
) -> tuple[UnitEstimates, UnitEstimates, int] | None:
    """The same units by both methods, and from how many independent weights the second is."""
    part, units = densities, torch.arange(densities.num_units, device=densities.device)
    select = unit_selector(densities) if densities.num_units > wanted else None
    if select is not None:
        units = units[torch.randperm(densities.num_units, device=units.device)[:wanted]]
        part = select(units)
    elif densities.num_units > _MOST_UNCUT:
        return None
    if isinstance(method, AnnealedImportanceSampling | SequentialMonteCarlo):
        # units that run alone have no guide: they start where the whole batch says
        start = match_start(densities, method.start.prior_share).select(units)
        run = method.run(part, start=start, progress=progress)
    else:
        run = method.run(part, progress=progress)
    return first.take(units), estimate_units(run), len(run.independent_log_weights)
