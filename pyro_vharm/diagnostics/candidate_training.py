"""Training a model afresh with each of several guides, and measuring what it learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pyro
from pyro.infer import Trace_ELBO
from tqdm.auto import tqdm

from pyro_vharm.diagnostics.guide_comparison import CandidateRun, GuideComparison
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference.agreement import Confirmation
from pyro_vharm.inference.choice import InferenceMethod, choose_method
from pyro_vharm.inference.evidence import Evidence, estimate_evidence
from pyro_vharm.learning.candidates import Candidate, MakeGuide
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learning_run import LearningRun
from pyro_vharm.learning.objective_value import (
    OwnObjective,
    default_objective,
    title_objective,
)
from pyro_vharm.learning.refit import Refit, elbo_over_batches
from pyro_vharm.learning.svi_optimizer import OwnOptimizer, title_optimizer
from pyro_vharm.learning.svi_training import SVITraining
from pyro_vharm.model.data import Data, as_batches
from pyro_vharm.model.heldout import prepare_heldout
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import reachable_modules, untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.objectives.exact import ExactEvidence

__all__ = ["compare_guides"]


def compare_guides(
    model: PyroFunction,
    candidates: Mapping[str, Candidate | MakeGuide],
    data: Data,
    *,
    heldout: Data | None = None,
    num_seeds: int = 3,
    objective: OwnObjective | None = None,
    optimizer: OwnOptimizer | None = None,
    num_steps: int = 1000,
    max_rounds: int = 8,
    method: InferenceMethod | None = None,
    fresh: Callable[[], PyroFunction] | None = None,
    unit_plate: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> GuideComparison:
    """Train a model afresh with each of several guides, and rank them by what was learned, in nats.

    A better bound is no evidence of a better model: candidates are compared by log evidence ℓ(θ̂)
    of what each learned, by one inference method with random numbers of its own, not by their
    objectives. Candidates of the same seed start alike, and differences are paired by seed, and on
    held-out data by unit. ℓ is an estimate with its error; see `log_evidence`.

    Args:
        model: a Pyro model.
        candidates: name → a callable from the model to a new guide, such as `AutoNormal`, or a
            `Candidate` with an objective of its own; `guide_ladder` gives the usual ones.
        data: the training data.
        heldout: data that no candidate sees.
        num_seeds: trainings of each candidate.
        objective: what candidates without one are trained on. Left out: `Trace_ELBO`, or
            `TraceEnum_ELBO` where discrete latents have no guide site.
        optimizer: as `reachability` takes it. Left out: Adam with a falling step size.
        num_steps: gradient steps of a round; rounds go on until objective and ℓ move no further.
        max_rounds: the budget of a training.
        method: the inference method for ℓ; see `log_evidence`.
        fresh: returns a new, untrained model. Without it, a model that keeps parameters in modules
            starts at their present values every time; parameters by ``pyro.param`` start afresh.
        unit_plate: name of the plate of independent units; found if left out.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where an argument or candidate breaks a constraint, before any training.
        ArithmeticError: if no candidate can be trained. One that fails, as by a gradient that is
            not finite, is left out with a note.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoDelta, AutoNormal
    >>> def model(x):
    ...     scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(0.0, scale))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> x = torch.tensor([0.1, -3.2, 2.7, 1.0])
    >>> found = compare_guides(
    ...     model, {"points": AutoDelta, "mean field": AutoNormal}, (x,), num_seeds=1,
    ...     num_steps=100, max_rounds=1, optimizer=pyro.optim.Adam({"lr": 0.1}), progress=False,
    ... )
    >>> found.ranking
    ('mean field', 'points')
    """
    chosen = _checked(candidates, num_seeds)
    common = Trace_ELBO() if objective is None else objective
    training = SVITraining(common, optimizer, num_steps, max_rounds=max_rounds, looks=1)
    started = fresh or (lambda: model)
    trial = _Trial(
        as_batches(data),
        None if heldout is None else as_batches(heldout, "heldout"),
        objective,
        training,
        method,
        unit_plate,
        progress,
    )
    with untouched(seed, model):
        for name, candidate in chosen.items():
            with _afresh(started, seed) as again:
                trial.prepare(name, candidate, again)
        runs = _run_all(trial, chosen, started, range(seed, seed + num_seeds))
    notes = [f"{', '.join(names)}: {note}" for note, names in trial.notes.items()]
    if fresh is None and any(list(root.parameters()) for root in reachable_modules(model)):
        notes.append(
            "the model's modules started at the values that they have now, as fresh= was left out"
        )
    settings = {
        "objectives": "; ".join(f"{name}, {title}" for name, title in trial.titles.items()),
        "optimizer": title_optimizer(optimizer, training.schedule),
        "seeds": str(num_seeds),
        "method": runs[next(iter(runs))][0].evidence.method,
    }
    return GuideComparison(runs, trial.titles, tuple(notes), settings)


def _run_all(
    trial: _Trial,
    candidates: Mapping[str, Candidate],
    started: Callable[[], PyroFunction],
    seeds: Sequence[int],
) -> dict[str, list[CandidateRun]]:
    """The runs of the candidates that could be trained with every seed.

    Raises:
        ArithmeticError: that of the last, if none could.
    """
    runs: dict[str, list[CandidateRun]] = {}
    failure: ArithmeticError | None = None
    shown = not trial.progress or None
    for name in tqdm(candidates, desc="candidates", disable=shown, leave=False):
        found = []
        try:
            for seed in seeds:
                with _afresh(started, seed) as again:
                    found.append(trial.run(name, candidates[name], again))
        except ArithmeticError as error:
            failure = error
            trial.note(f"left out, as its training failed: {error}", name)
            continue
        runs[name] = found
    if failure is not None and not runs:
        raise failure
    return runs


@dataclass(frozen=True)
class _Trial:
    """What is the same for all candidates and seeds."""

    data: Data
    heldout: Data | None
    objective: OwnObjective | None
    training: SVITraining
    method: InferenceMethod | None
    unit_plate: str | None
    progress: bool
    notes: dict[str, dict[str, None]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    guides: dict[int, object] = field(default_factory=dict)

    def prepare(
        self, name: str, candidate: Candidate, model: PyroFunction
    ) -> tuple[Problem, OwnObjective]:
        """A new guide, checked with the model; and what they are trained on."""
        guide = self._new_guide(name, candidate, model)
        problem = prepare(model, guide, self.data, unit_plate=self.unit_plate)
        if not problem.model_parameters.leaves:
            raise InputError(
                "the model has no parameters to learn, so guides can be compared by their gaps "
                "alone; see inference_gap"
            )
        objective = candidate.objective or self.objective or default_objective(problem)
        self.titles[name] = title_objective(objective)
        return problem, objective

    def note(self, what: str, name: str) -> None:
        """Of a candidate; the same of several is said once."""
        self.notes.setdefault(what, {})[name] = None

    def run(self, name: str, candidate: Candidate, model: PyroFunction) -> CandidateRun:
        """Train and measure, in a param store and with modules that are put back afterwards."""
        problem, objective = self.prepare(name, candidate, model)
        trained = replace(self.training, objective=objective).settle(
            LearningRun(problem, Journal(), self.progress)
        )
        trains_guide = not isinstance(objective, ExactEvidence)
        return CandidateRun(
            evidence=self._evidence(problem, Confirmation()),
            elbo=elbo_over_batches(problem, Refit().num_particles) if trains_guide else None,
            heldout=self._heldout(name, problem),
            parameters=problem.model_parameters.constrained(),
            ending=trained.ending,
            num_steps=trained.num_steps,
            seconds=trained.seconds,
            cpu_seconds=trained.cpu_seconds,
        )

    def _evidence(self, problem: Problem, confirmation: Confirmation | None = None) -> Evidence:
        choice = choose_method(problem.densities, self.method)
        return estimate_evidence(
            problem.densities, choice, confirmation=confirmation, progress=self.progress
        )

    def _heldout(self, name: str, problem: Problem) -> UnitEstimates | None:
        held, notes = prepare_heldout(problem, self.heldout)
        for note in notes:
            self.note(note, name)
        return None if held is None else self._evidence(held).per_unit

    def _new_guide(self, name: str, candidate: Candidate, model: PyroFunction) -> PyroFunction:
        guide = candidate.guide(model)
        if not callable(guide):
            raise InputError(f"candidates[{name!r}] returned {guide!r}, which is no guide")
        has_parameters = any(list(root.parameters()) for root in reachable_modules(guide))
        if has_parameters and id(guide) in self.guides:
            raise InputError(
                f"candidates[{name!r}] returned a guide that was trained before; it must make a "
                "new one at every call"
            )
        self.guides[id(guide)] = guide  # kept, so that no other has its id
        return guide


@contextmanager
def _afresh(started: Callable[[], PyroFunction], seed: int) -> Iterator[PyroFunction]:
    """A model in an empty param store; random numbers, and its modules afterwards, put back."""
    pyro.set_rng_seed(seed)
    model = started()
    with untouched(seed, model), pyro.get_param_store().scope():
        yield model


def _checked(
    candidates: Mapping[str, Candidate | MakeGuide], num_seeds: int
) -> dict[str, Candidate]:
    if num_seeds < 1:
        raise InputError(f"num_seeds must be at least 1, not {num_seeds}")
    if not isinstance(candidates, Mapping) or not candidates:
        raise InputError(
            "candidates must be a mapping from names to guides, such as "
            f"{{'mean field': AutoNormal}}, not {candidates!r}"
        )
    return {
        str(name): found if isinstance(found, Candidate) else Candidate(found)
        for name, found in candidates.items()
    }
