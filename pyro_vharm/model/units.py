"""Units: the independent blocks of latents given θ, and where they sit in a tensor's batch dims."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_vharm.errors import InputError, JointUnitWarning
from pyro_vharm.model.sites import Site

__all__ = ["UnitLayout", "find_unit_plate", "site_scale", "unit_layout"]


@dataclass(frozen=True)
class UnitLayout:
    """Which batch dim counts units, and how deep the plates of model and guide nest.

    Under an outermost plate of particles, a site has batch dims ``(particle, *plates)`` with
    `max_plate_nesting` plate dims, of which the one at `dim` counts units.

    Attributes:
        plate: name of the unit plate, ``None`` for one joint unit.
        dim: its batch dim (negative), ``None`` for one joint unit.
        max_plate_nesting: depth of the plates, without particles.
    """

    plate: str | None
    dim: int | None
    max_plate_nesting: int

    @property
    def particle_dim(self) -> int:
        """The batch dim for the plate of particles."""
        return -1 - self.max_plate_nesting

    def particle_plate(self, num_particles: int | None) -> tuple[int, int] | None:
        """Number and batch dim of the plate of particles; ``None`` without one."""
        return None if num_particles is None else (num_particles, self.particle_dim)

    def by_unit(self, log_prob: Tensor, num_particles: int, num_units: int) -> Tensor:
        """Sum a log density over every batch dim but particle and unit.

        Args:
            log_prob: batch dims as in the class docstring; missing ones are broadcast.
            num_particles: the size of the particle dim.
            num_units: the size of the unit dim.

        Returns:
            shape ``(particle, unit)``.

        Raises:
            InputError: if there are batch dims beyond the plates.
        """
        missing = self.max_plate_nesting + 1 - log_prob.dim()
        if missing < 0:
            raise InputError(
                f"a log density has batch shape {tuple(log_prob.shape)} where plates are nested "
                f"{self.max_plate_nesting} deep: a site is broadcast to batch dims that belong to "
                "no plate, often because a latent's batch dims were not kept apart from its event "
                "dims; index event dims from the right"
            )
        full = log_prob.reshape((1,) * missing + log_prob.shape)
        full = self.unit_second(full)
        full = full.expand(num_particles, num_units, *full.shape[2:])
        if full.dim() == 2:
            return full
        return full.reshape(num_particles, num_units, -1).sum(-1)

    def unit_second(self, value: Tensor, event_dim: int = 0) -> Tensor:
        """Move the unit dim to position 1, ``(particle, unit, *other plates, *event)``."""
        if self.dim is None:
            return value.unsqueeze(1)
        return value.movedim(self.dim - event_dim, 1)

    def unit_in_place(self, value: Tensor, event_dim: int = 0) -> Tensor:
        """The inverse of `unit_second`."""
        if self.dim is None:
            return value.squeeze(1)
        return value.movedim(1, self.dim - event_dim)

    def over_site(self, weights: Tensor, event_dim: int) -> Tensor:
        """Reshape ``(particle, unit)`` so that it broadcasts against a site's value."""
        num_particles, num_units = weights.shape
        shape = [num_particles] + [1] * (self.max_plate_nesting + event_dim)
        if self.dim is not None:
            shape[self.dim - event_dim] = num_units
        return weights.reshape(shape)


def find_unit_plate(latents: Sequence[Site], observed: Sequence[Site]) -> str | None:
    """The outermost plate that holds every latent and observed site, if there is one.

    Warns:
        JointUnitWarning: if there are plates but none holds every site; it names what stood in
            the way.
    """
    sites = [*latents, *observed]
    plates = [{f.name: f.dim for f in s["cond_indep_stack"] if f.vectorized} for s in sites]
    common = set.intersection(*(set(p) for p in plates))
    if common:
        outermost: str = min(common, key=lambda name: plates[0][name])
        return outermost
    every = set().union(*plates)
    if every:
        outside = {
            name: [s["name"] for s, p in zip(sites, plates, strict=True) if name not in p]
            for name in sorted(every)
        }
        reasons = "; ".join(f"plate {name!r} misses {sites}" for name, sites in outside.items())
        warnings.warn(
            f"no plate holds every latent and observed site ({reasons}): the whole data set is "
            "one joint unit. Put the sites inside the plate if its elements are independent "
            "given the parameters.",
            JointUnitWarning,
            stacklevel=2,
        )
    return None


def unit_layout(
    latents: Sequence[Site],
    observed: Sequence[Site],
    guide_sites: Sequence[Site],
    unit_plate: str | None,
    declared: Sequence[Site] = (),
) -> UnitLayout:
    """Read the layout off one trace of the model and one of the guide.

    Args:
        latents: the model's latent sites.
        observed: the model's observed sites.
        guide_sites: the guide's sample sites; empty without a guide.
        unit_plate: the plate that the user names; found by `find_unit_plate` if ``None``.
        declared: sites that count as parameters: their plates only take up dims.

    Raises:
        InputError: if a site of the model lies outside the unit plate, or parts of the model are
            scaled differently.
    """
    sites = [*latents, *observed, *guide_sites]
    nesting = [-f.dim for s in (*sites, *declared) for f in s["cond_indep_stack"] if f.vectorized]
    plate = find_unit_plate(latents, observed) if unit_plate is None else unit_plate
    dim = None if plate is None else _unit_dim(plate, [*latents, *observed], guide_sites)
    inside = [s for s in guide_sites if plate is None or _plate_dim(s, plate) is not None]
    _check_scale([*latents, *observed, *inside], plate)
    return UnitLayout(plate, dim, max(nesting, default=0))


def _unit_dim(plate: str, model_sites: Sequence[Site], guide_sites: Sequence[Site]) -> int:
    """The batch dim of the unit plate, which every site must be in."""
    model_dims = {site["name"]: _plate_dim(site, plate) for site in model_sites}
    outside = [name for name, dim in model_dims.items() if dim is None]
    if outside:
        raise InputError(
            f"unit_plate={plate!r} does not hold the sites {outside}; leave unit_plate out to "
            "treat all the data as one joint unit, or move them into the plate"
        )
    guide_dims = {site["name"]: _plate_dim(site, plate) for site in guide_sites}
    dims = {dim for dim in (*model_dims.values(), *guide_dims.values()) if dim is not None}
    if len(dims) > 1:
        raise InputError(
            f"the unit plate {plate!r} has different dims at different sites: {model_dims} in the "
            f"model, {guide_dims} in the guide; give pyro.plate the same dim= everywhere"
        )
    return dims.pop()


def _plate_dim(site: Site, plate: str) -> int | None:
    return next((f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name == plate), None)


def site_scale(site: Site) -> float:
    """The factor on a site's log density from subsampling or ``poutine.scale``.

    Raises:
        InputError: if it differs between elements.
    """
    scale = site["scale"]
    if not isinstance(scale, Tensor):
        return float(scale)
    if bool(scale.min() != scale.max()):
        raise InputError(
            f"the site {site['name']!r} is scaled by another factor at each element (poutine.scale "
            "with a tensor), which changes what is learned; use one number, or mask elements"
        )
    return float(scale.max())


def _check_scale(sites: Sequence[Site], plate: str | None) -> None:
    scales = {site["name"]: site_scale(site) for site in sites}
    if len({round(scale, 9) for scale in scales.values()}) > 1:
        raise InputError(
            f"the sites are scaled differently, {scales}: poutine.scale on a part of the model, "
            "or subsampling of an inner plate, changes what is learned, so evidence per unit is "
            "not defined; scale the whole model and guide alike, or not at all"
        )
    scale = next(iter(scales.values()))
    if plate is None and scale != 1.0:
        raise InputError(
            f"the data are one joint unit but scaled by {scale:g}, by a plate that subsamples or "
            "by poutine.scale; one joint unit needs all its data in one call, and no scale"
        )
