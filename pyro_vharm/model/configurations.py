"""Every joint value of the discrete latents of a unit, and its log density."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.model_runs import run_model
from pyro_vharm.model.sites import Site, is_discrete, latent_sites
from pyro_vharm.model.tracing import trace_call

__all__ = ["MOST_CONFIGURATIONS", "Configurations", "list_configurations"]

MOST_CONFIGURATIONS = 4096


@dataclass(frozen=True)
class Configurations:
    """All joint values of the discrete latents of one unit.

    Attributes:
        labels: of the scalar latents ("elements") of a unit, like ``z`` or ``item[2]``.
        codes: which value of its support each element takes, shape ``(configuration, element)``.
        values: site → value in each configuration, the same for every unit, of shape
            ``(configuration, *plates, *event)``.
    """

    labels: tuple[str, ...]
    codes: Tensor
    values: Mapping[str, Tensor]

    def log_joint(self, densities: UnitDensities, latents: Tensor) -> Tensor:
        """Log p(v, h, z; θ) at packed latents, ``(particle, configuration, unit)``."""
        count, number = len(latents), len(self.codes)
        run = run_model(
            densities.model,
            densities.batch,
            densities.structure,
            count * number,
            values={
                name: value.repeat(count, *[1] * (value.dim() - 1))
                for name, value in self.values.items()
            },
            unconstrained=densities.unpack(latents.repeat_interleave(number, 0)),
        )
        per_unit = run.log_joint[:, : densities.num_units]
        return per_unit.reshape(count, number, -1)


def list_configurations(densities: UnitDensities) -> Configurations | None:
    """The configurations of the discrete latents; ``None`` if there are more than 4096.

    Raises:
        InputError: if a support cannot be listed.
    """
    with torch.no_grad():
        trace = trace_call(densities.model, densities.batch)
    sites = [site for site in latent_sites(trace) if is_discrete(site)]
    supports = [_support(site) for site in sites]
    shapes = [_shape_in_unit(densities, site) for site in sites]
    sizes = [math.prod(shape) for shape in shapes]
    elements = [len(one) for one, size in zip(supports, sizes, strict=True) for _ in range(size)]
    if math.prod(elements) > MOST_CONFIGURATIONS:
        return None
    ranges = [torch.arange(count, device=densities.device) for count in elements]
    codes = torch.cartesian_prod(*ranges).reshape(-1, len(elements))
    values: dict[str, Tensor] = {}
    labels: list[str] = []
    for site, support, shape, own in zip(
        sites, supports, shapes, codes.split(sizes, 1), strict=True
    ):
        event_shape = support.shape[1:]
        value = support[own].reshape(len(codes), *shape, *event_shape)
        full = (len(codes), *_padded(densities, site), *event_shape)
        values[site["name"]] = value.expand(full)
        labels += _labels(site["name"], math.prod(shape))
    return Configurations(tuple(labels), codes, values)


def _labels(name: str, size: int) -> Sequence[str]:
    return [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]


def _support(site: Site) -> Tensor:
    """Every value of one element, ``(value, *event)``."""
    fn = site["fn"]
    try:
        support: Tensor = fn.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise InputError(
            f"the support of the discrete latent {site['name']!r} ({type(fn).__name__}) cannot be "
            "listed, as it has no end or differs between units; use a Categorical"
        ) from error
    return support.reshape(len(support), *fn.event_shape)


def _padded(densities: UnitDensities, site: Site) -> tuple[int, ...]:
    """The site's batch shape over all plates, 1 where it is outside of one."""
    batch_shape = tuple(site["fn"].batch_shape)
    return (1,) * (densities.layout.max_plate_nesting - len(batch_shape)) + batch_shape


def _shape_in_unit(densities: UnitDensities, site: Site) -> list[int]:
    """The same within one unit."""
    shape = list(_padded(densities, site))
    if densities.layout.dim is not None:
        shape[densities.layout.dim] = 1
    return shape
