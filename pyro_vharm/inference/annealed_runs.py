"""Annealing runs under a frozen plan: forward from the start density, and back to it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.hamiltonian import HamiltonianMoves
from pyro_vharm.inference.path import PathState

__all__ = ["AnnealedPlan", "Weighted", "anneal_forward", "anneal_reverse"]


class AnnealedPlan(NamedTuple):
    """Everything that a pilot fixes before the run that counts.

    Attributes:
        moves: transitions along the path from the normalised density f_0 to the joint density.
        temperatures: 0 = β_0 < … < β_T = 1 per unit, shape ``(T + 1, unit)``.
        step_sizes: of the transition at each β_t, t ≥ 1, per unit, shape ``(T, unit)``; without
            the last one where nothing moves at β = 1.
        pilot_variance: var(w)/mean(w)² of the pilot's own weights, shape ``(unit,)``.
    """

    moves: HamiltonianMoves
    temperatures: Tensor
    step_sizes: Tensor
    pilot_variance: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.temperatures) - 1

    @property
    def num_moves(self) -> int:
        """Transitions of a run: T, or one less where nothing moves at β = 1."""
        return len(self.step_sizes)

    def move(self, t: int, state: PathState) -> tuple[PathState, Tensor]:
        """The transition that leaves f_{β_t} invariant, and its acceptance probabilities."""
        return self.moves(state, self.temperatures[t], self.step_sizes[t - 1])


class Weighted(NamedTuple):
    """Where an annealing run ended.

    Attributes:
        latents: shape ``(particle, unit, dim)``.
        log_weights: shape ``(particle, unit)``.
        acceptance: mean acceptance probabilities, shape ``(particle, unit)``; NaN where nothing
            moved.
    """

    latents: Tensor
    log_weights: Tensor
    acceptance: Tensor


def anneal_forward(plan: AnnealedPlan, latents: Tensor) -> Weighted:
    """Carry draws of the start density along log f_β = (1 − β) log f_0 + β log p(v, h; θ).

    The weight Π_t f_{β_t}(h_{t−1}) / f_{β_{t−1}}(h_{t−1}) has mean p(v; θ), whatever the
    transitions, as long as each leaves its f_{β_t} invariant. The last transition, at β = 1, moves
    the particles on and leaves their weights as they are.
    """
    state = plan.moves.at(latents, resting=not plan.num_moves)
    log_weights = torch.zeros_like(state.log_joint)
    acceptance = torch.zeros_like(log_weights)
    for t, change in enumerate(plan.temperatures.diff(dim=0), 1):
        log_weights = log_weights + change * state.log_ratio
        if t <= plan.num_moves:
            state, accepted = plan.move(t, state)
            acceptance = acceptance + accepted
    return _ended(plan, state, log_weights, acceptance)


def anneal_reverse(plan: AnnealedPlan, latents: Tensor) -> Weighted:
    """Carry posterior draws back to the start density, transitions reversed and in reverse order.

    Each transition is reversible, so it is its own reversal. If the draws are exact,
    E[exp(−log_weights)] = 1 / p(v; θ), with or without the transition at β = 1.
    """
    state = plan.moves.at(latents, resting=not plan.num_moves)
    log_weights = torch.zeros_like(state.log_joint)
    acceptance = torch.zeros_like(log_weights)
    changes = plan.temperatures.diff(dim=0)
    for t in range(plan.num_steps, 0, -1):
        if t <= plan.num_moves:
            state, accepted = plan.move(t, state)
            acceptance = acceptance + accepted
        log_weights = log_weights + changes[t - 1] * state.log_ratio
    return _ended(plan, state, log_weights, acceptance)


def _ended(
    plan: AnnealedPlan, state: PathState, log_weights: Tensor, acceptance: Tensor
) -> Weighted:
    mean = acceptance / plan.num_moves if plan.num_moves else acceptance.fill_(math.nan)
    return Weighted(plan.moves.latents(state), log_weights, mean)
