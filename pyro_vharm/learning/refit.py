"""Refitting the guide's own family to each unit, at fixed θ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Kind, UnitEstimates, concatenate
from pyro_vharm.learning.training import Schedule, minimise
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.families import FreedGuide, free_arguments
from pyro_vharm.model.problem import Problem
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound

__all__ = ["Refit", "elbo_over_batches", "estimate_elbo", "refitted_elbo"]

_ROWS_PER_PASS = 2**18
_MOST_ROUNDS, _LEAST_GAIN = 20, 1e-5


@dataclass(frozen=True)
class Refit:
    """How to refit a guide, and how finely to evaluate an ELBO.

    Args:
        num_steps: gradient steps in each round; rounds are added while the ELBO rises.
        learning_rate: the first step size, in standard deviations for locations.
        num_replicates: draws per step.
        num_particles: fresh draws that evaluate an ELBO.
    """

    num_steps: int = 200
    learning_rate: float = 0.05
    num_replicates: int = 8
    num_particles: int = 400

    def __post_init__(self) -> None:
        Schedule(self.num_steps, self.learning_rate)
        if self.num_replicates < 1:
            raise InputError(f"num_replicates must be at least 1, not {self.num_replicates}")
        if self.num_particles < 2:
            raise InputError(f"num_particles must be at least 2, not {self.num_particles}")

    @property
    def schedule(self) -> Schedule:
        """Steps and step size."""
        return Schedule(self.num_steps, self.learning_rate)


def estimate_elbo(densities: UnitDensities, num_particles: int) -> UnitEstimates:
    """L(θ, q) per unit from fresh draws of the guide; unbiased, in nats.

    One value for all units where the guide's density can be had in total only.
    """
    log_weights = _guide_log_weights(densities, num_particles)
    error = log_weights.std(0) / num_particles**0.5
    units_each = densities.num_units // log_weights.shape[1]
    return UnitEstimates(log_weights.mean(0), error, Kind.ESTIMATED, units_each=units_each)


def _guide_log_weights(densities: UnitDensities, num_particles: int) -> Tensor:
    per_pass = max(_ROWS_PER_PASS // densities.num_units, 1)
    parts: list[Tensor] = []
    with torch.no_grad():
        for done in range(0, num_particles, per_pass):
            count = min(per_pass, num_particles - done)
            parts.append(densities.draw_guide(count).log_weights)
    return torch.cat(parts)


def elbo_over_batches(problem: Problem, num_particles: int) -> UnitEstimates | None:
    """L(θ, q) per unit over all batches; ``None`` for a guide that holds latents as points."""
    if not problem.densities[0].has_guide_density:
        return None
    return concatenate([estimate_elbo(d, num_particles) for d in problem.densities])


def refitted_elbo(problem: Problem, refit: Refit, *, progress: bool) -> UnitEstimates | None:
    """Max over q in the guide's family, separately for each unit, of L(θ, q), from below.

    The arguments of the guide's distributions are freed for each unit and optimised from where
    the guide has them. Where they cannot be freed and the data are one joint unit, the guide's
    parameters themselves are fine-tuned, which is the same family. A refit can only approach the
    maximum, so ℓ − this is an upper bound on the approximation gap, up to Monte Carlo error.

    Returns:
        ``None`` where the family cannot be freed and there are several units, where the guide
        draws discrete latents, or where it has no density.
    """
    structure = problem.densities[0].structure
    if structure.guided or not problem.densities[0].has_guide_density:
        return None
    single = len(problem.densities) == 1
    bar = tqdm(
        problem.densities,
        desc="refitting",
        disable=single or not progress or None,
        delay=2,
        leave=False,
    )
    parts = [_refit_batch(problem, densities, refit, progress and single) for densities in bar]
    found = [part for part in parts if part is not None]
    return concatenate(found) if len(found) == len(parts) else None


def _refit_batch(
    problem: Problem, densities: UnitDensities, refit: Refit, progress: bool
) -> UnitEstimates | None:
    assert problem.guide is not None, "callers check for a guide first"
    freed = free_arguments(problem.guide, densities.batch)
    if freed is None or not densities.structure.per_unit:
        shared = densities.layout.plate is not None and densities.structure.per_unit
        if shared or not problem.guide_parameters.trainable():
            return None
        with problem.guide_parameters.at(problem.guide_parameters.values()):
            _fit(densities, problem.guide_parameters.trainable(), refit, progress)
            return estimate_elbo(densities, refit.num_particles)
    if not freed.leaves():  # a guide without sites
        return estimate_elbo(densities, refit.num_particles)
    return _refit_freed(densities, freed, refit, progress)


def _refit_freed(
    densities: UnitDensities, freed: FreedGuide, refit: Refit, progress: bool
) -> UnitEstimates:
    """The best of each unit from two starts: where the guide has it, and narrow and elsewhere.

    KL(q ‖ p) has several local minima where a posterior has several modes. From the second start
    one round is run first; if it is behind for every unit, that was enough. Which is better is
    told by draws that serve nothing else.
    """
    seed = int(torch.randint(2**31, ()))

    def climb(begun: FreedGuide, most_rounds: int) -> _Climbed:
        return _climb(densities, begun, refit, seed, most_rounds, progress)

    first, second = climb(freed, _MOST_ROUNDS), climb(freed.narrowed(), 1)
    lead = second.log_weights - first.log_weights
    if not bool((lead.mean(0) > 2 * lead.std(0) / len(lead) ** 0.5).any()):
        return estimate_elbo(replace(densities, guide=first.guide), refit.num_particles)
    second = climb(second.guide, _MOST_ROUNDS)
    ahead = second.log_weights.mean(0) > first.log_weights.mean(0)
    found = [
        estimate_elbo(replace(densities, guide=climbed.guide), refit.num_particles)
        for climbed in (first, second)
    ]
    return replace(
        found[0],
        values=torch.where(ahead, found[1].values, found[0].values),
        mc_errors=torch.where(ahead, found[1].mc_errors, found[0].mc_errors),
    )


class _Climbed(NamedTuple):
    """Where rounds of optimisation ended, and log weights of draws that compare ends."""

    guide: FreedGuide
    log_weights: Tensor


def _climb(
    densities: UnitDensities,
    freed: FreedGuide,
    refit: Refit,
    seed: int,
    most_rounds: int,
    progress: bool,
) -> _Climbed:
    """Optimise in rounds, each with steps in units of where the last one ended, while L rises.

    Rounds are compared by the same random numbers, so that a rise in one unit is not lost in the
    noise of all.
    """

    def look() -> Tensor:
        return _same_draws(replace(densities, guide=freed), refit.num_particles, seed)

    before = look()
    for _ in range(most_rounds):
        _fit(replace(densities, guide=freed), freed.leaves(), refit, progress)
        now = look()
        gain, error = _paired_gain(now, before)
        if gain < -2 * error:  # where it starts at the best of the family, steps add their noise
            _back(freed)
            return _Climbed(freed, before)
        before, again = now, free_arguments(freed, densities.batch)
        if again is None or gain < max(2 * error, _LEAST_GAIN * abs(float(now.mean(0).sum()))):
            break
        freed = FreedGuide(freed.guide, again.freed)
    return _Climbed(freed, before)


def _same_draws(densities: UnitDensities, num_particles: int, seed: int) -> Tensor:
    """Log weights of the guide's draws from a seed, shape ``(particle, unit)``."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return _guide_log_weights(densities, num_particles)


def _paired_gain(now: Tensor, before: Tensor) -> tuple[float, float]:
    """Of the sum over units of the mean over particles, with its standard error."""
    change = now - before
    variance = change.var(0).sum() / len(change)
    return float(change.mean(0).sum()), float(variance.sqrt())


def _back(freed: FreedGuide) -> None:
    """Undo a round: its leaves were 0 before."""
    with torch.no_grad():
        for leaf in freed.leaves():
            leaf.zero_()


def _fit(densities: UnitDensities, leaves: list[Tensor], refit: Refit, progress: bool) -> None:
    def loss(_step: int) -> Tensor:
        return importance_weighted_bound(densities, 1, refit.num_replicates).loss

    minimise(loss, leaves, refit.schedule, description="refitting the guide", progress=progress)
