"""A tempered population that feels its way along the path: what pilots measure and tune with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import match_gaussian
from pyro_vharm.inference.hamiltonian import HamiltonianMoves
from pyro_vharm.inference.path import PathState
from pyro_vharm.inference.schedules import ThermodynamicLength
from pyro_vharm.particles import effective_sample_size, relative_variance, systematic_resample

__all__ = ["Tempered", "first_step_sizes", "measure_length", "temper", "tune_step"]

_FIRST_STEP_SIZE, _GAIN = 0.5, 2.0
_LEAST_SHARE = 2 / 3  # of the effective size that one step may leave: relative variance ½
_MOST_STEPS, _BISECTIONS = 100, 30


class Tempered(NamedTuple):
    """Where a tempered population went, and how it got there.

    Attributes:
        state: particles at β = 1, with equal weights.
        length: the path's thermodynamic length per unit.
        step_sizes: tuned at each knot after the first, shape ``(knot − 1, unit)``.
        metrics: Cholesky factors of the covariance of the population's positions at each knot after
            the first, shape ``(knot − 1, unit, dim, dim)``; ``None`` for moves that take none.
    """

    state: PathState
    length: ThermodynamicLength
    step_sizes: Tensor
    metrics: Tensor | None


def first_step_sizes(state: PathState) -> Tensor:
    """Where the tuning of step sizes begins, shape ``(unit,)``."""
    dim = state.position.shape[-1]
    return torch.full_like(state.log_joint[0], _FIRST_STEP_SIZE * dim**-0.25)


def tune_step(
    moves: HamiltonianMoves,
    state: PathState,
    temperature: Tensor,
    step_size: Tensor,
    metric: Tensor | None = None,
) -> tuple[PathState, Tensor]:
    """One transition, and step sizes pulled toward the acceptance that the kernel aims at."""
    state, accepted = moves(state, temperature, step_size, metric)
    pull = accepted.mean(0) - moves.kernel.target_acceptance
    return state, step_size * (_GAIN * pull).exp()


def temper(moves: HamiltonianMoves, num_particles: int, *, num_sweeps: int = 2) -> Tempered:
    """Take draws of the start density to the posterior, in steps that each unit chooses.

    A unit's next β is the farthest at which the effective sample size of the incremental weights
    is ⅔; then it resamples and moves. Everything adapts to the particles themselves, so their
    weights prove nothing: this is for pilots.

    Args:
        moves: the transitions; those that take their own metric get the population's at each step.
        num_particles: the size of the population of each unit.
        num_sweeps: transitions at each temperature.

    Source: "Inference for Lévy-driven stochastic volatility models via adaptive sequential Monte
    Carlo", Jasra, Stephens, Doucet, Tsagaris (2011).
    """
    state = moves.draw_start(num_particles)
    step_size = first_step_sizes(state)
    walk, steps, metrics = _Walk(step_size), [], []
    while not walk.is_done:
        state = state.take(systematic_resample(walk.go_on(state.log_ratio)))
        metric = match_gaussian(state.position).scale_tril if moves.own_metric else None
        for _ in range(num_sweeps):
            state, step_size = tune_step(moves, state, walk.knots[-1], step_size, metric)
        steps.append(step_size)
        if metric is not None:
            metrics.append(metric)
    return Tempered(
        state, walk.length, torch.stack(steps), torch.stack(metrics) if metrics else None
    )


def measure_length(moves: HamiltonianMoves, num_particles: int) -> ThermodynamicLength:
    """The thermodynamic length of the path, by a population that moves once at each knot.

    Nothing moves at β = 1, so that a start near the posterior costs one evaluation.
    """
    state = moves.draw_start(num_particles)
    step_size = first_step_sizes(state)
    walk = _Walk(step_size)
    while True:
        increments = walk.go_on(state.log_ratio)
        if walk.is_done:
            return walk.length
        state = state.take(systematic_resample(increments))
        state, step_size = tune_step(moves, state, walk.knots[-1], step_size)


class _Walk:
    """Temperatures that a population chooses on its way from β = 0 to 1, and the length so far."""

    def __init__(self, like: Tensor) -> None:
        self.knots, self.lengths = [torch.zeros_like(like)], [torch.zeros_like(like)]

    def go_on(self, log_ratio: Tensor) -> Tensor:
        """Step as far as the effective size allows; the log weights of that step."""
        here = self.knots[-1]
        reached = _farthest(log_ratio, here)
        if len(self.knots) > _MOST_STEPS:
            reached = torch.ones_like(reached)
        increments = (reached - here) * log_ratio
        self.lengths.append(self.lengths[-1] + relative_variance(increments).log1p().sqrt())
        self.knots.append(reached)
        return increments

    @property
    def is_done(self) -> bool:
        """Whether all units are at β = 1."""
        return bool((self.knots[-1] >= 1).all())

    @property
    def length(self) -> ThermodynamicLength:
        """The length at each knot."""
        return ThermodynamicLength(torch.stack(self.knots), torch.stack(self.lengths))


def _farthest(log_ratio: Tensor, temperature: Tensor) -> Tensor:
    """The largest β ≤ 1 whose incremental weights keep their share of the effective size."""
    finite = log_ratio.nan_to_num(nan=-torch.inf)
    least = _LEAST_SHARE * (~torch.isneginf(finite)).sum(0)

    def keeps(reached: Tensor) -> Tensor:
        size = effective_sample_size(_increment(reached - temperature, finite))
        return ~(size < least)  # without any finite weight there is nothing to keep

    one = torch.ones_like(temperature)
    low, high = temperature, one
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        good = keeps(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    shortest = temperature + 1e-8
    return torch.where(keeps(one), one, torch.maximum(low, shortest).clamp(max=1.0))


def _increment(change: Tensor, log_ratio: Tensor) -> Tensor:
    """Change · log_ratio, where 0 · −∞ counts as −∞: no density there from the first step on."""
    return torch.where(torch.isneginf(log_ratio), -torch.inf, change * log_ratio)
