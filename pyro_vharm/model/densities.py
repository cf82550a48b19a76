"""Plain functions of tensors for one batch: log p(v, h; θ) per unit, draws from prior and guide.

Latents are packed as ``(particle, unit, dim)`` on the unconstrained scale; densities carry the
Jacobian of the transform. θ and φ are read live from the user's callables, so that these functions
are differentiable in both, and see every parameter update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vharm.model.data import Batch
from pyro_vharm.model.tracing import (
    PyroFunction,
    UnconstrainedSites,
    latent_sites,
    observed_sites,
    site_log_prob,
    trace_particles,
    trace_plain,
)
from pyro_vharm.model.units import UnitLayout

__all__ = ["DensityTerms", "Draws", "LatentSite", "UnitDensities"]


class DensityTerms(NamedTuple):
    """The two factors of the joint density, each of shape ``(particle, unit)``.

    Attributes:
        log_prior: log p(h; θ) on the unconstrained scale.
        log_likelihood: log p(v | h; θ).
    """

    log_prior: Tensor
    log_likelihood: Tensor

    @property
    def log_joint(self) -> Tensor:
        """Log p(v, h; θ) on the unconstrained scale."""
        return self.log_prior + self.log_likelihood


class Draws(NamedTuple):
    """Draws of the latents with their densities.

    Attributes:
        latents: shape ``(particle, unit, dim)``, unconstrained.
        log_proposal: log density of what drew them, on the same scale, ``(particle, unit)``.
        terms: the model's densities there.
    """

    latents: Tensor
    log_proposal: Tensor
    terms: DensityTerms

    @property
    def log_weights(self) -> Tensor:
        """Log p(v, h; θ) − log q(h), shape ``(particle, unit)``."""
        return self.terms.log_joint - self.log_proposal


@dataclass(frozen=True)
class LatentSite:
    """Where one latent site lies in the packed latents.

    Attributes:
        name: the site.
        batch_shape: its plates' sizes, padded with 1 to the layout's nesting.
        num_plates: how many of these dims are its own.
        event_shape: its event shape on the unconstrained scale.
    """

    name: str
    batch_shape: tuple[int, ...]
    num_plates: int
    event_shape: tuple[int, ...]


@dataclass(frozen=True)
class UnitDensities:
    """Densities of one batch of units under a model and, where there is one, a guide.

    Attributes:
        model: the Pyro model.
        guide: the Pyro guide, or ``None``.
        batch: the arguments to call them with.
        layout: which batch dim counts units.
        sites: the model's latent sites, in packing order.
        num_units: the number of units in the batch.
        dtype: the dtype of the latents.
        device: the device of the latents.
    """

    model: PyroFunction
    guide: PyroFunction | None
    batch: Batch
    layout: UnitLayout
    sites: Sequence[LatentSite]
    num_units: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dim(self) -> int:
        """Number of unconstrained latent dimensions of one unit."""
        total = sum(
            torch.Size(site.batch_shape).numel() * torch.Size(site.event_shape).numel()
            for site in self.sites
        )
        return total // self.num_units

    def terms(self, latents: Tensor) -> DensityTerms:
        """Log prior and log likelihood at packed latents ``(particle, unit, dim)``."""
        trace, log_abs_det = self.trace_at(latents)
        return self._model_terms(trace, log_abs_det, len(latents))

    def log_joint(self, latents: Tensor) -> Tensor:
        """Log p(v, h; θ) at packed latents, shape ``(particle, unit)``."""
        return self.terms(latents).log_joint

    def trace_at(self, latents: Tensor) -> tuple[Trace, dict[str, Tensor]]:
        """The model's trace at packed latents, and the log Jacobian of each latent site."""
        substitute = UnconstrainedSites(self._names, self._unpack(latents))
        trace = trace_particles(self.model, self.batch, self.layout, len(latents), substitute)
        return trace, substitute.log_abs_det

    def plain_log_joint(self, latents: Tensor) -> Tensor:
        """`log_joint` by one ordinary run of the model per particle: slow, and right by itself."""
        return torch.cat([self._plain_one(latents[i : i + 1]) for i in range(len(latents))])

    def _plain_one(self, latents: Tensor) -> Tensor:
        values = {}
        for site in self.sites:
            own = site.batch_shape[len(site.batch_shape) - site.num_plates :]
            values[site.name] = self._unpack(latents)[site.name].reshape(own + site.event_shape)
        substitute = UnconstrainedSites(self._names, values)
        trace = trace_plain(self.model, self.batch, substitute)
        return self._model_terms(trace, substitute.log_abs_det, 1).log_joint

    def constrain(self, latents: Tensor) -> dict[str, Tensor]:
        """The latents on their own supports, site → ``(particle, *plates, *event)``."""
        trace, _ = self.trace_at(latents)
        return {site.name: trace.nodes[site.name]["value"] for site in self.sites}

    def draw_prior(self, num_particles: int) -> Draws:
        """Draw from p(h; θ), with what is observed held fixed."""
        record = UnconstrainedSites(self._names)
        trace = trace_particles(self.model, self.batch, self.layout, num_particles, record)
        terms = self._model_terms(trace, record.log_abs_det, num_particles)
        return Draws(self._pack(record.values, num_particles), terms.log_prior, terms)

    def draw_guide(self, num_particles: int) -> Draws:
        """Draw from q(h) and evaluate guide and model there."""
        assert self.guide is not None, "callers check for a guide first"
        guide_trace = trace_particles(self.guide, self.batch, self.layout, num_particles)
        record = UnconstrainedSites(self._names)
        trace = trace_particles(
            self.model,
            self.batch,
            self.layout,
            num_particles,
            record,
            poutine.replay(trace=guide_trace),
        )
        log_guide = self._sum_sites(
            [site_log_prob(site) for site in latent_sites(guide_trace)], num_particles
        ) + self._sum_sites(list(record.log_abs_det.values()), num_particles)
        terms = self._model_terms(trace, record.log_abs_det, num_particles)
        return Draws(self._pack(record.values, num_particles), log_guide, terms)

    @property
    def _names(self) -> set[str]:
        return {site.name for site in self.sites}

    def _model_terms(
        self, trace: Trace, log_abs_det: dict[str, Tensor], num_particles: int
    ) -> DensityTerms:
        prior = [site_log_prob(site) for site in latent_sites(trace)]
        likelihood = [site_log_prob(site) for site in observed_sites(trace)]
        return DensityTerms(
            self._sum_sites([*prior, *log_abs_det.values()], num_particles),
            self._sum_sites(likelihood, num_particles),
        )

    def _sum_sites(self, log_probs: Sequence[Tensor], num_particles: int) -> Tensor:
        total = torch.zeros(num_particles, self.num_units, dtype=self.dtype, device=self.device)
        for log_prob in log_probs:
            total = total + self.layout.by_unit(log_prob, num_particles, self.num_units)
        return total

    def _pack(self, values: dict[str, Tensor], num_particles: int) -> Tensor:
        packed = []
        for site in self.sites:
            value = values[site.name].expand(num_particles, *site.batch_shape, *site.event_shape)
            value = self.layout.unit_second(value, len(site.event_shape))
            packed.append(value.reshape(num_particles, self.num_units, -1))
        return torch.cat(packed, -1)

    def _unpack(self, latents: Tensor) -> dict[str, Tensor]:
        values, start = {}, 0
        for site in self.sites:
            like = torch.empty(len(latents), *site.batch_shape, *site.event_shape, device="meta")
            shape = self.layout.unit_second(like, len(site.event_shape)).shape
            stop = start + torch.Size(shape[2:]).numel()
            value = latents[..., start:stop].reshape(shape)
            values[site.name] = self.layout.unit_in_place(value, len(site.event_shape))
            start = stop
        return values
