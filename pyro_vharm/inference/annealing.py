"""Annealed importance sampling, forward and in reverse, with a pilot that tunes and freezes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.hamiltonian import hamiltonian_transition
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
        start: the normalised density f_0.
        temperatures: 0 = β_0 < … < β_T = 1, shape ``(T + 1,)``.
        step_sizes: of the transition at each β_t, t ≥ 1, per unit, shape ``(T, unit)``.
        num_leapfrog: leapfrog steps of each transition.
    """

    start: StartDensity
    temperatures: Tensor
    step_sizes: Tensor
    num_leapfrog: int


class _Tuned(NamedTuple):
    plan: AnnealedPlan
    latents: Tensor
    log_weights: Tensor


class _Weighted(NamedTuple):
    latents: Tensor
    log_weights: Tensor
    acceptance: Tensor


def anneal_forward(densities: UnitDensities, plan: AnnealedPlan, latents: Tensor) -> _Weighted:
    """Carry draws of the start density along log f_β = (1 − β) log f_0 + β log p(v, h; θ).

    The weight Π_t f_{β_t}(h_{t−1}) / f_{β_{t−1}}(h_{t−1}) has mean p(v; θ), whatever the
    transitions, as long as each leaves its f_{β_t} invariant.
    """
    log_weights = torch.zeros(latents.shape[:2], dtype=latents.dtype, device=latents.device)
    acceptance = torch.zeros_like(log_weights)
    for t, change in enumerate(plan.temperatures.diff()):
        log_weights = log_weights + change * _log_ratio(densities, plan.start, latents)
        latents, accepted = _transition(densities, plan, t, latents)
        acceptance = acceptance + accepted / len(plan.step_sizes)
    return _Weighted(latents, log_weights, acceptance)


def anneal_reverse(densities: UnitDensities, plan: AnnealedPlan, latents: Tensor) -> _Weighted:
    """Carry posterior draws back to the start density, transitions reversed and in reverse order.

    Each transition is reversible, so it is its own reversal. If the draws are exact,
    E[exp(−log_weights)] = 1 / p(v; θ).
    """
    log_weights = torch.zeros(latents.shape[:2], dtype=latents.dtype, device=latents.device)
    acceptance = torch.zeros_like(log_weights)
    changes = plan.temperatures.diff()
    for t in reversed(range(len(changes))):
        latents, accepted = _transition(densities, plan, t, latents)
        acceptance = acceptance + accepted / len(changes)
        log_weights = log_weights + changes[t] * _log_ratio(densities, plan.start, latents)
    return _Weighted(latents, log_weights, acceptance)


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
        progress: bool = False,
    ) -> Particles:
        """Estimate log p(v_u; θ) of every unit from both sides.

        Args:
            densities: the units.
            start: a start density of one's own; by default matched to guide draws.
            progress: show a bar.
        """
        start = match_start(densities, self.prior_share) if start is None else start
        with tqdm(
            total=3, desc="annealing", disable=not progress or None, delay=2, leave=False
        ) as bar:
            plan, variance = self.pilot(densities, start)
            bar.update()
            latents = plan.start.sample(densities, self.num_particles)
            forward = anneal_forward(densities, plan, latents)
            bar.update()
            log_weights, dropped = drop_nonfinite(forward.log_weights)
            settled = self.settle(densities, plan, resample(forward.latents, log_weights))
            reverse = anneal_reverse(densities, plan, settled)
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
        first = self._tune(densities, start)
        if not self.refit_start:
            return first.plan, relative_variance(drop_nonfinite(first.log_weights)[0])
        latents, draws = first.latents, []
        wanted = _PILOT_DRAWS + _PILOT_DRAWS_PER_DIM * densities.dim
        for _ in range(-(-wanted // self.num_particles)):
            latents = self._adapt(densities, first.plan, -1, latents)
            draws.append(latents)
        refitted = replace(start, gaussian=match_gaussian(torch.cat(draws)))
        second = self._tune(densities, refitted)
        return second.plan, relative_variance(drop_nonfinite(second.log_weights)[0])

    def _tune(self, densities: UnitDensities, start: StartDensity) -> _Tuned:
        temperatures = torch.linspace(
            0, 1, self.num_steps + 1, dtype=densities.dtype, device=densities.device
        )
        latents = start.sample(densities, self.num_particles)
        log_weights = torch.zeros(latents.shape[:2], dtype=latents.dtype, device=latents.device)
        first = torch.full_like(log_weights[0], _FIRST_STEP_SIZE * densities.dim**-0.25)
        plan = AnnealedPlan(start, temperatures, first.repeat(self.num_steps, 1), self.num_leapfrog)
        for t, change in enumerate(temperatures.diff()):
            log_weights = log_weights + change * _log_ratio(densities, start, latents)
            plan.step_sizes[t] = plan.step_sizes[max(t - 1, 0)]
            for _ in range(_PILOT_SWEEPS):
                latents = self._adapt(densities, plan, t, latents)
        return _Tuned(plan, latents, log_weights)

    def _adapt(
        self, densities: UnitDensities, plan: AnnealedPlan, t: int, latents: Tensor
    ) -> Tensor:
        """One transition, after which its step sizes are pulled toward the target acceptance."""
        t = t % len(plan.step_sizes)
        latents, accepted = _transition(densities, plan, t, latents)
        plan.step_sizes[t] *= (accepted.mean(0) - self.target_acceptance).exp()
        return latents

    def settle(self, densities: UnitDensities, plan: AnnealedPlan, latents: Tensor) -> Tensor:
        """Move particles on at β = 1."""
        for _ in range(self.num_settling):
            latents, _ = _transition(densities, plan, len(plan.step_sizes) - 1, latents)
        return latents


def _log_ratio(densities: UnitDensities, start: StartDensity, latents: Tensor) -> Tensor:
    """Log p(v, h; θ) − log f_0(h)."""
    with torch.no_grad():
        terms = densities.terms(latents)
        return terms.log_joint - start.log_prob(latents, terms.log_prior)


def _transition(
    densities: UnitDensities, plan: AnnealedPlan, t: int, latents: Tensor
) -> tuple[Tensor, Tensor]:
    return hamiltonian_transition(
        _tempered(densities, plan.start, plan.temperatures[t + 1]),
        latents,
        plan.step_sizes[t],
        plan.start.gaussian,
        plan.num_leapfrog,
    )


def _tempered(
    densities: UnitDensities, start: StartDensity, temperature: Tensor
) -> Callable[[Tensor], Tensor]:
    def log_density(latents: Tensor) -> Tensor:
        terms = densities.terms(latents)
        log_start = start.log_prob(latents, terms.log_prior)
        return (1 - temperature) * log_start + temperature * terms.log_joint

    return log_density
