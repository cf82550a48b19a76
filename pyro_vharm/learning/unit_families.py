"""Families of q with parameters of their own for each unit, and the two Gaussian ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_vharm.inference.gaussians import UnitGaussian

__all__ = ["FullRank", "GuideFamily", "MeanField", "UnitDraws", "UnitFit"]

type Tensors = Mapping[str, Tensor]


class UnitDraws(NamedTuple):
    """Draws of the members of a family, by strata: parts of q with known shares.

    Attributes:
        latents: ``(particle, stratum, unit, dim)``.
        log_density: log q there, ``(particle, stratum, unit)``.
        shares: the probability of each stratum, ``(stratum, unit)``.
    """

    latents: Tensor
    log_density: Tensor
    shares: Tensor


class GuideFamily(Protocol):
    """A family of q(h) on the unconstrained scale, with parameters of its own for each unit.

    Attributes:
        name: in tables and as a key of results.
        rung: a family holds every Gaussian that families on lower rungs hold.
        free: names of the parameters that are optimised.
    """

    rung: ClassVar[int]

    @property
    def num_strata(self) -> int:
        """Of how many parts with known shares a member consists."""
        ...

    @property
    def name(self) -> str:
        """In tables, and as a key of results."""
        ...

    @property
    def free(self) -> tuple[str, ...]:
        """The parameters that are optimised."""
        ...

    def begin(self, gaussian: UnitGaussian, draws: Tensor | None = None) -> Tensors:
        """Parameters of the member that is nearest to a Gaussian, of shape ``(unit, …)`` each.

        With posterior draws ``(particle, unit, dim)``, of one that is near to them, if the family
        has more than one stratum.
        """
        ...

    def rebased(self, tensors: Tensors) -> Tensors:
        """The same q, with steps of the parameters in units of its own standard deviations."""
        ...

    def draw(self, tensors: Tensors, noise: Tensor) -> UnitDraws:
        """Draws made from standard normal noise, and log q there, for gradients of E[−log q].

        Args:
            tensors: the parameters.
            noise: shape ``(particle, stratum, unit, dim)``.
        """
        ...

    def gaussian(self, tensors: Tensors) -> UnitGaussian | None:
        """Q where it is a Gaussian; ``None`` for families of other densities."""
        ...


@dataclass(frozen=True)
class UnitFit:
    """Members of a family, one for each unit.

    Attributes:
        family: it.
        tensors: their parameters, each of shape ``(unit, …)``.
    """

    family: GuideFamily
    tensors: Tensors

    def joined(self, other: UnitFit) -> UnitFit:
        """These members and then the other's, as if of further units."""
        pairs = {name: (value, other.tensors[name]) for name, value in self.tensors.items()}
        return replace(self, tensors={name: torch.cat(pair) for name, pair in pairs.items()})

    @property
    def gaussian(self) -> UnitGaussian | None:
        """The members where they are Gaussians."""
        return self.family.gaussian(self.tensors)

    def draw(self, noise: Tensor) -> UnitDraws:
        """Draws and log q there; see `GuideFamily.draw`."""
        return self.family.draw(self.tensors, noise)

    def rebased(self) -> UnitFit:
        """The same members, as a start of further steps."""
        return replace(self, tensors=self.family.rebased(self.tensors))

    def freed(self) -> tuple[UnitFit, list[Tensor]]:
        """A copy whose free parameters are leaves, and these."""
        copied = {name: value.detach().clone() for name, value in self.tensors.items()}
        leaves = [copied[name].requires_grad_() for name in self.family.free]
        return replace(self, tensors=copied), leaves

    def select(self, index: Tensor) -> UnitFit:
        """Those with these indices, without a record for differentiation."""
        picked = {name: value.detach()[index] for name, value in self.tensors.items()}
        return replace(self, tensors=picked)

    def where(self, chosen: Tensor, other: UnitFit) -> UnitFit:
        """These members where chosen, ``(unit,)``, and the other's elsewhere."""
        merged = {}
        for name, value in self.tensors.items():
            condition = chosen.reshape(-1, *[1] * (value.dim() - 1))
            merged[name] = torch.where(condition, value.detach(), other.tensors[name].detach())
        return replace(self, tensors=merged)


def begin_affine(gaussian: UnitGaussian) -> dict[str, Tensor]:
    """Parameters of h = m + L (shift + T z), at shift = 0 and T = 1; see `affine`."""
    return {
        "mean": gaussian.mean,
        "scale_tril": gaussian.scale_tril,
        "shift": torch.zeros_like(gaussian.mean),
        "log_scale": torch.zeros_like(gaussian.mean),
        "tilt": torch.zeros_like(gaussian.scale_tril),
    }


def affine(tensors: Tensors) -> UnitGaussian:
    """The affine map's Gaussian: T has exp(log_scale) on its diagonal and tilt below it."""
    step = UnitGaussian(tensors["mean"], tensors["scale_tril"])
    turn = torch.diag_embed(tensors["log_scale"].exp()) + tensors["tilt"].tril(-1)
    return UnitGaussian(step.unwhiten(tensors["shift"][None])[0], step.scale_tril @ turn)


class _Gaussian:
    """What the Gaussian families share."""

    def rebased(self, tensors: Tensors) -> Tensors:
        """The same q, with steps in units of its own standard deviations."""
        return begin_affine(affine(tensors))

    @property
    def num_strata(self) -> int:
        """One."""
        return 1

    def draw(self, tensors: Tensors, noise: Tensor) -> UnitDraws:
        """Draws and log q there, which is differentiated along the draws alone.

        That leaves out a term of mean 0, so the gradient vanishes where q is the posterior.

        Source: "Sticking the Landing", Roeder, Wu, Duvenaud (2017).
        """
        found = affine(tensors)
        latents = found.unwhiten(noise[:, 0])
        held = UnitGaussian(found.mean.detach(), found.scale_tril.detach())
        shares = torch.ones_like(latents[:1, :, 0])
        return UnitDraws(latents[:, None], held.log_prob(latents)[:, None], shares)

    def gaussian(self, tensors: Tensors) -> UnitGaussian | None:
        """Q itself."""
        return affine(tensors)


@dataclass(frozen=True)
class MeanField(_Gaussian):
    """A Gaussian with independent coordinates for each unit: q_u(h) = Π_i N(h_i; m_ui, s_ui²).

    On the unconstrained scale, and without an encoder. For a Gaussian posterior of precision P
    the best of the family has m the posterior's mean and s_i² = 1/P_ii, and its approximation gap
    is ½ (Σ_i log P_ii − log det P) nats.

    Source: "Inference Suboptimality in Variational Autoencoders", Cremer, Li, Duvenaud (2018).

    >>> MeanField().name
    'mean field'
    """

    name: str = field(default="mean field", init=False)
    rung: ClassVar[int] = 0

    @property
    def free(self) -> tuple[str, ...]:
        """The parameters that are optimised."""
        return "shift", "log_scale"

    def begin(self, gaussian: UnitGaussian, draws: Tensor | None = None) -> Tensors:
        """The best mean field for a Gaussian posterior: its mean, and variances 1/P_ii."""
        eye = torch.eye(gaussian.mean.shape[-1]).to(gaussian.mean).expand_as(gaussian.scale_tril)
        inverse = torch.linalg.solve_triangular(gaussian.scale_tril, eye, upper=False)
        deviations = inverse.square().sum(-2).rsqrt()  # P = L⁻ᵀ L⁻¹
        return begin_affine(UnitGaussian(gaussian.mean, torch.diag_embed(deviations)))


@dataclass(frozen=True)
class FullRank(_Gaussian):
    """A Gaussian for each unit: q_u(h) = N(h; m_u, L_u L_uᵀ), with L_u lower triangular.

    On the unconstrained scale, and without an encoder. Its approximation gap is 0 for a Gaussian
    posterior. Where the posterior has several modes apart, the best of the family sits on one.

    Source: "Automatic Differentiation Variational Inference", Kucukelbir, Tran, Ranganath, Gelman,
    Blei (2017).

    >>> FullRank().name
    'full rank'
    """

    name: str = field(default="full rank", init=False)
    rung: ClassVar[int] = 1

    @property
    def free(self) -> tuple[str, ...]:
        """The parameters that are optimised."""
        return "shift", "log_scale", "tilt"

    def begin(self, gaussian: UnitGaussian, draws: Tensor | None = None) -> Tensors:
        """That Gaussian."""
        return begin_affine(gaussian)
