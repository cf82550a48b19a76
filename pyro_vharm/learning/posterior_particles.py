"""Particles of one batch that stay while θ moves, with weights that follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vharm.estimates import Kind
from pyro_vharm.inference.choice import Choice
from pyro_vharm.inference.evidence import run_choice
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.particles import Particles, effective_sample_size, heaviest

__all__ = ["PosteriorParticles", "draw_posteriors"]


class PosteriorParticles(NamedTuple):
    """The particles that carry each unit's posterior at θ₀, where they were drawn.

    Attributes:
        densities: the batch.
        latents: shape ``(particle, unit, dim)``.
        log_shares: normalised log weights at θ₀, shape ``(particle, unit)``.
        log_joint: log p(v, h; θ₀).
        kind: of the particles: drawn, or nodes.
        dilution: how many draws stand for an independent one, shape ``(unit,)``.
    """

    densities: UnitDensities
    latents: Tensor
    log_shares: Tensor
    log_joint: Tensor
    kind: Kind
    dilution: Tensor

    @property
    def random(self) -> bool:
        """Whether other random numbers would give other particles."""
        return self.kind > Kind.NUMERICAL

    def reweighted(self) -> Tensor:
        """Log weights at the present θ; the sum of a unit's estimates p(v; θ) / p(v; θ₀)."""
        with torch.no_grad():
            return self._log_weights()

    def share_left(self) -> Tensor:
        """Of their effective number at θ₀, what reweighting leaves at θ, shape ``(unit,)``."""
        return effective_sample_size(self.reweighted()) / effective_sample_size(self.log_shares)

    def proximal_loss(self, shares: Tensor, penalty: float) -> Tensor:
        """−Σ_u log Σ_p w_up(θ) + β Σ_u KL_u, of which EM's M-step is the case β = 1.

        KL_u = log Σ_p w_p(θ) − Σ_p w̃_p log w_p(θ), but for a constant, is that of the posterior at
        θ from the one where the shares w̃ were taken.
        """
        log_weights = self._log_weights()
        estimate = log_weights.logsumexp(0).sum()
        completed = torch.where(shares > 0, shares * log_weights, 0.0).sum()
        return (penalty - 1) * estimate - penalty * completed

    def _log_weights(self) -> Tensor:
        change = self.densities.log_joint(self.latents) - self.log_joint
        return self.log_shares + torch.where(torch.isneginf(self.log_shares), 0.0, change)

    def loss(self, shares: Tensor) -> Tensor:
        """−Σ_u Σ_p w̃_up log p(v_u, h_up; θ)."""
        log_joint = self.densities.log_joint(self.latents)
        return -torch.where(shares > 0, shares * log_joint, 0.0).sum()


def draw_posteriors(
    densities: Sequence[UnitDensities], choice: Choice, *, progress: bool = False
) -> list[PosteriorParticles]:
    """Particles of every batch at the present θ, by nodes where those resolve it."""
    _, runs = run_choice(densities, choice, progress=progress)
    return [_kept(batch, run) for batch, run in zip(densities, runs, strict=True)]


def _kept(densities: UnitDensities, run: Particles) -> PosteriorParticles:
    latents, shares = heaviest(run)
    with torch.no_grad():
        log_joint = densities.log_joint(latents)
    dilution = torch.full_like(shares[0], run.group_size)
    if run.chain_sizes is not None:
        dilution = (len(run.log_weights) / run.chain_sizes).clamp(min=1.0)
    return PosteriorParticles(densities, latents, shares.log(), log_joint, run.kind, dilution)
