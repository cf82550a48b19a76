"""Refitting a start density to where a tempered pilot population finds the posterior."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.path import PathState
from pyro_vharm.inference.start import StartDensity, UnitGaussian, match_gaussian
from pyro_vharm.inference.tempering import temper, tune_step
from pyro_vharm.model.densities import UnitDensities

__all__ = ["refit_start"]

_LEAST_PARTICLES, _MOST_PARTICLES, _ELEMENTS = 32, 256, 2**15
_WIDE_SHARE = 0.5
_FIRST_DRAWS, _DRAWS, _LEAST_MOVES = 64, 64, 3
_FIRST_DRAWS_PER_DIM, _DRAWS_PER_DIM = 3, 12
_TYPICAL_STEPS = 20


def refit_start(
    densities: UnitDensities,
    start: StartDensity,
    kernel: HamiltonianKernel,
    num_particles: int,
) -> StartDensity:
    """Match the Gaussian of a start density to the posterior that a pilot population reaches.

    Half of the population starts from the Gaussian, half from the prior, whatever the share of
    prior in the start density, and all are tempered with resampling: so modes that a guide misses
    have their part in the match, as long as the prior leads to them. Then the population moves on
    at β = 1, for as many draws as a covariance matrix needs; an early match sets the metric.

    Args:
        densities: the units.
        start: the density to refit; its share of prior is kept.
        kernel: the transitions.
        num_particles: the least size of the population; at least 32, more where units are few.
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
    return replace(start, gaussian=gaussian)


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
