"""Plates that subsample inside the model: every unit of the data, a plateful at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch, with_subsample
from pyro_vharm.model.inspection import PlainRuns
from pyro_vharm.model.sites import latent_sites, subsample_sites
from pyro_vharm.model.tracing import FixedSites, PyroFunction, trace_call

__all__ = ["hold_indices", "whole_batches"]

_SIZES = ("__len__", "size", "dim", "__get__", "numel")


def hold_indices(
    model: PyroFunction, guide: PyroFunction, batch: Batch, subsampled: Set[str]
) -> Batch:
    """Draw the indices of plates that subsample once, for all runs of guide and model."""
    if subsampled <= batch.subsample.keys():
        return batch
    with torch.no_grad():
        for function in (guide, model):
            found = subsample_sites(trace_call(function, batch))
            batch = with_subsample(batch, {name: site["value"] for name, site in found.items()})
    return batch


def whole_batches(
    model: PyroFunction,
    guide: PyroFunction | None,
    batch: Batch,
    runs: PlainRuns,
    unit_plate: str | None,
) -> list[Batch]:
    """Batches that hold the indices of subsampled plates fixed, and together every unit once.

    Where model and guide do not look at the indices (a minibatch is passed, and the plate only
    scales), that is the batch itself. Where they do, and the plate is that of the units, it is
    one batch for each part of the plate's range; the last is filled up with units that do not
    count.

    Args:
        model: the model.
        guide: the guide, or ``None``.
        batch: one call.
        runs: one plain run of both.
        unit_plate: the name of the unit plate.

    Raises:
        InputError: if another plate picks its elements by random indices, or the guide does
            where the model does not.
    """
    found = subsample_sites(runs.model)
    if not found:
        return [batch]
    firsts = {
        name: torch.arange(len(site["value"]), device=site["value"].device)
        for name, site in found.items()
    }
    held = replace(batch, subsample={**firsts, **batch.subsample})
    by_model = _picking(model, held, runs.model)
    by_guide = _picking(guide, held, runs.guide)
    if not by_model | by_guide:
        return [held]
    if by_model | by_guide != {unit_plate}:
        raise InputError(
            f"the plates {sorted((by_model | by_guide) - {unit_plate})} pick elements at random "
            "(subsample_size) and are not the plate of the units, so evidence needs all of their "
            "elements; leave subsample_size out of them"
        )
    if not by_model:
        raise InputError(
            f"the guide picks parameters by the random indices of plate {unit_plate!r}, and the "
            "model does not pick its data by them, so it cannot be told to which units the "
            "minibatch belongs; pass all data in one call, or pick data in the model, x[index]"
        )
    (name,) = by_model
    size = len(found[name]["value"])
    every = torch.arange(found[name]["fn"].size, device=found[name]["value"].device)
    parts = every.split(size)
    return [_filled(held, name, part, size) for part in parts]


def _picking(function: PyroFunction | None, batch: Batch, trace: Trace | None) -> set[str]:
    """The plates whose indices a model or guide picks anything by."""
    if function is None or trace is None:
        return set()
    values = {site["name"]: site["value"] for site in latent_sites(trace)}
    watch = _Watch(batch.subsample)
    with watch:
        trace_call(function, batch, FixedSites(values))
    return watch.used


def _filled(batch: Batch, plate: str, part: Tensor, size: int) -> Batch:
    padded = size - len(part)
    indices = torch.cat([part, part[:1].expand(padded)])
    return replace(batch, subsample={**batch.subsample, plate: indices}, num_padded=padded)


class _Watch(TorchFunctionMode):
    """Notes which plates' indices an operation takes, other than to ask for their number."""

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.indices = {id(value): name for name, value in indices.items()}
        self.used: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and note the indices among its arguments."""
        given = pytree.tree_leaves((args, dict(kwargs or {})))
        if getattr(func, "__name__", "") not in _SIZES:
            self.used.update(self.indices[id(x)] for x in given if id(x) in self.indices)
        return func(*args, **(kwargs or {}))
