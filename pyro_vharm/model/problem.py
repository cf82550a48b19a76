"""A model, a guide and data, checked once: the form in which every other layer takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace

from pyro_vharm.errors import InputError
from pyro_vharm.model.checks import check_densities
from pyro_vharm.model.data import Batch, Data, as_batches
from pyro_vharm.model.declared import DeclaredModel, declare
from pyro_vharm.model.densities import LatentSite, UnitDensities
from pyro_vharm.model.inspection import inspect_pair, run_plainly
from pyro_vharm.model.parameters import Parameters, capture_parameters, check_disjoint
from pyro_vharm.model.sites import latent_sites, unconstrained_shape
from pyro_vharm.model.structure import GuideDensity, Structure
from pyro_vharm.model.subsampling import whole_batches
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.model.unit_sums import count_units
from pyro_vharm.model.units import UnitLayout, site_scale
from pyro_vharm.model.validation import check_same_kind, reporting

__all__ = ["Problem", "call_densities", "capture_pair", "checked_densities", "prepare"]


@dataclass(frozen=True)
class Problem:
    """A model and guide on given data, with the parameters of each.

    Attributes:
        model: the Pyro model.
        guide: the Pyro guide, or ``None``.
        batches: the data.
        densities: the same, as plain functions of tensors per batch.
        model_parameters: θ.
        guide_parameters: φ; empty without a guide.
        declared: sites that count as parameters.
    """

    model: PyroFunction
    guide: PyroFunction | None
    batches: Sequence[Batch]
    densities: Sequence[UnitDensities]
    model_parameters: Parameters
    guide_parameters: Parameters
    declared: tuple[str, ...] = ()

    @property
    def num_units(self) -> int:
        """The number of units in all batches."""
        return sum(densities.num_units for densities in self.densities)

    @property
    def layout(self) -> UnitLayout:
        """Which batch dim counts units."""
        return self.densities[0].layout

    def with_prior_shared_by(self, units: float | None) -> Problem:
        """The same with the log prior of declared parameters shared among so many units."""
        return replace(self, densities=_share_prior(list(self.densities), units))


def prepare(
    model: PyroFunction,
    guide: PyroFunction | None,
    data: Data,
    *,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    name: str = "data",
    heldout: bool = False,
    checked: Structure | None = None,
) -> Problem:
    """Run model and guide once on each batch, and check all that can be checked at once.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it, or ``None``.
        data: see `as_batches`.
        unit_plate: names the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses and that count as θ. Their log
            prior is part of the log evidence, an equal share of it of each unit's.
        name: the argument's name, for messages.
        heldout: leave that log prior out.
        checked: the structure that checks found for other data of this model and guide, so that
            fewer are left.

    Raises:
        InputError: if model, guide and data do not fit together, or are of a kind that is not
            supported; the message names the site or argument.
    """
    batches = as_batches(data, name)
    model, guide = declare(model, guide, parameters, batches[0])
    declared = model.names if isinstance(model, DeclaredModel) else ()
    densities: list[UnitDensities] = []
    for batch in batches:
        checked = densities[0].structure if densities else checked
        densities += _batch_densities(model, guide, batch, unit_plate, declared, checked)
    densities = _share_prior(densities, math.inf if heldout else None) if declared else densities
    first = densities[0].structure
    if first.layout.plate is None and len(batches) > 1:
        raise InputError(
            f"{name} has {len(batches)} batches, but the data are one joint unit (no plate holds "
            "every latent); pass all of it in one batch, as a tuple of arguments"
        )
    if first.guide_density is GuideDensity.TOTAL and len(densities) > 1:
        raise InputError(
            f"{name} has {len(densities)} batches, but the guide draws the latents of all units as "
            "one (log q cannot be evaluated per unit), so all data must be in one call"
        )
    theta, phi = capture_pair(model, guide, batches[0])
    check_disjoint(theta, phi)
    return Problem(model, guide, batches, densities, theta, phi, declared)


def _share_prior(densities: list[UnitDensities], units: float | None) -> list[UnitDensities]:
    """Tell every batch among how many units the log prior of declared parameters is shared."""
    units = sum(part.num_units for part in densities) if units is None else units
    shared = [replace(part.structure, declared_units=units) for part in densities]
    return [replace(d, structure=structure) for d, structure in zip(densities, shared, strict=True)]


def _batch_densities(
    model: PyroFunction,
    guide: PyroFunction | None,
    batch: Batch,
    unit_plate: str | None,
    declared: Sequence[str] = (),
    checked: Structure | None = None,
) -> list[UnitDensities]:
    """The densities of one batch: several where a plate inside the model subsamples it."""
    structure, runs = inspect_pair(model, guide, batch, unit_plate, declared)
    with reporting("model or guide"):
        parts = whole_batches(model, guide, batch, runs, structure.layout.plate)
    densities: list[UnitDensities] = []
    for part in parts:
        if len(parts) > 1:
            structure, runs = inspect_pair(model, guide, part, unit_plate, declared)
        made = _densities(model, guide, part, structure, runs.model)
        with torch.no_grad(), reporting("model or guide"):
            densities.append(check_densities(made, latent_sites(runs.model), checked))
        checked = densities[0].structure
    return densities


def _densities(
    model: PyroFunction,
    guide: PyroFunction | None,
    batch: Batch,
    structure: Structure,
    trace: Trace,
) -> UnitDensities:
    latents = latent_sites(trace)
    check_same_kind(latents)
    if structure.guide_density is GuideDensity.TOTAL and site_scale(latents[0]) != 1.0:
        raise InputError(
            "the guide draws the latents of all units as one (log q cannot be evaluated per unit), "
            "but the plate is subsampled; pass all data in one call, with a plate of their number"
        )
    dtype, device = _kind(trace, structure)
    return UnitDensities(
        model=model,
        guide=guide,
        batch=batch,
        structure=structure,
        sites=_packing(trace, structure),
        num_units=count_units(trace, structure.layout) - batch.num_padded,
        dtype=dtype,
        device=device,
    )


def _packing(trace: Trace, structure: Structure) -> tuple[LatentSite, ...]:
    sites = []
    for name in structure.continuous:
        site = trace.nodes[name]
        batch_shape = tuple(site["fn"].batch_shape)
        padded = (1,) * (structure.layout.max_plate_nesting - len(batch_shape)) + batch_shape
        sites.append(LatentSite(name, padded, unconstrained_shape(site)))
    return tuple(sites)


def _kind(trace: Trace, structure: Structure) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the latents; of a log density where all latents are discrete."""
    name = next(iter(structure.continuous), None)
    like = latent_sites(trace)[0]["log_prob"] if name is None else trace.nodes[name]["value"]
    return like.dtype, like.device


def capture_pair(
    model: PyroFunction, guide: PyroFunction | None, batch: Batch
) -> tuple[Parameters, Parameters]:
    """The parameters θ of the model and φ of the guide."""
    if guide is None:
        return capture_parameters(model, batch), Parameters({}, {})

    def replayed(*args: object, **kwargs: object) -> object:
        with poutine.block():
            trace = poutine.trace(guide).get_trace(*args, **kwargs)
        return poutine.replay(model, trace=trace)(*args, **kwargs)

    theta = capture_parameters(replayed, batch)
    if isinstance(model, DeclaredModel):
        points, phi = model.split(batch)
        return theta.joined(points), phi
    return theta, capture_parameters(guide, batch)


def checked_densities(
    model: PyroFunction, guide: PyroFunction, batch: Batch, unit_plate: str | None
) -> UnitDensities:
    """The densities of one call, of one plateful where a plate subsamples, all checks made.

    Raises:
        InputError: if model and guide do not fit together.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return _batch_densities(model, guide, batch, unit_plate)[0]


def call_densities(
    model: PyroFunction, guide: PyroFunction, batch: Batch, structure: Structure
) -> UnitDensities:
    """The densities of one call whose structure is known, unchecked; of subsampled plates too."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        trace = run_plainly(model, guide, batch).model
        return _densities(model, guide, batch, structure, trace)
