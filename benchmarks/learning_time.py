"""Learners at work, with the seconds of CPU that each checkpoint took.

CPU time of the process and of its finished children (compilers), as machines are shared: on an
idle core it is the wall time of one thread.
"""

from __future__ import annotations

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


@dataclass
class TimedRun(LearningRun):
    """A run whose checkpoints carry ``seconds`` since it began."""

    begun: float = field(default_factory=cpu_seconds)

    def note(self, **scalars: float) -> None:
        """Take a checkpoint, with the time."""
        super().note(**scalars, seconds=cpu_seconds() - self.begun)


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


def learn_from_here(problem: Problem, learner: Learner, seed: int) -> Learned:
    """Let a learner go from the present parameters, and put these back.

    Raises:
        InputError: if the learner cannot learn from the problem.
    """
    with untouched(seed, problem.model, problem.guide):
        learner.check(problem)
        run = TimedRun(problem, Journal(), False)
        here = run.values()
        try:
            ending = learner.learn(run)
            seconds = cpu_seconds() - run.begun
            return Learned(run.values(), ending, run.num_steps, seconds, tuple(run.checkpoints))
        finally:
            run.assign(here)
