"""The whole question in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pyro_vharm.diagnostics.gap import InferenceGap, measure_gap
from pyro_vharm.diagnostics.harm import measure_harm, resolve_reference
from pyro_vharm.diagnostics.verdict import Audit, Verdict, judge, material_harm
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference.choice import InferenceMethod, choose_method
from pyro_vharm.learning.attempts import train_reference
from pyro_vharm.learning.guide_training import GuideTraining
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learners import Learner, choose_learner
from pyro_vharm.learning.reference import Reference
from pyro_vharm.learning.refit import Refit
from pyro_vharm.learning.starts import Fresh, Starting
from pyro_vharm.model.data import Data
from pyro_vharm.model.heldout import prepare_heldout
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.tables import nats

__all__ = ["audit"]


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
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    material: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Audit:
    """Measure what variational inference did to a trained model, in nats.

    Estimates the log evidence at the learned θ̂ from both sides, splits the inference gap, looks
    for better parameters θ_ref with a better learner (or takes yours), and measures how much log
    evidence learning lost, on training and held-out data. Model, guide, parameters, gradients and
    random state are left as they were, also when interrupted.

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
        method: the inference method for log evidence; see `log_evidence`.
        refit: how to refit the guide per unit, and how finely to evaluate an ELBO.
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
        if reference is None:
            learns = choose_learner(problem, learner)
            settings["learner"] = str(learns)
            found = train_reference(
                problem, learns, start, fresh, journal=Journal(), progress=progress
            )
        else:
            training = GuideTraining() if learner == "auto" else learner.guide_training
            found = resolve_reference(problem, reference, training, progress=progress)
        gap = measure_gap(problem, chosen, refit, progress=progress)
        harm = measure_harm(problem, gap, found, held, notes, chosen, refit, progress=progress)
        if material is None:
            material = material_harm(problem.model_parameters, problem.num_units)
        return Audit(gap, harm, judge(harm, material), settings)


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
