"""The whole question in one call."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.diagnostics.audit_result import Audit
from pyro_vharm.diagnostics.gap import InferenceGap, measure_gap
from pyro_vharm.diagnostics.harm import check_reference, measure_harm, resolve_reference
from pyro_vharm.diagnostics.local import LocalHarm
from pyro_vharm.diagnostics.local_measurement import measure_local_harm
from pyro_vharm.diagnostics.pull_measurement import measure_reachability
from pyro_vharm.diagnostics.verdict import Verdict, judge, material_harm
from pyro_vharm.errors import InputError, NotTwiceDifferentiableError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.learning.attempts import train_reference
from pyro_vharm.learning.foresight import foresee_evidence, spoken
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learners import Learner, choose_learner
from pyro_vharm.learning.objective_value import OwnObjective, default_objective
from pyro_vharm.learning.reference import Reference
from pyro_vharm.learning.refit import Refit
from pyro_vharm.learning.starts import Fresh, Starting
from pyro_vharm.learning.svi_optimizer import OwnOptimizer
from pyro_vharm.learning.svi_training import SVITraining
from pyro_vharm.model.data import Data
from pyro_vharm.model.heldout import prepare_heldout
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import nats

__all__ = ["audit"]

_EVIDENCES, _LOOKS = 4, 4  # evaluations of log evidence in the stages, about
_WORTH_SAYING = 5.0  # seconds


def audit(
    model: PyroFunction,
    guide: PyroFunction,
    data: Data,
    *,
    heldout: Data | None = None,
    reference: Reference | Mapping[str, Any] | None = None,
    learner: Learner | Literal["auto"] = "auto",
    start: Starting = "both",
    fresh: Fresh | None = None,
    method: InferenceMethod | None = None,
    refit: Refit | None = None,
    objective: OwnObjective | None = None,
    optimizer: OwnOptimizer | None = None,
    num_steps: int = 1000,
    num_em_steps: int = 5,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    material: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Measure what variational inference did to a trained model, in nats.

    From cheap to dear: estimates the log evidence at the learned θ̂ from both sides and splits the
    inference gap (`inference_gap`); looks at what shows near θ̂ (`local_harm`); looks for better
    parameters θ_ref with a better learner, or takes yours (`learn_reference`); measures how much
    log evidence learning lost, on training and held-out data (`learning_harm`); and, if you say how
    you train, trains so from there (`reachability`). It says first how long that may take. Model,
    guide, parameters, gradients and random state are left as they were, also when interrupted.

    Args:
        model: a Pyro model, its latents in a plate of independent units or as one
            joint unit, holding the learned parameters.
        guide: its trained guide, with reparameterised sites.
        data: the training data: positional arguments as a tuple, keyword arguments as a Mapping,
            or an iterable of batches (each a tuple, list, Mapping or Tensor).
        heldout: data that training did not see, in the same forms.
        reference: θ_ref by name on the user-facing scale, or a `Reference`; learned if left out.
        learner: how to look for θ_ref; see `learn_reference`. For a reference that is handed in,
            only how it trains the guide there.
        start: where the learner starts: ``"current"``, ``"fresh"`` or ``"both"``.
        fresh: returns a new, untrained (model, guide), for a start from elsewhere than θ̂. Not
            needed where all parameters of the model are ``pyro.param`` statements.
        method: the inference method for log evidence, see `log_evidence`, and for the particles
            of `local_harm`.
        refit: how to refit the guide per unit, and how finely to evaluate an ELBO.
        objective: what θ̂ was trained on, as `SVI` takes it for ``loss=``. With this or `optimizer`
            the harm is split into pull, path and what was not converged; see `reachability`.
        optimizer: what θ̂ was trained by; see `reachability`.
        num_steps: gradient steps of a round of your training; see `reachability`.
        num_em_steps: EM steps of `local_harm`; 0 leaves that out.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        material: the least total harm in nats that is called harm; see `material_harm` for what
            is taken if left out.
        seed: of all random numbers used: the same seed gives the same audit, up to rounding where
            much work is compiled.
        progress: show bars on long work.

    Returns:
        the ledger, the verdict and the better parameters; see `Audit`.

    Raises:
        InputError: where an argument breaks a constraint, before any long work.
    """
    if material is not None and material < 0:
        raise InputError(f"material must not be negative, got {material}")
    if num_em_steps < 0:
        raise InputError(f"num_em_steps must not be negative, got {num_em_steps}")
    if guide is None:
        raise InputError("audit needs the guide that the model was trained with")
    refit = Refit() if refit is None else refit
    with untouched(seed, model, guide):
        problem = prepare(model, guide, data, unit_plate=unit_plate, parameters=parameters)
        held, notes = prepare_heldout(problem, heldout)
        chosen = choose_method(problem.densities, method)
        settings = {"seed": str(seed), "method": str(chosen)}
        if not problem.model_parameters.leaves:
            gap = measure_gap(problem, chosen, refit, progress=progress)
            return Audit(gap, None, _without_parameters(gap), settings)
        own = _own_training(problem, objective, optimizer, num_steps)
        if reference is not None:
            check_reference(problem, reference)
        learns = choose_learner(problem, learner) if reference is None else None
        if learns is not None:
            settings["learner"] = str(learns)
        if progress:
            _announce(problem, chosen, learns, num_em_steps, own)
        gap = measure_gap(problem, chosen, refit, progress=progress)
        particles = None if method is None else chosen
        local, missed = _look_near(problem, gap, chosen, particles, num_em_steps, progress)
        notes = (*notes, *missed)
        if learns is not None:
            known, journal = _near(problem, local), Journal()
            found = train_reference(
                problem,
                learns,
                start,
                fresh,
                journal=journal,
                progress=progress,
                known=known,
                heldout=held,
            )
        else:
            found = _given(problem, reference, learner, progress)
        harm = measure_harm(problem, gap, found, held, notes, chosen, refit, progress=progress)
        reach = None
        if own is not None:
            reach = measure_reachability(problem, found, own, chosen, refit, progress=progress)
        least = material_harm(problem.model_parameters, problem.num_units)
        verdict = judge(harm, least if material is None else material, local, reach)
        return Audit(gap, harm, verdict, settings, local, reach)


def _look_near(
    problem: Problem,
    gap: InferenceGap,
    choice: Choice,
    particles: Choice | None,
    num_em_steps: int,
    progress: bool,
) -> tuple[LocalHarm | None, tuple[str, ...]]:
    """What shows near θ̂, if it is asked for and can be had; and a note where it cannot."""
    if not num_em_steps or not problem.model_parameters.trainable():
        return None, ()
    try:
        found = measure_local_harm(
            problem, gap.evidence, choice, particles, num_em_steps, progress=progress
        )
    except NotTwiceDifferentiableError as error:
        return None, (f"Nothing is known of what shows near θ̂: {error}.",)
    return found, ()


def _given(
    problem: Problem,
    reference: Reference | Mapping[str, Any] | None,
    learner: Learner | Literal["auto"],
    progress: bool,
) -> Reference:
    """What the user handed in, with the guide retrained there."""
    assert reference is not None, "a learner was chosen where there is none"
    training = GuideTraining() if learner == "auto" else learner.guide_training
    return resolve_reference(problem, reference, training, progress=progress)


def _own_training(
    problem: Problem,
    objective: OwnObjective | None,
    optimizer: OwnOptimizer | None,
    num_steps: int,
) -> SVITraining | None:
    """The user's training, if they said how they train."""
    if objective is None and optimizer is None:
        return None
    chosen = default_objective(problem) if objective is None else objective
    return SVITraining(chosen, optimizer, num_steps)


def _near(problem: Problem, local: LocalHarm | None) -> dict[str, Mapping[str, Tensor]]:
    """What was found near θ̂, which a reference should not fall short of."""
    if local is None:
        return {}
    values = problem.model_parameters.unconstrain(local.best.parameters, "local")
    return {f"near θ̂: {local.best.name}": values}


def _announce(
    problem: Problem,
    choice: Choice,
    learner: Learner | None,
    num_em_steps: int,
    own: SVITraining | None,
) -> None:
    """Say how long it may take, if that is long, without using up random numbers."""
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices):
        evidence = foresee_evidence(problem, choice)
        stages = {"log evidence and gap": _EVIDENCES * evidence}
        if num_em_steps:
            stages["near θ̂"] = _LOOKS * evidence
        if learner is not None:
            stages["reference, each start at most"] = learner.most_seconds(problem)
        if own is not None:
            stages["your training"] = own.most_seconds(problem)
    if sum(stages.values()) > _WORTH_SAYING:
        tqdm.write(f"audit: {spoken(stages)}", file=sys.stderr)


def _shown(units: UnitEstimates) -> str:
    return nats(units.total().value, 2)


def _without_parameters(gap: InferenceGap) -> Verdict:
    return Verdict(
        "no harm found",
        (
            "The model has no parameters, so nothing was learned and nothing could be harmed. "
            + ("" if gap.gap is None else f"The inference gap is {_shown(gap.gap)} nats."),
        ),
    )
