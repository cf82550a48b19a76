"""Annealed importance sampling, forward and in reverse, with a pilot that tunes and freezes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.hamiltonian import Transition, hamiltonian_transition
from pyro_vharm.inference.path import AnnealingPath, PathState, annealing_path
from pyro_vharm.inference.start import StartDensity, match_gaussian, match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import (
    Particles,
    drop_nonfinite,
    relative_variance,
    resample,
)

__all__ = ["AnnealedImportanceSampling", "AnnealedPlan", "anneal_forward", "anneal_reverse"]

_PILOT_SWEEPS = 2
_FIRST_STEP_SIZE = 0.5
_PILOT_DRAWS, _PILOT_DRAWS_PER_DIM = 200, 20


class AnnealedPlan(NamedTuple):
    """Everything that a pilot fixes before the run that counts.

    Attributes:
        path: from the normalised density f_0 to the joint density.
        temperatures: 0 = β_0 < … < β_T = 1, shape ``(T + 1,)``.
        step_sizes: of the transition at each β_t, t ≥ 1, per unit, shape ``(T, unit)``.
        num_leapfrog: leapfrog steps of each transition.
    """

    path: AnnealingPath
    temperatures: Tensor
    step_sizes: Tensor
    num_leapfrog: int

    @property
    def start(self) -> StartDensity:
        """The density f_0."""
        return self.path.start


class _Tuned(NamedTuple):
    plan: AnnealedPlan
    state: PathState
    log_weights: Tensor


class _Weighted(NamedTuple):
    latents: Tensor
    log_weights: Tensor
    acceptance: Tensor


def anneal_forward(plan: AnnealedPlan, latents: Tensor) -> _Weighted:
    """Carry draws of the start density along log f_β = (1 − β) log f_0 + β log p(v, h; θ).

    The weight Π_t f_{β_t}(h_{t−1}) / f_{β_{t−1}}(h_{t−1}) has mean p(v; θ), whatever the
    transitions, as long as each leaves its f_{β_t} invariant.
    """
    state = plan.path.at(latents)
    log_weights = torch.zeros_like(state.log_joint)
    acceptance = torch.zeros_like(log_weights)
    for t, change in enumerate(plan.temperatures.diff()):
        log_weights = log_weights + change * state.log_ratio
        state, accepted = _transition(plan, t, state)
        acceptance = acceptance + accepted / len(plan.step_sizes)
    return _Weighted(state.latents, log_weights, acceptance)


def anneal_reverse(plan: AnnealedPlan, latents: Tensor) -> _Weighted:
    """Carry posterior draws back to the start density, transitions reversed and in reverse order.

    Each transition is reversible, so it is its own reversal. If the draws are exact,
    E[exp(−log_weights)] = 1 / p(v; θ).
    """
    state = plan.path.at(latents)
    log_weights = torch.zeros_like(state.log_joint)
    acceptance = torch.zeros_like(log_weights)
    changes = plan.temperatures.diff()
    for t in reversed(range(len(changes))):
        state, accepted = _transition(plan, t, state)
        acceptance = acceptance + accepted / len(changes)
        log_weights = log_weights + changes[t] * state.log_ratio
    return _Weighted(state.latents, log_weights, acceptance)


@dataclass(frozen=True)
class AnnealedImportanceSampling:
    """Annealed importance sampling from a start density near the posterior, and back.

    Forward, each particle's weight is an unbiased estimate of p(v_u; θ), so the log of their mean
    is a stochastic lower bound on log p(v_u; θ). The reverse runs start from the forward
    particles, resampled and moved on at β = 1: an upper bound *conditional* on those being
    posterior draws. A pilot refits the start density, tunes the step sizes per unit and temperature
    and foresees the spread of the weights; then all are frozen.

    Args:
        num_particles: chains per unit and direction.
        num_steps: T, temperatures after the start.
        num_leapfrog: leapfrog steps per transition.
        num_settling: transitions at β = 1 before the reverse run.
        prior_share: share of prior in the start density, in [0, 1).
        target_acceptance: what the pilot tunes step sizes to.
        refit_start: let the pilot refit the Gaussian of the start density to where its particles
            ended, so that a near-Gaussian posterior needs few temperatures in any dimension.

    Source: "Annealed Importance Sampling", Neal (2001); "Sandwiching the marginal likelihood using
    bidirectional Monte Carlo", Grosse, Ghahramani, Adams (2015).
    """

    num_particles: int = 16
    num_steps: int = 10
    num_leapfrog: int = 5
    num_settling: int = 10
    prior_share: float = 0.05
    target_acceptance: float = 0.75
    refit_start: bool = True

    def __post_init__(self) -> None:
        for name in ("num_particles", "num_steps", "num_leapfrog"):
            if getattr(self, name) < 1 or (name == "num_particles" and self.num_particles < 2):
                raise InputError(f"{name} = {getattr(self, name)} is too small")
        if not 0 <= self.prior_share < 1:
            raise InputError(f"prior_share must lie in [0, 1), not {self.prior_share}")
        if not 0 < self.target_acceptance < 1:
            raise InputError(f"target_acceptance must lie in (0, 1), not {self.target_acceptance}")

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        exact: Tensor | None = None,
        progress: bool = False,
    ) -> Particles:
        """Estimate log p(v_u; θ) of every unit from both sides.

        Args:
            densities: the units.
            start: a start density of one's own; by default matched to guide draws.
            exact: one exact posterior draw of each unit, ``(1, unit, dim)``, for the reverse runs
                to start from; by default they start from forward particles, moved on.
            progress: show a bar.
        """
        start = match_start(densities, self.prior_share) if start is None else start
        with tqdm(
            total=3, desc="annealing", disable=not progress or None, delay=2, leave=False
        ) as bar:
            plan, variance = self.pilot(densities, start)
            bar.update()
            latents = plan.start.sample(densities, self.num_particles)
            forward = anneal_forward(plan, latents)
            bar.update()
            log_weights, dropped = drop_nonfinite(forward.log_weights)
            if exact is None:
                last = self.settle(plan, resample(forward.latents, log_weights))
            else:
                last = exact.expand_as(latents)
            reverse = anneal_reverse(plan, last)
            bar.update()
        reverse_log_weights, dropped_reverse = drop_nonfinite(reverse.log_weights, reverse=True)
        return Particles(
            unconstrained=forward.latents,
            log_weights=log_weights,
            kind=Kind.ESTIMATED,
            pilot_variance=variance,
            reverse_log_weights=reverse_log_weights,
            acceptance=forward.acceptance.mean(0),
            num_nonfinite=dropped + dropped_reverse,
        )

    def pilot(self, densities: UnitDensities, start: StartDensity) -> tuple[AnnealedPlan, Tensor]:
        """Fix the plan on throw-away particles.

        A first annealing run tunes step sizes and brings its particles to the posterior; moved on
        at β = 1, they refit the Gaussian of the start density, covariance and all; a second run
        from there tunes the step sizes anew.

        Returns:
            the frozen plan, and var(w)/mean(w)² of the second run's weights, shape ``(unit,)``.
        """
        path = annealing_path(densities, start, self.num_particles, self._num_calls(densities.dim))
        first = self._tune(densities, path)
        if not self.refit_start:
            return first.plan, relative_variance(drop_nonfinite(first.log_weights)[0])
        state, draws = first.state, []
        for _ in range(self._num_refit(densities.dim)):
            state = self._adapt(first.plan, -1, state)
            draws.append(state.latents)
        refitted = replace(start, gaussian=match_gaussian(torch.cat(draws)))
        second = self._tune(densities, path.from_start(refitted))
        return second.plan, relative_variance(drop_nonfinite(second.log_weights)[0])

    def _num_refit(self, dim: int) -> int:
        """Transitions whose states refit the start density."""
        return -(-(_PILOT_DRAWS + _PILOT_DRAWS_PER_DIM * dim) // self.num_particles)

    def _num_calls(self, dim: int) -> int:
        """Evaluations of the path in one run, about."""
        pilot = (1 + self.refit_start) * _PILOT_SWEEPS * self.num_steps
        refit = self._num_refit(dim) if self.refit_start else 0
        return self.num_leapfrog * (pilot + refit + 2 * self.num_steps + self.num_settling)

    def _tune(self, densities: UnitDensities, path: AnnealingPath) -> _Tuned:
        temperatures = torch.linspace(
            0, 1, self.num_steps + 1, dtype=densities.dtype, device=densities.device
        )
        state = path.at(path.start.sample(densities, self.num_particles))
        log_weights = torch.zeros_like(state.log_joint)
        first = torch.full_like(log_weights[0], _FIRST_STEP_SIZE * densities.dim**-0.25)
        plan = AnnealedPlan(path, temperatures, first.repeat(self.num_steps, 1), self.num_leapfrog)
        for t, change in enumerate(temperatures.diff()):
            log_weights = log_weights + change * state.log_ratio
            plan.step_sizes[t] = plan.step_sizes[max(t - 1, 0)]
            for _ in range(_PILOT_SWEEPS):
                state = self._adapt(plan, t, state)
        return _Tuned(plan, state, log_weights)

    def _adapt(self, plan: AnnealedPlan, t: int, state: PathState) -> PathState:
        """One transition, after which its step sizes are pulled toward the target acceptance."""
        t = t % len(plan.step_sizes)
        state, accepted = _transition(plan, t, state)
        plan.step_sizes[t] *= (accepted.mean(0) - self.target_acceptance).exp()
        return state

    def settle(self, plan: AnnealedPlan, latents: Tensor) -> Tensor:
        """Move particles on at β = 1."""
        state = plan.path.at(latents)
        for _ in range(self.num_settling):
            state, _ = _transition(plan, len(plan.step_sizes) - 1, state)
        return state.latents


def _transition(plan: AnnealedPlan, t: int, state: PathState) -> Transition:
    return hamiltonian_transition(
        plan.path, state, plan.temperatures[t + 1], plan.step_sizes[t], plan.num_leapfrog
    )
