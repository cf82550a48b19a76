"""Model and guide run together: the per-unit terms that objectives are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyro import poutine
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

__all__ = ["PairTerms", "pair_terms"]


class PairTerms(NamedTuple):
    """One joint run of guide and model.

    Attributes:
        values: the guide's random draws by site, without those that are functions of others.
        event_dims: the number of event dims of each.
        log_model: log p(v, h; θ) at the draws, shape ``(particle, unit)``.
        log_guide: log q(h) at the draws, shape ``(particle, unit)``.
        scale: the factor from subsampling or ``poutine.scale``, which is not in the densities.
    """

    values: dict[str, Tensor]
    event_dims: dict[str, int]
    log_model: Tensor
    log_guide: Tensor
    scale: float


def pair_terms(
    model: PyroFunction,
    guide: PyroFunction,
    batch: Batch,
    layout: UnitLayout,
    num_particles: int,
    values: Mapping[str, Tensor] | None = None,
) -> PairTerms:
    """Run the guide, at fresh draws or at given values, and the model on what it drew.

    Densities are on the supports themselves: Jacobians cancel in log p − log q.

    Raises:
        InputError: if a site of the guide cannot be reparameterised.
    """
    fix = [] if values is None else [FixedSites(values)]
    guide_trace = trace_particles(guide, batch, layout, num_particles, *fix)
    replay = poutine.replay(trace=guide_trace)
    model_trace = trace_particles(model, batch, layout, num_particles, replay)
    proposed, latents = latent_sites(guide_trace), latent_sites(model_trace)
    random = [site for site in proposed if not is_point_mass(site)]
    for site in random:
        if not site["fn"].has_rsample:
            raise InputError(
                f"the guide's site {site['name']!r} ({type(site['fn']).__name__}) cannot be "
                "reparameterised, which the gradient for the guide needs"
            )
    num_units = _num_units(model_trace, layout)

    def total(sites: list[dict[str, object]]) -> Tensor:
        terms = [layout.by_unit(site_log_prob(s), num_particles, num_units) for s in sites]
        return sum(terms[1:], start=terms[0])

    return PairTerms(
        values={site["name"]: site["value"] for site in random},
        event_dims={site["name"]: site["fn"].event_dim for site in random},
        log_model=total([*latents, *observed_sites(model_trace)]),
        log_guide=total(proposed),
        scale=site_scale(latents[0]),
    )


def _num_units(trace: Trace, layout: UnitLayout) -> int:
    frames = latent_sites(trace)[0]["cond_indep_stack"]
    sizes: list[int] = [frame.size for frame in frames if frame.name == layout.plate]
    return sizes[0] if sizes else 1
