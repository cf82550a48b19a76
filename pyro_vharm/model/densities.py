"""Plain functions of tensors for one batch: log p(v, h; θ) per unit, draws from prior and guide.

Latents are packed as ``(particle, unit, dim)`` on the unconstrained scale; densities carry the
Jacobian of the transform. Discrete latents are summed out. θ and φ are read live from the user's
callables, so that these functions are differentiable in both, and see every parameter update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vharm.model.data import Batch
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.model_runs import ModelRun, run_model, run_model_at
from pyro_vharm.model.structure import GuideDensity, Structure
from pyro_vharm.model.tracing import PyroFunction
from pyro_vharm.model.units import UnitLayout
from pyro_vharm.model.vectorising import by_loop, by_vmap

__all__ = ["DensityTerms", "Draws", "LatentSite", "UnitDensities"]


class DensityTerms(NamedTuple):
    """Prior and joint density on the unconstrained scale, each of shape ``(particle, unit)``.

    Attributes:
        log_prior: log p(h; θ).
        log_joint: log p(v, h; θ).
    """

    log_prior: Tensor
    log_joint: Tensor

    @property
    def log_likelihood(self) -> Tensor:
        """Log p(v | h; θ)."""
        return self.log_joint - self.log_prior


class Draws(NamedTuple):
    """Draws of the latents with their densities.

    Attributes:
        latents: continuous latents, ``(particle, unit, dim)``, unconstrained.
        log_joint: log p(v, h; θ) there, ``(particle, unit)``; at the drawn values of discrete
            latents that the guide draws too, others summed out.
        log_proposal: log density of what drew them, on the same scale, ``(particle, unit)``;
            ``(particle, 1)`` for a guide whose density can be had in total only.
    """

    latents: Tensor
    log_joint: Tensor
    log_proposal: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Log p(v, h; θ) − log q(h), of the shape of `log_proposal`."""
        if self.log_proposal.shape == self.log_joint.shape:
            return self.log_joint - self.log_proposal
        return self.log_joint.sum(1, keepdim=True) - self.log_proposal


@dataclass(frozen=True)
class LatentSite:
    """Where one continuous latent site lies in the packed latents.

    Attributes:
        name: the site.
        batch_shape: its plates' sizes, padded with 1 to the layout's nesting.
        event_shape: its event shape on the unconstrained scale.
    """

    name: str
    batch_shape: tuple[int, ...]
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class UnitDensities:
    """Densities of one batch of units under a model and, where there is one, a guide.

    Attributes:
        model: the Pyro model.
        guide: the Pyro guide, or ``None``.
        batch: the arguments to call them with.
        structure: the sites of both, and how to run them.
        sites: the model's continuous latent sites, in packing order.
        num_units: the number of units in the batch.
        dtype: the dtype of the latents.
        device: the device of the latents.
    """

    model: PyroFunction
    guide: PyroFunction | None
    batch: Batch
    structure: Structure
    sites: Sequence[LatentSite]
    num_units: int
    dtype: torch.dtype
    device: torch.device

    @property
    def layout(self) -> UnitLayout:
        """Which batch dim counts units."""
        return self.structure.layout

    @property
    def dim(self) -> int:
        """Number of unconstrained latent dimensions of one unit; 0 if all latents are discrete."""
        total = sum(
            torch.Size(site.batch_shape).numel() * torch.Size(site.event_shape).numel()
            for site in self.sites
        )
        return total // self._num_run

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the unconstrained dims of one unit, like ``h[0]``, or ``h`` where it has one."""
        labels: list[str] = []
        for site in self.sites:
            total = torch.Size(site.batch_shape).numel() * torch.Size(site.event_shape).numel()
            size = total // self._num_run
            labels += [site.name] if size == 1 else [f"{site.name}[{i}]" for i in range(size)]
        return tuple(labels)

    def affordable(self, least: int, most: int, elements: int) -> int:
        """How many particles, so that data and latents of all units have so many elements each."""
        leaves = pytree.tree_leaves((self.batch.args, dict(self.batch.kwargs)))
        sizes = [leaf.numel() for leaf in leaves if isinstance(leaf, Tensor)]
        size = max([self.num_units * max(self.dim, 1), *sizes])
        return min(max(elements // size, least), most)

    @property
    def has_guide_density(self) -> bool:
        """Whether there is a guide, and not one that holds latents as point masses."""
        return self.guide is not None and self.structure.guide_density is not GuideDensity.NONE

    def run_at(self, latents: Tensor, *, record: bool = False) -> ModelRun:
        """The model at packed latents ``(particle, unit, dim)``, discrete latents summed out.

        With `record`, `ModelRun.log_abs_det` is that of the latents' transforms to their supports.
        """
        return run_model(
            self.model,
            self.batch,
            self.structure,
            len(latents),
            unconstrained=self.unpack(latents),
            summed=self.structure.discrete,
            record=record,
        )

    def terms(self, latents: Tensor) -> DensityTerms:
        """Log prior and log joint at packed latents ``(particle, unit, dim)``."""
        run = self.run_at(latents)
        return DensityTerms(self.counted(run.log_prior), self.counted(run.log_joint))

    def log_joint(self, latents: Tensor) -> Tensor:
        """Log p(v, h; θ) at packed latents, shape ``(particle, unit)``."""
        return self.counted(self.run_at(latents).log_joint)

    def plain_log_joint(self, latents: Tensor) -> Tensor:
        """`log_joint` by one ordinary run of the model per particle: slow, and right by itself."""
        plain = replace(self.structure, model_runs=by_loop)
        return replace(self, structure=plain).log_joint(latents)

    def constrain(self, latents: Tensor) -> dict[str, Tensor]:
        """The continuous latents on their own supports, site → ``(particle, *plates, *event)``."""
        return self.run_at(latents).values

    def draw_latents(self, num_particles: int) -> Tensor:
        """Draws of the guide, or of the prior where there is no guide density.

        Prior draws of a model that `torch.vmap` runs are made one by one, as most distributions
        refuse to draw under it.
        """
        values, masks, structure = {}, {}, self.structure
        if self.has_guide_density:
            assert self.guide is not None
            drawn = run_guide(self.guide, self.batch, self.structure, num_particles)
            values, masks = drawn.values, drawn.masks
        elif structure.model_runs is by_vmap:
            structure = replace(structure, model_runs=by_loop)
        at = run_model(
            self.model,
            self.batch,
            structure,
            num_particles,
            values=values,
            masks=masks,
            record=True,
            only_latents=True,
        )
        return self.pack(at.unconstrained, num_particles)

    def pack_values(self, values: Mapping[str, Tensor]) -> Tensor:
        """Latents of one plain run, on their supports by site, as ``(1, unit, dim)``."""
        structure = replace(self.structure, model_runs=by_loop)
        own = {name: value for name, value in values.items() if name in structure.dims}
        padded = {name: value[None] for name, value in structure.pad(own).items()}
        with torch.no_grad():
            at = run_model(
                self.model, self.batch, structure, 1, values=padded, record=True, only_latents=True
            )
        return self.pack(at.unconstrained, 1)

    def draw_prior(self, num_particles: int) -> Tensor:
        """Draws from p(h; θ), with what is observed held fixed, ``(particle, unit, dim)``."""
        with torch.no_grad():
            return replace(self, guide=None).draw_latents(num_particles)

    def draw_guide(self, num_particles: int) -> Draws:
        """Draw from q(h) and evaluate guide and model there."""
        assert self.has_guide_density, "callers check for a guide's density first"
        assert self.guide is not None
        drawn = run_guide(self.guide, self.batch, self.structure, num_particles)
        at = run_model_at(self.model, self.batch, self.structure, num_particles, drawn, record=True)
        volume = self.counted(at.log_abs_det)
        log_guide = drawn.log_guide.to(at.log_joint)
        if self.structure.per_unit:
            log_guide = self.counted(log_guide.expand_as(at.log_joint)) + volume
        else:
            log_guide = log_guide + volume.sum(1, keepdim=True)
        latents = self.pack(at.unconstrained, num_particles)
        return Draws(latents, self.counted(at.log_joint) + volume, log_guide)

    @property
    def _num_run(self) -> int:
        """The units of one run, with those that only fill up a plate."""
        return self.num_units + self.batch.num_padded

    def counted(self, per_unit: Tensor) -> Tensor:
        """``(particle, unit)`` without the units that only fill up a plate."""
        return per_unit[:, : self.num_units] if self.batch.num_padded else per_unit

    def pack(self, values: Mapping[str, Tensor], num_particles: int) -> Tensor:
        """Unconstrained values by site as packed latents ``(particle, unit, dim)``."""
        packed = [
            torch.empty(num_particles, self._num_run, 0, dtype=self.dtype, device=self.device)
        ]
        for site in self.sites:
            value = values[site.name]
            depth = 1 + len(site.batch_shape) + len(site.event_shape)
            value = value.reshape((1,) * (depth - value.dim()) + value.shape)
            value = value.expand(num_particles, *site.batch_shape, *site.event_shape)
            value = self.layout.unit_second(value, len(site.event_shape))
            packed.append(value.reshape(num_particles, self._num_run, -1))
        return self.counted(torch.cat(packed, -1))

    def unpack(self, latents: Tensor) -> dict[str, Tensor]:
        """Packed latents by site, unconstrained, ``(particle, *plates, *event)``."""
        if self.batch.num_padded:
            filling = latents[:, :1].expand(-1, self.batch.num_padded, -1)
            latents = torch.cat([latents, filling], 1)
        values, start = {}, 0
        for site in self.sites:
            like = torch.empty(len(latents), *site.batch_shape, *site.event_shape, device="meta")
            shape = self.layout.unit_second(like, len(site.event_shape)).shape
            stop = start + torch.Size(shape[2:]).numel()
            value = latents[..., start:stop].reshape(shape)
            values[site.name] = self.layout.unit_in_place(value, len(site.event_shape))
            start = stop
        return values
