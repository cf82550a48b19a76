"""Short ways up from θ̂: along a line, and by EM steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_vharm.estimates import Estimate
from pyro_vharm.learning.expectation_maximization import ExpectationMaximization
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learning_run import LearningRun, is_higher
from pyro_vharm.model.problem import Problem

__all__ = ["LineEnd", "climb_by_em", "search_lines"]

_NEARER = (0.5, 0.25, 0.125)
_MOST_DOUBLINGS = 6

type Values = Mapping[str, Tensor]


class LineEnd(NamedTuple):
    """The highest point that was found along lines from θ̂.

    Attributes:
        values: θ there, unconstrained; θ̂ itself where no line rises.
        length: in steps; 0 at θ̂.
        line: which of the lines, in the order given.
    """

    values: Values
    length: float
    line: int


def search_lines(problem: Problem, steps: Sequence[Values]) -> LineEnd:
    """The highest log evidence along lines from θ̂, by a few quick looks at each.

    A line is tried at a whole step; farther as long as that is higher, nearer where it is not.
    Each look has random numbers of its own, and the highest of several looks is too high by
    chance: what is found has to be measured anew. θ is left as it was.
    """
    theta = problem.model_parameters
    begun = theta.values()
    with theta.at(begun):
        run = LearningRun(problem, Journal(), progress=False)
        top, best = run.evidence("begun"), LineEnd(begun, 0.0, 0)
        for line, step in enumerate(steps):
            length, reached = _search(run, begun, step)
            if is_higher(reached, top):
                top, best = reached, LineEnd(_moved(begun, step, length), length, line)
    return best


def _search(run: LearningRun, begun: Values, step: Values) -> tuple[float, Estimate]:
    def look(length: float) -> Estimate:
        run.problem.model_parameters.assign(_moved(begun, step, length))
        return run.evidence("look")

    looks = {1.0: look(1.0)}
    for i in range(1, _MOST_DOUBLINGS + 1):
        farther = look(2.0**i)
        if not farther.value > looks[2.0 ** (i - 1)].value:
            break
        looks[2.0**i] = farther
    if len(looks) == 1:
        looks |= {length: look(length) for length in _NEARER}
    return max(looks.items(), key=lambda pair: pair[1].value)


def _moved(begun: Values, step: Values, length: float) -> dict[str, Tensor]:
    return {name: value + length * step[name] for name, value in begun.items()}


def climb_by_em(problem: Problem, begun: Values, num_steps: int) -> tuple[Values, int]:
    """A few EM steps from given values: where they end, and how many there were."""
    theta = problem.model_parameters
    with theta.at(begun):
        run = LearningRun(problem, Journal(), progress=False)
        ExpectationMaximization(num_steps).learn(run)
        return theta.values(), run.num_steps
