"""Where the Markov chains of a training step start: at draws of the guide, or where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vharm.errors import InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.densities import UnitDensities

__all__ = ["GuideChains", "KeptChains", "PersistentChains"]


class KeptChains(NamedTuple):
    """Where the chains of every unit seen so far are.

    Attributes:
        latents: shape ``(particle, unit of the data, dim)``.
        known: which units have been seen, shape ``(unit of the data,)``.
        tensors: the tensors of the batch, where units are known by their position in it.
    """

    latents: Tensor
    known: Tensor
    tensors: tuple[Tensor, ...]

    def to(self, device: torch.device) -> KeptChains:
        """On a device: what was written down comes back on the CPU."""
        return self._replace(latents=self.latents.to(device), known=self.known.to(device))


@dataclass(frozen=True)
class GuideChains:
    """New chains at each step, from fresh draws of the guide."""

    def begin(self, densities: UnitDensities, draws: Tensor, kept: KeptChains | None) -> Tensor:
        """The draws themselves, ``(particle, unit, dim)``."""
        return draws

    def keep(
        self, densities: UnitDensities, latents: Tensor, kept: KeptChains | None
    ) -> KeptChains | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class PersistentChains:
    """Chains of each unit that go on from step to step; at first from draws of the guide.

    They follow the posterior while θ moves, so a few transitions a step do, also where the guide is
    poor. With minibatches, say what identifies units; without `index`, every call must have the
    same units in the same order.

    Args:
        index: the argument that holds the integer index of each unit in the data, by name or
            position, or the name of the plate that subsamples them.

    Source: "Training Restricted Boltzmann Machines using Approximations to the Likelihood
    Gradient", Tieleman (2008).
    """

    index: str | int | None = None

    def begin(self, densities: UnitDensities, draws: Tensor, kept: KeptChains | None) -> Tensor:
        """Where the chains of these units were, ``(particle, unit, dim)``; draws for new ones.

        Raises:
            InputError: if units cannot be told apart.
        """
        if kept is None:
            return draws
        kept = kept.to(draws.device)
        units = self._units(densities, kept)
        inside = units < len(kept.known)
        at = torch.where(inside, units, 0)
        known = inside & kept.known[at]
        return torch.where(known[:, None], kept.latents[:, at], draws)

    def keep(
        self, densities: UnitDensities, latents: Tensor, kept: KeptChains | None
    ) -> KeptChains:
        """Take note of where the chains of these units are."""
        units = self._units(densities, kept)
        size = max(int(units.max()) + 1, 0 if kept is None else len(kept.known))
        all_latents = latents.new_zeros(len(latents), size, latents.shape[-1])
        known = torch.zeros(size, dtype=torch.bool, device=latents.device)
        if kept is not None:
            all_latents[:, : len(kept.known)] = kept.latents
            known[: len(kept.known)] = kept.known
        all_latents[:, units], known[units] = latents, True
        return KeptChains(all_latents, known, _tensors(densities.batch))

    def _units(self, densities: UnitDensities, kept: KeptChains | None) -> Tensor:
        if self.index is not None:
            return self._named(densities)
        found = _tensors(densities.batch)
        if kept is not None and not _equal(found, kept.tensors):
            raise InputError(
                "PersistentChains() takes the units of every call for the same, and this call has "
                "other data; pass index=, the argument (by name or position) or subsampled plate "
                "that identifies units"
            )
        return torch.arange(densities.num_units, device=densities.device)

    def _named(self, densities: UnitDensities) -> Tensor:
        batch, index = densities.batch, self.index
        known: dict[str | int, Any] = dict(enumerate(batch.args))
        known.update(batch.kwargs.items())
        known.update(batch.subsample.items())
        units = None if index is None else known.get(index)
        if not isinstance(units, Tensor) or units.is_floating_point():
            raise InputError(
                f"index={index!r} must name an argument or subsampled plate that holds integers; "
                f"known are {list(known)}"
            )
        if units.shape != (densities.num_units,) or bool(units.min() < 0):
            raise InputError(
                f"index={index!r} must hold one index ≥ 0 for each of the {densities.num_units} "
                f"units; its shape is {tuple(units.shape)}"
            )
        return units.to(densities.device)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs), dict(batch.subsample)))
    return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(
        a is b or (a.shape == b.shape and torch.equal(a, b.to(a.device)))
        for a, b in zip(first, second, strict=True)
    )
