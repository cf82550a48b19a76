"""The data of each unit, by the names that the model gives its arguments."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from pyro_vharm.model.data import Batch
from pyro_vharm.model.problem import Problem
from pyro_vharm.model.tracing import PyroFunction

__all__ = ["unit_data"]

_MOST_ELEMENTS = 2**22


def unit_data(problem: Problem) -> dict[str, Tensor]:
    """The tensors among the data whose first dim counts units, of all units in order.

    Nothing of one joint unit, of batches that a plate subsamples, and of what is too large to be
    kept beside a result.
    """
    if problem.layout.plate is None or any(batch.subsample for batch in problem.batches):
        return {}
    sizes = [densities.num_units for densities in problem.densities]
    named = [_arguments(problem.model, batch) for batch in problem.batches]
    found = {}
    for name in set.intersection(*map(set, named)):
        parts = [_of_units(each[name], size) for each, size in zip(named, sizes, strict=True)]
        kept = [part for part in parts if part is not None]
        if len(kept) == len(parts) and sum(part.numel() for part in kept) <= _MOST_ELEMENTS:
            found[name] = torch.cat(kept)
    return found


def _of_units(part: object, size: int) -> Tensor | None:
    counts = isinstance(part, Tensor) and part.dim() > 0 and len(part) == size
    return part.detach().cpu() if isinstance(part, Tensor) and counts else None


def _arguments(model: PyroFunction, batch: Batch) -> dict[str, object]:
    called = model.forward if isinstance(model, nn.Module) else model
    try:
        bound = inspect.signature(called).bind(*batch.args, **batch.kwargs).arguments
    except (TypeError, ValueError):  # a callable that hides its arguments
        bound = {"argument": batch.args, **batch.kwargs}
    flat: dict[str, object] = {}
    for name, value in bound.items():
        if isinstance(value, tuple):  # *args
            flat |= {f"{name}_{i}": part for i, part in enumerate(value)}
        elif isinstance(value, dict):
            flat |= value
        else:
            flat[name] = value
    return flat
