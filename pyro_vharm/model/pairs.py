"""Model and guide run together: the per-unit terms that objectives are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.tracing import (
    FixedSites,
    PyroFunction,
    is_point_mass,
    latent_sites,
    observed_sites,
    site_log_prob,
    trace_particles,
)
from pyro_vharm.model.units import UnitLayout, site_scale

__all__ = ["GuideTerms", "ModelTerms", "run_guide", "run_model"]

type Site = dict[str, Any]


class GuideTerms(NamedTuple):
    """One run of the guide for many particles.

    Attributes:
        values: its random draws by site, without those that are functions of others.
        event_dims: the number of event dims of each.
        latents: the values of all its sites, for the model.
        latent_event_dims: the number of event dims of each.
        log_guide: log q(h) at the draws, on the supports, shape ``(particle, unit)``.
    """

    values: dict[str, Tensor]
    event_dims: dict[str, int]
    latents: dict[str, Tensor]
    latent_event_dims: dict[str, int]
    log_guide: Tensor


class ModelTerms(NamedTuple):
    """One run of the model at given latents.

    Attributes:
        log_joint: log p(v, h; θ) on the supports, shape ``(particle, unit)``.
        scale: the factor from subsampling or ``poutine.scale``, which is not in the density.
    """

    log_joint: Tensor
    scale: float


def run_guide(
    guide: PyroFunction,
    batch: Batch,
    layout: UnitLayout,
    num_particles: int,
    values: Mapping[str, Tensor] | None = None,
) -> GuideTerms:
    """Run the guide, at fresh draws or at given values of its random sites.

    Raises:
        InputError: if a site of the guide cannot be reparameterised.
    """
    fix = [] if values is None else [FixedSites(values)]
    trace = trace_particles(guide, batch, layout, num_particles, *fix)
    sites = latent_sites(trace)
    random = [site for site in sites if not is_point_mass(site)]
    for site in random:
        if not site["fn"].has_rsample:
            raise InputError(
                f"the guide's site {site['name']!r} ({type(site['fn']).__name__}) cannot be "
                "reparameterised, which the gradient for the guide needs"
            )
    return GuideTerms(
        values={site["name"]: site["value"] for site in random},
        event_dims={site["name"]: site["fn"].event_dim for site in random},
        latents={site["name"]: site["value"] for site in sites},
        latent_event_dims={site["name"]: site["fn"].event_dim for site in sites},
        log_guide=_sum_sites(sites, trace, layout, num_particles),
    )


def run_model(
    model: PyroFunction,
    batch: Batch,
    layout: UnitLayout,
    num_particles: int,
    latents: Mapping[str, Tensor],
) -> ModelTerms:
    """Run the model at given values of its latent sites."""
    trace = trace_particles(model, batch, layout, num_particles, FixedSites(latents))
    sites = [*latent_sites(trace), *observed_sites(trace)]
    return ModelTerms(_sum_sites(sites, trace, layout, num_particles), site_scale(sites[0]))


def _sum_sites(sites: list[Site], trace: Trace, layout: UnitLayout, num_particles: int) -> Tensor:
    num_units = _num_units(trace, layout)
    terms = [layout.by_unit(site_log_prob(s), num_particles, num_units) for s in sites]
    return sum(terms[1:], start=terms[0])


def _num_units(trace: Trace, layout: UnitLayout) -> int:
    frames = latent_sites(trace)[0]["cond_indep_stack"]
    sizes: list[int] = [frame.size for frame in frames if frame.name == layout.plate]
    return sizes[0] if sizes else 1
