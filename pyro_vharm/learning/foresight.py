"""How long work will take, from timing a small part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pyro_vharm.inference.choice import Choice
from pyro_vharm.inference.evidence import estimate_evidence
from pyro_vharm.model.clock import now
from pyro_vharm.model.minibatches import cut_units
from pyro_vharm.model.problem import Problem

__all__ = ["foresee_evidence", "spoken", "timed"]

_FEW, _MORE = 20, 100  # units
_MINUTE = 60.0


def timed(work: Callable[[], object]) -> float:
    """Seconds that a piece of work takes the second time, when nothing is set up any more."""
    work()
    begun = now()
    work()
    return now() - begun


def foresee_evidence(problem: Problem, choice: Choice) -> float:
    """Seconds for the log evidence of all units, on a line through those of a few and some more.

    The units are those of the first batch, where it can be cut. Random numbers are used up.
    """
    few, more = (cut_units(problem.densities[0], size)[0] for size in (_FEW, _MORE))
    begun = now()
    estimate_evidence([few], choice)
    least = now() - begun
    if more.num_units == few.num_units:
        return least * problem.num_units / few.num_units
    begun = now()
    estimate_evidence([more], choice)
    each = max(now() - begun - least, 0.0) / (more.num_units - few.num_units)
    return least * len(problem.densities) + each * problem.num_units


def spoken(stages: Mapping[str, float]) -> str:
    """Seconds of several stages as one clause, like ``about 2 min (gap 20 s, reference 100 s)``."""
    parts = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in stages.items())
    return f"about {_duration(sum(stages.values()))} ({parts})"


def _duration(seconds: float) -> str:
    """Two digits are more than such a number is worth.

    >>> _duration(3.2), _duration(95.0), _duration(600.0)
    ('3 s', '2 min', '10 min')
    """
    if seconds < 1.5 * _MINUTE:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / _MINUTE)} min"
