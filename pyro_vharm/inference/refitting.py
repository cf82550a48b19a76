"""Refitting a start density: by scores where one or several Gaussians do, else by tempering."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.climbs import all_climbs_end_near
from pyro_vharm.inference.gaussians import UnitGaussian, UnitMixture, match_gaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.mixture_matching import affordable_units, match_mixture
from pyro_vharm.inference.path import PathState
from pyro_vharm.inference.score_matching import MOST_COST, largest_spread, match_in_rounds
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.inference.tempering import temper, tune_step
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import Selector, unit_selector

__all__ = ["Effort", "match_by_scores", "refit_start"]

_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS = 32, 256, 2**15
_WIDE_SHARE = 0.5
_FIRST_DRAWS, _DRAWS, _LEAST_MOVES = 64, 64, 3
_FIRST_DRAWS_PER_DIM, _DRAWS_PER_DIM = 3, 12
_TYPICAL_STEPS = 20
_CLIMBERS = 12


class Effort(NamedTuple):
    """How much to try: rounds of matching, and steps of the climbs."""

    num_rounds: int
    num_steps: int


_FIRST, _SECOND = Effort(5, 12), Effort(12, 40)


def refit_start(
    densities: UnitDensities,
    start: StartDensity,
    kernel: HamiltonianKernel,
    num_particles: int,
) -> StartDensity:
    """Match the Gaussian of a start density to each unit's posterior.

    First by the scores at a few draws. That is kept for units whose weights under the Gaussian are
    as even as a matched population could make them, and where all climbs from the prior end within
    it: one near-Gaussian mode. Those that fail try once more and longer, as few draws may speak
    against a unit by chance. The others get a mixture of Gaussians, one for each peak that climbs
    find, if that is good in the same sense. The rest are matched by a tempered population.

    Args:
        densities: the units.
        start: the density to refit; its share of prior is kept.
        kernel: the transitions.
        num_particles: the least size of the population; at least 32, more where units are few.
    """
    select, gaussian = unit_selector(densities), start.gaussian
    left = torch.arange(densities.num_units, device=densities.device)
    for effort in (_FIRST, _SECOND):
        part = _Part.of(densities, select, left)
        own = gaussian.select(part.units)
        found, good = match_by_scores(part.densities, own, effort, part.select)
        gaussian = gaussian.replaced(left, found.select(part.place))
        left = left[~good[part.place]]
        if not len(left):
            return replace(start, gaussian=gaussian)
    mixtures, left = _match_mixtures(densities, select, gaussian, left)
    if len(left):
        part = _Part.of(densities, select, left)
        first = start.select(part.units)
        tempered = _match_by_tempering(part.densities, first, kernel, num_particles)
        gaussian = gaussian.replaced(left, tempered.select(part.place))
    return _joined(replace(start, gaussian=gaussian), mixtures)


type _Mixtures = list[tuple[Tensor, UnitMixture]]


def _match_mixtures(
    densities: UnitDensities, select: Selector | None, gaussian: UnitGaussian, units: Tensor
) -> tuple[_Mixtures, Tensor]:
    """Mixtures for some of these units, by indices of the units, and which are refused one."""
    size = len(units) if select is None else affordable_units(densities.dim)
    mixtures, refused = [], []
    for some in units.split(size):
        part = _Part.of(densities, select, some)
        found, good = match_mixture(part.densities, gaussian.select(part.units))
        kept = good[part.place]
        mixtures.append((some[kept], found.select(part.place[kept])))
        refused.append(some[~kept])
    return mixtures, torch.cat(refused)


def _joined(start: StartDensity, mixtures: _Mixtures) -> StartDensity:
    """A start density that is a mixture for some of the units."""
    if not any(len(units) for units, _ in mixtures):
        return start
    gaussian, whole = start.gaussian, UnitMixture.single(start.gaussian)
    for units, mixture in mixtures:
        gaussian = gaussian.replaced(units, mixture.within)
        whole = whole.replaced(units, mixture)
    return replace(start, gaussian=gaussian, mixture=whole)


class _Part(NamedTuple):
    """The densities of some units alone, or of all where they cannot be cut.

    Attributes:
        densities: of the units in it.
        units: which these are.
        place: where among them those are that were asked for.
        select: what gives the densities of some of the units in it.
    """

    densities: UnitDensities
    units: Tensor
    place: Tensor
    select: Selector | None

    @classmethod
    def of(cls, densities: UnitDensities, select: Selector | None, units: Tensor) -> _Part:
        if select is None or len(units) == densities.num_units:
            every = torch.arange(densities.num_units, device=units.device)
            return cls(densities, every, units, select)
        place = torch.arange(len(units), device=units.device)
        return cls(select(units), units, place, lambda some: select(units[some]))


def match_by_scores(
    densities: UnitDensities,
    gaussian: UnitGaussian,
    effort: Effort,
    select: Selector | None = None,
) -> tuple[UnitGaussian, Tensor]:
    """A Gaussian for each unit by its scores, and for which units that is good enough.

    Matched at its own draws, a Gaussian misses what lies in its tails. So in the end it is made
    wider: by what costs, were it the posterior, as much variance as it leaves, and at most 0.1.

    Args:
        densities: the units.
        gaussian: where to begin.
        effort: how much to try.
        select: what gives the densities of some of the units, so that rounds and climbs go on for
            those alone that take more of them.
    """
    best = match_in_rounds(densities, gaussian, effort.num_rounds, select)
    good = best.spread <= largest_spread(densities.dim)
    if bool(good.any()):
        good = good & all_climbs_end_near(
            densities, best.gaussian, best.draws, _CLIMBERS, effort.num_steps, select
        )
    return best.gaussian.widened(best.spread.clamp(max=MOST_COST)), good


def _match_by_tempering(
    densities: UnitDensities,
    start: StartDensity,
    kernel: HamiltonianKernel,
    num_particles: int,
) -> UnitGaussian:
    """Match a Gaussian to where a tempered pilot population finds the posterior.

    Half of the population starts from the Gaussian, half from the prior, whatever the share of
    prior in the start density, and all are tempered with resampling: so modes that a guide misses
    have their part in the match, as long as the prior leads to them. Then the population moves on
    at β = 1, for as many draws as a covariance matrix needs; an early match sets the metric.
    """
    affordable = densities.affordable(_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS)
    count, dim = max(num_particles, affordable), densities.dim
    wide = replace(start, prior_share=_WIDE_SHARE)
    first = max(-(-(_FIRST_DRAWS + _FIRST_DRAWS_PER_DIM * dim) // count), _LEAST_MOVES)
    second = max(-(-(_DRAWS + _DRAWS_PER_DIM * dim) // count), _LEAST_MOVES)
    ahead = 2 * _TYPICAL_STEPS + first + second
    moves = kernel.moves(densities, wide, count, ahead, own_metric=True)
    tempered = temper(moves, count)
    assert tempered.metrics is not None, "asked for"
    state, step_size, metric = tempered.state, tempered.step_sizes[-1], tempered.metrics[-1]
    state, step_size, early = _collect(moves, state, step_size, metric, first)
    metric = moves.path.metric(early.scale_tril)
    *_, gaussian = _collect(moves, state, step_size, metric, second)
    return gaussian


def _collect(
    moves: HamiltonianMoves,
    state: PathState,
    step_size: Tensor,
    metric: Tensor,
    num_moves: int,
) -> tuple[PathState, Tensor, UnitGaussian]:
    """Move on at β = 1, and match a Gaussian to every state on the way."""
    one, draws = torch.ones_like(step_size), []
    for _ in range(num_moves):
        state, step_size = tune_step(moves, state, one, step_size, metric)
        draws.append(moves.latents(state))
    return state, step_size, match_gaussian(*draws)
