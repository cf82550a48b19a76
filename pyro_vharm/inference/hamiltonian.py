"""One Hamiltonian transition for all particles of all units, whitened by a Gaussian per unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.start import UnitGaussian

__all__ = ["Transition", "hamiltonian_transition"]


class Transition(NamedTuple):
    """Where a transition ended, and how likely the proposals were to be accepted.

    Attributes:
        latents: shape ``(particle, unit, dim)``.
        acceptance: acceptance probabilities, shape ``(particle, unit)``.
    """

    latents: Tensor
    acceptance: Tensor


def hamiltonian_transition(
    log_density: Callable[[Tensor], Tensor],
    latents: Tensor,
    step_size: Tensor,
    metric: UnitGaussian,
    num_leapfrog: int,
) -> Transition:
    """Leave exp(log_density) invariant, reversibly, by one Hamiltonian Monte Carlo step.

    In the coordinates e with h = L e, momenta are standard normal and
    r ← r + ½ε Lᵀ∇log f(h), h ← h + ε L r, r ← r + ½ε Lᵀ∇log f(h), repeated; then a
    Metropolis test. A proposal whose energy is not finite is rejected.

    Args:
        log_density: ``(particle, unit, dim)`` → ``(particle, unit)``, units independent.
        latents: where to start.
        step_size: ε per unit, shape ``(unit,)``.
        metric: gives L per unit.
        num_leapfrog: leapfrog steps.

    Source: "MCMC using Hamiltonian dynamics", Neal (2011).
    """
    momentum = torch.randn_like(latents)
    half = 0.5 * step_size[:, None]
    position = latents
    start, force = _value_and_force(log_density, position, metric)
    energy = start - 0.5 * momentum.square().sum(-1)
    moving, value = momentum, start
    for _ in range(num_leapfrog):
        moving = moving + half * force
        position = position + step_size[:, None] * metric.scale(moving)
        value, force = _value_and_force(log_density, position, metric)
        moving = moving + half * force
    change = value - 0.5 * moving.square().sum(-1) - energy
    acceptance = change.nan_to_num(nan=-torch.inf).clamp(max=0.0).exp()
    accepted = torch.rand_like(acceptance) < acceptance
    return Transition(torch.where(accepted[..., None], position, latents), acceptance)


def _value_and_force(
    log_density: Callable[[Tensor], Tensor], latents: Tensor, metric: UnitGaussian
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        value = log_density(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), metric.scale_transposed(gradient)
