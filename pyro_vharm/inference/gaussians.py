"""A Gaussian for each unit, or several, and how to match one to draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["FEW_DIMS", "Moments", "UnitGaussian", "UnitMixture", "match_gaussian", "multiply"]

FEW_DIMS = 4


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

    @property
    def fields(self) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor."""
        return self.mean, self.scale_tril

    def unwhiten(self, noise: Tensor) -> Tensor:
        """Mean + L · noise, for ``(particle, unit, dim)``."""
        return self.mean + multiply(self.scale_tril, noise)

    def whiten(self, latents: Tensor) -> Tensor:
        """L⁻¹ (latents − mean), for ``(particle, unit, dim)``."""
        centred = (latents - self.mean).permute(1, 2, 0)
        solved: Tensor = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False)
        return solved.permute(2, 0, 1)

    def select(self, units: Tensor) -> UnitGaussian:
        """That of some of the units."""
        return UnitGaussian(self.mean[units], self.scale_tril[units])

    def replaced(self, units: Tensor, other: UnitGaussian) -> UnitGaussian:
        """This one, but for some of the units the other."""
        pairs = zip(self.fields, other.fields, strict=True)
        return UnitGaussian(*(a.index_copy(0, units, b) for a, b in pairs))

    def widened(self, variance: Tensor) -> UnitGaussian:
        """As wide as makes weights of such relative variances, ``(unit,)``, were this the target.

        With (1 + δ) Σ for Σ, weights have E[w²]/E[w]² = ((1 + δ)/√(1 + 2δ))^dim, a quadratic
        equation for δ.
        """
        excess = (2 * variance.log1p() / self.mean.shape[-1]).expm1()
        delta = excess + (excess.square() + excess).sqrt()
        return UnitGaussian(self.mean, self.scale_tril * (1 + delta).sqrt()[:, None, None])

    @property
    def log_abs_det(self) -> Tensor:
        """Log |det L|, shape ``(unit,)``."""
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log density, shape ``(particle, unit)``."""
        return self.log_prob_whitened(self.whiten(latents))

    def log_prob_whitened(self, noise: Tensor) -> Tensor:
        """Log density of mean + L · noise, shape ``(particle, unit)``."""
        square = noise.square().sum(-1)
        return -0.5 * (square + noise.shape[-1] * math.log(2 * math.pi)) - self.log_abs_det


@dataclass(frozen=True)
class UnitMixture:
    """Σ_c s_c N(h; m_c, Σ_c) for each unit's unconstrained latents.

    Attributes:
        log_shares: log s_c, −∞ where a unit has fewer components, shape ``(component, unit)``.
        gaussians: the first component of every unit, then the second of every unit, and so on.
    """

    log_shares: Tensor
    gaussians: UnitGaussian

    @classmethod
    def single(cls, gaussian: UnitGaussian) -> UnitMixture:
        """Of one component for each unit."""
        return cls(torch.zeros_like(gaussian.mean[None, :, 0]), gaussian)

    def replaced(self, units: Tensor, other: UnitMixture) -> UnitMixture:
        """This one, but for some of the units the other."""
        count = max(len(self.log_shares), len(other.log_shares))
        own, further = self._padded(count), other._padded(count)
        every = torch.arange(count * own.log_shares.shape[1], device=units.device)
        places = every.reshape(count, -1)[:, units].flatten()
        log_shares = own.log_shares.index_copy(1, units, further.log_shares)
        return UnitMixture(log_shares, own.gaussians.replaced(places, further.gaussians))

    def _padded(self, count: int) -> UnitMixture:
        """With further components, equal to the first, that have no share."""
        shape = self.log_shares.shape
        more = count - shape[0]
        log_shares = nn.functional.pad(self.log_shares, (0, 0, 0, more), value=-math.inf)
        fields = (
            torch.cat([field, *[field[: shape[1]]] * more]) for field in self.gaussians.fields
        )
        return UnitMixture(log_shares, UnitGaussian(*fields))

    def sample(self, num_particles: int) -> Tensor:
        """Draws of shape ``(particle, unit, dim)``."""
        shares = self.log_shares.exp().T
        chosen = torch.multinomial(shares, num_particles, replacement=True).T
        noise = torch.randn(
            num_particles,
            *self.gaussians.mean[: len(shares)].shape,
            dtype=self.log_shares.dtype,
            device=self.log_shares.device,
        )
        each = self.gaussians.unwhiten(self._repeat(noise)).unflatten(1, self.log_shares.shape)
        index = chosen[:, None, :, None].expand(-1, 1, -1, each.shape[-1])
        drawn: Tensor = each.gather(1, index)[:, 0]
        return drawn

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log density, shape ``(particle, unit)``."""
        each = self.gaussians.log_prob(self._repeat(latents)).unflatten(1, self.log_shares.shape)
        total: Tensor = torch.logsumexp(each + self.log_shares, 1)
        return total

    def distance(self, latents: Tensor) -> Tensor:
        """Standard deviations to the mean of the nearest component, shape ``(particle, unit)``."""
        whitened = self.gaussians.whiten(self._repeat(latents))
        each: Tensor = whitened.norm(dim=-1).unflatten(1, self.log_shares.shape)
        return each.masked_fill(torch.isneginf(self.log_shares), math.inf).amin(1)

    def _repeat(self, latents: Tensor) -> Tensor:
        """``(particle, unit, dim)`` for every component, ``(particle, component · unit, dim)``."""
        return latents.repeat(1, len(self.log_shares), 1)

    def select(self, units: Tensor) -> UnitMixture:
        """That of some of the units."""
        shape = self.log_shares.shape
        fields = (
            field.unflatten(0, shape)[:, units].flatten(0, 1) for field in self.gaussians.fields
        )
        return UnitMixture(self.log_shares[:, units], UnitGaussian(*fields))

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log shares, means and Cholesky factors."""
        return self.log_shares, *self.gaussians.fields

    @property
    def moments(self) -> UnitGaussian:
        """The Gaussian of each unit with the mixture's mean and covariance."""
        mean, within = self._mean_and_covariance_within()
        apart = self.gaussians.mean.unflatten(0, self.log_shares.shape) - mean
        shares = self.log_shares.exp()[..., None, None]
        between = (shares * apart[..., :, None] * apart[..., None, :]).sum(0)
        return UnitGaussian(mean, torch.linalg.cholesky(within + between))

    @property
    def within(self) -> UnitGaussian:
        """The Gaussian with the mixture's mean and the mean of its components' covariances."""
        mean, covariance = self._mean_and_covariance_within()
        return UnitGaussian(mean, torch.linalg.cholesky(covariance))

    def _mean_and_covariance_within(self) -> tuple[Tensor, Tensor]:
        shape, shares = self.log_shares.shape, self.log_shares.exp()
        means, scale_trils = (field.unflatten(0, shape) for field in self.gaussians.fields)
        covariances = scale_trils @ scale_trils.mT
        return (shares[..., None] * means).sum(0), (shares[..., None, None] * covariances).sum(0)


def multiply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Matrices ``(unit, dim, dim)`` times vectors ``(particle, unit, dim)``, unit by unit.

    In few dims by elementwise products, which a compiler fuses with what comes before and after.
    """
    if matrix.shape[-1] > FEW_DIMS:
        product: Tensor = torch.einsum("uij,puj->pui", matrix, vectors)
        return product
    return (matrix * vectors.unsqueeze(-2)).sum(-1)


class Moments:
    """Mean and sum of outer products about it, of draws that come in passes."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.outer = torch.tensor(0.0)

    def add(self, draws: Tensor) -> None:
        """Take in draws ``(particle, unit, dim)`` (Chan, Golub, LeVeque, 1983)."""
        count, mean = len(draws), draws.mean(0)
        centred = draws - mean
        outer = torch.einsum("pui,puj->uij", centred, centred)
        if not self.count:
            self.count, self.mean, self.outer = count, mean, outer
            return
        total, apart = self.count + count, mean - self.mean
        between = apart[..., :, None] * apart[..., None, :] * (self.count * count / total)
        self.outer = self.outer + outer + between
        self.mean = self.mean + apart * (count / total)
        self.count = total

    def gaussian(self) -> UnitGaussian:
        """The Gaussian with these moments, correlations shrunk; see `match_gaussian`."""
        covariance = self.outer / self.count
        deviation = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        floor = torch.finfo(deviation.dtype).eps ** 0.5 * (1 + self.mean.abs())
        deviation = torch.maximum(deviation, floor)
        correlation = covariance / (deviation[..., :, None] * deviation[..., None, :])
        eye = torch.eye(self.mean.shape[-1], dtype=self.mean.dtype, device=self.mean.device)
        off = correlation * (1 - eye)
        variance = ((1 - off.square()).square() * (1 - eye)).sum((-1, -2)) / max(self.count - 1, 1)
        share = (variance / off.square().sum((-1, -2)).clamp(min=1e-30)).clamp(1e-4, 1.0)
        shrunk = off * (1 - share)[:, None, None] + eye
        return UnitGaussian(self.mean, deviation[..., None] * torch.linalg.cholesky(shrunk))


def match_gaussian(*draws: Tensor) -> UnitGaussian:
    """Match mean and covariance of each unit's draws, with correlations shrunk toward 0.

    The share of shrinkage is the estimated optimum Σ var(r_ij) / Σ r_ij² over pairs i ≠ j
    ("A Shrinkage Approach to Large-Scale Covariance Matrix Estimation", Schäfer, Strimmer, 2005),
    so draws of a mean-field guide give a diagonal matrix, and those of a correlated one keep
    their correlations.

    Args:
        draws: one or more tensors of shape ``(particle, unit, dim)``.
    """
    moments = Moments()
    for part in draws:
        moments.add(part)
    return moments.gaussian()
