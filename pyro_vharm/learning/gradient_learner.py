"""Learning θ and φ by stochastic gradient steps on an objective, in rounds, until it arrives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate, Kind, concatenate
from pyro_vharm.learning.foresight import timed
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.journal import random_state, set_random_state
from pyro_vharm.learning.learning_run import Ending, LearningRun, Values, is_higher
from pyro_vharm.learning.training import Schedule, minimise, shuffled_passes
from pyro_vharm.model.minibatches import cut_units
from pyro_vharm.model.problem import Problem
from pyro_vharm.objectives.importance_weighted import ImportanceWeightedELBO
from pyro_vharm.objectives.objective import UnitObjective
from pyro_vharm.tables import nats

__all__ = ["GradientLearner"]

_PARTIAL = "partial"
_EVALUATIONS, _LEAST_SHORTFALL = 16, 0.5
_MOST_DOUBLINGS, _CHECKPOINTS, _STEPS_PER_FILE = 20, 20, 100
_SMALLER = 0.1  # steps, after a round in which log evidence fell


def _importance_weighted() -> UnitObjective:
    return ImportanceWeightedELBO(50)


@dataclass(frozen=True)
class GradientLearner:
    """Trains θ and φ on an objective by Adam, in rounds, while log evidence rises.

    After each round, the log evidence of a few hundred units is looked at. Where going as far
    again in the same direction raises it, that is done, again and again: a learner whose steps are
    small beside the distance it has to go ends somewhere on the way. Where a round lowers it, its
    steps were too large: it is undone, and the next one takes steps of a tenth. The learner has
    converged when a round neither raises log evidence, by more than 0.05 nats, nor lowers it by
    more than its error; the better end of that round is kept. A rise within the error may be one:
    it is kept, another round follows, and is held against what was reached for certain. Where the
    bound is more than half a nat below log evidence in the end, the learner says so: it has
    followed the bound, which need not be highest where log evidence is.

    Args:
        objective: one of this package's, such as `ImportanceWeightedELBO` or `MarkovChainEM`. Each
            minibatch has a copy of its own, so that `PersistentChains` need no index.
        num_steps: gradient steps of a round.
        learning_rate: first step size of Adam in a round; it falls along a half cosine to a
            hundredth.
        batch_size: units per step where one batch holds more and can be cut without changing
            densities.
        max_rounds: the budget.
        guide_training: how φ is retrained at θ_ref.
    """

    objective: UnitObjective = field(default_factory=_importance_weighted)
    num_steps: int = 3000
    learning_rate: float = 0.01
    batch_size: int = 250
    max_rounds: int = 3
    guide_training: GuideTraining = field(default_factory=GuideTraining)

    def __post_init__(self) -> None:
        if not isinstance(self.objective, UnitObjective):
            raise InputError(
                "objective must be one of this package's, such as ImportanceWeightedELBO(50), not "
                f"{self.objective!r}"
            )
        Schedule(self.num_steps, self.learning_rate)
        for name in ("batch_size", "max_rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def name(self) -> str:
        """The objective, in words."""
        return self.objective.title

    def check(self, problem: Problem) -> None:
        """Refuse a problem that the objective cannot train.

        Raises:
            InputError: saying what stands in the way.
        """
        self.objective.check(problem.densities[0])

    def most_seconds(self, problem: Problem) -> float:
        """All steps of all rounds, from timing one step; compiled, they may take less."""
        batch = cut_units(problem.densities[0], self.batch_size)[0]
        objective = self.objective.renewed()
        leaves = [*problem.model_parameters.trainable(), *problem.guide_parameters.trainable()]

        def step() -> None:
            torch.autograd.grad(objective.evaluate(batch).loss, leaves, allow_unused=True)

        return self.max_rounds * self.num_steps * timed(step)

    def learn(self, run: LearningRun) -> Ending:
        """Train θ and φ, in place.

        Raises:
            FloatingPointError: if the gradient is not finite in the last round.
        """
        reached = here = run.evidence("before")
        run.note(evidence=reached.per_unit.value)
        rate, ending = self.learning_rate, Ending(False, "")
        for i in range(self.max_rounds):
            before = run.values()
            with run.stage(f"round-{i}"):
                now = self._round(run, rate, last=i + 1 == self.max_rounds)
            if is_higher(now, reached):
                reached = here = now
                ending = Ending(False, f"log evidence still rose in round {i + 1}")
                continue
            if now.value >= reached.value:
                here = now
                if _undecided(now, reached):
                    ending = Ending(False, f"log evidence rose within its error in round {i + 1}")
                    continue
            else:
                run.assign(before)
                run.note(evidence=reached.per_unit.value)
            if math.isfinite(now.value) and not is_higher(reached, now):
                ending = Ending(True, f"log evidence rose no further in round {i + 1}")
                break
            rate *= _SMALLER
            ending = Ending(False, f"log evidence fell in round {i + 1}, which was undone")
        return ending._replace(reason=ending.reason + self._shortfall(run, here))

    def _shortfall(self, run: LearningRun, reached: Estimate) -> str:
        """How far a lower bound is below log evidence where it ended, in words, if it is far.

        Where it is far, the learner may have followed its bound and not log evidence.
        """
        if self.objective.side != "lower":
            return ""
        bound = run.piece("bound", partial(self._bound, run))
        missing = reached.value - bound["value"]
        if missing < max(2 * math.hypot(reached.mc_error, bound["error"]), _LEAST_SHORTFALL):
            return ""
        per_unit = missing / reached.num_units
        total = per_unit * run.problem.num_units
        return (
            f"; its bound is {nats(total)} nats below log evidence there ({nats(per_unit)} per "
            "unit), so another objective may find more"
        )

    def _bound(self, run: LearningRun) -> dict[str, float]:
        """Of the units that log evidence is looked at for, by fresh draws."""
        objective, totals = self.objective.renewed(), []
        with torch.no_grad():
            for _ in range(_EVALUATIONS):
                found = [objective.evaluate(part).per_unit for part in run.probe.densities]
                totals.append(concatenate(found).total().value)
        values = torch.tensor(totals, dtype=torch.float64)
        return {"value": float(values.mean()), "error": float(values.std()) / len(values) ** 0.5}

    def _round(self, run: LearningRun, rate: float, *, last: bool) -> Estimate:
        """Steps, and farther on where that pays; what log evidence came to."""
        before = run.values()
        try:
            run.piece("steps", partial(self._descend, run, rate))
        except FloatingPointError:
            if last:
                raise
            return Estimate(-math.inf, 0.0, run.probe.num_units, Kind.ESTIMATED)
        return _go_further(run, before)

    def _descend(self, run: LearningRun, rate: float) -> None:
        problem = run.problem
        batches = [part for d in problem.densities for part in cut_units(d, self.batch_size)]
        objectives = [self.objective.renewed() for _ in batches]  # chains are those of one batch
        order = shuffled_passes(len(batches), self.num_steps)
        theta, phi = problem.model_parameters, problem.guide_parameters
        leaves = [*theta.trainable(), *phi.trainable(), *objectives[0].leaves(batches[0])]

        def loss(step: int) -> Tensor:
            which = order[step]
            terms = objectives[which].evaluate(batches[which])
            return terms.loss * len(batches)  # unbiased whatever the sizes of the batches

        minimise(
            loss,
            leaves,
            Schedule(self.num_steps, rate),
            description="learning",
            progress=run.progress,
            keeper=_Keeper(run, objectives, self.num_steps),
        )


@dataclass
class _Keeper:
    """Notes the history, and writes down every so many steps all that going on takes."""

    run: LearningRun
    objectives: Sequence[UnitObjective]
    num_steps: int
    losses: list[float] = field(default_factory=list)

    def begin(self, loop: Sequence[Any]) -> int:
        """Restore a loop that was cut short."""
        found = self.run.journal.recall(_PARTIAL)
        if found is None:
            return 0
        self.run.restore(found["run"])
        for part, state in zip(loop, found["loop"], strict=True):
            part.load_state_dict(state)
        for objective, carried in zip(self.objectives, found["carried"], strict=True):
            objective.carry(carried)
        self.losses[:] = found["losses"]
        set_random_state(found["random_state"])
        done: int = found["done"]
        return done

    def step(self, done: int, value: float, loop: Sequence[Any]) -> None:
        """Count a step, and note or write what is due."""
        self.run.num_steps += 1
        self.losses.append(value / self.run.problem.num_units)
        if done % max(self.num_steps // _CHECKPOINTS, 1) == 0:
            mean = sum(self.losses) / len(self.losses)
            name, sign = ("loss", 1) if self.objectives[0].side == "upper" else ("bound", -1)
            self.run.note(**{name: sign * mean})
            self.losses.clear()
        if self.run.journal.path is not None and done % _STEPS_PER_FILE == 0:
            content = {
                "done": done,
                "run": self.run.state(),
                "loop": [part.state_dict() for part in loop],
                "carried": [objective.carried() for objective in self.objectives],
                "losses": list(self.losses),
                "random_state": random_state(),
            }
            self.run.journal.write(_PARTIAL, content)


def _undecided(now: Estimate, reached: Estimate) -> bool:
    """Whether log evidence may have risen, by looks whose errors are too large to tell."""
    exactly = (Estimate(e.value, 0.0, e.num_units, e.kind) for e in (now, reached))
    return is_higher(*exactly)


def _go_further(run: LearningRun, before: Values) -> Estimate:
    """Double the displacement of θ and φ while log evidence rises; what it rose to."""
    reached = run.evidence("after")
    for i in range(_MOST_DOUBLINGS):
        here = run.values()
        run.assign(Values(_doubled(here.model, before.model), _doubled(here.guide, before.guide)))
        further = run.evidence(f"doubling-{i}")
        if not is_higher(further, reached):
            run.assign(here)
            break
        reached = further
    run.note(evidence=reached.per_unit.value)
    return reached


def _doubled(here: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * value - before[name] for name, value in here.items()}
