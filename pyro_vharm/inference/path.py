"""The annealing path between a start density and the joint density, with its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.inference.start import StartDensity
from pyro_vharm.model.densities import UnitDensities

__all__ = ["AnnealingPath", "PathState"]


class PathState(NamedTuple):
    """Positions and the two ends of the path there, with gradients.

    Attributes:
        position: coordinates e of the latents, shape ``(particle, unit, dim)``; see
            `AnnealingPath`.
        log_start: log f_0, shape ``(particle, unit)``.
        log_joint: log p(v, h; θ), shape ``(particle, unit)``.
        start_gradient: ∇_e log f_0, of the position's shape.
        joint_gradient: ∇_e log p(v, h; θ), of the position's shape.
    """

    position: Tensor
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
        """∇_e log f_β for β of shape ``(unit,)``."""
        temperature = temperature[:, None]
        return (1 - temperature) * self.start_gradient + temperature * self.joint_gradient

    def where(self, accepted: Tensor, other: PathState) -> PathState:
        """This state where accepted, shape ``(particle, unit)``, else the other."""
        pairs = zip(self, other, strict=True)
        return PathState(*(torch.where(_like(accepted, a), a, b) for a, b in pairs))

    def where_defined(self) -> PathState:
        """Particles without a finite density moved to others of their unit that have one.

        No transition leads away from where density and gradient are no numbers.
        """
        defined = torch.isfinite(self.log_joint)
        if bool(defined.all()):
            return self
        some = (defined | ~defined.any(0)).double()  # a unit without any keeps what it has
        drawn = torch.multinomial(some.T, len(some), replacement=True).T
        own = torch.arange(len(some), device=drawn.device)[:, None]
        return self.take(torch.where(defined, own, drawn))

    def take(self, index: Tensor) -> PathState:
        """The states of other particles, by index ``(particle, unit)``."""
        return PathState(*(field.gather(0, _like(index, field).expand_as(field)) for field in self))


def _like(index: Tensor, field: Tensor) -> Tensor:
    return index if field.dim() == 2 else index[..., None]


@dataclass(frozen=True)
class AnnealingPath:
    """The path log f_β = (1 − β) log f_0 + β log p(v, h; θ), for β from 0 to 1.

    Positions e are whitened, h = m + L e with the start's Gaussian N(m, L Lᵀ), or e = h. All
    densities are those of h.

    Attributes:
        densities: the units.
        start: f_0.
        whitened: whether positions are whitened.
    """

    densities: UnitDensities
    start: StartDensity
    whitened: bool

    def latents(self, position: Tensor) -> Tensor:
        """The latents h at positions ``(particle, unit, dim)``."""
        return self.start.gaussian.unwhiten(position) if self.whitened else position

    def position(self, latents: Tensor) -> Tensor:
        """The positions e of latents ``(particle, unit, dim)``."""
        return self.start.gaussian.whiten(latents) if self.whitened else latents

    def metric(self, scale_tril: Tensor) -> Tensor:
        """A Cholesky factor of a covariance of h as one of e, both ``(unit, dim, dim)``."""
        if not self.whitened:
            return scale_tril
        outer = self.start.gaussian.scale_tril
        turned: Tensor = torch.linalg.solve_triangular(outer, scale_tril, upper=False)
        return turned

    def state(self, position: Tensor) -> PathState:
        """Evaluate both ends of the path at positions ``(particle, unit, dim)``."""
        with torch.enable_grad():
            leaf = position.detach().requires_grad_()
            log_start, log_joint = self._ends(leaf)
            (joint_gradient,) = torch.autograd.grad(log_joint.sum(), leaf, retain_graph=True)
            (start_gradient,) = torch.autograd.grad(log_start.sum(), leaf)
        detached = position.detach(), log_start.detach(), log_joint.detach()
        return PathState(*detached, start_gradient, joint_gradient)

    def resting(self, position: Tensor) -> PathState:
        """The same where nothing moves on, so that gradients, not computed, count as 0."""
        with torch.no_grad():
            still = torch.zeros_like(position)
            return PathState(position, *self._ends(position), still, still)

    def gradient(self, position: Tensor, temperature: Tensor) -> Tensor:
        """∇_e log f_β at positions ``(particle, unit, dim)``, for β of shape ``(unit,)``."""
        with torch.enable_grad():
            leaf = position.detach().requires_grad_()
            log_start, log_joint = self._ends(leaf)
            log_density = (1 - temperature) * log_start + temperature * log_joint
            (gradient,) = torch.autograd.grad(log_density.sum(), leaf)
        return gradient

    def _ends(self, position: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.latents(position).contiguous()
        terms = self.densities.terms(latents)
        if self.whitened:
            log_start = self.start.log_prob_whitened(position, terms.log_prior)
        else:
            log_start = self.start.log_prob(latents, terms.log_prior)
        return log_start, terms.log_joint
