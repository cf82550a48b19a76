"""Whether climbs from the prior lead to nothing but what a Gaussian of each unit covers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.score_matching import ScoredDraws, log_weights, score_draws
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import WORTH_CUTTING, Selector
from pyro_vharm.particles import log_mean_exp

__all__ = ["all_climbs_end_near"]

_SCOUTS_PER_CLIMBER = 4
_FAR = 2.5  # standard deviations of a peak from the mean
_LEVEL, _ON_TOP = 0.5, 0.01  # nats that a Newton step may still gain
_NEW_MASS = 0.5  # nats that draws of the prior may add


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
        select: what gives the densities of some of the units, so that climbs go on for those alone
            whose climbers have not all ended.
    """
    with torch.no_grad():
        prior = densities.draw_prior(_SCOUTS_PER_CLIMBER * num_climbers)
        covered = _adds_little(densities, gaussian, draws, prior)
        first = gaussian.whiten(prior[:num_climbers])
    climb = _Climb.begin(densities, gaussian, first)
    near = torch.zeros_like(covered)
    left = torch.arange(len(covered), device=covered.device)
    for _ in range(num_steps):
        climb = climb.step()
        near[left] = (climb.is_level & climb.is_near).all(0)
        elsewhere = climb.is_level.all(0) & (climb.is_on_top & ~climb.is_near).any(0)
        ended = near[left] | elsewhere
        if bool(ended.all()):
            break
        if select is not None and float((~ended).double().mean()) < WORTH_CUTTING:
            kept = (~ended).nonzero().flatten()
            left = left[kept]
            climb = climb.of(select(left), kept)
    return covered & near


class _Climb(NamedTuple):
    """Where climbers stand, and how they are to go on.

    Attributes:
        densities: the units.
        gaussian: whose coordinates they move in.
        at: positions, densities and slopes, ``(climber, unit, …)``.
        radius: the longest that the next step may be, ``(climber, unit)``.
        factor: how many times the slope the next step is long, ``(climber, unit)``.
    """

    densities: UnitDensities
    gaussian: UnitGaussian
    at: ScoredDraws
    radius: Tensor
    factor: Tensor

    @classmethod
    def begin(cls, densities: UnitDensities, gaussian: UnitGaussian, first: Tensor) -> _Climb:
        at = score_draws(densities, gaussian, first)
        radius = torch.full_like(at.log_joint, first.shape[-1] ** 0.5)
        return cls(densities, gaussian, at, radius, torch.ones_like(radius))

    @property
    def is_level(self) -> Tensor:
        """Whether a Newton step would gain little, ``(climber, unit)``."""
        return 0.5 * self.at.scores.square().sum(-1) < _LEVEL

    @property
    def is_on_top(self) -> Tensor:
        """Whether a Newton step would gain next to nothing, ``(climber, unit)``."""
        return 0.5 * self.at.scores.square().sum(-1) < _ON_TOP

    @property
    def is_near(self) -> Tensor:
        """Whether climbers stand near the mean, ``(climber, unit)``."""
        near: Tensor = self.at.whitened.norm(dim=-1) < _FAR
        return near

    def step(self) -> _Climb:
        slope = self.at.scores.norm(dim=-1)
        length = torch.minimum(self.factor * slope, self.radius)
        step = self.at.scores * (length / slope.clamp(min=1e-30))[..., None]
        tried = score_draws(self.densities, self.gaussian, self.at.whitened + step)
        up = tried.log_joint > self.at.log_joint
        steeper = up & (tried.scores.norm(dim=-1) > slope)
        return self._replace(
            at=tried.where(up, self.at),
            radius=torch.where(up, 2.0 * self.radius, 0.25 * length),
            factor=torch.where(steeper, 2.0 * self.factor, 1.0),
        )

    def of(self, densities: UnitDensities, units: Tensor) -> _Climb:
        """Those of some of the units."""
        gaussian, at = self.gaussian.select(units), self.at.select(units)
        return _Climb(densities, gaussian, at, self.radius[:, units], self.factor[:, units])


def _adds_little(
    densities: UnitDensities, gaussian: UnitGaussian, draws: ScoredDraws, prior: Tensor
) -> Tensor:
    """Whether weights under the mixture of both kinds of draws have the mean of the Gaussian's."""
    terms = densities.terms(prior)
    log_joint = torch.cat([draws.log_joint, terms.log_joint.nan_to_num(nan=-torch.inf)])
    log_prior = torch.cat([draws.log_prior, terms.log_prior])
    whitened = torch.cat([draws.whitened, gaussian.whiten(prior)])
    share = len(draws.log_joint) / len(log_joint)
    mixture = torch.logaddexp(
        gaussian.log_prob_whitened(whitened) + math.log(share), log_prior + math.log1p(-share)
    )
    total = log_mean_exp(log_joint - mixture)
    return total - log_mean_exp(log_weights(gaussian, draws)) < _NEW_MASS
