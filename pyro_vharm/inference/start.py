"""Start densities: a Gaussian per unit matched to draws, with a share of prior mixed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.model.densities import UnitDensities

_ROWS_PER_PASS = 2**17

__all__ = ["StartDensity", "UnitGaussian", "match_gaussian", "match_start"]


@dataclass(frozen=True)
class UnitGaussian:
    """A Gaussian for each unit's unconstrained latents.

    Attributes:
        mean: shape ``(unit, dim)``.
        scale_tril: Cholesky factor of the covariance, shape ``(unit, dim, dim)``.
    """

    mean: Tensor
    scale_tril: Tensor

    def sample(self, num_particles: int) -> Tensor:
        """Draws of shape ``(particle, unit, dim)``."""
        noise = torch.randn(
            num_particles, *self.mean.shape, dtype=self.mean.dtype, device=self.mean.device
        )
        return self.unwhiten(noise)

    def unwhiten(self, noise: Tensor) -> Tensor:
        """Mean + L · noise."""
        return self.mean + self.scale(noise)

    def scale(self, noise: Tensor) -> Tensor:
        """L · noise, for ``(particle, unit, dim)``."""
        scaled: Tensor = torch.einsum("uij,puj->pui", self.scale_tril, noise)
        return scaled

    def scale_transposed(self, vector: Tensor) -> Tensor:
        """Lᵀ · vector, for ``(particle, unit, dim)``."""
        scaled: Tensor = torch.einsum("uij,pui->puj", self.scale_tril, vector)
        return scaled

    def whiten(self, latents: Tensor) -> Tensor:
        """L⁻¹ (latents − mean), for ``(particle, unit, dim)``."""
        centred = (latents - self.mean).permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False)
        return solved.permute(2, 0, 1)

    @property
    def log_abs_det(self) -> Tensor:
        """Log |det L|, shape ``(unit,)``."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log density, shape ``(particle, unit)``."""
        square = self.whiten(latents).square().sum(-1)
        return -0.5 * (square + latents.shape[-1] * math.log(2 * math.pi)) - self.log_abs_det


def match_gaussian(draws: Tensor) -> UnitGaussian:
    """Match mean and covariance of each unit's draws, with correlations shrunk toward 0.

    The share of shrinkage is the estimated optimum Σ var(r_ij) / Σ r_ij² over pairs i ≠ j
    ("A Shrinkage Approach to Large-Scale Covariance Matrix Estimation", Schäfer, Strimmer, 2005),
    so draws of a mean-field guide give a diagonal matrix, and those of a correlated one keep
    their correlations.

    Args:
        draws: shape ``(particle, unit, dim)``.
    """
    count, _, dim = draws.shape
    mean = draws.mean(0)
    centred = draws - mean
    deviation = centred.square().mean(0).sqrt()
    floor = torch.finfo(draws.dtype).eps ** 0.5 * (1 + mean.abs())
    deviation = torch.maximum(deviation, floor)
    standard = centred / deviation
    correlation = torch.einsum("pui,puj->uij", standard, standard) / count
    eye = torch.eye(dim, dtype=draws.dtype, device=draws.device)
    off = correlation * (1 - eye)
    variance = ((1 - off.square()).square() * (1 - eye)).sum((-1, -2)) / (count - 1)
    share = (variance / off.square().sum((-1, -2)).clamp(min=1e-30)).clamp(1e-4, 1.0)
    shrunk = off * (1 - share)[:, None, None] + eye
    return UnitGaussian(mean, deviation[..., None] * torch.linalg.cholesky(shrunk))


@dataclass(frozen=True)
class StartDensity:
    """(1 − ε) N(h; m_u, Σ_u) + ε p(h; θ): normalised, easy to draw from, and as wide as the prior.

    Attributes:
        gaussian: the Gaussian part.
        prior_share: ε; guards against a guide that sits on one of several modes.
    """

    gaussian: UnitGaussian
    prior_share: float

    def sample(self, densities: UnitDensities, num_particles: int) -> Tensor:
        """Draws of shape ``(particle, unit, dim)``."""
        draws = self.gaussian.sample(num_particles)
        if self.prior_share == 0:
            return draws
        with torch.no_grad():
            prior = densities.draw_prior(num_particles).latents
        chosen = torch.rand(draws.shape[:2], device=draws.device) < self.prior_share
        return torch.where(chosen[..., None], prior, draws)

    def log_prob(self, latents: Tensor, log_prior: Tensor) -> Tensor:
        """Log density, shape ``(particle, unit)``, given log p(h; θ) at the same latents."""
        gaussian = self.gaussian.log_prob(latents)
        if self.prior_share == 0:
            return gaussian
        return torch.logaddexp(
            gaussian + math.log1p(-self.prior_share), log_prior + math.log(self.prior_share)
        )


def match_start(densities: UnitDensities, prior_share: float) -> StartDensity:
    """Match the start density to draws from the guide, or from the prior where there is none."""
    wanted = 200 + 10 * densities.dim
    per_pass = max(_ROWS_PER_PASS // densities.num_units, 1)
    with torch.no_grad():
        sizes = [min(per_pass, wanted - done) for done in range(0, wanted, per_pass)]
        latents = torch.cat([densities.draw_latents(size) for size in sizes])
    return StartDensity(match_gaussian(latents), prior_share)
