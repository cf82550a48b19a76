"""One run of the model for many particles, as plain tensors per particle and unit."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.enumeration import Factor
from pyro_vharm.model.guide_runs import GuideRun
from pyro_vharm.model.sites import (
    Mask,
    Site,
    is_in_plate,
    latent_sites,
    log_prob_at,
    observed_sites,
    own_log_prob,
)
from pyro_vharm.model.structure import Structure
from pyro_vharm.model.tracing import FixedSites, PyroFunction, UnconstrainedSites, trace_call
from pyro_vharm.model.unit_sums import UnitSums, count_units
from pyro_vharm.model.units import site_scale

__all__ = ["ModelRun", "run_model", "run_model_at"]


class ModelRun(NamedTuple):
    """One run of the model for many particles.

    Attributes:
        log_prior: log density of the latents, ``(particle, unit)``: on the unconstrained scale
            where they were given there, else on the supports.
        log_joint: the same with the observed sites.
        values: the latents on their supports, ``(particle, *plates, *event)``.
        unconstrained: the continuous latents on the unconstrained scale.
        log_abs_det: log |dz/du| of the transforms to the supports of the continuous latents, if
            they were recorded, ``(particle, unit)``.
        scale: the factor from subsampling or ``poutine.scale``, which is not in the densities.
    """

    log_prior: Tensor
    log_joint: Tensor
    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    log_abs_det: Tensor
    scale: float


def run_model(
    model: PyroFunction,
    batch: Batch,
    structure: Structure,
    num_particles: int,
    *,
    values: Mapping[str, Tensor] | None = None,
    unconstrained: Mapping[str, Tensor] | None = None,
    masks: Mapping[str, Mask] | None = None,
    summed: Collection[str] = (),
    record: bool = False,
    only_latents: bool = False,
) -> ModelRun:
    """Run the model, at given values of its latents; those that are not given are drawn.

    A masked-out element of a latent counts with its own normalised prior, unless `masks` drops
    it: then it has no part in the density, as it has none in the guide's.

    Args:
        model: the model.
        batch: what to call it with.
        structure: its sites.
        num_particles: how many particles.
        values: latents on their supports.
        unconstrained: continuous latents on the unconstrained scale; densities then carry the
            Jacobian of the transform.
        masks: the guide's masks by site.
        summed: discrete latents to sum out.
        record: find the unconstrained values of the latents that were not given there, and the
            log Jacobians of all.
        only_latents: leave the observed sites out of the densities.
    """
    layout, masks = structure.layout, masks or {}
    recorded = structure.continuous if record or unconstrained else ()
    seen: dict[str, Any] = {}

    def run(given: dict[str, dict[str, Tensor]], count: int | None) -> Any:
        values, free = given["values"], given["unconstrained"]
        if count is None:
            values, free = structure.unpad(values), structure.unpad(free, unconstrained=True)
        substitute = UnconstrainedSites(recorded, free)
        trace = trace_call(
            model,
            batch,
            *([FixedSites(values)] if values else []),
            *([substitute] if recorded else []),
            particles=layout.particle_plate(count),
            summed=summed,
            first_free_dim=layout.particle_dim - (count is not None),
        )
        latents = latent_sites(trace)
        _check_known(latents, structure)
        sums = UnitSums(trace, layout, count, count_units(trace, layout))
        seen["scale"] = site_scale(latents[0]) if latents else 1.0
        share = 0.0 if only_latents else _declared_share(sums, structure, seen["scale"])
        prior = [_with_jacobian(s, masks.get(s["name"]), substitute) for s in latents]
        likelihood = [] if only_latents else _observed(trace, structure, declared=False)
        log_prior, log_joint = _prior_and_joint(sums, prior, likelihood, bool(summed))
        volumes = _recorded_volumes(sums, substitute, record)
        volume = sums.product(volumes) if volumes else torch.zeros_like(log_prior)
        drawn = {s["name"]: s["value"] for s in latents if s["name"] not in summed}
        found = substitute.values
        if count is not None:
            return log_prior, log_joint + share, drawn, found, volume
        drawn, found = structure.pad(drawn), structure.pad(found, unconstrained=True)
        return log_prior[0], (log_joint + share)[0], drawn, found, volume[0]

    given = {"values": dict(values or {}), "unconstrained": dict(unconstrained or {})}
    return ModelRun(*structure.model_runs(run, given, num_particles), **seen)


def run_model_at(
    model: PyroFunction,
    batch: Batch,
    structure: Structure,
    num_particles: int,
    drawn: GuideRun,
    *,
    record: bool = False,
) -> ModelRun:
    """`run_model` at what the guide drew, under its masks, latents without a guide site summed."""
    return run_model(
        model,
        batch,
        structure,
        num_particles,
        values=drawn.values,
        masks=drawn.masks,
        summed=structure.unguided,
        record=record,
    )


def _prior_and_joint(
    sums: UnitSums, prior: list[Factor], likelihood: list[Factor], enumerated: bool
) -> tuple[Tensor, Tensor]:
    """Log prior and log joint, ``(particle, unit)``."""
    if enumerated:
        sums.trace.symbolize_dims()
        return sums.summed_out(prior), sums.summed_out([*prior, *likelihood])
    log_prior = sums.product(prior)
    if not likelihood:
        return log_prior, log_prior
    return log_prior, log_prior + sums.product(likelihood)


def _observed(trace: Trace, structure: Structure, *, declared: bool) -> list[Factor]:
    """The observed sites that count as parameters, or those that do not."""
    return [
        (site, own_log_prob(site))
        for site in observed_sites(trace)
        if (site["name"] in structure.declared) == declared
    ]


def _with_jacobian(site: Site, mask: Mask, substitute: UnconstrainedSites) -> Factor:
    log_prob, name = log_prob_at(site, mask), site["name"]
    if name in substitute.given:
        log_prob = log_prob + substitute.log_abs_det[name]
    return site, log_prob


def _declared_share(sums: UnitSums, structure: Structure, scale: float) -> Tensor | float:
    """The log prior of sites that count as parameters: a unit's own, and its share of others'."""
    if not structure.declared:
        return 0.0
    factors = _observed(sums.trace, structure, declared=True)
    units = structure.declared_units or sums.num_units * scale
    own = [f for f in factors if is_in_plate(f[0], structure.layout.plate)]
    shared = [f for f in factors if not is_in_plate(f[0], structure.layout.plate)]
    joint = sums._replace(layout=structure.as_joint().layout, num_units=1)
    share = joint.product(shared) / units
    return share if math.isinf(units) else share + sums.product(own)


def _recorded_volumes(sums: UnitSums, substitute: UnconstrainedSites, record: bool) -> list[Factor]:
    """Log Jacobians of the latents, of those that were given unconstrained only if asked for."""
    depth = sums.layout.max_plate_nesting + (sums.num_particles is not None)
    volumes = []
    for name, volume in substitute.log_abs_det.items():
        if name in substitute.given and not record:
            continue
        if volume.dim() > depth:
            raise InputError(
                f"the support of {name!r} depends on a discrete latent that is summed out, so that "
                "a draw has no one place on the unconstrained scale; give the discrete latent a "
                "site in the guide, or leave the guide out"
            )
        volumes.append((sums.trace.nodes[name], volume))
    return volumes


def _check_known(latents: list[Site], structure: Structure) -> None:
    known = {*structure.continuous, *structure.discrete}
    found = {site["name"] for site in latents}
    if found != known:
        raise InputError(
            f"the model has the latents {sorted(found)} in this call and had {sorted(known)} in an "
            "earlier one of the same kind; make what decides about them an argument that is there "
            "or None, or a number"
        )
