"""What one plain run tells of a model and guide: their sites, and how to run them for many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from torch import Tensor

from pyro_vharm.model.units import UnitLayout
from pyro_vharm.model.vectorising import Vectorisation, by_loop

__all__ = ["GuideDensity", "SiteDims", "Structure"]


class GuideDensity(Enum):
    """In what form log q can be had."""

    PER_UNIT = "per unit"
    TOTAL = "in total only"
    NONE = "not at all"


class SiteDims(NamedTuple):
    """The dims of a site's value, in a plain run.

    Attributes:
        num_plates: batch dims, as many as the site itself has.
        event_dim: event dims on the support.
        unconstrained_dim: event dims on the unconstrained scale.
    """

    num_plates: int
    event_dim: int
    unconstrained_dim: int


@dataclass(frozen=True)
class Structure:
    """The sites of a model and guide, whatever the size of the batch.

    Attributes:
        layout: which batch dim counts units.
        dims: of every latent site of the model, and every sample site of the guide.
        continuous: the model's continuous latents, in packing order.
        unguided: discrete latents without a guide site: summed out in evidence and ELBO.
        guided: discrete latents with a guide site: summed out in the evidence only.
        guide_density: in what form log q can be had; per unit where there is no guide.
        model_runs: how the model is run for many particles.
        guide_runs: how the guide is.
        learned_transforms: whether the guide computes latents from its draws by a function that
            has parameters of its own, beside the distributions of the draws.
        subsampled: plates that subsample at random.
        declared: sites that count as parameters θ.
        declared_units: among how many units the log prior of those is shared out; ``None``: among
            all that the unit plate stands for.
    """

    layout: UnitLayout
    dims: Mapping[str, SiteDims]
    continuous: tuple[str, ...]
    unguided: frozenset[str]
    guided: frozenset[str]
    guide_density: GuideDensity
    model_runs: Vectorisation = by_loop
    guide_runs: Vectorisation = by_loop
    learned_transforms: bool = False
    subsampled: frozenset[str] = frozenset()
    declared: frozenset[str] = frozenset()
    declared_units: float | None = None

    @property
    def discrete(self) -> frozenset[str]:
        """All discrete latents."""
        return self.unguided | self.guided

    @property
    def per_unit(self) -> bool:
        """Whether log q can be had for each unit."""
        return self.guide_density is GuideDensity.PER_UNIT

    def as_joint(self) -> Structure:
        """The same with all units as one joint unit."""
        layout = UnitLayout(None, None, self.layout.max_plate_nesting)
        return replace(self, layout=layout)

    def as_guide_splits(self) -> Structure:
        """The same, with all units as one where log q cannot be had for each."""
        return self if self.per_unit else self.as_joint()

    def spread(self, values: Mapping[str, Tensor], num_particles: int) -> dict[str, Tensor]:
        """Expand the values of a run under a plate of particles where they lack its dim."""
        spread = {}
        for name, value in values.items():
            depth = 1 + self.layout.max_plate_nesting + self.dims[name].event_dim
            full = value.reshape((1,) * (depth - value.dim()) + value.shape)
            spread[name] = full.expand(num_particles, *full.shape[1:])
        return spread

    def pad(
        self, values: Mapping[str, Tensor], *, unconstrained: bool = False
    ) -> dict[str, Tensor]:
        """Give one particle's values all plate dims, of size 1 where a site lacks one."""
        return {name: self._pad(name, value, unconstrained) for name, value in values.items()}

    def _pad(self, name: str, value: Tensor, unconstrained: bool) -> Tensor:
        missing = self.layout.max_plate_nesting + self._events(name, unconstrained) - value.dim()
        return value.reshape((1,) * missing + value.shape)

    def unpad(
        self, values: Mapping[str, Tensor], *, unconstrained: bool = False
    ) -> dict[str, Tensor]:
        """The inverse of `pad`: back to the dims that a site has in a plain run."""
        return {name: self._unpad(name, value, unconstrained) for name, value in values.items()}

    def _unpad(self, name: str, value: Tensor, unconstrained: bool) -> Tensor:
        own = self.dims[name].num_plates + self._events(name, unconstrained)
        return value.reshape(value.shape[value.dim() - own :])

    def _events(self, name: str, unconstrained: bool) -> int:
        dims = self.dims[name]
        return dims.unconstrained_dim if unconstrained else dims.event_dim
