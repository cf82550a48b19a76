"""Annealed importance sampling, forward and in reverse, with a pilot that tunes and freezes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind
from pyro_vharm.inference.annealed_runs import AnnealedPlan, anneal_forward, anneal_reverse
from pyro_vharm.inference.hamiltonian import HamiltonianKernel, HamiltonianMoves
from pyro_vharm.inference.refitting import refit_start
from pyro_vharm.inference.schedules import AdaptiveSchedule, Schedule, ThermodynamicLength
from pyro_vharm.inference.start import MatchedStart, PriorStart, StartDensity, block_starts
from pyro_vharm.inference.tempering import first_step_sizes, measure_length, tune_step
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_selector
from pyro_vharm.particles import (
    LEAST_DRAWS_FOR_SHAPE,
    Particles,
    drop_nonfinite,
    join_units,
    pareto_shape,
    relative_variance,
    resample,
)

__all__ = ["AnnealedImportanceSampling"]

_ROWS_AT_ONCE = 2**14
_LARGEST_RISE = 8
_LEAST_MEASURED = 4  # temperatures: to place fewer, a measured path helps less than it costs
_CAUTION = 2.0  # the largest weights are those that a pilot misses


@dataclass(frozen=True)
class AnnealedImportanceSampling:
    """Annealed importance sampling from a start density near the posterior, and back.

    Forward, each particle's weight is an unbiased estimate of p(v_u; θ), so the log of their mean
    is a stochastic lower bound on log p(v_u; θ). The reverse runs start from the forward
    particles, resampled and moved on at β = 1: an upper bound *conditional* on those being
    posterior draws. A pilot on random numbers of its own refits the start density, places the
    temperatures, tunes step sizes per unit and temperature and foresees the spread of the weights;
    then all are frozen. Where a posterior is near Gaussian, or a mixture of some Gaussians whose
    peaks climbs find, the refit takes a few gradients at draws, also in a hundred dims, and few
    temperatures are left to place.

    With weights of variance V, relative to their squared mean, the two bounds of a unit lie about
    V / num_particles apart. Given a `target_width`, each unit gets as many temperatures as its
    pilot asks for: all begin with `num_steps`, and those that would miss it double theirs until
    they meet it or `max_steps`. Where units cannot be run alone, all get what the worst needs.

    Args:
        num_particles: chains per unit and direction.
        num_steps: T, temperatures after the start.
        target_width: nats that the bounds of a unit may lie apart; ``None`` to keep `num_steps`.
        max_steps: most temperatures of a unit with a target width.
        start: where to start, a `MatchedStart` or `PriorStart`.
        schedule: where to place the temperatures; fewer than four are placed evenly, as to measure
            the path for so few costs more than it helps.
        kernel: the transitions.
        num_settling: transitions at β = 1 before the reverse run.

    Source: "Annealed Importance Sampling", Neal (2001); "Sandwiching the marginal likelihood using
    bidirectional Monte Carlo", Grosse, Ghahramani, Adams (2015); "Batch and match: black-box
    variational inference with a score-based divergence", Cai et al. (2024).

    >>> import pyro, pyro.distributions as dist
    >>> from pyro_vharm import log_evidence
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
    ...         pyro.sample("x", dist.Normal(h.sum(-1), 1.0), obs=x)
    >>> x = torch.tensor([0.5, -3.0])
    >>> method = AnnealedImportanceSampling(target_width=0.05)
    >>> evidence = log_evidence(model, (x,), method=method, progress=False)
    >>> exact = dist.Normal(0.0, 6**0.5).log_prob(x)
    >>> bool(((evidence.per_unit.values - exact).abs() < 0.2).all())
    True
    """

    num_particles: int = 16
    num_steps: int = 10
    target_width: float | None = None
    max_steps: int = 640
    start: MatchedStart | PriorStart = field(default_factory=MatchedStart)
    schedule: Schedule = field(default_factory=AdaptiveSchedule)
    kernel: HamiltonianKernel = field(default_factory=HamiltonianKernel)
    num_settling: int = 10

    def __post_init__(self) -> None:
        for name, least in (("num_particles", 2), ("num_steps", 1), ("max_steps", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.num_settling < 0:
            raise InputError(f"num_settling must not be negative, got {self.num_settling}")
        if self.target_width is not None and not self.target_width > 0:
            raise InputError(f"target_width must be positive, not {self.target_width}")

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
            exact: exact posterior draws of each unit, ``(particle, unit, dim)``, a reverse run
                from each; then no particle moves at β = 1, as nothing depends on it. By default
                reverse runs start from forward particles, moved on.
            progress: show a bar.
        """
        size = max(_ROWS_AT_ONCE // self.num_particles, 1)
        prior_share, roughly = self.start.prior_share, self.start.refit
        blocks = block_starts(densities, size, prior_share, start, roughly=roughly)
        with tqdm(
            total=densities.num_units,
            desc="annealing",
            unit="unit",
            disable=not progress or None,
            delay=2,
            leave=False,
        ) as bar:
            parts = (
                (units[some], particles)
                for units, block, own in blocks
                for some, particles in self._run_block(
                    block, own, None if exact is None else exact[:, units], bar.update
                )
            )
            return join_units(parts, densities.num_units)

    def _run_block(
        self,
        densities: UnitDensities,
        start: StartDensity,
        exact: Tensor | None,
        report: Callable[[int], object],
    ) -> list[tuple[Tensor, Particles]]:
        """Give units that miss the target more temperatures, and run the others for good."""
        start = self.locate(densities, start)
        pending = torch.arange(densities.num_units, device=densities.device)
        select = None if self.target_width is None else unit_selector(densities)
        num_steps, done = self.num_steps, []
        length = self._length(densities, start, num_steps)
        part, own = densities, exact
        while len(pending):
            plan, variance = self.tune(part, start, length, num_steps, last_move=exact is None)
            ready = self._is_narrow(variance) | (num_steps >= self._most_steps)
            if select is None:
                ready = ready.all().expand_as(ready)
            good = ready.nonzero().flatten()
            if len(good) == len(pending):
                done.append((pending, self._count(plan, own)))
            elif len(good) and select is not None:
                chosen = self._plan_of(select(pending[good]), plan, good)
                some = None if own is None else own[:, good]
                done.append((pending[good], self._count(chosen, some)))
            report(len(good))
            left = (~ready).nonzero().flatten()
            if len(left) and select is not None and len(left) < len(pending):
                part = select(pending[left])
            own = None if own is None else own[:, left]
            length, start, pending = length.select(left), start.select(left), pending[left]
            before, num_steps = num_steps, self._next(num_steps, variance[left])
            if before < _LEAST_MEASURED <= num_steps:
                length = self._length(part, start, num_steps)
        return done

    @property
    def _most_steps(self) -> int:
        return self.num_steps if self.target_width is None else self.max_steps

    def _is_narrow(self, variance: Tensor) -> Tensor:
        if self.target_width is None:
            return torch.ones_like(variance, dtype=torch.bool)
        return _CAUTION * variance / self.num_particles <= self.target_width

    def _next(self, num_steps: int, variance: Tensor) -> int:
        """Temperatures for the units left: log weights have variance log(1 + V) ∝ 1/T."""
        if not len(variance) or self.target_width is None:
            return num_steps
        aim = math.log1p(self.num_particles * self.target_width / _CAUTION)
        rise = min(max(float(variance.log1p().median()) / aim, 2.0), _LARGEST_RISE)
        doublings = round(math.log2(rise))
        return min(num_steps << doublings, self.max_steps)

    def pilot(self, densities: UnitDensities, start: StartDensity) -> tuple[AnnealedPlan, Tensor]:
        """Fix a plan with `num_steps` temperatures for every unit, on throw-away particles.

        Returns:
            the frozen plan, and var(w)/mean(w)² that it foresees, shape ``(unit,)``.
        """
        start = self.locate(densities, start)
        length = self._length(densities, start, self.num_steps)
        return self.tune(densities, start, length, self.num_steps)

    def locate(self, densities: UnitDensities, start: StartDensity) -> StartDensity:
        """The start density, its Gaussian refitted by a pilot if that was asked for."""
        if not self.start.refit:
            return start
        return refit_start(densities, start, self.kernel, self.num_particles)

    def _length(
        self, densities: UnitDensities, start: StartDensity, num_steps: int
    ) -> ThermodynamicLength:
        """The length of the path, where placing so many temperatures takes it."""
        if num_steps >= _LEAST_MEASURED and self.schedule.needs_length:
            return measure_length(self._moves(densities, start, 0), self.num_particles)
        return ThermodynamicLength.unmeasured(start.gaussian.mean[:, 0])

    def _moves(
        self, densities: UnitDensities, start: StartDensity, num_steps: int
    ) -> HamiltonianMoves:
        ahead = 3 * num_steps + self.num_settling
        return self.kernel.moves(densities, start, self.num_particles, ahead)

    def tune(
        self,
        densities: UnitDensities,
        start: StartDensity,
        length: ThermodynamicLength,
        num_steps: int,
        *,
        last_move: bool = True,
    ) -> tuple[AnnealedPlan, Tensor]:
        """Place so many temperatures and tune their step sizes, on throw-away particles.

        The spread of the weights is foreseen by their own, by that of a lognormal distribution of
        such log weights, and by the length of the path, whichever is largest: a few weights rarely
        show the largest.

        Returns:
            the frozen plan, and var(w)/mean(w)² of a weight under it as the pilot foresees it,
            shape ``(unit,)``.
        """
        moves = self._moves(densities, start, num_steps)
        temperatures = self.schedule.place(num_steps, length)
        num_moves = num_steps if last_move else num_steps - 1
        state = moves.draw_start(self.num_particles, resting=not num_moves)
        log_weights = torch.zeros_like(state.log_joint)
        step_sizes = torch.ones_like(temperatures[:num_moves])
        step_size = first_step_sizes(state)
        for t, change in enumerate(temperatures.diff(dim=0), 1):
            log_weights = log_weights + change * state.log_ratio
            if t <= num_moves:
                state, step_size = tune_step(moves, state, temperatures[t], step_size)
                step_sizes[t - 1] = step_size
        log_weights, _ = drop_nonfinite(log_weights)
        seen = relative_variance(log_weights).nan_to_num(nan=math.inf)  # without any weight
        plan = AnnealedPlan(moves, temperatures, step_sizes, seen)
        variance = torch.maximum(seen, _lognormal_variance(log_weights))
        least = (length.lengths[-1].square() / num_steps).expm1()  # 0 where it was not measured
        least = least.nan_to_num(nan=math.inf).clamp(max=self.num_particles)
        return plan, torch.maximum(variance, least)

    def _plan_of(self, densities: UnitDensities, plan: AnnealedPlan, units: Tensor) -> AnnealedPlan:
        moves = self._moves(densities, plan.moves.start.select(units), plan.num_steps)
        return AnnealedPlan(
            moves,
            plan.temperatures[:, units],
            plan.step_sizes[:, units],
            plan.pilot_variance[units],
        )

    def _count(self, plan: AnnealedPlan, exact: Tensor | None) -> Particles:
        """The runs that count, with everything frozen."""
        start, densities = plan.moves.start, plan.moves.densities
        forward = anneal_forward(plan, start.sample(densities, self.num_particles))
        log_weights, dropped = drop_nonfinite(forward.log_weights)
        if exact is None:
            last = self.settle(plan, resample(forward.latents, log_weights))
            reverse = anneal_reverse(plan, last)
        else:
            moves = self.kernel.moves(densities, start, len(exact), plan.num_moves)
            reverse = anneal_reverse(plan._replace(moves=moves), exact)
        reverse_log_weights, dropped_reverse = drop_nonfinite(reverse.log_weights, reverse=True)
        return Particles(
            unconstrained=forward.latents,
            log_weights=log_weights,
            kind=Kind.ESTIMATED,
            pilot_variance=plan.pilot_variance,
            reverse_log_weights=reverse_log_weights,
            acceptance=forward.acceptance.mean(0),
            num_steps=torch.full_like(plan.pilot_variance, plan.num_steps),
            pareto_shapes=self._shapes(log_weights),
            num_nonfinite=dropped + dropped_reverse,
        )

    def _shapes(self, log_weights: Tensor) -> Tensor | None:
        """Pareto k̂, where there are enough particles: a heavy tail of weights seen too rarely."""
        enough = self.num_particles >= LEAST_DRAWS_FOR_SHAPE
        return pareto_shape(log_weights) if enough else None

    def settle(self, plan: AnnealedPlan, latents: Tensor) -> Tensor:
        """Move particles on at β = 1."""
        state = plan.moves.at(latents)
        for _ in range(self.num_settling):
            state, _ = plan.move(plan.num_steps, state)
        return plan.moves.latents(state)


def _lognormal_variance(log_weights: Tensor) -> Tensor:
    """exp(σ²) − 1 for normal log weights of variance σ², at most their number, shape ``(unit,)``.

    Normal log weights keep their variance when weighed by any power of the weights. The square
    root leaves out particles of next to no weight, and still counts most of the others.
    """
    finite = log_weights.masked_fill(torch.isneginf(log_weights), 0.0)
    share = torch.softmax(0.5 * log_weights, 0).nan_to_num(nan=0.0)
    mean = (share * finite).sum(0)
    variance = (share * (finite - mean).square()).sum(0)
    degrees = (1 - share.square().sum(0)).clamp(min=1e-6)
    return (variance / degrees).expm1().clamp(max=len(log_weights))
