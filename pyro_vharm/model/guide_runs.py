"""One run of the guide for many particles, as plain tensors per particle and unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vharm.model.data import Batch
from pyro_vharm.model.sites import (
    Mask,
    is_point_mass,
    latent_sites,
    masked_where,
    own_log_prob,
)
from pyro_vharm.model.structure import Structure
from pyro_vharm.model.tracing import FixedSites, PyroFunction, trace_call
from pyro_vharm.model.unit_sums import UnitSums, count_units

__all__ = ["GuideRun", "run_guide"]


class GuideRun(NamedTuple):
    """One run of the guide for many particles.

    Attributes:
        values: the values of all its sites on their supports, ``(particle, *plates, *event)``.
        random: the sites among them that are drawn, not computed from others.
        log_guide: log q(h) on the supports, ``(particle, unit)``; ``(particle, 1)`` where it can
            be had in total only.
        log_score: the part of it that sites in `irreproducible` have, of the same shape; 0 where
            there are none.
        masks: the masks of its sites, which the ELBO puts on the model's as well.
        irreproducible: sites whose draws cannot be differentiated in their parameters.
    """

    values: dict[str, Tensor]
    random: tuple[str, ...]
    log_guide: Tensor
    log_score: Tensor
    masks: dict[str, Mask]
    irreproducible: tuple[str, ...]


def run_guide(
    guide: PyroFunction,
    batch: Batch,
    structure: Structure,
    num_particles: int,
    values: Mapping[str, Tensor] | None = None,
) -> GuideRun:
    """Run the guide, at fresh draws or at given values of its random sites."""
    layout = structure.as_guide_splits().layout
    seen: dict[str, Any] = {}

    def run(given: dict[str, Tensor], count: int | None) -> Any:
        fix = FixedSites(given if count is not None else structure.unpad(given))
        trace = trace_call(guide, batch, fix, particles=layout.particle_plate(count))
        sites = latent_sites(trace)
        random = [site for site in sites if not is_point_mass(site)]
        seen["random"] = tuple(site["name"] for site in random)
        irreproducible = tuple(s["name"] for s in random if not s["fn"].has_rsample)
        seen["irreproducible"] = irreproducible
        seen["masks"] = {site["name"]: masked_where(site) for site in sites}
        found = {site["name"]: site["value"] for site in sites}
        factors = [(site, own_log_prob(site)) for site in sites]
        sums = UnitSums(trace, layout, count, count_units(trace, layout))
        log_guide = sums.product(factors)
        scored = [factor for factor in factors if factor[0]["name"] in irreproducible]
        log_score = sums.product(scored) if scored else torch.zeros_like(log_guide)
        if count is None:
            return structure.pad(found), log_guide[0], log_score[0]
        return structure.spread(found, count), log_guide, log_score

    found, log_guide, log_score = structure.guide_runs(run, dict(values or {}), num_particles)
    return GuideRun(found, log_guide=log_guide, log_score=log_score, **seen)
