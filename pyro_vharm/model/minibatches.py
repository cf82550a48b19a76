"""Cutting one large batch of units into smaller ones, where that provably changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vharm.model.data import Batch
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_runs import GuideRun, run_guide
from pyro_vharm.model.model_runs import run_model_at
from pyro_vharm.model.tracing import CALL_FAILURES

__all__ = [
    "WORTH_CUTTING",
    "Selector",
    "cut_units",
    "guided_selector",
    "unit_blocks",
    "unit_selector",
]

WORTH_CUTTING = 0.75  # a share of units that is left; for more the cut costs as much as it saves
_PROBED_UNITS = 64

type Selector = Callable[[Tensor], UnitDensities]


def cut_units(densities: UnitDensities, size: int) -> list[UnitDensities]:
    """Random minibatches of about `size` units that together hold every unit once.

    Tensor arguments whose first dim counts units are indexed along it. The cut is used only if
    model and guide give each unit of the first minibatch the density they gave it in the whole
    batch; otherwise (parameters per datum in the guide, units along another dim, plates of fixed
    size) the batch is returned whole.
    """
    num_units = densities.num_units
    if num_units <= size or densities.layout.plate is None:
        return [densities]
    if not (densities.has_guide_density and densities.structure.per_unit):
        return [densities]
    parts = torch.randperm(num_units).tensor_split(-(-num_units // size))
    cut = [_densities_of(densities, part) for part in parts]
    return cut if _same_densities(densities, cut[0].batch, parts[0]) else [densities]


def unit_blocks(densities: UnitDensities, size: int) -> Iterator[tuple[Tensor, UnitDensities]]:
    """The units of a batch in blocks of at most `size`, each with the indices of its units.

    All of them at once where the batch cannot be cut; see `unit_selector`.
    """
    every = torch.arange(densities.num_units, device=densities.device)
    select = None if densities.num_units <= size else unit_selector(densities)
    if select is None:
        yield every, densities
        return
    count = -(-len(every) // size)
    for part in every.split(-(-len(every) // count)):  # of one size, so that they share a graph
        yield part, select(part)


def unit_selector(densities: UnitDensities) -> Selector | None:
    """What gives the densities of some units of a batch alone, without the guide.

    Tensor arguments whose first dim counts units are indexed along it. ``None`` where that gives
    a few units that were tried other densities than they have in the whole batch, or none at all:
    with units along another dim, plates of fixed size, or data that are no arguments.
    """
    if densities.layout.plate is None or densities.batch.subsample or densities.num_units < 2:
        return None

    alone = replace(densities, guide=None)

    def select(units: Tensor) -> UnitDensities:
        return _densities_of(alone, units)

    units = _probed(densities)
    return select if _gives_the_same(densities, select(units), units) else None


def guided_selector(densities: UnitDensities) -> Selector | None:
    """`unit_selector` that keeps the guide's density, if there is one.

    ``None`` where the guide cannot be cut along with the model: with parameters per datum, or
    where log q can be had in total only.
    """
    select = unit_selector(densities)
    if select is None or not densities.has_guide_density:
        return select
    units = _probed(densities)
    part = _densities_of(densities, units)
    if not densities.structure.per_unit or not _same_densities(densities, part.batch, units):
        return None
    return lambda units: _densities_of(densities, units)


def _probed(densities: UnitDensities) -> Tensor:
    """A few units at random to try a cut on."""
    order = torch.randperm(densities.num_units, device=densities.device)
    return order[: min(_PROBED_UNITS, densities.num_units // 2)]


def _densities_of(densities: UnitDensities, units: Tensor) -> UnitDensities:
    dim = densities.layout.dim
    assert dim is not None, "one joint unit is never cut"
    sites = []
    for site in densities.sites:
        shape = list(site.batch_shape)
        shape[dim] = len(units)
        sites.append(replace(site, batch_shape=tuple(shape)))
    batch = _select(densities.batch, units, densities.num_units)
    return replace(densities, batch=batch, sites=tuple(sites), num_units=len(units))


def _gives_the_same(densities: UnitDensities, part: UnitDensities, units: Tensor) -> bool:
    try:
        with torch.no_grad():
            latents = densities.draw_latents(2)
            expected, found = densities.terms(latents), part.terms(latents[:, units])
    except CALL_FAILURES:  # of a model that refuses some of its units
        return False
    tolerance = torch.finfo(densities.dtype).eps ** 0.5
    return all(
        some.shape == every[:, units].shape
        and torch.allclose(some, every[:, units], rtol=tolerance, atol=tolerance, equal_nan=True)
        for some, every in zip(found, expected, strict=True)
    )


def _select(batch: Batch, units: Tensor, num_units: int) -> Batch:
    def select(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_units:
            return value[units.to(value.device)]
        return value

    return Batch(
        tuple(select(value) for value in batch.args),
        {name: select(value) for name, value in batch.kwargs.items()},
    )


def _same_densities(densities: UnitDensities, part: Batch, units: Tensor) -> bool:
    guide, structure = densities.guide, densities.structure
    assert guide is not None, "the caller checks for a guide first"
    try:
        with torch.no_grad():
            whole = run_guide(guide, densities.batch, structure, 2)
            joint = _log_joint(densities, densities.batch, whole)
            units = units.to(joint.device)
            values = {
                name: _select_site(
                    whole.values[name], units, structure.layout.dim, structure.dims[name].event_dim
                )
                for name in whole.random
            }
            cut = run_guide(guide, part, structure, 2, values)
            cut_joint = _log_joint(densities, part, cut)
    except CALL_FAILURES:  # of a model that refuses some of its units
        return False
    guided = [  # that of a guide without sites has one unit, and no device of its own
        run.log_guide.to(of.device).expand_as(of) for run, of in ((cut, cut_joint), (whole, joint))
    ]
    pairs = [(cut_joint, joint), (guided[0], guided[1])]
    return all(
        some.shape == every[:, units].shape
        and torch.allclose(some, every[:, units], rtol=1e-4, atol=1e-4)
        for some, every in pairs
    )


def _log_joint(densities: UnitDensities, batch: Batch, drawn: GuideRun) -> Tensor:
    return run_model_at(densities.model, batch, densities.structure, 2, drawn).log_joint


def _select_site(value: Tensor, units: Tensor, dim: int | None, event_dim: int) -> Tensor:
    assert dim is not None, "one joint unit is never cut"
    return value.index_select(dim - event_dim, units)
