"""Where a learner starts: at the present parameters, away from a boundary, or afresh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_vharm.errors import InputError
from pyro_vharm.model.boundaries import inside_boundary
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["Fresh", "Start", "Starting", "find_starts"]

type Fresh = Callable[[], tuple[PyroFunction, PyroFunction]]
type Starting = Literal["current", "fresh", "both"]

_JITTER = 0.1


@dataclass(frozen=True)
class Start:
    """Where one attempt starts.

    Attributes:
        name: for messages.
        problem: with the parameters that the attempt trains, in place.
        values: θ to start from, unconstrained; ``None`` for what the problem holds.
        store: Pyro's param store that these parameters live in; ``None`` for the present one.
    """

    name: str
    problem: Problem
    values: Mapping[str, Tensor] | None = None
    store: Any = None


def find_starts(
    problem: Problem, starting: Starting, fresh: Fresh | None
) -> tuple[list[Start], list[str]]:
    """The starts that were asked for, and notes on what could not be had.

    A model that gave a class no weight has no score that would give it some, nor one whose scale
    went to 0: such boundaries are left by a start of their own.

    Raises:
        InputError: if a fresh start was asked for and cannot be had, or `fresh` returned the
            wrong thing.
    """
    if starting not in ("current", "fresh", "both"):
        raise InputError(f"start must be 'current', 'fresh' or 'both', not {starting!r}")
    starts, notes = [], []
    if starting != "fresh":
        starts.append(Start("from θ̂", problem))
        moved = _off_boundaries(problem.model_parameters)
        if moved is not None:
            starts.append(Start("from θ̂ off its boundaries", problem, moved))
    if starting != "current":
        found = _start_afresh(problem, fresh)
        if isinstance(found, Start):
            starts.append(found)
        elif starting == "fresh":
            raise InputError(found)
        else:
            notes.append(found)
    return starts, notes


def _off_boundaries(parameters: Parameters) -> dict[str, Tensor] | None:
    """Unconstrained values that are away from boundaries; ``None`` if none is near one.

    Those near one move as `inside_boundary` says; what is left is jittered, to break ties.
    """
    values, user_facing = parameters.values(), parameters.constrained()
    moved, near = {}, False
    for name, value in user_facing.items():
        constraint = parameters.constraints[name]
        inside = inside_boundary(constraint, value)
        if inside is None:
            moved[name] = values[name] + _JITTER * torch.randn_like(values[name])
            continue
        near |= not torch.equal(inside, value)
        moved[name] = transform_to(constraint).inv(inside)
    return moved if near else None


def _start_afresh(problem: Problem, fresh: Fresh | None) -> Start | str:
    """Untrained parameters in a param store of their own, or why there are none."""
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
    _check_fits(problem, again)
    return Start("afresh", again, store=store)


def _check_fits(problem: Problem, again: Problem) -> None:
    for what, old, new in (
        ("model", problem.model_parameters, again.model_parameters),
        ("guide", problem.guide_parameters, again.guide_parameters),
    ):
        shapes = [
            {name: tuple(leaf.shape) for name, leaf in part.leaves.items()} for part in (old, new)
        ]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"fresh() returned a {what} with the parameters {shapes[1]}; names and shapes must "
                f"be those of the trained one: {shapes[0]}"
            )
