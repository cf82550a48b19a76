"""Whether climbs from the prior lead to nothing but what a Gaussian of each unit covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.coverage import FAR, Weighed, finds_no_new_mass
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.score_matching import ScoredDraws, score_draws
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import WORTH_CUTTING, Selector

__all__ = ["all_climbs_end_near"]

_SCOUTS_PER_CLIMBER = 4
_LEVEL, _ON_TOP = 0.5, 0.01  # nats that a Newton step may still gain


def all_climbs_end_near(
    densities: UnitDensities,
    gaussian: UnitGaussian,
    draws: ScoredDraws,
    num_climbers: int,
    num_steps: int,
    select: Selector | None = None,
) -> Tensor:
    """Whether the prior leads to nothing but what a Gaussian covers, shape ``(unit,)``.

    Climbers go from draws of the prior up the posterior density, by its scores, in the coordinates
    of the Gaussian. A step is as long as the slope, which leads to the top of a Gaussian, or longer
    and longer where the slope rises; at first no longer than a standard deviation in each dim, then
    twice as long, or a quarter where that is not higher. It leads to what the Gaussian covers where
    the ground is level within two and a half standard deviations of the mean, and elsewhere where
    it stands on top of another peak. Before, draws of the prior, four times as many, must not find
    mass that those of the Gaussian do not.

    Args:
        densities: the units.
        gaussian: one for each unit.
        draws: of that Gaussian.
        num_climbers: for each unit.
        num_steps: most steps of a climb.
        select: what gives the densities of some of the units, so that those climbers alone go on
            that have not ended.
    """
    scouts = densities.draw_prior(_SCOUTS_PER_CLIMBER * num_climbers)
    whitened = gaussian.whiten(scouts)
    log_matched = gaussian.log_prob_whitened(draws.whitened)
    own = Weighed(draws.log_prior, draws.log_joint, log_matched)
    found = Weighed.at(densities, scouts, gaussian.log_prob_whitened(whitened))
    covered = finds_no_new_mass(own, found)
    climb = _Climb.begin(densities, gaussian, whitened[:num_climbers])
    units = torch.arange(len(covered), device=covered.device).expand(num_climbers, -1)
    elsewhere = torch.zeros_like(covered)
    moving = torch.ones_like(units, dtype=torch.bool)
    for _ in range(num_steps):
        climb = climb.step()
        level, near = climb.is_level, climb.is_near
        busy, on_other = torch.zeros_like(covered), torch.zeros_like(covered)
        busy[units[~level]] = True
        on_other[units[climb.is_on_top & ~near]] = True
        elsewhere |= on_other & ~busy
        moving = ~(level & near) & ~elsewhere[units]
        if not bool(moving.any()):
            break
        if select is not None and float(moving.double().mean()) < WORTH_CUTTING:
            kept = moving.flatten().nonzero().flatten()
            unit = units.flatten()[kept]
            parts = unit.split(densities.num_units)  # a model may know how many units there are
            climb = climb.of([(select(some), gaussian.select(some)) for some in parts], kept)
            units, moving = unit[None], torch.ones_like(unit[None], dtype=torch.bool)
    elsewhere[units[moving]] = True
    return covered & ~elsewhere


class _Climb(NamedTuple):
    """Where climbers stand, and how they are to go on.

    Attributes:
        parts: densities that together have the units, with the Gaussians whose coordinates the
            climbers move in.
        at: positions, densities and slopes, ``(climber, unit, …)``.
        radius: the longest that the next step may be, ``(climber, unit)``.
        factor: how many times the slope the next step is long, ``(climber, unit)``.
    """

    parts: Sequence[tuple[UnitDensities, UnitGaussian]]
    at: ScoredDraws
    radius: Tensor
    factor: Tensor

    @classmethod
    def begin(cls, densities: UnitDensities, gaussian: UnitGaussian, first: Tensor) -> _Climb:
        at = score_draws(densities, gaussian, first)
        radius = torch.full_like(at.log_joint, first.shape[-1] ** 0.5)
        return cls([(densities, gaussian)], at, radius, torch.ones_like(radius))

    @property
    def is_level(self) -> Tensor:
        """Whether a Newton step would gain little, ``(climber, unit)``."""
        return 0.5 * self.at.scores.square().sum(-1) < _LEVEL

    @property
    def is_on_top(self) -> Tensor:
        """Whether a Newton step would gain next to nothing, ``(climber, unit)``.

        Not where the last step found a steeper slope: that is the foot of a hill, or a flat tail.
        """
        return (0.5 * self.at.scores.square().sum(-1) < _ON_TOP) & (self.factor == 1.0)

    @property
    def is_near(self) -> Tensor:
        """Whether climbers stand near the mean, ``(climber, unit)``."""
        near: Tensor = self.at.whitened.norm(dim=-1) < FAR
        return near

    def step(self) -> _Climb:
        slope = self.at.scores.norm(dim=-1)
        length = torch.minimum(self.factor * slope, self.radius)
        step = self.at.scores * (length / slope.clamp(min=1e-30))[..., None]
        tried = self._score(self.at.whitened + step)
        up = tried.log_joint > self.at.log_joint
        steeper = up & (tried.scores.norm(dim=-1) > slope)
        return self._replace(
            at=tried.where(up, self.at),
            radius=torch.where(up, 2.0 * self.radius, 0.25 * length),
            factor=torch.where(steeper, 2.0 * self.factor, 1.0),
        )

    def _score(self, whitened: Tensor) -> ScoredDraws:
        columns = whitened.split([densities.num_units for densities, _ in self.parts], 1)
        found = [score_draws(*part, some) for part, some in zip(self.parts, columns, strict=True)]
        return ScoredDraws(*(torch.cat(fields, 1) for fields in zip(*found, strict=True)))

    def of(self, parts: Sequence[tuple[UnitDensities, UnitGaussian]], climbers: Tensor) -> _Climb:
        """Some climbers alone, by their places in a row, each as the only one of a unit."""
        at = ScoredDraws(*(field.flatten(0, 1)[None, climbers] for field in self.at))
        radius, factor = (field.flatten()[None, climbers] for field in (self.radius, self.factor))
        return _Climb(parts, at, radius, factor)
