"""Held-out data, with the guide where its density there is that of the held-out units."""

from __future__ import annotations

import torch

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Data
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["prepare_heldout"]


def prepare_heldout(
    problem: Problem, heldout: Data | None
) -> tuple[Problem | None, tuple[str, ...]]:
    """Held-out data with the guide, or without it where the guide cannot be evaluated there."""
    if heldout is None:
        return None, ()
    try:
        held = _prepare_heldout(problem, problem.guide, heldout)
        if not _same_guide_density(problem, held):
            return held, ()
        reason = "it gives held-out units the densities of training units, whatever the data"
    except InputError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
    held = _prepare_heldout(problem, None, heldout)
    return held, (f"the guide was left out on held-out data: {reason}",)


def _prepare_heldout(problem: Problem, guide: PyroFunction | None, heldout: Data) -> Problem:
    return prepare(
        problem.model,
        guide,
        heldout,
        unit_plate=problem.layout.plate,
        parameters=problem.declared,
        name="heldout",
        heldout=True,
    )


def _same_guide_density(train: Problem, heldout: Problem) -> bool:
    """Whether the guide does not look at the data: its parameters belong to the training units."""
    first, second = train.densities[0], heldout.densities[0]
    if train.guide is None or first.num_units != second.num_units or first.layout.plate is None:
        return False
    with torch.no_grad():
        drawn = run_guide(train.guide, first.batch, first.structure, 2)
        values = {name: drawn.values[name] for name in drawn.random}
        again = run_guide(train.guide, second.batch, second.structure, 2, values)
    return torch.equal(drawn.log_guide, again.log_guide) and not _same_data(first, second)


def _same_data(first: UnitDensities, second: UnitDensities) -> bool:
    """Whether the model gives both the same densities at the same latents."""
    latents = torch.zeros(1, first.num_units, first.dim, dtype=first.dtype, device=first.device)
    with torch.no_grad():
        return torch.equal(first.log_joint(latents), second.log_joint(latents))
