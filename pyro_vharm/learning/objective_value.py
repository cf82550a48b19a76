"""The user's own objective: which it is, begun afresh, and its value at the present parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import (
    ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.estimates import Estimate, Kind
from pyro_vharm.learning.refit import elbo_over_batches
from pyro_vharm.model.data import Batch
from pyro_vharm.model.declared import DeclaredModel
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import Problem
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.objectives.objective import UnitObjective

__all__ = [
    "OwnObjective",
    "as_written",
    "check_objective",
    "copy_objective",
    "default_objective",
    "evaluate_objective",
    "is_elbo",
    "renew_objective",
    "title_objective",
]

type OwnObjective = ELBO | Callable[..., Any]

_ESTIMATORS_OF_THE_ELBO = (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO)
_EVALUATIONS, _SAME = 50, 1e-4


def check_objective(objective: OwnObjective | None) -> None:
    """Refuse what `SVI` would not take as ``loss=``.

    Raises:
        InputError: saying what to pass.
    """
    if objective is None:
        return
    if isinstance(objective, type | ELBOModule) or not (
        isinstance(objective, ELBO) or callable(objective)
    ):
        raise InputError(
            "objective must be what SVI takes as loss=, such as Trace_ELBO() or "
            f"ImportanceWeightedELBO(16), not {objective!r}"
        )


def title_objective(objective: OwnObjective) -> str:
    """What it is, for tables."""
    if isinstance(objective, UnitObjective):
        return objective.title
    return getattr(objective, "__name__", type(objective).__name__)


def default_objective(problem: Problem) -> ELBO:
    """`Trace_ELBO`; where the model has discrete latents without a guide site, `TraceEnum_ELBO`."""
    structure = problem.densities[0].structure
    if structure.unguided:
        return TraceEnum_ELBO(max_plate_nesting=structure.layout.max_plate_nesting)
    return Trace_ELBO()


def as_written(
    problem: Problem, objective: OwnObjective
) -> tuple[PyroFunction, PyroFunction | None]:
    """Model and guide as the user trains them: declared sites are latents of the guide again."""
    model, guide, known = problem.model, problem.guide, problem.model
    if isinstance(known, DeclaredModel):
        model, guide = known.model, known.whole_guide
    if isinstance(objective, TraceEnum_ELBO) and problem.densities[0].structure.unguided:
        model = config_enumerate(model)
    return model, guide


def copy_objective(objective: OwnObjective) -> OwnObjective:
    """A copy to work with: an objective remembers the plates that it has seen."""
    return copy.copy(objective) if isinstance(objective, ELBO) else objective


def renew_objective(objective: OwnObjective) -> OwnObjective:
    """The objective without chains that it carries from call to call."""
    return objective.renewed() if isinstance(objective, UnitObjective) else objective


def is_elbo(problem: Problem, objective: OwnObjective) -> bool:
    """Whether the objective estimates L(θ, q) itself, whose value can be had more precisely."""
    if not problem.densities[0].has_guide_density:
        return False
    if type(objective) is TraceEnum_ELBO:
        return True
    unguided = problem.densities[0].structure.unguided
    return type(objective) in _ESTIMATORS_OF_THE_ELBO and not unguided


def evaluate_objective(problem: Problem, objective: OwnObjective, num_particles: int) -> Estimate:
    """The objective over all units at the present parameters, in nats: minus the loss.

    An ELBO by fresh draws of the guide per unit. Others by evaluating the loss of each batch
    again and again; the factor from subsampling is taken out, so that it sums over the units given.

    Args:
        problem: model, guide and data.
        objective: the user's.
        num_particles: draws that evaluate an ELBO.
    """
    if is_elbo(problem, objective):
        found = elbo_over_batches(problem, num_particles)
        assert found is not None, "the guide has a density"
        return found.total()
    model, guide = as_written(problem, objective)
    loss = objective.loss if isinstance(objective, ELBO) else objective
    value, variance = 0.0, 0.0
    for batch, factor in zip(problem.batches, _factors(problem), strict=True):

        def once(batch: Batch = batch) -> float:
            with torch.no_grad():
                return _number(loss(model, guide, *batch.args, **batch.kwargs))

        mean, error = _mean(once)
        value, variance = value - mean / factor, variance + (error / factor) ** 2
    return Estimate(value, math.sqrt(variance), problem.num_units, Kind.ESTIMATED)


def _number(loss: Any) -> float:
    first = loss[0] if isinstance(loss, tuple) else loss  # wake-sleep gives θ's loss, then φ's
    return float(first.detach() if isinstance(first, Tensor) else first)


def _mean(once: Callable[[], float]) -> tuple[float, float]:
    """Mean and standard error; two evaluations will do for a loss that is not random."""
    values = [once(), once()]
    if abs(values[1] - values[0]) > _SAME:
        values += [once() for _ in range(_EVALUATIONS - 2)]
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / len(values) ** 0.5


def _factors(problem: Problem) -> list[float]:
    """By how much each batch's loss exceeds the sum over its units, from subsampling."""
    if problem.densities[0].structure.subsampled:
        return [1.0] * len(problem.batches)
    return [_factor(densities) for densities in problem.densities]


def _factor(densities: UnitDensities) -> float:
    shape = (1, densities.num_units + densities.batch.num_padded, densities.dim)
    with torch.no_grad():
        latents = torch.zeros(shape, dtype=densities.dtype, device=densities.device)
        return densities.run_at(latents).scale
