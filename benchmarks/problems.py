"""The problems: each log joint three times over, as a Pyro model, in torch and in JAX."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

if find_spec("jax") is not None:
    import jax
    import jax.numpy as jnp

__all__ = ["LATENT", "NUM_PARTICLES", "PROBLEMS", "Problem", "vae_log_joint_jax"]

LATENT = "latent"
NUM_PARTICLES = 16
TOY_DIM, TOY_SCALE = 2, 0.3
LATENT_DIM, HIDDEN, PIXELS, NUM_IMAGES = 50, 200, 784, 100

_LOG_2PI = math.log(2 * math.pi)
_TOY_CONSTANT = -TOY_DIM * (_LOG_2PI + math.log(TOY_SCALE))


@dataclass(frozen=True)
class Problem:
    """One log joint log p(v, h) by three ways of writing it, and where to evaluate it.

    Attributes:
        model: the Pyro model, with one latent site `LATENT` in a plate of units.
        data: the arguments of the model.
        latents: h, shape ``(particle, unit, dim)``.
        torch_log_joint: ``(latents, *arrays)`` → log p(v, h), shape ``(particle, unit)``.
        jax_log_joint: the same for JAX arrays.
        arrays: what the formulas take beside the latents: data and weights.
    """

    model: Callable[..., None]
    data: tuple[Tensor, ...]
    latents: Tensor
    torch_log_joint: Callable[..., Tensor]
    jax_log_joint: Callable[..., Any]
    arrays: tuple[Tensor, ...]


def _toy_model(observed: Tensor) -> None:
    with pyro.plate("units", len(observed)):
        prior = dist.Normal(observed.new_zeros(TOY_DIM), 1.0).to_event(1)
        latent = pyro.sample(LATENT, prior)
        pyro.sample("observed", dist.Normal(latent.square(), TOY_SCALE).to_event(1), obs=observed)


def _toy_torch(latents: Tensor, observed: Tensor) -> Tensor:
    residual = (observed - latents.square()) / TOY_SCALE
    return _TOY_CONSTANT - 0.5 * (latents.square() + residual.square()).sum(-1)


def _toy_jax(latents: Any, observed: Any) -> Any:
    residual = (observed - jnp.square(latents)) / TOY_SCALE
    return _TOY_CONSTANT - 0.5 * (jnp.square(latents) + jnp.square(residual)).sum(-1)


def _toy(num_units: int) -> Problem:
    """Two dims of h ~ N(0, 1), v | h ~ N(h², 0.3²): two modes per dim."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(num_units, TOY_DIM, generator=generator)
    noise = torch.randn(num_units, TOY_DIM, generator=generator)
    observed = truth.square() + TOY_SCALE * noise
    latents = torch.randn(NUM_PARTICLES, num_units, TOY_DIM, generator=generator)
    return Problem(_toy_model, (observed,), latents, _toy_torch, _toy_jax, (observed,))


def _vae_torch(latents: Tensor, signs: Tensor, *weights: Tensor) -> Tensor:
    weight_in, bias_in, weight_out, bias_out = weights
    logits = linear(linear(latents, weight_in, bias_in).tanh(), weight_out, bias_out)
    log_prior = -0.5 * latents.shape[-1] * _LOG_2PI - 0.5 * latents.square().sum(-1)
    return log_prior + logsigmoid(signs * logits).sum(-1)


def vae_log_joint_jax(latents: Any, signs: Any, *weights: Any) -> Any:
    """Log p(v, h) of a decoder with one hidden layer; signs are +1 for white pixels, else −1."""
    weight_in, bias_in, weight_out, bias_out = weights
    logits = jnp.tanh(latents @ weight_in.T + bias_in) @ weight_out.T + bias_out
    log_prior = -0.5 * latents.shape[-1] * _LOG_2PI - 0.5 * jnp.square(latents).sum(-1)
    return log_prior + jax.nn.log_sigmoid(signs * logits).sum(-1)


def _vae() -> Problem:
    """A decoder 50 → 200 → 784 with tanh, and Bernoulli pixels: log p(v | h) = Σ log σ(±logit)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Linear(LATENT_DIM, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))
        images = torch.bernoulli(torch.full((NUM_IMAGES, PIXELS), 0.5))
        latents = torch.randn(NUM_PARTICLES, NUM_IMAGES, LATENT_DIM)

    def model(images: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("images", len(images)):
            prior = dist.Normal(images.new_zeros(LATENT_DIM), 1.0).to_event(1)
            pixels = dist.Bernoulli(logits=decoder(pyro.sample(LATENT, prior))).to_event(1)
            pyro.sample("image", pixels, obs=images)

    weights = [weight.detach() for weight in decoder.parameters()]
    return Problem(
        model, (images,), latents, _vae_torch, vae_log_joint_jax, (2 * images - 1, *weights)
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "toy-1000": lambda: _toy(1000),
    "toy-10": lambda: _toy(10),
    "vae": _vae,
}
