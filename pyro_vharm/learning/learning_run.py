"""One attempt at better parameters as a learner sees it: evidence, journal and history."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vharm.estimates import Estimate, Kind, UnitEstimates
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.choice import Choice, choose_method
from pyro_vharm.inference.evidence import estimate_evidence
from pyro_vharm.inference.start import MatchedStart
from pyro_vharm.learning.history import Checkpoint, take_checkpoint
from pyro_vharm.learning.journal import Journal
from pyro_vharm.model.minibatches import cut_units
from pyro_vharm.model.problem import Problem
from pyro_vharm.model.snapshots import live_tensors

__all__ = ["Ending", "LearningRun", "Values", "is_higher", "quick_choice", "watch", "watch_units"]

_LEAST_GAIN = 0.05
_PROBED_BATCHES = 20
_PROBED_UNITS, _MANY_DIMS, _FEW_DIMS = 200, 10, 2
_WATCHING = 8  # particles, at the least
_MOST_PARTICLES, _ELEMENTS = 128, 2**14


class Ending(NamedTuple):
    """How a learner's work ended.

    Attributes:
        converged: whether log evidence stopped rising, and not the budget stopped it.
        reason: in words.
    """

    converged: bool
    reason: str

    def __str__(self) -> str:
        return f"{'converged' if self.converged else 'stopped by its budget'}: {self.reason}"


class Values(NamedTuple):
    """θ and φ, unconstrained, by name."""

    model: Mapping[str, Tensor]
    guide: Mapping[str, Tensor]


@dataclass
class LearningRun:
    """One start of one learner: its parameters are those of the problem, and change in place.

    Attributes:
        problem: model, guide and data.
        journal: pieces of work that are done.
        progress: show bars.
        checkpoints: θ and φ along the way, with the bound and the evidence per unit in nats.
        num_steps: gradient steps, iterations or EM steps so far.
    """

    problem: Problem
    journal: Journal
    progress: bool
    checkpoints: list[Checkpoint] = field(default_factory=list)
    num_steps: int = 0
    _probe: Problem | None = None
    _own: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._own = frozenset(live_tensors(self.problem.model, self.problem.guide))

    def values(self) -> Values:
        """θ and φ as they are now."""
        theta, phi = self.problem.model_parameters, self.problem.guide_parameters
        return Values(theta.values(), phi.values())

    def assign(self, values: Values) -> None:
        """Set θ and φ, in place."""
        self.problem.model_parameters.assign(values.model)
        self.problem.guide_parameters.assign(values.guide)

    @contextmanager
    def stage(self, scope: str) -> Iterator[None]:
        """Pieces of work inside have names of their own."""
        before = self.journal
        self.journal = before.within(scope)
        try:
            yield
        finally:
            self.journal = before

    def piece(
        self, name: str, work: Callable[[], Mapping[str, float] | None]
    ) -> Mapping[str, float]:
        """Work that changes θ, φ and the history, done once however often the run is resumed.

        Returns:
            the numbers that it returned.
        """

        def done() -> Mapping[str, Any]:
            numbers = dict(work() or {})
            return {"numbers": numbers, "run": self.state()}

        found = self.journal.once(name, done)
        self.restore(found["run"])
        numbers: Mapping[str, float] = found["numbers"]
        return numbers

    def state(self) -> dict[str, Any]:
        """All of the run, as plain tensors and numbers."""
        values = self.values()
        return {
            "model": dict(values.model),
            "guide": dict(values.guide),
            "num_steps": self.num_steps,
            "checkpoints": [(c.step, dict(c.values), dict(c.scalars)) for c in self.checkpoints],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put the run where it was when `state` was taken."""
        self.assign(Values(state["model"], state["guide"]))
        self.num_steps = state["num_steps"]
        self.checkpoints[:] = [Checkpoint(*content) for content in state["checkpoints"]]

    @property
    def probe(self) -> Problem:
        """Up to a few hundred of the units, always the same."""
        if self._probe is None:
            self._probe = _probe(self.problem)
        return self._probe

    def evidence(self, name: str) -> Estimate:
        """Log evidence of a few hundred units, to steer by."""
        return watch(self.probe, self.journal, name)

    def note(self, **scalars: float) -> None:
        """Take a checkpoint at the present step, or add to the one there is."""
        kept = self.checkpoints
        known: Mapping[str, float] = {}
        if kept and kept[-1].step == self.num_steps:
            known = kept.pop().scalars
        numbers = {**known, **scalars}
        taken = take_checkpoint(self.problem.model, self.problem.guide, self.num_steps, numbers)
        # parameters of an objective are in Pyro's store while it trains, and not afterwards
        own = {name: value for name, value in taken.values.items() if name in self._own}
        kept.append(replace(taken, values=own))


def _probe(problem: Problem) -> Problem:
    """A few hundred of the units, if they can be had apart, with the same live parameters.

    From up to twenty batches, picked at random, the same share of each.
    """
    if problem.num_units <= _PROBED_UNITS:
        return problem
    order = torch.randperm(len(problem.densities))[:_PROBED_BATCHES].tolist()
    chosen = [problem.densities[i] for i in order]
    share = _PROBED_UNITS / sum(part.num_units for part in chosen)
    parts = [cut_units(part, max(round(share * part.num_units), 1))[0] for part in chosen]
    return replace(problem, batches=[part.batch for part in parts], densities=parts)


def watch(problem: Problem, journal: Journal, name: str) -> Estimate:
    """Log evidence as a learner left it, to choose between attempts and for nothing else."""

    def look() -> Mapping[str, Any]:
        found = _quick_look(problem).total()
        return {"value": found.value, "error": found.mc_error, "kind": int(found.kind)}

    found = journal.once(name, look)
    return Estimate(found["value"], found["error"], problem.num_units, Kind(found["kind"]))


def watch_units(problem: Problem, journal: Journal, name: str) -> UnitEstimates:
    """The same for each unit."""

    def look() -> Mapping[str, Any]:
        found = _quick_look(problem)
        return {"values": found.values, "errors": found.errors, "kind": int(found.kind)}

    found = journal.once(name, look)
    values, errors = (found[part].to(problem.densities[0].device) for part in ("values", "errors"))
    return UnitEstimates(values, errors, Kind(found["kind"]))


def _quick_look(problem: Problem) -> UnitEstimates:
    return estimate_evidence(problem.densities, quick_choice(problem, _WATCHING)).per_unit


def quick_choice(problem: Problem, num_particles: int) -> Choice:
    """The method of choice for few dimensions; for more, a short annealing.

    With more particles where units are few: those of one joint unit have nothing to average over.
    """
    dim = problem.densities[0].dim
    if dim <= _FEW_DIMS:
        return choose_method(problem.densities)
    start = MatchedStart(refit=dim > _MANY_DIMS)
    most = max(num_particles, _MOST_PARTICLES)
    parts = problem.densities
    count = min(part.affordable(num_particles, most, _ELEMENTS) for part in parts)
    return Choice(AnnealedImportanceSampling(count, num_steps=5, num_settling=5, start=start))


def is_higher(first: Estimate, second: Estimate) -> bool:
    """Whether log evidence rose from the second to the first, beyond both their errors."""
    error = math.hypot(first.mc_error, second.mc_error)
    return first.value > second.value + max(2 * error, _LEAST_GAIN)
