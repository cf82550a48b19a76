"""The quadratic model of log evidence around θ̂: what it predicts, and where it says nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vharm.diagnostics.scores import PosteriorScores

__all__ = ["Curvature", "Prediction", "analyse_curvature", "predict_gain", "predict_slope"]

_LEAST_SHARE = 1e-4
_NOISY = 3.0
_UNUSED = 1e-12
_ADDED = 1e-3


@dataclass(frozen=True)
class Curvature:
    """−∇²ℓ at θ̂, in coordinates where the complete data's information is the identity.

    Attributes:
        basis: shape ``(k, r)``: column i is a direction in which the complete data have unit
            information and the observed data have `shares` of it; different columns share nothing.
        shares: share of information that is left when h is not seen, shape ``(r,)``. At most 1 up
            to noise where the model is right; negative where ℓ curves upward.
        errors: standard errors of the shares, from the particles.
    """

    basis: Tensor
    shares: Tensor
    errors: Tensor

    @property
    def limits(self) -> Tensor:
        """Below this a share cannot be told from 0."""
        return (_NOISY * self.errors).clamp(min=_LEAST_SHARE)

    @property
    def usable(self) -> Tensor:
        """Directions in which ℓ curves downward, beyond noise."""
        return self.shares > self.limits

    @property
    def upward(self) -> Tensor:
        """Directions in which ℓ curves upward, beyond noise: θ̂ is at or near a saddle."""
        return self.shares < -self.limits

    @property
    def flat(self) -> Tensor:
        """Directions in which ℓ does not curve: symmetries, and parameters at a boundary."""
        return ~(self.usable | self.upward)

    @property
    def steepest(self) -> Tensor:
        """The direction in which ℓ curves upward most, as long as one of its standard errors."""
        least = self.shares.argmin()
        return self.basis[:, least] / self.shares[least].abs().clamp(min=1.0).sqrt()

    @property
    def covariance(self) -> Tensor:
        """Inverse of the information where it is usable, 0 elsewhere, shape ``(k, k)``."""
        kept = self.basis[:, self.usable]
        return kept / self.shares[self.usable] @ kept.T


def analyse_curvature(first: PosteriorScores, second: PosteriorScores) -> Curvature:
    """Louis's information in units of the complete data's, from two independent estimates.

    The generalised eigenvalues λ of the observed information I with respect to C = Σ_u E[G Gᵀ] do
    not change with the parameters' coordinates or scales. 1 − λ is the rate at which EM converges.
    Where latents are summed out, C can be next to nothing in a direction in which ℓ curves, as
    between two classes that are alike: a thousandth of |I| is added to it.
    """
    complete = (first.complete + second.complete) / 2
    both = torch.stack([first.observed_information, second.observed_information])
    scale = (complete.diagonal() + both.mean(0).diagonal().abs()).clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    outer = scale * scale[:, None]
    measure = complete / outer + _ADDED * _absolute((both / outer).mean(0))
    values, vectors = torch.linalg.eigh(measure)
    kept = values > _UNUSED * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    white = vectors[:, kept] / values[kept].sqrt()
    each = white.T @ (both / outer) @ white
    shares, turned = torch.linalg.eigh(each.mean(0))
    apart = turned.T @ (each[0] - each[1]) @ turned / 2
    return Curvature((white / scale[:, None]) @ turned, shares, apart.norm(dim=1))


def _absolute(matrix: Tensor) -> Tensor:
    """The positive matrix with the same directions of curvature."""
    values, vectors = torch.linalg.eigh(matrix)
    positive: Tensor = vectors * values.abs() @ vectors.T
    return positive


@dataclass(frozen=True)
class Prediction:
    """½ sᵀ I⁻¹ s, and the step that would gain it.

    Attributes:
        value: in nats; may be negative by chance where s is 0.
        mc_error: its standard error from the particles.
        step: I⁻¹ s, shape ``(k,)``.
        step_noise: its covariance from the particles, shape ``(k, k)``.
    """

    value: float
    mc_error: float
    step: Tensor
    step_noise: Tensor

    @property
    def is_seen(self) -> bool:
        """Whether it is more than score noise makes."""
        return self.value > 2 * self.mc_error


def predict_gain(
    first: PosteriorScores, second: PosteriorScores, curvature: Curvature
) -> Prediction:
    """What a Newton step from θ̂ would gain, in nats, where ℓ curves downward."""
    usable = curvature.usable
    return _crossed(first, second, curvature.basis[:, usable], 1 / curvature.shares[usable])


def predict_slope(
    first: PosteriorScores, second: PosteriorScores, curvature: Curvature
) -> Prediction:
    """The same for a step C⁻¹ s, as EM would make it, along the flat directions: at the least."""
    flat = curvature.basis[:, curvature.flat]
    return _crossed(first, second, flat, torch.ones_like(flat[0]))


def _crossed(
    first: PosteriorScores, second: PosteriorScores, basis: Tensor, weights: Tensor
) -> Prediction:
    """½ Σ_i w_i a_i a'_i with a = Bᵀ s, crossed over two independent estimates.

    Noise of the score adds nothing in expectation. With N and N' the covariances of the noise,
    var = ¼ [(wa)ᵀ (N + N') (wa) + tr(W N W N')]; where a stands for its mean, the other estimate
    of it has noise of its own, so that tr(W N W N') comes in twice too much and is taken off.
    """
    a, b = weights * (first.total @ basis), weights * (second.total @ basis)
    noise = [basis.T @ part.noise @ basis for part in (first, second)]
    value = 0.5 * float((a * b / weights).sum())
    both = float(((weights[:, None] * noise[0] * weights) * noise[1]).sum())
    crossed = float(b @ noise[0] @ b + a @ noise[1] @ a)
    variance = max(crossed - both, both) / 4
    kept_noise = weights[:, None] * ((noise[0] + noise[1]) / 4) * weights
    return Prediction(
        value, math.sqrt(max(variance, 0.0)), basis @ ((a + b) / 2), basis @ kept_noise @ basis.T
    )
