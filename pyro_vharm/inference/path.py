"""The annealing path between a start density and the joint density, with its gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.start import StartDensity
from pyro_vharm.model.densities import UnitDensities

__all__ = ["PathState", "path_gradient", "path_state"]


class PathState(NamedTuple):
    """Latents and the two ends of the path there, with gradients.

    The path is log f_β = (1 − β) log f_0 + β log p(v, h; θ), for β from 0 to 1.

    Attributes:
        latents: shape ``(particle, unit, dim)``.
        log_start: log f_0, shape ``(particle, unit)``.
        log_joint: log p(v, h; θ), shape ``(particle, unit)``.
        start_gradient: ∇_h log f_0, of the latents' shape.
        joint_gradient: ∇_h log p(v, h; θ), of the latents' shape.
    """

    latents: Tensor
    log_start: Tensor
    log_joint: Tensor
    start_gradient: Tensor
    joint_gradient: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """Log p(v, h; θ) − log f_0(h)."""
        return self.log_joint - self.log_start

    def log_density(self, temperature: Tensor) -> Tensor:
        """Log f_β for β of shape ``(unit,)``."""
        return (1 - temperature) * self.log_start + temperature * self.log_joint

    def gradient(self, temperature: Tensor) -> Tensor:
        """∇_h log f_β for β of shape ``(unit,)``."""
        temperature = temperature[:, None]
        return (1 - temperature) * self.start_gradient + temperature * self.joint_gradient

    def where(self, accepted: Tensor, other: PathState) -> PathState:
        """This state where accepted, shape ``(particle, unit)``, else the other."""
        pairs = zip(self, other, strict=True)
        return PathState(*(torch.where(_like(accepted, a), a, b) for a, b in pairs))

    def take(self, index: Tensor) -> PathState:
        """The states of other particles, by index ``(particle, unit)``."""
        return PathState(*(field.gather(0, _like(index, field).expand_as(field)) for field in self))


def _like(index: Tensor, field: Tensor) -> Tensor:
    return index if field.dim() == 2 else index[..., None]


def path_state(densities: UnitDensities, start: StartDensity, latents: Tensor) -> PathState:
    """Evaluate both ends of the path at latents ``(particle, unit, dim)``."""
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        log_start, log_joint = _ends(densities, start, leaf)
        (joint_gradient,) = torch.autograd.grad(log_joint.sum(), leaf, retain_graph=True)
        (start_gradient,) = torch.autograd.grad(log_start.sum(), leaf)
    detached = latents.detach(), log_start.detach(), log_joint.detach()
    return PathState(*detached, start_gradient, joint_gradient)


def path_gradient(
    densities: UnitDensities, start: StartDensity, latents: Tensor, temperature: Tensor
) -> Tensor:
    """∇_h log f_β at latents ``(particle, unit, dim)``, for β of shape ``(unit,)``."""
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        log_start, log_joint = _ends(densities, start, leaf)
        log_density = (1 - temperature) * log_start + temperature * log_joint
        (gradient,) = torch.autograd.grad(log_density.sum(), leaf)
    return gradient


def _ends(densities: UnitDensities, start: StartDensity, latents: Tensor) -> tuple[Tensor, Tensor]:
    terms = densities.terms(latents)
    return start.log_prob(latents, terms.log_prior), terms.log_joint
