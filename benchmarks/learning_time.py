"""Learners at work, with the seconds of CPU that each checkpoint took.

CPU time of the process and of its finished children (compilers), as machines are shared: on an
idle core it is the wall time of one thread.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple

from pyro_vharm.learning.history import Checkpoint
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learners import Learner
from pyro_vharm.learning.learning_run import Ending, LearningRun, Values
from pyro_vharm.model.problem import Problem
from pyro_vharm.model.state import untouched

__all__ = ["Learned", "cpu_seconds", "learn_from_here"]


def cpu_seconds() -> float:
    """CPU time so far, children included."""
    return sum(os.times()[:4])


class _TimeIsUpError(Exception):
    """The budget is spent."""


@dataclass
class TimedRun(LearningRun):
    """A run whose checkpoints carry ``seconds`` since it began, and that ends when they are up."""

    begun: float = field(default_factory=cpu_seconds)
    budget: float = math.inf

    def note(self, **scalars: float) -> None:
        """Take a checkpoint, with the time."""
        seconds = cpu_seconds() - self.begun
        super().note(**scalars, seconds=seconds)
        if seconds > self.budget:
            raise _TimeIsUpError


class Learned(NamedTuple):
    """Where a learner ended.

    Attributes:
        values: θ and φ, unconstrained.
        ending: how it ended.
        num_steps: gradient steps, iterations or EM steps.
        seconds: of CPU.
        checkpoints: on the way, with ``seconds`` among their scalars.
    """

    values: Values
    ending: Ending
    num_steps: int
    seconds: float
    checkpoints: tuple[Checkpoint, ...]


def learn_from_here(
    problem: Problem, learner: Learner, seed: int, budget: float = math.inf
) -> Learned:
    """Let a learner go from the present parameters, and put these back.

    Args:
        problem: model, guide and data.
        learner: it is cut short where its time is up.
        seed: of its random numbers.
        budget: seconds of CPU.

    Raises:
        InputError: if the learner cannot learn from the problem.
    """
    with untouched(seed, problem.model, problem.guide):
        learner.check(problem)
        run = TimedRun(problem, Journal(), False, budget=budget)
        here = run.values()
        try:
            ending = _ending(learner, run)
            seconds = cpu_seconds() - run.begun
            return Learned(run.values(), ending, run.num_steps, seconds, tuple(run.checkpoints))
        finally:
            run.assign(here)


def _ending(learner: Learner, run: TimedRun) -> Ending:
    try:
        return learner.learn(run)
    except _TimeIsUpError:
        return Ending(False, f"{run.budget:.0f} seconds of CPU")
