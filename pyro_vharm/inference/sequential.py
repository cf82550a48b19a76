"""Sequential Monte Carlo along the annealing path: annealed importance sampling that resamples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.refitting import refit_start
from pyro_vharm.inference.start import MatchedStart, PriorStart, StartDensity, block_starts
from pyro_vharm.inference.tempering import temper
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import (
    Particles,
    drop_nonfinite,
    effective_sample_size,
    join_units,
    log_mean_exp,
    systematic_resample,
)

__all__ = ["Sequence", "SequentialMonteCarlo", "SequentialPlan", "run_sequence"]

_ROWS_AT_ONCE = 2**14
_TYPICAL_STEPS = 20


class SequentialPlan(NamedTuple):
    """Everything that a pilot fixes before the run that counts.

    Attributes:
        moves: transitions along the path from the normalised density f_0 to the joint density.
        temperatures: 0 = β_0 ≤ … ≤ β_T = 1 per unit, shape ``(T + 1, unit)``.
        step_sizes: at each β_t, t ≥ 1, shape ``(T, unit)``.
        metrics: Cholesky factors that whiten the moves there, shape ``(T, unit, dim, dim)``.
        foreseen_variance: Σ_t var(increment) of the pilot, shape ``(unit,)``: with perfect mixing
            the relative variance of Ẑ is that over the number of particles.
    """

    moves: HamiltonianMoves
    temperatures: Tensor
    step_sizes: Tensor
    metrics: Tensor

    foreseen_variance: Tensor


class Sequence(NamedTuple):
    """Where a sequence of weighing, resampling and moving ended.

    Attributes:
        latents: shape ``(particle, unit, dim)``.
        log_weights: shape ``(particle, unit)``.
        acceptance: mean acceptance probabilities, shape ``(particle, unit)``.
        num_nonfinite: weights that were not finite and count as zero.
    """

    latents: Tensor
    log_weights: Tensor
    acceptance: Tensor
    num_nonfinite: int


def run_sequence(
    plan: SequentialPlan, latents: Tensor, group_size: int, least_share: float, num_sweeps: int
) -> Sequence:
    """Weigh, resample where weights have become uneven, and move, at each temperature.

    A group of a unit is resampled when the effective size of its weights falls below
    `least_share` of its particles; every weight is then the group's mean weight. The mean weight
    at the end is unbiased for p(v; θ), also when no group was ever resampled.

    Args:
        plan: the frozen plan.
        latents: draws of the start density, ``(particle, unit, dim)``.
        group_size: so many consecutive particles are resampled together.
        least_share: share of the effective size below which a group is resampled.
        num_sweeps: transitions at each temperature.

    Source: "Sequential Monte Carlo samplers", Del Moral, Doucet, Jasra (2006); that adaptive
    resampling keeps the estimate unbiased: "On the role of interaction in sequential Monte Carlo
    algorithms", Whiteley, Lee, Heine (2016).
    """
    state = plan.moves.at(latents)
    log_weights = torch.zeros_like(state.log_joint)
    acceptance, dropped = torch.zeros_like(log_weights), 0
    for t, change in enumerate(plan.temperatures.diff(dim=0)):
        step = torch.where(change > 0, change * state.log_ratio, 0.0)
        log_weights, bad = drop_nonfinite(log_weights + step)
        dropped += bad
        index, log_weights = _resample_groups(log_weights, group_size, least_share)
        state = state.take(index)
        for _ in range(num_sweeps):
            temperature, step_size = plan.temperatures[t + 1], plan.step_sizes[t]
            state, accepted = plan.moves(state, temperature, step_size, plan.metrics[t])
            acceptance = acceptance + accepted / (len(plan.step_sizes) * num_sweeps)
    return Sequence(plan.moves.latents(state), log_weights, acceptance, dropped)


def _resample_groups(
    log_weights: Tensor, group_size: int, least_share: float
) -> tuple[Tensor, Tensor]:
    """Which particle each becomes, and its weight then, both ``(particle, unit)``."""
    num_particles, num_units = log_weights.shape
    grouped = log_weights.reshape(-1, group_size, num_units)
    columns = grouped.movedim(1, 0).reshape(group_size, -1)
    stay = torch.arange(group_size, device=columns.device)[:, None].expand_as(columns)
    poor = effective_sample_size(columns) < least_share * group_size
    within = torch.where(poor, systematic_resample(columns), stay)
    equal = log_mean_exp(columns).expand_as(columns)
    weights = torch.where(poor, equal, columns)
    first = torch.arange(0, num_particles, group_size, device=columns.device)[:, None, None]
    index = within.reshape(group_size, -1, num_units).movedim(0, 1) + first
    kept = weights.reshape(group_size, -1, num_units).movedim(0, 1)
    return index.reshape(num_particles, num_units), kept.reshape(num_particles, num_units)


@dataclass(frozen=True)
class SequentialMonteCarlo:
    """Tempered sequential Monte Carlo: a population that resamples on its way to the posterior.

    From the prior by default, so that it depends on no guide, and resampling sends its particles
    where the mass is: the natural second opinion on several modes. The log of the mean weight is
    a stochastic lower bound on log p(v_u; θ); there is no upper one. A pilot population chooses
    the temperatures of each unit, step sizes and metrics; then all are frozen. Resampling works
    within independent groups, whose spread gives the standard error.

    Args:
        num_particles: all particles of a unit.
        num_groups: into how many independent groups they are divided, at least 2.
        start: where to start, a `PriorStart` or `MatchedStart`.
        kernel: the transitions.
        num_sweeps: transitions at each temperature.
        least_share: share of the effective size below which a group is resampled, in [0, 1].

    Source: "Sequential Monte Carlo samplers", Del Moral, Doucet, Jasra (2006).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_vharm import log_evidence
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    ...         pyro.sample("x", dist.Normal(h.square().sum(-1), 1.0), obs=x)
    >>> evidence = log_evidence(
    ...     model, (torch.tensor([3.0]),), method=SequentialMonteCarlo(), progress=False
    ... )
    >>> -3 < evidence.per_unit.total().value < -1
    True
    """

    num_particles: int = 256
    num_groups: int = 8
    start: PriorStart | MatchedStart = field(default_factory=PriorStart)
    kernel: HamiltonianKernel = field(default_factory=HamiltonianKernel)
    num_sweeps: int = 2
    least_share: float = 0.5

    def __post_init__(self) -> None:
        if self.num_groups < 2:
            raise InputError(f"num_groups must be at least 2, not {self.num_groups}")
        if self.num_particles % self.num_groups or self.group_size < 4:
            raise InputError(
                f"num_particles must be a multiple of num_groups, with at least 4 in each; not "
                f"{self.num_particles} in {self.num_groups}"
            )
        if self.num_sweeps < 1:
            raise InputError(f"num_sweeps must be at least 1, not {self.num_sweeps}")
        if not 0 <= self.least_share <= 1:
            raise InputError(f"least_share must lie in [0, 1], not {self.least_share}")

    @property
    def group_size(self) -> int:
        """Particles that are resampled together."""
        return self.num_particles // self.num_groups

    def run(
        self,
        densities: UnitDensities,
        *,
        start: StartDensity | None = None,
        progress: bool = False,
    ) -> Particles:
        """Estimate log p(v_u; θ) of every unit from below.

        Args:
            densities: the units.
            start: a start density of one's own; by default the prior, or matched to guide draws.
            progress: show a bar.
        """
        size = max(_ROWS_AT_ONCE // self.num_particles, 1)
        blocks = block_starts(densities, size, self.start.prior_share, start)
        with tqdm(
            total=densities.num_units,
            desc="sequential",
            unit="unit",
            disable=not progress or None,
            delay=2,
            leave=False,
        ) as bar:
            parts = (
                (units, self._run_block(block, own, bar.update)) for units, block, own in blocks
            )
            return join_units(parts, densities.num_units)

    def pilot(self, densities: UnitDensities, start: StartDensity) -> SequentialPlan:
        """Fix temperatures, step sizes and metrics on a throw-away population."""
        if self.start.refit:
            start = refit_start(densities, start, self.kernel, self.num_particles)
        ahead = 2 * _TYPICAL_STEPS * self.num_sweeps
        moves = self.kernel.moves(densities, start, self.num_particles, ahead, own_metric=True)
        tempered = temper(moves, self.num_particles, num_sweeps=self.num_sweeps)
        assert tempered.metrics is not None, "asked for"
        return SequentialPlan(
            moves=moves,
            temperatures=tempered.length.temperatures,
            step_sizes=tempered.step_sizes,
            metrics=tempered.metrics,
            foreseen_variance=tempered.length.lengths.diff(dim=0).square().sum(0),
        )

    def _run_block(
        self, densities: UnitDensities, start: StartDensity, report: Callable[[int], object]
    ) -> Particles:
        plan = self.pilot(densities, start)
        latents = plan.moves.start.sample(densities, self.num_particles)
        ended = run_sequence(plan, latents, self.group_size, self.least_share, self.num_sweeps)
        report(densities.num_units)
        return Particles(
            unconstrained=ended.latents,
            log_weights=ended.log_weights,
            kind=Kind.ESTIMATED,
            group_size=self.group_size,
            pilot_variance=plan.foreseen_variance / self.group_size,
            acceptance=ended.acceptance.mean(0),
            num_steps=(plan.temperatures.diff(dim=0) > 0).sum(0).to(latents),
            num_nonfinite=ended.num_nonfinite,
        )
