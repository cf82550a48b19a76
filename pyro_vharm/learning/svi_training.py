"""Training by the user's own objective and optimiser, in rounds, until it has settled."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate
from pyro_vharm.learning.foresight import timed
from pyro_vharm.learning.history import History
from pyro_vharm.learning.learning_run import Ending, LearningRun
from pyro_vharm.learning.objective_value import (
    OwnObjective,
    as_written,
    check_objective,
    copy_objective,
    evaluate_objective,
    is_elbo,
    renew_objective,
)
from pyro_vharm.learning.svi_optimizer import (
    GuardedSteps,
    OwnOptimizer,
    check_optimizer,
    fresh_optimizer,
)
from pyro_vharm.learning.training import Schedule, shuffled_passes
from pyro_vharm.model.problem import Problem
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound

__all__ = ["SVITraining", "Trained", "TrainingPoint"]

_LEAST_MOVE = 0.05  # nats in total
_END = object()


class TrainingPoint(NamedTuple):
    """What was found on the way, in nats, to follow a training by.

    Attributes:
        step: gradient steps so far.
        objective: the user's objective, a bound on log evidence where it is an ELBO.
        log_evidence: ℓ(θ) of up to a few hundred units.
    """

    step: int
    objective: Estimate
    log_evidence: Estimate


@dataclass(frozen=True)
class Trained:
    """A training that is done.

    Attributes:
        points: objective and log evidence along the way, the start first.
        history: θ and φ at the same steps.
        ending: whether it settled.
        num_rounds: rounds that were taken.
        num_steps: gradient steps in all of them.
        seconds: wall clock of the steps alone, without looking on.
        cpu_seconds: of this process, for the same.
    """

    points: tuple[TrainingPoint, ...]
    history: History
    ending: Ending
    num_rounds: int
    num_steps: int
    seconds: float
    cpu_seconds: float

    @property
    def last_move(self) -> float:
        """By how much log evidence per unit moved in the last round, in nats: the noise of it."""
        per_round = (len(self.points) - 1) // self.num_rounds
        last, before = self.points[-1], self.points[-1 - per_round]
        return abs(last.log_evidence.per_unit.value - before.log_evidence.per_unit.value)


@dataclass(frozen=True)
class SVITraining:
    """Steps of Pyro's `SVI`, in rounds; each begins with a fresh optimiser of the same settings.

    Batches are passed over in a new random order each time. A scheduler of `pyro.optim` steps once
    per pass. A round is the user's training as its settings say, so that schedules begin anew.

    Args:
        objective: what `SVI` takes as ``loss=``; a copy of it is used.
        optimizer: one of `pyro.optim`, or a callable from leaves to a torch optimiser; ``None`` for
            Adam whose step size falls along a half cosine to a hundredth.
        num_steps: gradient steps of a round.
        learning_rate: first step size of that Adam.
        max_rounds: the budget.
        num_particles: draws that evaluate an ELBO.
        looks: how often in a round objective and log evidence are looked at, its end among these.
    """

    objective: OwnObjective
    optimizer: OwnOptimizer | None = None
    num_steps: int = 1000
    learning_rate: float = 0.003
    max_rounds: int = 8
    num_particles: int = 400
    looks: int = 4

    def __post_init__(self) -> None:
        check_objective(self.objective)
        object.__setattr__(self, "objective", copy_objective(self.objective))
        check_optimizer(self.optimizer)
        Schedule(self.num_steps, self.learning_rate)
        for name in ("max_rounds", "looks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def schedule(self) -> Schedule:
        """Of the Adam that stands in for a user's optimiser."""
        return Schedule(self.num_steps, self.learning_rate)

    def most_seconds(self, problem: Problem) -> float:
        """From the reference and on from θ̂, as if a draw took as long as one of the ELBO's."""
        densities = problem.densities[0]
        leaves = [*problem.model_parameters.trainable(), *problem.guide_parameters.trainable()]
        if not densities.has_guide_density:
            return 0.0

        def step() -> None:
            loss = importance_weighted_bound(densities, 1, 1).loss
            torch.autograd.grad(loss, leaves, allow_unused=True)

        draws = getattr(self.objective, "num_particles", 1)
        return 2 * self.max_rounds * self.num_steps * draws * timed(step)

    def fit_guide(self, run: LearningRun) -> None:
        """Train φ alone, at θ as it is, until the objective moves no further; in place."""
        if not run.problem.guide_parameters.trainable():
            return
        frozen = run.problem.model_parameters.trainable()
        reached = [self.value(run)]
        for _ in range(self.max_rounds):
            for _part in self._round(run, "retraining the guide", frozen):
                pass
            reached.append(self.value(run))
            if not _drifts(reached):
                return

    def settle(self, run: LearningRun) -> Trained:
        """Train θ and φ until neither objective nor log evidence moves beyond its error, in place.

        A move counts if it exceeds two standard errors, and 0.05 nats, in the direction of the move
        before it: to and fro is the optimiser's noise.
        """
        run.num_steps = 0
        points, ends, watch = [self._look(run)], [0], _Stopwatch()
        for _ in range(self.max_rounds):
            for _part in watch.running(self._round(run, "training")):
                points.append(self._look(run))
            ends.append(len(points) - 1)
            reached = [points[i] for i in ends]
            if not (
                _drifts([p.objective for p in reached])
                or _drifts([p.log_evidence for p in reached])
            ):
                ending = Ending(True, "neither objective nor log evidence moved further")
                break
        else:
            ending = Ending(False, f"still moving after {self.max_rounds} rounds")
        history = History(run.problem.model, run.problem.guide, tuple(run.checkpoints))
        cost = watch.seconds, watch.cpu_seconds
        return Trained(tuple(points), history, ending, len(ends) - 1, run.num_steps, *cost)

    def go_on(self, run: LearningRun, num_rounds: int) -> None:
        """Train θ and φ for so many rounds, whatever they bring, in place."""
        for _ in range(num_rounds):
            for _part in self._round(run, "training on"):
                pass

    def value(self, run: LearningRun) -> Estimate:
        """The objective at the present parameters, of the units that log evidence is watched on.

        Of all units, where it is no ELBO: its loss can be had for whole batches only.
        """
        return self.evaluate(run.probe if is_elbo(run.problem, self.objective) else run.problem)

    def evaluate(self, problem: Problem) -> Estimate:
        """The objective at the present parameters, over all units of a problem."""
        return evaluate_objective(problem, renew_objective(self.objective), self.num_particles)

    def _look(self, run: LearningRun) -> TrainingPoint:
        found = TrainingPoint(run.num_steps, self.value(run), run.evidence(f"at-{run.num_steps}"))
        run.note(
            objective=found.objective.per_unit.value, evidence=found.log_evidence.per_unit.value
        )
        return found

    def _round(self, run: LearningRun, title: str, frozen: Sequence[Tensor] = ()) -> Iterator[None]:
        """The steps of one round; pauses at each quarter of them, the end among these."""
        batches = run.problem.batches
        model, guide = as_written(run.problem, self.objective)
        steps = GuardedSteps(fresh_optimizer(self.optimizer, self.schedule), frozen)
        svi = SVI(model, guide, steps, loss=renew_objective(self.objective))
        looks = min(self.looks, self.num_steps)
        pauses = {self.num_steps * (i + 1) // looks for i in range(looks)}
        bar = tqdm(
            shuffled_passes(len(batches), self.num_steps),
            desc=title,
            disable=not run.progress or None,
            delay=2,
            leave=False,
        )
        for done, which in enumerate(bar, 1):
            loss = svi.step(*batches[which].args, **batches[which].kwargs)
            run.num_steps += 1
            if done % len(batches) == 0:
                steps.end_pass(_first(loss))
            if done in pauses:
                yield


@dataclass
class _Stopwatch:
    """Time that an iterator takes, without what is done between its items."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def running(self, parts: Iterator[None]) -> Iterator[None]:
        done = False
        while not done:
            begun = time.perf_counter(), time.process_time()
            done = next(parts, _END) is _END
            self.seconds += time.perf_counter() - begun[0]
            self.cpu_seconds += time.process_time() - begun[1]
            if not done:
                yield


def _first(loss: Any) -> float:
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _drifts(reached: Sequence[Estimate]) -> bool:
    """Whether the last move is beyond its error, and goes on with the one before it."""
    *earlier, before, now = reached
    move = now.value - before.value
    if abs(move) <= max(2 * math.hypot(now.mc_error, before.mc_error), _LEAST_MOVE):
        return False
    return not earlier or move * (before.value - earlier[-1].value) >= 0
