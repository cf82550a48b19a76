"""Plates that subsample inside the model: every unit of the data, a plateful at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.inspection import PlainRuns
from pyro_vharm.model.sites import latent_sites, log_prob_at, sample_sites, subsample_sites
from pyro_vharm.model.tracing import FixedSites, PyroFunction, trace_call

__all__ = ["whole_batches"]


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
        InputError: if another plate picks its elements by random indices.
    """
    found = subsample_sites(runs.model)
    if not found:
        return [batch]
    firsts = {name: torch.arange(len(site["value"])) for name, site in found.items()}
    lasts = {
        name: torch.arange(site["fn"].size - len(site["value"]), site["fn"].size)
        for name, site in found.items()
    }
    used = [
        name
        for name in found
        if _differs(model, batch, runs.model, firsts, {**firsts, name: lasts[name]})
        or (
            runs.guide is not None
            and guide is not None
            and _differs(guide, batch, runs.guide, firsts, {**firsts, name: lasts[name]})
        )
    ]
    if not used:
        return [replace(batch, subsample={**firsts, **batch.subsample})]
    if used != [unit_plate]:
        raise InputError(
            f"the plates {sorted(set(used) - {unit_plate})} pick elements at random "
            "(subsample_size) and are not the plate of the units, so evidence needs all of their "
            "elements; leave subsample_size out of them"
        )
    site = found[used[0]]
    parts = torch.arange(site["fn"].size).split(len(site["value"]))
    return [_filled(batch, firsts, used[0], part, len(site["value"])) for part in parts]


def _filled(
    batch: Batch, others: Mapping[str, Tensor], plate: str, part: Tensor, size: int
) -> Batch:
    padded = size - len(part)
    indices = torch.cat([part, part[:1].expand(padded)])
    subsample = {**others, **batch.subsample, plate: indices}
    return replace(batch, subsample=subsample, num_padded=padded)


def _differs(
    function: PyroFunction,
    batch: Batch,
    trace: Trace,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
) -> bool:
    """Whether other indices give other densities at the same latents."""
    values = {site["name"]: site["value"] for site in latent_sites(trace)}
    one, two = (
        trace_call(function, replace(batch, subsample=indices), FixedSites(values))
        for indices in (first, second)
    )
    return any(
        not torch.equal(
            log_prob_at(site, site["mask"]),
            log_prob_at(two.nodes[site["name"]], two.nodes[site["name"]]["mask"]),
        )
        for site in sample_sites(one)
    )
