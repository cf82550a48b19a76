"""Reference parameters θ_ref: where a better learner ends, or what the user hands in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.choice import Choice, choose_method
from pyro_vharm.inference.evidence import estimate_evidence
from pyro_vharm.inference.start import MatchedStart
from pyro_vharm.learning.training import Schedule, minimise, shuffled_passes
from pyro_vharm.model.data import Data
from pyro_vharm.model.minibatches import cut_units
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import Problem, capture_pair, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from pyro_vharm.tables import html_table

__all__ = [
    "Attempt",
    "Fresh",
    "ImportanceWeightedLearner",
    "Reference",
    "given_reference",
    "learn_reference",
    "train_reference",
]

type Fresh = Callable[[], tuple[PyroFunction, PyroFunction]]

_MOST_ROUNDS, _MOST_DOUBLINGS, _LEAST_GAIN = 5, 20, 0.05
_PROBED_UNITS, _MANY_DIMS = 200, 10


@dataclass(frozen=True)
class ImportanceWeightedLearner:
    """Trains θ and φ on the importance-weighted bound, then φ alone on the ELBO at θ_ref.

    Args:
        num_particles: K of the bound.
        num_steps: gradient steps on θ and φ from each start.
        learning_rate: first step size of Adam; it falls along a half cosine to a hundredth.
        batch_size: units per step where one batch holds more and can be cut; see `cut_units`.
        guide_steps: gradient steps that retrain φ at θ_ref.
        guide_replicates: draws per unit in each of these.
    """

    num_particles: int = 50
    num_steps: int = 3000
    learning_rate: float = 0.003
    batch_size: int = 100
    guide_steps: int = 1000
    guide_replicates: int = 8

    def __post_init__(self) -> None:
        if self.num_particles < 2:
            raise InputError(
                f"num_particles must be at least 2, not {self.num_particles}: with one the bound "
                "is the ELBO, which is no better learner"
            )
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {self.batch_size}")
        Schedule(self.num_steps, self.learning_rate)
        Schedule(self.guide_steps, self.learning_rate)

    def learn(self, problem: Problem, progress: bool) -> None:
        """Train θ and φ, in place."""
        leaves = problem.model_parameters.trainable() + problem.guide_parameters.trainable()
        schedule = Schedule(self.num_steps, self.learning_rate)
        _maximise_bound(
            problem, self.batch_size, leaves, schedule, self.num_particles, 1, "learning", progress
        )

    def retrain_guide(self, problem: Problem, progress: bool) -> None:
        """Train φ on the ELBO at θ as it is, in place."""
        leaves = problem.guide_parameters.trainable()
        if not leaves:
            return
        schedule = Schedule(self.guide_steps, self.learning_rate)
        replicates = self.guide_replicates
        _maximise_bound(
            problem, self.batch_size, leaves, schedule, 1, replicates, "retraining", progress
        )


def _maximise_bound(
    problem: Problem,
    batch_size: int,
    leaves: Sequence[Tensor],
    schedule: Schedule,
    num_particles: int,
    num_replicates: int,
    description: str,
    progress: bool,
) -> None:
    batches = [part for d in problem.densities for part in cut_units(d, batch_size)]
    order = shuffled_passes(len(batches), schedule.num_steps)

    def loss(step: int) -> Tensor:
        bound = importance_weighted_bound(batches[order[step]], num_particles, num_replicates)
        return bound.loss * len(batches)  # unbiased whatever the sizes of the batches

    minimise(loss, leaves, schedule, description=description, progress=progress)


@dataclass(frozen=True)
class Attempt:
    """One way to a reference that was tried.

    Attributes:
        name: learner and start.
        log_evidence: what it reached on the training data, by random numbers of its own; ``None``
            for parameters handed in, which nothing competes with.
    """

    name: str
    log_evidence: Estimate | None

    def __str__(self) -> str:
        if self.log_evidence is None:
            return self.name
        return f"{self.name} (log evidence {self.log_evidence})"


@dataclass(frozen=True)
class Reference:
    """θ_ref, with the guide retrained there.

    Attributes:
        model_values: θ_ref, name → unconstrained value.
        guide_values: φ retrained on the ELBO at θ_ref.
        attempts: what was tried; the reference is the best of them.
        notes: what was not tried, and why.
    """

    model_values: Mapping[str, Tensor]
    guide_values: Mapping[str, Tensor]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    _problem: Problem = field(repr=False)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """θ_ref by name, on the user-facing scale."""
        constraints = self._problem.model_parameters.constraints
        return Parameters(self.model_values, constraints).constrained()

    def apply(self) -> None:
        """Set the user's model to θ_ref and the guide to the one retrained there, in place."""
        problem = self._problem
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            theta, phi = capture_pair(problem.model, problem.guide, problem.batches[0])
        theta.assign(self.model_values)
        phi.assign(self.guide_values)

    def __str__(self) -> str:
        return "\n".join(
            ["reference parameters, the best of:", *map(str, self.attempts), *self.notes]
        )

    def _repr_html_(self) -> str:
        return html_table(str(self))


def learn_reference(
    model: PyroFunction,
    data: Data,
    *,
    guide: PyroFunction,
    learner: ImportanceWeightedLearner | None = None,
    fresh: Fresh | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Reference:
    """Look for better parameters than the model has now, and leave the model as it is.

    The learner starts at the present parameters, and afresh where that is possible: from what
    `fresh` returns, or, where all of the model's parameters are ``pyro.param`` statements, from
    their initial values. Where going as far again in the same direction raises log evidence, it
    goes on from there. The best by log evidence on the training data is the reference, which is
    the present parameters where nothing better was found.

    Args:
        model: a trained Pyro model.
        data: the training data.
        guide: its trained guide, with reparameterised sites.
        learner: the better learner.
        fresh: returns a new, untrained (model, guide) whose parameters have the same names.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint, before any long work.
    """
    learner = ImportanceWeightedLearner() if learner is None else learner
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        return train_reference(problem, learner, fresh, progress=progress)


def train_reference(
    problem: Problem, learner: ImportanceWeightedLearner, fresh: Fresh | None, *, progress: bool
) -> Reference:
    """`learn_reference` for a problem that is prepared; leaves its parameters as they were."""
    if not problem.densities[0].has_guide_density:
        raise InputError(
            "the guide holds continuous latents as point masses (Delta), so no reference can be "
            "learned with it: call learn_reference with a guide that has a density, such as "
            "AutoNormal(model), and pass the result as reference="
        )
    if not problem.model_parameters.leaves:
        raise InputError(
            "the model has no parameters to learn, so there can be no learning harm; "
            "inference_gap says how far the guide is from the posterior"
        )
    name = f"importance weights, K = {learner.num_particles}"
    started = _start_afresh(problem, fresh)
    candidates = [
        _as_learned(problem),
        _attempt(problem, learner, f"{name}, from θ̂", progress),
    ]
    if isinstance(started, _FreshStart):
        with pyro.get_param_store().scope(started.store):
            candidates.append(_attempt(started.problem, learner, f"{name}, afresh", progress))
    notes = [started] if isinstance(started, str) else []
    if not problem.densities[0].structure.per_unit:
        notes.append(
            "the guide draws the latents of all units as one, so importance weights are those of "
            "all units together: a looser bound than one per unit"
        )
    best = max(candidates, key=lambda candidate: candidate.log_evidence.value)
    attempts = tuple(Attempt(c.name, c.log_evidence) for c in candidates)
    guide_values = _retrain(problem, learner, best.model_values, best.guide_values, progress)
    return Reference(best.model_values, guide_values, attempts, tuple(notes), problem)


def given_reference(
    problem: Problem,
    parameters: Mapping[str, Any],
    learner: ImportanceWeightedLearner,
    *,
    progress: bool,
) -> Reference:
    """A reference from parameters that the user hands in, on the user-facing scale.

    Raises:
        InputError: if names, shapes or constraints do not fit the model.
    """
    values = problem.model_parameters.unconstrain(parameters, "reference")
    if not problem.densities[0].has_guide_density:
        return Reference(values, {}, (Attempt("handed in", None),), (), problem)
    before = problem.guide_parameters.values()
    guide_values = _retrain(problem, learner, values, before, progress)
    return Reference(values, guide_values, (Attempt("handed in", None),), (), problem)


@dataclass(frozen=True)
class _Candidate:
    name: str
    log_evidence: Estimate
    model_values: Mapping[str, Tensor]
    guide_values: Mapping[str, Tensor]


def _attempt(
    problem: Problem, learner: ImportanceWeightedLearner, name: str, progress: bool
) -> _Candidate:
    theta, phi = problem.model_parameters, problem.guide_parameters
    with theta.at(theta.values()), phi.at(phi.values()):
        probe = _probe(problem)
        for _ in range(_MOST_ROUNDS):
            before = theta.values(), phi.values()
            learner.learn(problem, progress)
            if not _go_further(probe, *before):
                break
        return _Candidate(name, _monitor(problem), theta.values(), phi.values())


def _probe(problem: Problem) -> Problem:
    """A few hundred of the units, if they can be had apart, with the same live parameters."""
    part = cut_units(problem.densities[0], _PROBED_UNITS)[0]
    return replace(problem, batches=[part.batch], densities=[part])


def _as_learned(problem: Problem) -> _Candidate:
    theta, phi = problem.model_parameters, problem.guide_parameters
    return _Candidate("θ̂ itself", _monitor(problem), theta.values(), phi.values())


def _go_further(
    problem: Problem,
    model_before: Mapping[str, Tensor],
    guide_before: Mapping[str, Tensor],
) -> bool:
    """Double the displacement of θ and φ while log evidence rises; whether it ever did.

    A learner whose steps are small beside the distance it has to go ends somewhere on the way;
    going as far again in the same direction shows it, and mends it.
    """
    theta, phi, moved = problem.model_parameters, problem.guide_parameters, False
    reached = _monitor(problem)
    for _ in range(_MOST_DOUBLINGS):
        here, guide_here = theta.values(), phi.values()
        theta.assign({name: 2 * here[name] - model_before[name] for name in here})
        phi.assign({name: 2 * guide_here[name] - guide_before[name] for name in guide_here})
        further = _monitor(problem)
        error = math.hypot(further.mc_error, reached.mc_error)
        if not further.value > reached.value + max(2 * error, _LEAST_GAIN):
            theta.assign(here)
            phi.assign(guide_here)
            return moved
        reached, moved = further, True
    return moved


class _FreshStart(NamedTuple):
    problem: Problem
    store: Any


def _start_afresh(problem: Problem, fresh: Fresh | None) -> _FreshStart | str:
    """A problem with untrained parameters in a param store of its own, or why there is none."""
    with pyro.get_param_store().scope() as store:
        model, guide = (problem.model, problem.guide) if fresh is None else fresh()
        again = prepare(
            model,
            guide,
            problem.batches,
            unit_plate=problem.layout.plate,
            parameters=problem.declared,
        )
    known, found = problem.model_parameters.leaves, again.model_parameters.leaves
    if any(found.get(name) is leaf for name, leaf in known.items()):
        if fresh is None:
            return (
                "no fresh start was tried, as modules hold the parameters: pass fresh=, a callable "
                "that returns a new (model, guide)"
            )
        raise InputError("fresh() returned a model that holds the trained parameters")
    for what, old, new in (
        ("model", known, found),
        ("guide", problem.guide_parameters.leaves, again.guide_parameters.leaves),
    ):
        shapes = [{name: tuple(leaf.shape) for name, leaf in part.items()} for part in (old, new)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"fresh() returned a {what} with the parameters {shapes[1]}; names and shapes must "
                f"be those of the trained one: {shapes[0]}"
            )
    return _FreshStart(again, store)


def _retrain(
    problem: Problem,
    learner: ImportanceWeightedLearner,
    model_values: Mapping[str, Tensor],
    guide_values: Mapping[str, Tensor],
    progress: bool,
) -> dict[str, Tensor]:
    """φ retrained at given θ, from given φ."""
    with problem.model_parameters.at(model_values), problem.guide_parameters.at(guide_values):
        learner.retrain_guide(problem, progress)
        return problem.guide_parameters.values()


def _monitor(problem: Problem) -> Estimate:
    """Log evidence as a learner left it, to choose between attempts and for nothing else."""
    dim = problem.densities[0].dim
    choice = choose_method(problem.densities)
    if dim > 2:
        start = MatchedStart(refit=dim > _MANY_DIMS)
        quick = AnnealedImportanceSampling(8, num_steps=5, num_settling=5, start=start)
        choice = Choice(quick)
    return estimate_evidence(problem.densities, choice).per_unit.total()
