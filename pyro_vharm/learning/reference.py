"""Reference parameters θ_ref: where a better learner ends, or what the user hands in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, Literal

import pyro
import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate
from pyro_vharm.inference.agreement import Confirmation
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.evidence import estimate_evidence
from pyro_vharm.learning.evidence_pair import EvidencePair, bounds_table
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.history import Checkpoint, History
from pyro_vharm.learning.journal import Journal, open_journal
from pyro_vharm.learning.learners import Effort, Learner, choose_learner
from pyro_vharm.learning.learning_run import LearningRun, Values, watch
from pyro_vharm.learning.starts import Fresh, Start, Starting, find_starts
from pyro_vharm.model.data import Data, fingerprint
from pyro_vharm.model.heldout import prepare_heldout
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import Problem, capture_pair, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import html_table, nats

__all__ = [
    "Attempt",
    "Reference",
    "given_reference",
    "learn_reference",
    "train_reference",
]


@dataclass(frozen=True)
class Attempt:
    """One way to a reference that was tried.

    Attributes:
        name: learner and start.
        log_evidence: what it reached on the training data, by random numbers of its own; ``None``
            for parameters handed in, which nothing competes with, and where learning failed.
        ending: how it ended, in words.
        num_steps: gradient steps, iterations or EM steps.
    """

    name: str
    log_evidence: Estimate | None
    ending: str = ""
    num_steps: int = 0

    def __str__(self) -> str:
        if self.log_evidence is None:
            return f"{self.name} ({self.ending})" if self.ending else self.name
        return f"{self.name} (log evidence {self.log_evidence})"


@dataclass(frozen=True)
class Reference:
    """θ_ref, with the guide retrained there.

    Attributes:
        model_values: θ_ref, name → unconstrained value.
        guide_values: φ retrained on the ELBO at θ_ref.
        attempts: what was tried; the reference is the best of them by log evidence.
        notes: what was not tried, and why.
        history: θ and φ along the way of the best attempt, with the bound that was trained on and
            the evidence that steered it, per unit in nats.
        train: log evidence of the training data at θ̂ and at θ_ref, with bounds, by random numbers
            that chose nothing; ``None`` where it was left to a diagnostic.
        heldout: the same of held-out data.
    """

    model_values: Mapping[str, Tensor]
    guide_values: Mapping[str, Tensor]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    history: History
    train: EvidencePair | None = None
    heldout: EvidencePair | None = None
    _problem: Problem = field(repr=False, kw_only=True)

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
        lines = ["reference parameters, the best of:"]
        for attempt in self.attempts:
            lines.append(f"  {attempt}")
            if attempt.log_evidence is not None and attempt.ending:
                lines.append(f"    {attempt.ending}; {attempt.num_steps} steps")
        lines += self.notes
        if self.train is not None:
            lines += ["", bounds_table(self.train)]
        if self.heldout is not None:
            gain = self.heldout.harm.heldout_total().per_unit
            error = (gain.mc_error**2 + (gain.sampling_error or 0.0) ** 2) ** 0.5
            lines.append(
                f"held-out data: {nats(gain.value)} ± {nats(error)} nats per unit above what was "
                "learned"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(str(self))


def learn_reference(
    model: PyroFunction,
    data: Data,
    *,
    guide: PyroFunction,
    learner: Learner | Literal["auto"] = "auto",
    effort: Effort = "full",
    start: Starting = "both",
    fresh: Fresh | None = None,
    heldout: Data | None = None,
    method: InferenceMethod | Literal["auto"] | None = None,
    checkpoint: str | PathLike[str] | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Reference:
    """Look for better parameters than the model has now, and leave the model as it is.

    A learner starts at the present parameters θ̂; where a probability or a scale lies at a boundary,
    also off it; and afresh where that is possible: from what `fresh` returns, or,
    where all of the model's parameters are ``pyro.param`` statements, from their initial values.
    The best by log evidence on the training data is the reference, which is θ̂ itself where nothing
    better was found. Then its evidence, and that of θ̂, are bounded by random numbers that chose
    nothing. That θ_ref is better on the training data may be overfitting that VI avoided: held-out
    data tell.

    Args:
        model: a trained Pyro model.
        data: the training data.
        guide: its trained guide.
        learner: how to look: by default `ExactLearner` where evidence can be summed or integrated
            at every step, else `ClimbingLearner`, from importance weights to Markov chain EM.
        effort: ``"quick"`` for `ExpectationMaximization` in place of those.
        start: where from: ``"current"``, ``"fresh"`` or ``"both"``.
        fresh: returns a new, untrained (model, guide) whose parameters have the same names.
        heldout: data that training did not see.
        method: the inference method for the bounds; see `log_evidence`.
        checkpoint: a directory to keep the work in. When it was cut short, the same call goes on
            from there, and ends as it would have, up to rounding where work is compiled.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where an argument breaks a constraint, before any long work.
        ArithmeticError: if learning fails from every start.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(x):
    ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, scale))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(0.0 * x, 1.0))
    >>> x = torch.tensor([3.0, -3.0, 1.0, 2.0], dtype=torch.float64)
    >>> reference = learn_reference(model, (x,), guide=guide, progress=False)
    >>> exact = (x.square().mean() - 1).sqrt()
    >>> abs(float(reference.parameters["scale"] - exact)) < 0.01
    True
    """
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        held, notes = prepare_heldout(problem, heldout)
        choice = choose_method(problem.densities, method)
        chosen = choose_learner(problem, learner, effort)
        settings = _settings(problem, chosen, start, fresh, seed)
        found = train_reference(
            problem,
            chosen,
            start,
            fresh,
            journal=open_journal(checkpoint, settings),
            progress=progress,
        )
        found = replace(found, notes=(*found.notes, *notes))
        return _with_evidence(found, problem, held, choice, progress)


def _settings(
    problem: Problem, learner: Learner, starting: Starting, fresh: Fresh | None, seed: int
) -> str:
    """All that the result depends on."""
    theta, phi = problem.model_parameters.values(), problem.guide_parameters.values()
    begun = {"model": theta, "guide": phi}
    return (
        f"{learner}, start {starting!r}, fresh {fresh is not None}, seed {seed}, data "
        f"{fingerprint(list(problem.batches))}, parameters {fingerprint(begun)}"
    )


def _with_evidence(
    found: Reference, problem: Problem, held: Problem | None, choice: Choice, progress: bool
) -> Reference:
    """Bounds on both ends, of training and held-out data."""

    def both(of: Problem, confirmation: Confirmation | None) -> EvidencePair:
        learned = estimate_evidence(
            of.densities, choice, confirmation=confirmation, progress=progress
        )
        theta, phi = problem.model_parameters, problem.guide_parameters
        with theta.at(found.model_values), phi.at(found.guide_values):
            reference = estimate_evidence(
                of.densities, choice, confirmation=confirmation, progress=progress
            )
        return EvidencePair(learned, reference)

    train = both(problem, Confirmation())
    return replace(found, train=train, heldout=None if held is None else both(held, None))


def train_reference(
    problem: Problem,
    learner: Learner,
    starting: Starting,
    fresh: Fresh | None,
    *,
    journal: Journal,
    progress: bool,
) -> Reference:
    """`learn_reference` for a problem that is prepared, without bounds; its θ and φ stay."""
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
    failures: list[tuple[Attempt, ArithmeticError]] = []
    for i, begun in enumerate(starts):
        try:
            found.append(_attempt(begun, learner, journal.within(f"attempt-{i}"), progress))
        except ArithmeticError as error:
            failed = Attempt(f"{learner.name}, {begun.name}", None, f"failed: {error}")
            failures.append((failed, error))
    if len(found) == 1:
        raise failures[0][1]
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
    guide_values: dict[str, Tensor] = found["guide"]
    return guide_values
