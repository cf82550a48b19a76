"""The annealing path between a start density and the joint density, with its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.start import StartDensity, UnitGaussian
from pyro_vharm.model.compilation import Accelerated, accelerate
from pyro_vharm.model.densities import UnitDensities

__all__ = ["AnnealingPath", "PathState", "annealing_path"]


class PathState(NamedTuple):
    """Latents and the two ends of the path there, with gradients.

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

    def log_density(self, temperature: Tensor | float) -> Tensor:
        """Log f_β = (1 − β) log f_0 + β log p(v, h; θ)."""
        return (1 - temperature) * self.log_start + temperature * self.log_joint

    def gradient(self, temperature: Tensor | float) -> Tensor:
        """∇_h log f_β."""
        return (1 - temperature) * self.start_gradient + temperature * self.joint_gradient

    def where(self, accepted: Tensor, other: PathState) -> PathState:
        """This state where accepted, shape ``(particle, unit)``, else the other."""
        wide = accepted[..., None]
        return PathState(
            torch.where(wide, self.latents, other.latents),
            torch.where(accepted, self.log_start, other.log_start),
            torch.where(accepted, self.log_joint, other.log_joint),
            torch.where(wide, self.start_gradient, other.start_gradient),
            torch.where(wide, self.joint_gradient, other.joint_gradient),
        )


@dataclass(frozen=True)
class AnnealingPath:
    """Log f_β = (1 − β) log f_0 + β log p(v, h; θ), evaluated for all particles of all units.

    Attributes:
        start: the normalised density f_0, whose Gaussian is the metric of moves along the path.
        ends: gives both ends and their gradients.
    """

    start: StartDensity
    ends: Accelerated

    def at(self, latents: Tensor) -> PathState:
        """Evaluate at latents ``(particle, unit, dim)``."""
        gaussian = self.start.gaussian
        return PathState(latents, *self.ends(latents, gaussian.mean, gaussian.scale_tril))

    def from_start(self, start: StartDensity) -> AnnealingPath:
        """The path from another start density with the same share of prior."""
        return AnnealingPath(start, self.ends)


@dataclass(frozen=True)
class _Ends:
    """Both ends and their gradients as a function of tensors, for a given share of prior."""

    prior_share: float

    def __call__(
        self, densities: UnitDensities, latents: Tensor, mean: Tensor, scale_tril: Tensor
    ) -> tuple[Tensor, ...]:
        start = StartDensity(UnitGaussian(mean, scale_tril), self.prior_share)
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            terms = densities.terms(leaf)
            log_start = start.log_prob(leaf, terms.log_prior)
            (joint_gradient,) = torch.autograd.grad(terms.log_joint.sum(), leaf, retain_graph=True)
            (start_gradient,) = torch.autograd.grad(log_start.sum(), leaf)
        return log_start.detach(), terms.log_joint.detach(), start_gradient, joint_gradient


def annealing_path(
    densities: UnitDensities, start: StartDensity, num_particles: int, num_calls: int
) -> AnnealingPath:
    """The path, evaluated in the form that the number of calls ahead pays for."""
    latents = start.gaussian.mean.expand(num_particles, -1, -1).clone()
    inputs = (latents, start.gaussian.mean, start.gaussian.scale_tril)
    ends = accelerate(_Ends(start.prior_share), densities, inputs, num_calls)
    return AnnealingPath(start, ends)
