"""A model, a guide and data, checked once: the form in which every other layer takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch, Data, as_batches
from pyro_vharm.model.densities import LatentSite, UnitDensities
from pyro_vharm.model.parameters import Parameters, capture_parameters, check_disjoint
from pyro_vharm.model.tracing import (
    PyroFunction,
    latent_sites,
    observed_sites,
    trace_plain,
    unconstrained_shape,
)
from pyro_vharm.model.units import UnitLayout, unit_layout
from pyro_vharm.model.validation import (
    check_density,
    check_deterministic,
    check_deterministic_guide,
    check_finite,
    check_independent,
    check_latents,
    check_particles,
    check_sites_match,
    refuse_training_modes,
    reporting,
)

_NUM_CHECKED = 17  # a prime, so that it equals no size in the model by accident

__all__ = ["Problem", "capture_pair", "layout_of", "prepare"]


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
    """

    model: PyroFunction
    guide: PyroFunction | None
    batches: Sequence[Batch]
    densities: Sequence[UnitDensities]
    model_parameters: Parameters
    guide_parameters: Parameters

    @property
    def num_units(self) -> int:
        """The number of units in all batches."""
        return sum(densities.num_units for densities in self.densities)

    @property
    def layout(self) -> UnitLayout:
        """Which batch dim counts units."""
        return self.densities[0].layout


def prepare(
    model: PyroFunction,
    guide: PyroFunction | None,
    data: Data,
    *,
    unit_plate: str | None = None,
    name: str = "data",
) -> Problem:
    """Run model and guide once on each batch, and check all that can be checked at once.

    Args:
        model: a Pyro model.
        guide: a Pyro guide for it, or ``None``.
        data: see `as_batches`.
        unit_plate: names the plate of independent units; found if left out.
        name: the argument's name, for messages.

    Raises:
        InputError: if model, guide and data do not fit together, or are of a kind that is not
            supported; the message names the site or argument.
    """
    batches = as_batches(data, name)
    densities = [_densities(model, guide, batch, unit_plate) for batch in batches]
    first = densities[0].layout
    if first.plate is None and len(batches) > 1:
        raise InputError(
            f"{name} has {len(batches)} batches, but the data are one joint unit (no plate holds "
            "every latent); pass all of it in one batch, as a tuple of arguments"
        )
    theta, phi = capture_pair(model, guide, batches[0])
    check_disjoint(theta, phi)
    return Problem(model, guide, batches, densities, theta, phi)


def layout_of(
    model: PyroFunction, guide: PyroFunction | None, batch: Batch, unit_plate: str | None
) -> tuple[UnitLayout, Trace]:
    """The layout of units for one call, and the model's trace it was read from."""
    guide_trace = None
    with poutine.block():
        if guide is not None:
            with reporting("guide"), refuse_training_modes("guide"):
                guide_trace = poutine.trace(guide).get_trace(*batch.args, **batch.kwargs)
        replayed = model if guide_trace is None else poutine.replay(model, trace=guide_trace)
        with reporting("model"), refuse_training_modes("model"):
            trace = poutine.trace(replayed).get_trace(*batch.args, **batch.kwargs)
            trace.compute_log_prob()
    latents = latent_sites(trace)
    check_latents(latents)
    proposed = [] if guide_trace is None else latent_sites(guide_trace)
    if guide is not None and guide_trace is not None:
        check_sites_match(latents, proposed)
        again = latent_sites(trace_plain(guide, batch))
        check_density(latents, proposed, again, observed_sites(guide_trace))
    return unit_layout(latents, observed_sites(trace), proposed, unit_plate), trace


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

    return capture_parameters(replayed, batch), capture_parameters(guide, batch)


def _densities(
    model: PyroFunction, guide: PyroFunction | None, batch: Batch, unit_plate: str | None
) -> UnitDensities:
    layout, trace = layout_of(model, guide, batch, unit_plate)
    sites = []
    for site in latent_sites(trace):
        batch_shape = tuple(site["fn"].batch_shape)
        padded = (1,) * (layout.max_plate_nesting - len(batch_shape)) + batch_shape
        sites.append(LatentSite(site["name"], padded, len(batch_shape), unconstrained_shape(site)))
    values = [site["value"] for site in latent_sites(trace)]
    _check_same(trace)
    densities = UnitDensities(
        model=model,
        guide=guide,
        batch=batch,
        layout=layout,
        sites=tuple(sites),
        num_units=1 if layout.dim is None else sites[0].batch_shape[layout.dim],
        dtype=values[0].dtype,
        device=values[0].device,
    )
    with torch.no_grad(), reporting("model or guide", particles=True):
        draw = densities.draw_prior if guide is None else densities.draw_guide
        latents = draw(_NUM_CHECKED).latents
        check_finite(densities, latents)
        check_deterministic(densities, latents)
        check_deterministic_guide(densities)
        check_particles(densities, latents)
        check_independent(densities, latents)
    return densities


def _check_same(trace: Trace) -> None:
    found = {s["name"]: (s["value"].dtype, s["value"].device) for s in latent_sites(trace)}
    if len(set(found.values())) > 1:
        raise InputError(
            f"the latents differ in dtype or device, {found}; bring them to one of each"
        )
