"""Runs of a model or guide for many particles, as plain tensors per particle and unit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.enumeration import Factor, sum_out
from pyro_vharm.model.sites import (
    Mask,
    Site,
    is_point_mass,
    latent_sites,
    log_prob_at,
    masked_where,
    observed_sites,
    own_log_prob,
)
from pyro_vharm.model.structure import Structure
from pyro_vharm.model.tracing import (
    FixedSites,
    PyroFunction,
    UnconstrainedSites,
    trace_call,
)
from pyro_vharm.model.units import UnitLayout, site_scale

__all__ = ["GuideRun", "ModelRun", "run_guide", "run_model"]

_PARTICLES = "_particles"


class GuideRun(NamedTuple):
    """One run of the guide for many particles.

    Attributes:
        values: the values of all its sites on their supports, ``(particle, *plates, *event)``.
        random: the sites among them that are drawn, not computed from others.
        log_guide: log q(h) on the supports, ``(particle, unit)``; ``(particle, 1)`` where it can
            be had in total only.
        masks: the masks of its sites, which the ELBO puts on the model's as well.
        irreproducible: sites whose draws cannot be differentiated in their parameters.
    """

    values: dict[str, Tensor]
    random: tuple[str, ...]
    log_guide: Tensor
    masks: dict[str, Mask]
    irreproducible: tuple[str, ...]


class ModelRun(NamedTuple):
    """One run of the model for many particles.

    Attributes:
        log_prior: log density of the latents, ``(particle, unit)``: on the unconstrained scale
            where they were given there, else on the supports.
        log_joint: the same with the observed sites.
        values: the latents on their supports, ``(particle, *plates, *event)``.
        unconstrained: the continuous latents on the unconstrained scale.
        log_abs_det: log |dz/du| of the transforms to the supports of latents that were recorded,
            ``(particle, unit)``.
        scale: the factor from subsampling or ``poutine.scale``, which is not in the densities.
    """

    log_prior: Tensor
    log_joint: Tensor
    values: dict[str, Tensor]
    unconstrained: dict[str, Tensor]
    log_abs_det: Tensor
    scale: float


def run_guide(
    guide: PyroFunction,
    batch: Batch,
    structure: Structure,
    num_particles: int,
    values: Mapping[str, Tensor] | None = None,
) -> GuideRun:
    """Run the guide, at fresh draws or at given values of its random sites."""
    layout = structure.layout if structure.per_unit else structure.as_joint().layout
    seen: dict[str, Any] = {}

    def run(given: dict[str, Tensor], count: int | None) -> Any:
        fix = FixedSites(given if count is not None else structure.unpad(given))
        trace = trace_call(guide, batch, fix, particles=_plate(layout, count))
        sites = latent_sites(trace)
        random = [site for site in sites if not is_point_mass(site)]
        seen["random"] = tuple(site["name"] for site in random)
        seen["irreproducible"] = tuple(s["name"] for s in random if not s["fn"].has_rsample)
        seen["masks"] = {site["name"]: masked_where(site) for site in sites}
        found = {site["name"]: site["value"] for site in sites}
        factors = [(site, own_log_prob(site)) for site in sites]
        log_guide = _sum_factors(factors, layout, count, _num_units(trace, layout))
        if count is None:
            return structure.pad(found), log_guide[0]
        return structure.spread(found, count), log_guide

    found, log_guide = structure.guide_runs(run, dict(values or {}), num_particles)
    return GuideRun(found, log_guide=log_guide, **seen)


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
        record: find the unconstrained values of the latents that were not given there.
    """
    layout, masks = structure.layout, masks or {}
    names = structure.continuous if record or unconstrained else ()
    seen: dict[str, Any] = {}

    def run(given: dict[str, dict[str, Tensor]], count: int | None) -> Any:
        values, free = given["values"], given["unconstrained"]
        if count is None:
            values, free = structure.unpad(values), structure.unpad(free, unconstrained=True)
        substitute = UnconstrainedSites(names, free)
        trace = trace_call(
            model,
            batch,
            *([FixedSites(values)] if values else []),
            *([substitute] if names else []),
            particles=_plate(layout, count),
            summed=summed,
            first_free_dim=layout.particle_dim - (count is not None),
        )
        num_units = _num_units(trace, layout)
        latents = latent_sites(trace)
        _check_known(latents, structure)
        seen["scale"] = site_scale(latents[0]) if latents else 1.0
        prior = [_with_jacobian(site, masks.get(site["name"]), substitute) for site in latents]
        likelihood = [
            (site, own_log_prob(site))
            for site in observed_sites(trace)
            if site["name"] not in structure.declared
        ]
        total = _Total(trace, layout, count, num_units, bool(summed))
        log_prior, log_joint = total.both(prior, likelihood)
        log_joint = log_joint + _declared_share(trace, structure, count, num_units * seen["scale"])
        volumes = _recorded_volumes(trace, substitute, layout, count)
        drawn = {s["name"]: s["value"] for s in latents if s["name"] not in summed}
        result = (
            log_prior,
            log_joint,
            drawn,
            substitute.values,
            _sum_factors(volumes, layout, count, num_units).to(log_prior),
        )
        return result if count is not None else _one(structure, *result)

    given = {"values": dict(values or {}), "unconstrained": dict(unconstrained or {})}
    return ModelRun(*structure.model_runs(run, given, num_particles), **seen)


def _recorded_volumes(
    trace: Trace, substitute: UnconstrainedSites, layout: UnitLayout, count: int | None
) -> list[Factor]:
    """Log Jacobians of the latents whose unconstrained values were recorded."""
    volumes = []
    for name, volume in substitute.log_abs_det.items():
        if name in substitute.given:
            continue
        if volume.dim() > layout.max_plate_nesting + (count is not None):
            raise InputError(
                f"the support of {name!r} depends on a discrete latent that is summed out, so that "
                "a draw has no one place on the unconstrained scale; give the discrete latent a "
                "site in the guide, or leave the guide out"
            )
        volumes.append((trace.nodes[name], volume))
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


def _one(
    structure: Structure,
    log_prior: Tensor,
    log_joint: Tensor,
    values: dict[str, Tensor],
    unconstrained: dict[str, Tensor],
    log_abs_det: Tensor,
) -> Any:
    """What a run for one particle returns, without its particle dim."""
    padded = structure.pad(unconstrained, unconstrained=True)
    return log_prior[0], log_joint[0], structure.pad(values), padded, log_abs_det[0]


class _Total(NamedTuple):
    """Sums of factors of one trace."""

    trace: Trace
    layout: UnitLayout
    num_particles: int | None
    num_units: int
    enumerated: bool

    def both(self, prior: list[Factor], likelihood: list[Factor]) -> tuple[Tensor, Tensor]:
        """Log prior and log joint, ``(particle, unit)``."""
        if not self.enumerated:
            log_prior = _sum_factors(prior, self.layout, self.num_particles, self.num_units)
            rest = _sum_factors(likelihood, self.layout, self.num_particles, self.num_units)
            return log_prior, log_prior + rest.to(log_prior)
        self.trace.symbolize_dims()
        return self._summed(prior), self._summed([*prior, *likelihood])

    def _summed(self, factors: list[Factor]) -> Tensor:
        log_prob = sum_out(self.trace, factors, self.layout, _PARTICLES)
        return self.layout.by_unit(log_prob, self.num_particles or 1, self.num_units)


def _with_jacobian(site: Any, mask: Mask, substitute: UnconstrainedSites) -> Factor:
    log_prob = log_prob_at(site, mask)
    name = site["name"]
    if name in substitute.given:
        log_prob = log_prob + substitute.log_abs_det[name]
    return site, log_prob


def _declared_share(
    trace: Trace, structure: Structure, count: int | None, num_stood_for: float
) -> Tensor | float:
    """One unit's share of the log prior of sites that count as parameters."""
    if not structure.declared:
        return 0.0
    layout = structure.as_joint().layout
    factors = [
        (site, own_log_prob(site))
        for site in observed_sites(trace)
        if site["name"] in structure.declared
    ]
    units = structure.declared_units or num_stood_for
    return _sum_factors(factors, layout, count, 1) / units


def _plate(layout: UnitLayout, count: int | None) -> tuple[int, int] | None:
    return None if count is None else (count, layout.particle_dim)


def _sum_factors(
    factors: list[Factor], layout: UnitLayout, count: int | None, num_units: int
) -> Tensor:
    terms = [layout.by_unit(log_prob, count or 1, num_units) for _, log_prob in factors]
    return sum(terms[1:], start=terms[0]) if terms else torch.zeros(count or 1, num_units)


def _num_units(trace: Trace, layout: UnitLayout) -> int:
    if layout.plate is None:
        return 1
    for site in trace.nodes.values():
        if site["type"] == "sample":
            for frame in site["cond_indep_stack"]:
                if frame.name == layout.plate:
                    size: int = frame.size
                    return size
    return 1
