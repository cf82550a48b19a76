"""Importance sampling from a guide, a matched Gaussian, or that Gaussian with a share of prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.start import StartDensity, match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import (
    LEAST_DRAWS_FOR_SHAPE,
    Particles,
    drop_nonfinite,
    log_mean_exp,
    pareto_shape,
    relative_variance,
    tail_size,
)

__all__ = ["DefensiveMixture", "GuideProposal", "ImportanceSampling", "MatchedGaussian"]

_ROWS_PER_PASS = 2**16
_MOST_KEPT = 1000

type Draw = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GuideProposal:
    """The guide itself: log w = log p(v, h; θ) − log q(h), whose mean over draws is the ELBO."""

    def sampler(self, densities: UnitDensities) -> Draw:
        """Draws of the guide and their log weights, by number of particles.

        Raises:
            InputError: if there is no guide with a density of each unit's latents.
        """
        if not (densities.has_guide_density and densities.structure.per_unit):
            raise InputError(
                "GuideProposal needs a guide whose log q can be had for each unit; leave "
                "proposal=GuideProposal() out, and a Gaussian is matched to what there is"
            )
        if densities.structure.guided:
            raise InputError(
                f"the guide draws the discrete latents {sorted(densities.structure.guided)}, which "
                "log evidence sums out, so its density is no proposal for the rest; leave "
                "proposal=GuideProposal() out"
            )

        def draw(num_particles: int) -> tuple[Tensor, Tensor]:
            drawn = densities.draw_guide(num_particles)
            return drawn.latents, drawn.log_weights

        return draw


@dataclass(frozen=True)
class DefensiveMixture:
    """A Gaussian per unit, matched to guide draws, mixed with the prior.

    A weight is at most p(v | h) / share, so tails or modes that the guide misses cannot make the
    variance infinite where the likelihood is bounded.

    Args:
        prior_share: share of prior, in [0, 1].

    Source: "Weighted average importance sampling and defensive mixture distributions", Hesterberg
    (1995).
    """

    prior_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.prior_share <= 1:
            raise InputError(f"prior_share must lie in [0, 1], not {self.prior_share}")

    def sampler(self, densities: UnitDensities) -> Draw:
        """Draws and their log weights, by number of particles."""
        return _start_sampler(densities, match_start(densities, self.prior_share))


@dataclass(frozen=True)
class MatchedGaussian:
    """A Gaussian per unit, matched to draws of the guide, or of the prior where there is none."""

    def sampler(self, densities: UnitDensities) -> Draw:
        """Draws and their log weights, by number of particles."""
        return _start_sampler(densities, match_start(densities, 0.0))


def _start_sampler(densities: UnitDensities, start: StartDensity) -> Draw:
    def draw(num_particles: int) -> tuple[Tensor, Tensor]:
        latents = start.sample(densities, num_particles)
        terms = densities.terms(latents)
        return latents, terms.log_joint - start.log_prob(latents, terms.log_prior)

    return draw


@dataclass(frozen=True)
class ImportanceSampling:
    """Importance sampling, in passes of bounded memory.

    The log of the mean weight is a stochastic lower bound on log p(v_u; θ); there is no upper one.
    The Pareto shape k̂ of all weights says whether their mean is to be trusted. A pilot of a tenth
    of the particles foresees the spread of the weights. Beyond 1000 particles, groups of them are
    kept as one each: one of the group drawn in proportion to its weight, with the group's mean
    weight, so that memory does not grow.

    Args:
        num_particles: weights per unit; rounded up to a multiple of the groups kept.
        proposal: what to draw from.

    Source: "Pareto Smoothed Importance Sampling", Vehtari, Simpson, Gelman, Yao, Gabry (2024).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_vharm import log_evidence
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> x = torch.tensor([0.5])
    >>> evidence = log_evidence(model, (x,), method=ImportanceSampling(), progress=False)
    >>> exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    >>> abs(evidence.per_unit.total().value - float(exact)) < 0.2
    True
    """

    num_particles: int = 1000
    proposal: DefensiveMixture | MatchedGaussian | GuideProposal = field(
        default_factory=DefensiveMixture
    )

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise InputError(f"num_particles must be at least 2, not {self.num_particles}")

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        progress: bool = False,
    ) -> Particles:
        """Weigh draws of the proposal.

        Args:
            densities: the units.
            start: a density of one's own to draw from, in place of the proposal.
            progress: show a bar.

        Raises:
            InputError: if the proposal is the guide and has no density per unit.
        """
        if start is None:
            draw = self.proposal.sampler(densities)
        else:
            draw = _start_sampler(densities, start)
        group_size = -(-self.num_particles // _MOST_KEPT)
        num_groups = -(-self.num_particles // group_size)
        pilot = _weigh(densities, draw, max(num_groups // 10, 2), group_size, progress=False)
        run = _weigh(densities, draw, num_groups, group_size, progress)
        variance = relative_variance(drop_nonfinite(pilot.log_weights)[0])
        return replace(run, pilot_variance=variance)


def _weigh(
    densities: UnitDensities, draw: Draw, num_groups: int, group_size: int, progress: bool
) -> Particles:
    """Draw so many groups, and keep one particle of each."""
    per_pass = max(_ROWS_PER_PASS // (densities.num_units * group_size), 1)
    sizes = [min(per_pass, num_groups - done) for done in range(0, num_groups, per_pass)]
    counted = _Counted(draw, _Tail(num_groups * group_size))
    with (
        torch.no_grad(),
        tqdm(sizes, desc="importance", disable=not progress or None, delay=2, leave=False) as bar,
    ):
        if densities.num_units * group_size <= _ROWS_PER_PASS:
            parts = [_one_of_each(*counted(size * group_size), size) for size in bar]
        else:
            most = max(_ROWS_PER_PASS // densities.num_units, 1)
            parts = [_one_of_many(counted, group_size, most) for _ in bar]
    return Particles(
        unconstrained=torch.cat([latents for latents, _ in parts]),
        log_weights=torch.cat([log_weights for _, log_weights in parts]),
        kind=Kind.ESTIMATED,
        pareto_shapes=counted.tail.shape(),
        num_nonfinite=counted.num_nonfinite,
    )


def _one_of_each(latents: Tensor, log_weights: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """One particle of each group, drawn in proportion to its weight, and the mean weight."""
    if num_groups == len(latents):
        return latents, log_weights
    grouped = log_weights.unflatten(0, (num_groups, -1))
    noise = -torch.empty_like(grouped).exponential_().log()
    index = (grouped + noise).argmax(1)  # Gumbel's trick: in proportion to the weights
    wide = index[:, None, :, None].expand(-1, 1, -1, latents.shape[-1])
    chosen = latents.unflatten(0, (num_groups, -1)).gather(1, wide)[:, 0]
    return chosen, log_mean_exp(grouped, dim=1)


def _one_of_many(draw: Draw, group_size: int, most: int) -> tuple[Tensor, Tensor]:
    """The same for one group that is too large to be drawn at once."""
    kept, total = _one_of_each(*draw(min(most, group_size)), 1)
    done = min(most, group_size)
    while done < group_size:
        size = min(most, group_size - done)
        other, mean = _one_of_each(*draw(size), 1)
        done += size
        both = torch.stack([total + math.log((done - size) / done), mean + math.log(size / done)])
        total = torch.logsumexp(both, 0)
        taken = torch.rand_like(total).log() < both[1] - total
        kept = torch.where(taken[..., None], other, kept)
    return kept, total


class _Counted:
    """Draws whose largest weights and weights that are not finite are noted."""

    def __init__(self, draw: Draw, tail: _Tail) -> None:
        self.draw, self.tail, self.num_nonfinite = draw, tail, 0

    def __call__(self, num_particles: int) -> tuple[Tensor, Tensor]:
        latents, log_weights = self.draw(num_particles)
        log_weights, bad = drop_nonfinite(log_weights)
        self.num_nonfinite += bad
        self.tail.add(log_weights)
        return latents, log_weights


class _Tail:
    """The largest weights of each unit among all that were drawn."""

    def __init__(self, num_particles: int) -> None:
        self.num_particles = num_particles
        self.largest: Tensor | None = None

    def add(self, log_weights: Tensor) -> None:
        """Take in some more."""
        if self.largest is not None:
            log_weights = torch.cat([self.largest, log_weights])
        count = min(tail_size(self.num_particles) + 1, len(log_weights))
        self.largest = log_weights.topk(count, 0).values

    def shape(self) -> Tensor | None:
        """K̂ of each unit, where there are enough particles."""
        if self.num_particles < LEAST_DRAWS_FOR_SHAPE or self.largest is None:
            return None
        return pareto_shape(self.largest, self.num_particles)
