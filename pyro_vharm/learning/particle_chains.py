"""Particles that follow the posterior while θ moves: resampled, and carried on by transitions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.estimates import Kind
from pyro_vharm.inference.gaussians import match_gaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.path import PathState
from pyro_vharm.inference.start import StartDensity
from pyro_vharm.inference.tempering import first_step_sizes, tune_step
from pyro_vharm.learning.posterior_particles import PosteriorParticles
from pyro_vharm.particles import systematic_resample

__all__ = ["ParticleChains"]

_KERNEL = HamiltonianKernel()
_TUNING = 10
_TRANSITIONS = 10
_GAIN = 0.5  # of the logarithm of a step size, from call to call


@dataclass
class ParticleChains:
    """Hamiltonian transitions for the particles of one batch, tuned as they go on.

    Attributes:
        moves: transitions toward the batch's posterior at the present θ.
        step_size: ε, shape ``(unit,)``.
    """

    moves: HamiltonianMoves
    step_size: Tensor | None = None

    @classmethod
    def of(cls, particles: PosteriorParticles, most_calls: int) -> ParticleChains:
        """Chains for as many particles as there are, which are moved on at most so often."""
        count, ahead = len(particles.latents), _TUNING + most_calls * _TRANSITIONS
        start = StartDensity(match_gaussian(particles.latents), 0.0)
        return cls(_KERNEL.moves(particles.densities, start, count, ahead))

    def carry_on(self, particles: PosteriorParticles) -> PosteriorParticles:
        """Particles of equal weight, resampled by their weights at the present θ and moved there.

        Transitions are whitened by the covariance of the particles as they were.
        """
        densities = particles.densities
        with torch.no_grad():
            index = systematic_resample(particles.reweighted())[..., None]
            latents = particles.latents.gather(0, index.expand_as(particles.latents))
            start = StartDensity(match_gaussian(particles.latents), 0.0)
            moves = self.moves.on(densities, start)
            state = self._move(moves, moves.at(latents))
            latents = moves.latents(state)
            log_joint = densities.log_joint(latents)
        log_shares = torch.full_like(log_joint, -math.log(len(latents)))
        return PosteriorParticles(
            densities, latents, log_shares, log_joint, Kind.CONDITIONAL, particles.dilution
        )

    def _move(self, moves: HamiltonianMoves, state: PathState) -> PathState:
        one = torch.ones_like(state.log_joint[0])
        if self.step_size is None:
            step_size = first_step_sizes(state)
            for _ in range(_TUNING):
                state, step_size = tune_step(moves, state, one, step_size)
            self.step_size = step_size
        acceptance = torch.zeros_like(one)
        for _ in range(_TRANSITIONS):
            state, accepted = moves(state, one, self.step_size)
            acceptance = acceptance + accepted.mean(0) / _TRANSITIONS
        self.step_size = self.step_size * (_GAIN * (acceptance - _KERNEL.target_acceptance)).exp()
        return state
