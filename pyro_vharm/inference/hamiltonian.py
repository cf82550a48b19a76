"""One Hamiltonian transition for all particles of all units, whitened by a Gaussian per unit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.path import AnnealingPath, PathState

__all__ = ["Transition", "hamiltonian_transition"]


class Transition(NamedTuple):
    """Where a transition ended, and how likely the proposals were to be accepted.

    Attributes:
        state: the latents and the path there.
        acceptance: acceptance probabilities, shape ``(particle, unit)``.
    """

    state: PathState
    acceptance: Tensor


def hamiltonian_transition(
    path: AnnealingPath,
    state: PathState,
    temperature: Tensor,
    step_size: Tensor,
    num_leapfrog: int,
) -> Transition:
    """Leave f_β invariant, reversibly, by one Hamiltonian Monte Carlo step.

    In the coordinates e with h = L e, L from the start density's Gaussian, momenta are standard
    normal and r ← r + ½ε Lᵀ∇log f_β(h), h ← h + ε L r, r ← r + ½ε Lᵀ∇log f_β(h), repeated; then a
    Metropolis test. A proposal whose energy is not finite is rejected.

    Args:
        path: the densities.
        state: where to start.
        temperature: β.
        step_size: ε per unit, shape ``(unit,)``.
        num_leapfrog: leapfrog steps, each of which evaluates the path once.

    Source: "MCMC using Hamiltonian dynamics", Neal (2011).
    """
    metric = path.start.gaussian
    momentum = torch.randn_like(state.latents)
    half = 0.5 * step_size[:, None]
    force = metric.scale_transposed(state.gradient(temperature))
    energy = state.log_density(temperature) - 0.5 * momentum.square().sum(-1)
    moving, proposed = momentum, state
    for _ in range(num_leapfrog):
        moving = moving + half * force
        position = proposed.latents + step_size[:, None] * metric.scale(moving)
        proposed = path.at(position)
        force = metric.scale_transposed(proposed.gradient(temperature))
        moving = moving + half * force
    change = proposed.log_density(temperature) - 0.5 * moving.square().sum(-1) - energy
    acceptance = change.nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    return Transition(proposed.where(accepted, state), acceptance)
