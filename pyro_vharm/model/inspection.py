"""One plain run of a model and its guide, and the structure read off it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace

from pyro_vharm.model.data import Batch, with_subsample
from pyro_vharm.model.sites import (
    Site,
    fixed_sites,
    is_discrete,
    is_in_plate,
    is_point_mass,
    latent_sites,
    observed_sites,
    own_log_prob,
    subsample_sites,
    unconstrained_shape,
)
from pyro_vharm.model.structure import GuideDensity, SiteDims, Structure
from pyro_vharm.model.tracing import FixedSites, PyroFunction, trace_call
from pyro_vharm.model.units import unit_layout
from pyro_vharm.model.validation import (
    check_density,
    check_latents,
    check_masks,
    check_sites_match,
    refuse_training_modes,
    reporting,
)

__all__ = ["PlainRuns", "inspect_pair", "run_plainly"]


class PlainRuns(NamedTuple):
    """One run of each as the user would run them, the model at the guide's values.

    Attributes:
        model: the model's trace, with log densities.
        guide: the guide's, ``None`` without one.
    """

    model: Trace
    guide: Trace | None


def run_plainly(model: PyroFunction, guide: PyroFunction | None, batch: Batch) -> PlainRuns:
    """Run the guide, then the model at its values, with Pyro's own validation.

    Raises:
        InputError: if one of them raises, or a module that changes by being run is in train mode.
    """
    guide_trace, values = None, dict(batch.subsample)
    with poutine.block():
        if guide is not None:
            with reporting("guide"), refuse_training_modes("guide"):
                guide_trace = _trace(guide, batch, values)
            values = {
                name: site["value"]
                for name, site in guide_trace.nodes.items()
                if site["type"] == "sample" and not site["is_observed"]
            }
        with reporting("model"), refuse_training_modes("model"):
            trace = _trace(model, batch, values)
            trace.compute_log_prob()
    return PlainRuns(trace, guide_trace)


def _trace(function: PyroFunction, batch: Batch, values: dict[str, Any]) -> Trace:
    tracer = poutine.trace()
    with tracer, FixedSites(values):
        function(*batch.args, **batch.kwargs)
    return tracer.trace


def inspect_pair(
    model: PyroFunction,
    guide: PyroFunction | None,
    batch: Batch,
    unit_plate: str | None,
    declared: Collection[str] = (),
) -> tuple[Structure, PlainRuns]:
    """The structure of a model and guide on one batch, and the runs it was read from.

    Raises:
        InputError: if a site is of a kind that is not supported, or they do not fit together.
    """
    runs = run_plainly(model, guide, batch)
    trace, guide_trace = runs.model, runs.guide
    latents = latent_sites(trace)
    observed = [site for site in observed_sites(trace) if site["name"] not in declared]
    points = [site for site in observed_sites(trace) if site["name"] in declared]
    proposed = [] if guide_trace is None else latent_sites(guide_trace)
    check_latents(latents, {site["name"] for site in proposed})
    density, learned = GuideDensity.PER_UNIT, False
    check_masks(latents, proposed)
    if guide is not None and guide_trace is not None:
        check_sites_match(latents, proposed)
        indices = {name: site["value"] for name, site in subsample_sites(guide_trace).items()}
        held = with_subsample(batch, indices)
        fixed = fixed_sites(guide_trace, trace_call(guide, held))
        check_density(latents, proposed, fixed, observed_sites(guide_trace))
        density = GuideDensity.NONE if fixed else GuideDensity.PER_UNIT
        learned = _has_learned_transforms(guide, held, proposed)
    layout = unit_layout(latents, observed, proposed, unit_plate, points)
    split = layout.plate is None or all(is_in_plate(site, layout.plate) for site in proposed)
    if density is GuideDensity.PER_UNIT and not split:
        density = GuideDensity.TOTAL
    names = tuple(site["name"] for site in latents if not is_discrete(site))
    discrete = {site["name"] for site in latents if is_discrete(site)}
    guided = discrete & {site["name"] for site in proposed}
    structure = Structure(
        layout=layout,
        dims={**_dims(proposed), **_dims(latents, set(names))},
        continuous=names,
        unguided=frozenset(discrete - guided),
        guided=frozenset(guided),
        guide_density=density,
        learned_transforms=learned,
        subsampled=frozenset(subsample_sites(trace)),
        declared=frozenset(declared),
    )
    return structure, runs


def _has_learned_transforms(guide: PyroFunction, batch: Batch, sites: Sequence[Site]) -> bool:
    """Whether, at fixed draws, what is computed from them still depends on parameters."""
    draws = {s["name"]: s["value"].detach() for s in sites if not is_point_mass(s)}
    with torch.enable_grad():
        trace = trace_call(guide, batch, FixedSites(draws))
        return any(
            site["value"].requires_grad or own_log_prob(site).requires_grad
            for site in latent_sites(trace)
            if is_point_mass(site)
        )


def _dims(sites: Sequence[Site], continuous: Collection[str] = ()) -> dict[str, SiteDims]:
    dims = {}
    for site in sites:
        fn, name = site["fn"], site["name"]
        free = len(unconstrained_shape(site)) if name in continuous else fn.event_dim
        dims[name] = SiteDims(len(fn.batch_shape), fn.event_dim, free)
    return dims
