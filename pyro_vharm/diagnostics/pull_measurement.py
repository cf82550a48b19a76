"""Measuring pull and path: the user's own training from the reference, and from θ̂ once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vharm.diagnostics.gap import measure_gap
from pyro_vharm.diagnostics.harm import resolve_reference
from pyro_vharm.diagnostics.pull import Endpoint, Reachability
from pyro_vharm.diagnostics.verdict import material_harm
from pyro_vharm.errors import InputError
from pyro_vharm.inference.agreement import Confirmation
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.inference.evidence import Evidence, estimate_evidence
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learning_run import LearningRun
from pyro_vharm.learning.objective_value import (
    OwnObjective,
    default_objective,
    title_objective,
)
from pyro_vharm.learning.reference import Reference
from pyro_vharm.learning.refit import Refit
from pyro_vharm.learning.svi_optimizer import OwnOptimizer, title_optimizer
from pyro_vharm.learning.svi_training import SVITraining
from pyro_vharm.model.data import Data
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["measure_reachability", "reachability"]


def reachability(
    model: PyroFunction,
    guide: PyroFunction,
    data: Data,
    *,
    reference: Reference | Mapping[str, Any],
    objective: OwnObjective | None = None,
    optimizer: OwnOptimizer | None = None,
    num_steps: int = 1000,
    max_rounds: int = 8,
    method: InferenceMethod | None = None,
    refit: Refit | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Reachability:
    """Split H = ℓ(θ_ref) − ℓ(θ̂) into pull, path and what was not converged, in nats.

    Could variational inference ever have reached θ_ref? At θ_ref the guide is retrained, and from
    there both are trained as the user trains them, until they settle at θ_pull. With θ_cont where
    as many steps lead from θ̂,

        H = pull + path,   pull = ℓ(θ_ref) − ℓ(θ_pull),   path = ℓ(θ_pull) − ℓ(θ̂),

    and of path, unconverged = ℓ(θ_cont) − ℓ(θ̂). Pull is the objective's doing: it prefers
    θ_pull to θ_ref. The rest of path, ℓ(θ_pull) − ℓ(θ_cont), is the optimiser's if the objective
    is higher at θ_pull than at θ_cont, and the objective's own if it is lower. Each part may be
    negative. Their errors are those of the four log evidences, from independent random numbers.
    Training itself ends a little elsewhere with every seed, the more so where its step size stays
    constant: `Reachability.training_noise` is how far the last round moved log evidence.

    The reachability gap R = A(θ_ref) says how far the guide's family is from the posteriors at the
    reference; see `inference_gap`.

    Args:
        model: a Pyro model with the parameters θ̂ that SVI ended at.
        guide: its trained guide.
        data: the training data; several batches are passed over in random orders.
        reference: from `learn_reference`, or θ_ref by name on the user-facing scale.
        objective: what θ̂ was trained on, as `SVI` takes it for ``loss=``. Left out: `Trace_ELBO`,
            or `TraceEnum_ELBO` where discrete latents have no guide site.
        optimizer: what θ̂ was trained by: one of `pyro.optim`, or a callable from a list of leaves
            to a torch optimiser. A fresh one of the same settings is used in every round; a
            scheduler steps once per pass over the batches. Left out: Adam with a falling step size.
        num_steps: gradient steps of a round.
        max_rounds: rounds within which training has to settle.
        method: the inference method for ℓ; see `log_evidence`.
        refit: how to refit the guide per unit, and how finely to evaluate an ELBO.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where an argument breaks a constraint, before any long work.
        FloatingPointError: if training finds no finite gradient.

    Source: "Two problems with variational expectation maximisation for time-series models",
    Turner, Sahani (2011), on objectives that move parameters to where the bound is tight.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.tensor(1.0))
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     shift = pyro.param("shift", torch.tensor(0.5))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(x / 2 + shift, 0.5**0.5))
    >>> x = torch.tensor([0.1, 3.2, 2.7])
    >>> found = reachability(
    ...     model, guide, (x,), reference={"loc": 2.0}, num_steps=100, refit=Refit(50),
    ...     optimizer=pyro.optim.Adam({"lr": 0.02}), progress=False,
    ... )
    >>> abs(found.pull.value) < 0.1  # the family holds the posterior
    True
    >>> abs(found.pull.value + found.path.value - found.harm.value) < 1e-5
    True
    """
    if guide is None:
        raise InputError("reachability needs the guide that the model was trained with")
    refit = refit or Refit()
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        if not problem.model_parameters.leaves:
            raise InputError(
                "the model has no parameters to learn, so there is no reference to reach; "
                "inference_gap says how far the guide is from the posterior"
            )
        training = SVITraining(
            default_objective(problem) if objective is None else objective,
            optimizer,
            num_steps,
            max_rounds=max_rounds,
            num_particles=refit.num_particles,
        )
        chosen = choose_method(problem.densities, method)
        found = resolve_reference(problem, reference, GuideTraining(0), progress=progress)
        return measure_reachability(problem, found, training, chosen, refit, progress=progress)


def measure_reachability(
    problem: Problem,
    reference: Reference,
    training: SVITraining,
    choice: Choice,
    refit: Refit,
    *,
    progress: bool,
) -> Reachability:
    """`reachability` from a prepared problem, which holds θ̂; it is left there."""
    theta, phi = problem.model_parameters, problem.guide_parameters
    learned = _endpoint(problem, training, choice, progress)
    with theta.at(reference.model_values), phi.at(reference.guide_values):
        run = LearningRun(problem, Journal(), progress)
        training.fit_guide(run)
        gap = measure_gap(problem, choice, refit, progress=progress)
        at_reference = _endpoint(problem, training, choice, progress, gap.evidence)
        trained = training.settle(run)
        pulled = _endpoint(problem, training, choice, progress)
    with theta.at(theta.values()), phi.at(phi.values()):
        training.go_on(LearningRun(problem, Journal(), progress), trained.num_rounds)
        continued = _endpoint(problem, training, choice, progress)
    settings = {
        "objective": title_objective(training.objective),
        "optimizer": title_optimizer(training.optimizer, training.schedule),
        "steps from reference": f"{trained.num_steps} in {trained.num_rounds} rounds; "
        f"{trained.ending}",
    }
    return Reachability(
        at_reference=at_reference,
        pulled=pulled,
        learned=learned,
        continued=continued,
        gap=gap,
        training=trained,
        reference=reference,
        material=material_harm(theta, problem.num_units),
        settings=settings,
        notes=reference.notes,
    )


def _endpoint(
    problem: Problem,
    training: SVITraining,
    choice: Choice,
    progress: bool,
    evidence: Evidence | None = None,
) -> Endpoint:
    value = training.evaluate(problem)
    if evidence is None:
        evidence = estimate_evidence(
            problem.densities, choice, confirmation=Confirmation(), progress=progress
        )
    return Endpoint(evidence, value, problem.model_parameters.constrained())
