"""Start densities: a Gaussian per unit matched to draws, mixed with the prior, or either alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.inference.gaussians import Moments, UnitGaussian, UnitMixture
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import guided_selector, unit_blocks

__all__ = [
    "Blocks",
    "MatchedStart",
    "PriorStart",
    "StartDensity",
    "block_starts",
    "match_start",
    "select_start",
]

_ROWS_PER_PASS = 2**15


@dataclass(frozen=True)
class StartDensity:
    """(1 − ε) N(h; m_u, Σ_u) + ε p(h; θ): normalised, easy to draw from, and as wide as the prior.

    Where a mixture of Gaussians is given, it takes the place of the one.

    Attributes:
        gaussian: the Gaussian part, and whose coordinates transitions move in; only the latter
            beside a mixture.
        prior_share: ε; guards against a guide that sits on one of several modes. With ε = 1 it is
            the prior alone.
        mixture: a Gaussian for each peak of a posterior that has several.
    """

    gaussian: UnitGaussian
    prior_share: float
    mixture: UnitMixture | None = None

    def sample(self, densities: UnitDensities, num_particles: int) -> Tensor:
        """Draws of shape ``(particle, unit, dim)``."""
        if self.prior_share == 1:
            return densities.draw_prior(num_particles)
        draws = (self.mixture or self.gaussian).sample(num_particles)
        if self.prior_share == 0:
            return draws
        chosen = torch.rand(draws.shape[:2], device=draws.device) < self.prior_share
        count = int(chosen.sum(0).max())
        if not count:
            return draws
        prior = densities.draw_prior(count)  # no more than the unit that takes most of them
        place = (chosen.cumsum(0) - 1).clamp(min=0)[..., None]
        return torch.where(chosen[..., None], prior.gather(0, place.expand_as(draws)), draws)

    def log_prob(self, latents: Tensor, log_prior: Tensor) -> Tensor:
        """Log density, shape ``(particle, unit)``, given log p(h; θ) at the same latents."""
        if self.prior_share == 1:
            return log_prior
        return self._mix((self.mixture or self.gaussian).log_prob(latents), log_prior)

    def log_prob_whitened(self, noise: Tensor, log_prior: Tensor) -> Tensor:
        """The same at latents mean + L · noise of the Gaussian."""
        if self.prior_share == 1:
            return log_prior
        if self.mixture is not None:
            return self.log_prob(self.gaussian.unwhiten(noise), log_prior)
        return self._mix(self.gaussian.log_prob_whitened(noise), log_prior)

    def _mix(self, matched: Tensor, log_prior: Tensor) -> Tensor:
        if self.prior_share == 0:
            return matched
        return torch.logaddexp(
            matched + math.log1p(-self.prior_share), log_prior + math.log(self.prior_share)
        )

    @property
    def moments(self) -> UnitGaussian:
        """The Gaussian of the mean and covariance of all but the share of prior."""
        return self.gaussian if self.mixture is None else self.mixture.moments

    def select(self, units: Tensor) -> StartDensity:
        """That of some of the units."""
        mixture = None if self.mixture is None else self.mixture.select(units)
        return StartDensity(self.gaussian.select(units), self.prior_share, mixture)


def match_start(
    densities: UnitDensities, prior_share: float, *, roughly: bool = False
) -> StartDensity:
    """Match the start density to draws from the guide, or from the prior where there is none.

    Roughly, by fewer draws, is enough where the match is refitted.
    """
    wanted = 32 + 2 * densities.dim if roughly else 200 + 10 * densities.dim
    per_pass = max(_ROWS_PER_PASS // densities.num_units, 2)
    moments = Moments()
    with torch.no_grad():
        for done in range(0, wanted, per_pass):
            moments.add(densities.draw_latents(min(per_pass, wanted - done)))
    return StartDensity(moments.gaussian(), prior_share)


type Blocks = Iterator[tuple[Tensor, UnitDensities, StartDensity]]


def block_starts(
    densities: UnitDensities,
    size: int,
    prior_share: float,
    start: StartDensity | None = None,
    *,
    roughly: bool = False,
) -> Blocks:
    """Blocks of at most `size` units, with their indices and start densities.

    A block is matched when its turn comes, so that memory does not grow with the units; all are
    at once where the guide cannot be cut.

    Args:
        densities: all units.
        size: the most units of a block.
        prior_share: see `match_start`.
        start: a start density of one's own, for all units.
        roughly: see `match_start`.
    """
    select = None
    if start is None and densities.num_units > size:
        select = guided_selector(densities)
    if start is None and select is None:
        start = match_start(densities, prior_share, roughly=roughly)
    for units, block in unit_blocks(densities, size):
        if start is not None:
            yield units, block, start.select(units)
        elif select is not None:
            yield units, block, match_start(select(units), prior_share, roughly=roughly)


def select_start(densities: UnitDensities, prior_share: float, units: Tensor) -> StartDensity:
    """`match_start` for some of the units, in order."""
    select = guided_selector(densities) if len(units) < densities.num_units else None
    if select is None:
        return match_start(densities, prior_share).select(units)
    return match_start(select(units), prior_share)


@dataclass(frozen=True)
class MatchedStart:
    """Start at a Gaussian per unit, matched to draws of the guide, with a share of prior.

    Args:
        prior_share: share of prior in the start density, in [0, 1).
        refit: match the Gaussian anew, by scores at a few draws, one at each of several peaks, or
            to where a pilot's particles end, so that a posterior of near-Gaussian modes needs few
            temperatures in any dimension.
    """

    prior_share: float = 0.05
    refit: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.prior_share < 1:
            raise InputError(f"prior_share must lie in [0, 1), not {self.prior_share}")


@dataclass(frozen=True)
class PriorStart:
    """Start at the prior p(h; θ), as the classical recipe does."""

    prior_share = 1.0
    refit = False
