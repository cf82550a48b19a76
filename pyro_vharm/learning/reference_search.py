"""The search for better parameters in one call, resumable, with bounds on what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Literal

from pyro_vharm.inference.agreement import Confirmation
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.evidence import estimate_evidence
from pyro_vharm.learning.attempts import train_reference
from pyro_vharm.learning.evidence_pair import EvidencePair
from pyro_vharm.learning.journal import open_journal
from pyro_vharm.learning.learners import Effort, Learner, choose_learner
from pyro_vharm.learning.reference import Reference
from pyro_vharm.learning.starts import Fresh, Starting
from pyro_vharm.model.data import Data, fingerprint
from pyro_vharm.model.heldout import prepare_heldout
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["learn_reference"]


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
            heldout=held,
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
