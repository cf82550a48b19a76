"""Hamiltonian transitions for all particles of all units, whitened by a factor per unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.inference.path import PathState, path_gradient, path_state
from pyro_vharm.inference.start import StartDensity, UnitGaussian
from pyro_vharm.model.compilation import Accelerated, accelerate
from pyro_vharm.model.densities import UnitDensities

__all__ = ["HamiltonianKernel", "HamiltonianMoves", "Transition"]


class Transition(NamedTuple):
    """Where a transition ended, and how likely the proposals were to be accepted.

    Attributes:
        state: the latents and the path there.
        acceptance: acceptance probabilities, shape ``(particle, unit)``.
    """

    state: PathState
    acceptance: Tensor


@dataclass(frozen=True)
class HamiltonianKernel:
    """One Hamiltonian Monte Carlo step, which leaves f_β invariant and is its own reversal.

    In the coordinates e with h = L e, momenta are standard normal and r ← r + ½ε Lᵀ∇log f_β(h),
    h ← h + ε L r, r ← r + ½ε Lᵀ∇log f_β(h), repeated; then a Metropolis test. A proposal whose
    energy is not finite is rejected. The step size ε of a unit varies at random by ± `jitter` from
    transition to transition, so that no orbit closes on itself.

    Args:
        num_leapfrog: leapfrog steps of a transition, one gradient each.
        whitened: take L from a covariance matrix per unit; otherwise L = 1.
        target_acceptance: what a pilot tunes step sizes to.
        jitter: relative half-width of the random factor of the step size, in [0, 1).

    Source: "MCMC using Hamiltonian dynamics", Neal (2011).
    """

    num_leapfrog: int = 5
    whitened: bool = True
    target_acceptance: float = 0.75
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if self.num_leapfrog < 1:
            raise InputError(f"num_leapfrog must be at least 1, not {self.num_leapfrog}")
        if not 0 < self.target_acceptance < 1:
            raise InputError(f"target_acceptance must lie in (0, 1), not {self.target_acceptance}")
        if not 0 <= self.jitter < 1:
            raise InputError(f"jitter must lie in [0, 1), not {self.jitter}")

    def moves(
        self, densities: UnitDensities, start: StartDensity, num_particles: int, num_calls: int
    ) -> HamiltonianMoves:
        """Transitions along the path from `start`, in the form that the calls ahead pay for."""
        gaussian = start.gaussian
        latents = gaussian.mean.expand(num_particles, -1, -1).clone()
        per_pair = torch.full_like(latents[..., 0], 0.5)
        per_unit = per_pair[0]
        momentum = 0.1 + torch.zeros_like(latents)
        state = path_state(densities, start, latents)
        inputs = (*state, momentum, per_pair, per_unit, 0.1 * per_unit, *gaussian.fields)
        trajectory = _Trajectory(start.prior_share, self.num_leapfrog, self.whitened)
        call = accelerate(trajectory, densities, (*inputs, gaussian.scale_tril), num_calls)
        return HamiltonianMoves(self, densities, start, call)


@dataclass(frozen=True)
class HamiltonianMoves:
    """A kernel bound to the path from a start density to the joint density of some units.

    Attributes:
        kernel: its settings.
        densities: the units.
        start: f_0.
        trajectory: the transition as a function of tensors.
    """

    kernel: HamiltonianKernel
    densities: UnitDensities
    start: StartDensity
    trajectory: Accelerated

    def at(self, latents: Tensor) -> PathState:
        """The path at latents ``(particle, unit, dim)``."""
        return path_state(self.densities, self.start, latents)

    def draw_start(self, num_particles: int) -> PathState:
        """Draws of f_0."""
        return self.at(self.start.sample(self.densities, num_particles))

    def __call__(
        self,
        state: PathState,
        temperature: Tensor,
        step_size: Tensor,
        metric: Tensor | None = None,
    ) -> Transition:
        """One transition that leaves f_β of every unit invariant.

        Args:
            state: where to start.
            temperature: β per unit, shape ``(unit,)``.
            step_size: ε per unit, shape ``(unit,)``.
            metric: L per unit, ``(unit, dim, dim)``; by default that of the start's Gaussian.
        """
        gaussian = self.start.gaussian
        noise = torch.rand_like(step_size)
        step_size = step_size * (1 + self.kernel.jitter * (2 * noise - 1))
        momentum = torch.randn_like(state.latents)
        uniform = torch.rand_like(state.log_joint)
        metric = gaussian.scale_tril if metric is None else metric
        inputs = (*state, momentum, uniform, temperature, step_size, *gaussian.fields, metric)
        *moved, acceptance = self.trajectory(*inputs)
        return Transition(PathState(*moved), acceptance)

    def on(self, densities: UnitDensities, start: StartDensity) -> HamiltonianMoves:
        """The same for another batch of the same shape, from a start with as much prior."""
        trajectory = self.trajectory.on(densities)
        return replace(self.from_start(start), densities=densities, trajectory=trajectory)

    def from_start(self, start: StartDensity) -> HamiltonianMoves:
        """The same along the path from another start density with the same share of prior."""
        assert start.prior_share == self.start.prior_share, "it is part of the compiled function"
        return replace(self, start=start)


@dataclass(frozen=True)
class _Trajectory:
    """A transition as a function of tensors, random numbers among them."""

    prior_share: float
    num_leapfrog: int
    whitened: bool

    def __call__(
        self,
        densities: UnitDensities,
        latents: Tensor,
        log_start: Tensor,
        log_joint: Tensor,
        start_gradient: Tensor,
        joint_gradient: Tensor,
        momentum: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        step_size: Tensor,
        mean: Tensor,
        scale_tril: Tensor,
        metric: Tensor,
    ) -> tuple[Tensor, ...]:
        start = StartDensity(UnitGaussian(mean, scale_tril), self.prior_share)
        state = PathState(latents, log_start, log_joint, start_gradient, joint_gradient)
        step = step_size[:, None]
        moving = momentum + 0.5 * step * self._force(state.gradient(temperature), metric)
        position = latents + step * self._velocity(moving, metric)
        for _ in range(self.num_leapfrog - 1):
            gradient = path_gradient(densities, start, position, temperature)
            moving = moving + step * self._force(gradient, metric)
            position = position + step * self._velocity(moving, metric)
        proposed = path_state(densities, start, position)
        moving = moving + 0.5 * step * self._force(proposed.gradient(temperature), metric)
        before = state.log_density(temperature) - 0.5 * momentum.square().sum(-1)
        after = proposed.log_density(temperature) - 0.5 * moving.square().sum(-1)
        change = (after - before).nan_to_num(nan=-torch.inf)
        acceptance = change.clamp(max=0.0).exp()
        return *proposed.where(uniform < acceptance, state), acceptance

    def _force(self, gradient: Tensor, metric: Tensor) -> Tensor:
        """Lᵀ · gradient."""
        if not self.whitened:
            return gradient
        turned: Tensor = torch.einsum("uij,pui->puj", metric, gradient)
        return turned

    def _velocity(self, momentum: Tensor, metric: Tensor) -> Tensor:
        """L · momentum."""
        if not self.whitened:
            return momentum
        turned: Tensor = torch.einsum("uij,puj->pui", metric, momentum)
        return turned
