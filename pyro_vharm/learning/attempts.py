"""Attempts at reference parameters: a learner from every start, and the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pyro
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.history import Checkpoint, History
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learners import Learner
from pyro_vharm.learning.learning_run import LearningRun, Values, watch, watch_units
from pyro_vharm.learning.reference import Attempt, Reference
from pyro_vharm.learning.starts import Fresh, Start, Starting, find_starts
from pyro_vharm.model.problem import Problem

__all__ = ["given_reference", "train_reference"]


def train_reference(
    problem: Problem,
    learner: Learner,
    starting: Starting,
    fresh: Fresh | None,
    *,
    journal: Journal,
    progress: bool,
    known: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
    heldout: Problem | None = None,
) -> Reference:
    """`learn_reference` for a problem that is prepared, without bounds; its θ and φ stay.

    Values of θ that are `known` by some other way, unconstrained, are candidates too. The best on
    the training data is taken; what each reaches on held-out data is told beside.
    """
    if not problem.model_parameters.leaves:
        raise InputError(
            "the model has no parameters to learn, so there can be no learning harm; "
            "inference_gap says how far the guide is from the posterior"
        )
    starts, notes = find_starts(problem, starting, fresh)
    if not problem.densities[0].structure.per_unit:
        notes.append(
            "the guide draws the latents of all units as one, so importance weights are those of "
            "all units together: a looser bound than one per unit"
        )
    found = [_as_learned(problem, journal)]
    found += [_as_known(problem, name, values, journal) for name, values in known.items()]
    failures: list[tuple[Attempt, ArithmeticError]] = []
    for i, begun in enumerate(starts):
        try:
            found.append(_attempt(begun, learner, journal.within(f"attempt-{i}"), progress))
        except ArithmeticError as error:
            failed = Attempt(f"{learner.name}, {begun.name}", None, f"failed: {error}")
            failures.append((failed, error))
    if len(found) == 1 + len(known):
        raise failures[0][1]
    if heldout is not None:
        found = [_looked_at(c, problem, heldout, journal, i) for i, c in enumerate(found)]
    best = max(found, key=lambda candidate: candidate.log_evidence.value)
    guide_values = _retrain(problem, learner.guide_training, best.values, journal, progress)
    return Reference(
        best.values.model,
        guide_values,
        (*(candidate.attempt for candidate in found), *(failed for failed, _ in failures)),
        tuple(notes),
        History(problem.model, problem.guide, best.checkpoints),
        _problem=problem,
    )


def given_reference(
    problem: Problem,
    parameters: Mapping[str, Any],
    guide_training: GuideTraining,
    *,
    progress: bool,
) -> Reference:
    """A reference from parameters that the user hands in, on the user-facing scale.

    Raises:
        InputError: if names, shapes or constraints do not fit the model.
    """
    values = problem.model_parameters.unconstrain(parameters, "reference")
    begun = Values(values, problem.guide_parameters.values())
    guide_values = _retrain(problem, guide_training, begun, Journal(), progress)
    history = History(problem.model, problem.guide)
    return Reference(
        values, guide_values, (Attempt("handed in", None),), (), history, _problem=problem
    )


@dataclass(frozen=True)
class _Candidate:
    attempt: Attempt
    log_evidence: Estimate
    values: Values
    checkpoints: tuple[Checkpoint, ...] = ()


def _as_learned(problem: Problem, journal: Journal) -> _Candidate:
    theta, phi = problem.model_parameters, problem.guide_parameters
    evidence = watch(problem, journal, "learned")
    values = Values(theta.values(), phi.values())
    return _Candidate(Attempt("θ̂ itself", evidence), evidence, values)


def _as_known(
    problem: Problem, name: str, values: Mapping[str, Tensor], journal: Journal
) -> _Candidate:
    theta, phi = problem.model_parameters, problem.guide_parameters
    with theta.at(values):
        evidence = watch(problem, journal, name)
        return _Candidate(Attempt(name, evidence), evidence, Values(theta.values(), phi.values()))


def _looked_at(
    candidate: _Candidate, problem: Problem, heldout: Problem, journal: Journal, number: int
) -> _Candidate:
    """The same with its log evidence of held-out units."""
    theta, phi = problem.model_parameters, problem.guide_parameters
    with theta.at(candidate.values.model), phi.at(candidate.values.guide):
        per_unit = watch_units(heldout, journal, f"heldout-{number}")
    return replace(candidate, attempt=replace(candidate.attempt, heldout=per_unit))


def _attempt(begun: Start, learner: Learner, journal: Journal, progress: bool) -> _Candidate:
    problem = begun.problem
    theta, phi = problem.model_parameters, problem.guide_parameters
    values = theta.values() if begun.values is None else begun.values
    store = pyro.get_param_store()
    scope = nullcontext() if begun.store is None else store.scope(begun.store)
    with scope, theta.at(values), phi.at(phi.values()):
        run = LearningRun(problem, journal, progress)
        ending = learner.learn(run)
        evidence = watch(problem, journal, "reached")
        attempt = Attempt(f"{learner.name}, {begun.name}", evidence, str(ending), run.num_steps)
        return _Candidate(attempt, evidence, run.values(), tuple(run.checkpoints))


def _retrain(
    problem: Problem,
    guide_training: GuideTraining,
    values: Values,
    journal: Journal,
    progress: bool,
) -> dict[str, Tensor]:
    """φ retrained at given θ, from given φ."""
    theta, phi = problem.model_parameters, problem.guide_parameters

    def retrain() -> Mapping[str, Any]:
        guide_training.train(problem, progress)
        return {"guide": phi.values()}

    with theta.at(values.model), phi.at(values.guide):
        found = journal.once("guide", retrain)
    return {name: value.to(phi.leaves[name].device) for name, value in found["guide"].items()}
