"""Learners: what they have in common, climbing from one to the next, and the choice of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from pyro_vharm.errors import InputError
from pyro_vharm.learning.exact_learner import ExactLearner
from pyro_vharm.learning.expectation_maximization import ExpectationMaximization
from pyro_vharm.learning.gradient_learner import GradientLearner
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.learning_run import Ending, LearningRun
from pyro_vharm.model.problem import Problem
from pyro_vharm.objectives.chain_starts import PersistentChains
from pyro_vharm.objectives.importance_weighted import ImportanceWeightedELBO
from pyro_vharm.objectives.markov_chain_em import MarkovChainEM
from pyro_vharm.objectives.objective import UnitObjective

__all__ = ["ClimbingLearner", "Effort", "Learner", "choose_learner"]

type Effort = Literal["full", "quick"]

_MOST_UNITS = {0: 2**20, 1: 4096, 2: 256}  # that quadrature can be asked for at every step


class Learner(Protocol):
    """Looks for better parameters of a model, from where they are."""

    @property
    def name(self) -> str:
        """What it does, in words."""
        ...

    @property
    def guide_training(self) -> GuideTraining:
        """How φ is retrained at θ_ref."""
        ...

    def check(self, problem: Problem) -> None:
        """Refuse a problem that it cannot learn from."""
        ...

    def most_seconds(self, problem: Problem) -> float:
        """How long it may take from one start, from timing a step of it."""
        ...

    def learn(self, run: LearningRun) -> Ending:
        """Change the run's parameters for the better, in place."""
        ...


def _stages() -> tuple[Learner, ...]:
    # most of the way by cheap and large steps; smaller ones later, for what these left
    cheap = ImportanceWeightedELBO(10)
    return (
        GradientLearner(cheap, num_steps=2000, learning_rate=0.03, max_rounds=6),
        GradientLearner(ImportanceWeightedELBO(50), max_rounds=2),
        GradientLearner(MarkovChainEM(8, chains=PersistentChains())),
    )


@dataclass(frozen=True)
class ClimbingLearner:
    """Starts cheap and goes on with dearer learners.

    Each stage has its own budget and goes on from where the one before it ended. A stage that
    lowers log evidence is undone. All are tried: where more weights gain nothing, chains still may.

    Args:
        stages: learners, from cheap to dear. Those that cannot learn from a problem are left out.
        guide_training: how φ is retrained at θ_ref.
    """

    stages: tuple[Learner, ...] = field(default_factory=_stages)
    guide_training: GuideTraining = field(default_factory=GuideTraining)

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("stages must hold at least one learner")

    @property
    def name(self) -> str:
        """The stages, in order."""
        return ", then ".join(stage.name for stage in self.stages)

    def check(self, problem: Problem) -> None:
        """Refuse a problem that none of the stages can learn from.

        Raises:
            InputError: what the first of them says.
        """
        obstacles = [_obstacle(stage, problem) for stage in self.stages]
        if not all(obstacles):
            return
        if not problem.densities[0].has_guide_density:
            raise InputError(
                "the guide holds continuous latents as point masses (Delta), so no reference can "
                "be learned with it: call learn_reference with a guide that has a density, such as "
                "AutoNormal(model), and pass the result as reference="
            )
        raise InputError(obstacles[0])

    def most_seconds(self, problem: Problem) -> float:
        """The sum of the stages."""
        able = [stage for stage in self.stages if not _obstacle(stage, problem)]
        return sum(stage.most_seconds(problem) for stage in able)

    def learn(self, run: LearningRun) -> Ending:
        """Train θ and φ, in place."""
        able = [stage for stage in self.stages if not _obstacle(stage, run.problem)]
        reached, ending = run.evidence("before"), Ending(True, "no stage")
        for i, stage in enumerate(able):
            before = run.values()
            with run.stage(f"stage-{i}"):
                ending = stage.learn(run)
                now = run.evidence("reached")
            ending = ending._replace(reason=f"{stage.name}: {ending.reason}")
            if now.value >= reached.value:
                reached = now
            else:
                run.assign(before)
                run.note(evidence=reached.per_unit.value)
        return ending


def _obstacle(learner: Learner, problem: Problem) -> str:
    """Why a learner cannot learn from a problem; empty if it can."""
    try:
        learner.check(problem)
    except InputError as error:
        return str(error)
    return ""


def choose_learner(
    problem: Problem, learner: Learner | Literal["auto"] | None, effort: Effort = "full"
) -> Learner:
    """The user's learner; or the exact one where it is possible, else one that climbs.

    Exact evidence is possible without continuous latents, and with one or two continuous
    dimensions of a unit, if units are few enough and their integrals can be had at the present
    parameters.

    Raises:
        InputError: if the learner is not one, or cannot learn from the problem.
    """
    if effort not in ("full", "quick"):
        raise InputError(f"effort must be 'full' or 'quick', not {effort!r}")
    if learner is None or learner == "auto":
        learner = _automatic(problem, effort)
    if isinstance(learner, type | str) or not callable(getattr(learner, "learn", None)):
        raise InputError(
            f"learner must be 'auto' or a learner, such as GradientLearner(), not {learner!r}"
        )
    learner.check(problem)
    return learner


def _automatic(problem: Problem, effort: Effort) -> Learner:
    if effort == "quick":
        return ExpectationMaximization()
    return ExactLearner() if _is_exact(problem) else ClimbingLearner()


def _is_exact(problem: Problem) -> bool:
    if problem.num_units > _MOST_UNITS.get(problem.densities[0].dim, 0):
        return False
    objective: UnitObjective = ExactLearner().objective.renewed()
    try:
        with torch.no_grad():
            return all(
                bool(torch.isfinite(objective.evaluate(densities).loss))
                for densities in problem.densities
            )
    except ArithmeticError:
        return False
