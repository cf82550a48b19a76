"""Gradient estimators of the importance-weighted bound, each an object of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_vharm.errors import InputError
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.guide_runs import GuideRun, run_guide
from pyro_vharm.model.model_runs import run_model_at
from pyro_vharm.model.structure import Structure

__all__ = [
    "BoundGradient",
    "DoublyReparameterized",
    "Pathwise",
    "StickingTheLanding",
    "WeightedRuns",
]


class WeightedRuns(NamedTuple):
    """K importance weights per unit in each of R replicates, and what to differentiate.

    Attributes:
        log_weights: log p(v, h; θ) − log q(h), detached, ``(replicate, particle, unit)``.
        surrogate: a scalar whose gradient is that of the sum over units of the mean over
            replicates of log (1/K) Σ_k w_k; its value means nothing.
        scale: the factor from subsampling.
    """

    log_weights: Tensor
    surrogate: Tensor
    scale: float


class BoundGradient(Protocol):
    """Draws from the guide, weighs the draws, and says what to differentiate."""

    def check(self, num_particles: int) -> None:
        """Refuse a number of particles for which the estimator is biased."""
        ...

    def __call__(
        self, densities: UnitDensities, num_particles: int, num_replicates: int
    ) -> WeightedRuns:
        """K weights per unit and replicate, from fresh draws."""
        ...


@dataclass(frozen=True)
class Pathwise:
    """∇ log (1/K) Σ_k w_k through reparameterised draws, with score terms for the other sites.

    With w̃ the weights normalised over K, Σ_k w̃_k ∇ log w_k, where log w depends on θ and φ in
    every way it does. Sites s that cannot be reparameterised, such as discrete ones, add

        Σ_k (log Ẑ − b_k) ∇ log q(s_k | ·),

    where b_k is log Ẑ with w_k replaced by the geometric mean of the other K − 1 weights, which
    does not depend on s_k. For K = 1 it is the mean of log w over the other replicates, and 0 if
    there are none.

    Right for every guide. The signal-to-noise ratio of its gradient for φ falls as K rises; that of
    `DoublyReparameterized` rises.

    Source: "Importance Weighted Autoencoders", Burda, Grosse, Salakhutdinov (2016); "Variational
    Inference for Monte Carlo Objectives", Mnih, Rezende (2016); "Tighter Variational Bounds are
    Not Necessarily Better", Rainforth et al. (2018).
    """

    def check(self, num_particles: int) -> None:
        """Any number of particles will do."""

    def __call__(
        self, densities: UnitDensities, num_particles: int, num_replicates: int
    ) -> WeightedRuns:
        """K weights per unit and replicate, from fresh draws."""
        structure = densities.structure.as_guide_splits()
        count = num_particles * num_replicates
        drawn = _draw(densities, structure, count)
        return _pathwise(densities, structure, drawn, num_particles)


@dataclass(frozen=True)
class DoublyReparameterized:
    """For θ, Σ_k w̃_k ∇_θ log p; for φ, Σ_k w̃_k² (∂log w_k/∂h_k) (∂h_k/∂φ).

    The same mean as `Pathwise`, with far less noise for φ: none at all at the exact posterior.
    Each way from a parameter to log w has its own weight, so it is right for parameters that model
    and guide share. For K = 1 it is the gradient that sticks the landing.

    A guide that computes latents from its draws by a function with parameters of its own
    (AutoStructured, AutoGaussian), or that has sites which cannot be reparameterised, takes the
    pathwise gradient: what such a function adds to log q is no score term, and must stay.

    Source: "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", Tucker,
    Lawson, Gu, Maddison (2019).
    """

    def check(self, num_particles: int) -> None:
        """Any number of particles will do."""

    def __call__(
        self, densities: UnitDensities, num_particles: int, num_replicates: int
    ) -> WeightedRuns:
        """K weights per unit and replicate, from fresh draws.

        The model is run once, at latents whose gradients a hook multiplies by w̃: the one backward
        pass of Σ w̃ log p then gives both parts. The guide is run a second time at its draws as
        fixed leaves, so that log q enters as a function of h alone.
        """
        structure = densities.structure.as_guide_splits()
        count = num_particles * num_replicates
        drawn = _draw(densities, structure, count)
        if structure.learned_transforms or drawn.irreproducible or not torch.is_grad_enabled():
            return _pathwise(densities, structure, drawn, num_particles)
        latents = {name: value.view_as(value) for name, value in drawn.values.items()}
        at = run_model_at(
            densities.model, densities.batch, structure, count, drawn._replace(values=latents)
        )
        log_weights, weights = _weigh(densities, at.log_joint, drawn.log_guide, num_particles)
        layout, dims = structure.layout, structure.dims
        shares = weights / num_replicates
        for name, value in latents.items():
            if value.requires_grad:
                value.register_hook(_scaled_by(layout.over_site(weights, dims[name].event_dim)))
        surrogate = (shares * at.log_joint).sum()
        for name, gradient in _guide_gradients(densities, structure, drawn, shares).items():
            squared = layout.over_site(weights, dims[name].event_dim) * gradient
            surrogate = surrogate - (squared * drawn.values[name]).sum()
        return WeightedRuns(log_weights, surrogate, at.scale)


@dataclass(frozen=True)
class StickingTheLanding:
    """For one particle: the pathwise gradient without the score term of log q, whose mean is 0.

    With more particles the term's mean is not 0, and leaving it out is biased: 1.125 where the
    others agree at 0.318 on a Gaussian example.

    Source: "Sticking the Landing: Simple, Lower-Variance Gradient Estimators for Variational
    Inference", Roeder, Wu, Duvenaud (2017).
    """

    def check(self, num_particles: int) -> None:
        """Refuse more than one particle.

        Raises:
            InputError: naming what is unbiased there.
        """
        if num_particles != 1:
            raise InputError(
                f"StickingTheLanding is biased for num_particles={num_particles}; use it with one, "
                "or gradient=DoublyReparameterized(), which equals it there and is right for more"
            )

    def __call__(
        self, densities: UnitDensities, num_particles: int, num_replicates: int
    ) -> WeightedRuns:
        """One weight per unit and replicate, from fresh draws."""
        self.check(num_particles)
        return DoublyReparameterized()(densities, num_particles, num_replicates)


def _draw(densities: UnitDensities, structure: Structure, count: int) -> GuideRun:
    assert densities.guide is not None, "callers check for a guide first"
    return run_guide(densities.guide, densities.batch, structure, count)


def _weigh(
    densities: UnitDensities, log_joint: Tensor, log_guide: Tensor, num_particles: int
) -> tuple[Tensor, Tensor]:
    """Log weights of the units that count, and w̃ of all, ``(particle of all, unit)``."""
    log_weights = (log_joint - log_guide.to(log_joint.device)).detach()
    grouped = log_weights.unflatten(0, (-1, num_particles))
    weights = torch.softmax(grouped, 1).flatten(0, 1)
    if densities.batch.num_padded and log_weights.shape[1] > 1:
        weights[:, -densities.batch.num_padded :] = 0.0
        grouped = grouped[..., : -densities.batch.num_padded]
    return grouped, weights


def _pathwise(
    densities: UnitDensities, structure: Structure, drawn: GuideRun, num_particles: int
) -> WeightedRuns:
    count = len(drawn.log_guide)
    at = run_model_at(densities.model, densities.batch, structure, count, drawn)
    log_weights, weights = _weigh(densities, at.log_joint, drawn.log_guide, num_particles)
    shares = weights / len(log_weights)
    surrogate = (shares * (at.log_joint - drawn.log_guide.to(at.log_joint.device))).sum()
    if drawn.irreproducible:
        advantage = _advantage(log_weights).flatten(0, 1) / len(log_weights)
        surrogate = surrogate + (advantage * densities.counted(drawn.log_score)).sum()
    return WeightedRuns(log_weights, surrogate, at.scale)


def _advantage(log_weights: Tensor) -> Tensor:
    """Log Ẑ less what does not depend on the draw itself, ``(replicate, particle, unit)``."""
    num_replicates, num_particles = log_weights.shape[:2]
    value = torch.logsumexp(log_weights, 1, keepdim=True) - math.log(num_particles)
    if num_particles == 1:
        others = value.sum(0, keepdim=True) - value
        return value - others / max(num_replicates - 1, 1)
    own = torch.eye(num_particles, dtype=torch.bool, device=log_weights.device)[..., None]
    others = torch.where(own, 0.0, log_weights[:, None]).sum(2, keepdim=True) / (num_particles - 1)
    replaced = torch.where(own, others, log_weights[:, None])  # (replicate, left out, particle, …)
    return value - (torch.logsumexp(replaced, 2) - math.log(num_particles))


def _guide_gradients(
    densities: UnitDensities, structure: Structure, drawn: GuideRun, shares: Tensor
) -> dict[str, Tensor]:
    """∇_h Σ w̃ log q(h) at the guide's draws, by site; empty for a guide with flat densities."""
    assert densities.guide is not None, "callers check for a guide first"
    leaves = {name: drawn.values[name].detach().requires_grad_() for name in drawn.random}
    if not leaves:
        return {}
    fixed = run_guide(densities.guide, densities.batch, structure, len(drawn.log_guide), leaves)
    log_guide = (shares * fixed.log_guide).sum()
    if not log_guide.requires_grad:
        return {}
    found = torch.autograd.grad(log_guide, list(leaves.values()), allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def _scaled_by(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor
