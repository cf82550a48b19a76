"""Models that variational inference does not harm: L and log evidence are highest at the same θ.

In the first three the guide's family holds the posterior at some θ*; in the last a Gaussian guide
is so near the posterior that learning loses about a thousandth of a nat.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.continuous_models import mean_field_gap
from benchmarks.exact_optima import (
    HarmedModel,
    Values,
    generator,
    maximise,
    randn,
    split_values,
    tensor,
)

__all__ = ["free_causes", "poisson_intercepts", "principal_components", "random_effects"]

_POSITIVE = constraints.positive
_REPEATS = 3


def random_effects(num_units: int = 40, *, seed: int = 0) -> HarmedModel:
    """Means of units, h ~ N(μ, τ²), v_j | h ~ N(h, s²); the guide holds the posterior."""
    source = generator(seed)
    h, noise = randn(num_units, 1, generator=source), randn(num_units, _REPEATS, generator=source)
    v = 0.5 + 0.8 * h + 0.7 * noise
    means, within = v.mean(1), (v - v.mean(1, keepdim=True)).square().sum()

    def model(v: Tensor) -> None:
        mu = pyro.param("mu", v.new_tensor(0.0))
        tau = pyro.param("tau", v.new_tensor(1.0), constraint=_POSITIVE)
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(mu, tau))
            loc = h[..., None].expand(*h.shape, _REPEATS)
            pyro.sample("v", dist.Normal(loc, scale).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        slope = pyro.param("slope", v.new_tensor(0.5))
        offset = pyro.param("offset", v.new_zeros(()))
        spread = pyro.param("spread", v.new_tensor(0.5), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(slope * v.mean(1) + offset, spread))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        """Of the means of units, and of the differences within."""
        variance, inner = values["tau"].square(), values["scale"].square()
        between = dist.Normal(values["mu"], (variance + inner / _REPEATS).sqrt()).log_prob(means)
        count = num_units * (_REPEATS - 1)
        rest = -0.5 * (within / inner + count * (2 * math.pi * inner).log())
        total: Tensor = between.sum() + rest - 0.5 * num_units * math.log(_REPEATS)
        return total

    def bound(values: Values) -> Tensor:
        loc = values["slope"] * means + values["offset"]
        variance, inner = values["spread"].square(), values["scale"].square()
        squares = within + _REPEATS * ((means - loc).square() + variance).sum()
        log_likelihood = -0.5 * (squares / inner + v.numel() * (2 * math.pi * inner).log())
        prior = dist.Normal(values["mu"], values["tau"])
        divergence = torch.distributions.kl_divergence(dist.Normal(loc, values["spread"]), prior)
        return log_likelihood - divergence.sum()

    start = {"mu": tensor(0.5), "tau": tensor(0.8), "scale": tensor(0.7)}
    free = {"slope": tensor(0.5), "offset": tensor(0.0), "spread": tensor(0.5)}
    positive = dict.fromkeys(("tau", "scale", "spread"), _POSITIVE)
    found = maximise(bound, start | free, positive)
    best = maximise(log_evidence, start, positive)
    learned, fitted = split_values(found, best)
    height = float(bound(found))
    return HarmedModel(
        "family holds the posterior",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


_OBSERVED, _FACTORS = 5, 2


def principal_components(num_units: int = 40, *, seed: int = 0) -> HarmedModel:
    """Probabilistic PCA: h ~ N(0, I₂), v | h ~ N(Wh, s² I₅), W free; mean field.

    W may be rotated until WᵀW is diagonal, where mean field is exact. θ̂ is the closed form of
    "Probabilistic Principal Component Analysis", Tipping, Bishop (1999), and θ* another rotation.
    """
    source = generator(seed)
    weights = randn(_OBSERVED, _FACTORS, generator=source) * tensor(1.5, 0.8)
    h, noise = (randn(num_units, dim, generator=source) for dim in (_FACTORS, _OBSERVED))
    v = h @ weights.T + 0.6 * noise
    eye = torch.eye(_FACTORS, dtype=v.dtype)

    def model(v: Tensor) -> None:
        weights = pyro.param("weights", 0.5 * torch.eye(_OBSERVED, _FACTORS, dtype=v.dtype))
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(_FACTORS), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ weights.T, scale).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_full((_OBSERVED, _FACTORS), 0.1))
        scales = pyro.param("scales", v.new_full((_FACTORS,), 0.7), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v @ slopes, scales).to_event(1))

    def precision(values: Mapping[str, Tensor]) -> Tensor:
        return eye + values["weights"].T @ values["weights"] / values["scale"].square()

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        noise = values["scale"].square() * torch.eye(_OBSERVED, dtype=v.dtype)
        covariance = values["weights"] @ values["weights"].T + noise
        density: Tensor = (
            dist.MultivariateNormal(v.new_zeros(_OBSERVED), covariance).log_prob(v).sum()
        )
        return density

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - num_units * mean_field_gap(precision(values))

    roots, vectors = torch.linalg.eigh(v.T @ v / num_units)
    variance = roots[: _OBSERVED - _FACTORS].mean()
    columns = vectors[:, -_FACTORS:] * (roots[-_FACTORS:] - variance).sqrt()
    learned = {"weights": columns, "scale": variance.sqrt()}
    turn = torch.tensor([[math.cos(0.7), -math.sin(0.7)], [math.sin(0.7), math.cos(0.7)]])
    best = learned | {"weights": columns @ turn.double()}
    P = precision(learned)
    fitted = {"slopes": columns @ P.inverse() / variance, "scales": P.diagonal().rsqrt()}
    height = float(bound(learned))
    return HarmedModel(
        "probabilistic PCA",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


def free_causes(num_units: int = 60, *, seed: int = 0) -> HarmedModel:
    """Two causes with a weight each: v | h ~ N(a₁h₁ + a₂h₂, 1); mean field.

    Log evidence depends on a₁² + a₂² alone; L is highest where one of the weights is 0. (The
    twin with one weight for both is harmed.)
    """
    v = randn(num_units, generator=generator(seed)) * math.sqrt(1 + 2 * 1.5**2)

    def model(v: Tensor) -> None:
        a = pyro.param("a", v.new_tensor([1.2, 0.8]))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal((a * h).sum(-1), 1.0), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_tensor([0.3, 0.3]))
        scales = pyro.param("scales", v.new_tensor([0.7, 0.7]), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v[:, None] * slopes, scales).to_event(1))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        scale = (1 + values["a"].square().sum()).sqrt()
        density: Tensor = dist.Normal(0.0, scale).log_prob(v).sum()
        return density

    def bound(values: Values) -> Tensor:
        precision = torch.eye(2, dtype=v.dtype) + torch.outer(values["a"], values["a"])
        return log_evidence(values) - num_units * mean_field_gap(precision)

    signal = (v.square().mean() - 1).clamp(min=0)
    learned = {"a": torch.stack([signal.sqrt(), torch.zeros_like(signal)])}
    best = {"a": (signal / 2).sqrt().repeat(2)}
    fitted = {
        "slopes": learned["a"] / (1 + signal),
        "scales": torch.stack([(1 + signal).rsqrt(), torch.ones_like(signal)]),
    }
    height = float(bound(learned))
    return HarmedModel(
        "two causes, free",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


def poisson_intercepts(num_units: int = 40, *, seed: int = 0) -> HarmedModel:
    """Poisson regression with an intercept for each unit: v_j ~ Poisson(exp(b + βx_j + τh)).

    h ~ N(0, 1), and a Gaussian for each unit, under which E exp(τh) = exp(τm + τ²s²/2).
    """
    source = generator(seed)
    x = tensor(-1.0, -0.3, 0.4, 1.0)
    h = randn(num_units, generator=source)
    v = torch.poisson((0.8 + 0.4 * x + 0.7 * h[:, None]).exp(), generator=source)
    nodes = torch.linspace(-7.0, 7.0, 1401, dtype=v.dtype)
    log_prior = dist.Normal(0.0, 1.0).log_prob(nodes) + math.log(float(nodes[1] - nodes[0]))

    def model(v: Tensor) -> None:
        b, beta = pyro.param("b", v.new_tensor(1.5)), pyro.param("beta", v.new_tensor(0.0))
        tau = pyro.param("tau", v.new_tensor(0.7), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            rate = (b + beta * x + tau * h[..., None]).exp()
            pyro.sample("v", dist.Poisson(rate).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        loc = pyro.param("loc", v.new_zeros(len(v)))
        spread = pyro.param("spread", v.new_full((len(v),), 0.4), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(loc, spread))

    constant = (v + 1).lgamma().sum()

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        fixed = values["b"] + values["beta"] * x
        rise = values["tau"] * nodes
        seen = (v @ fixed)[:, None] + v.sum(1)[:, None] * rise
        expected = fixed.exp().sum() * rise.exp()
        total: Tensor = (log_prior + seen - expected).logsumexp(1).sum() - constant
        return total

    def bound(values: Values) -> Tensor:
        fixed = values["b"] + values["beta"] * x
        m, s2 = values["loc"], values["spread"].square()
        rise, half = values["tau"] * m, 0.5 * values["tau"].square() * s2
        log_likelihood = v @ fixed + v.sum(1) * rise - fixed.exp().sum() * (rise + half).exp()
        divergence = 0.5 * (m.square() + s2 - 1 - s2.log())
        return (log_likelihood - divergence).sum() - constant

    start = {"b": tensor(0.8), "beta": tensor(0.4), "tau": tensor(0.7)}
    free = {"loc": h, "spread": torch.full_like(h, 0.3)}
    positive = dict.fromkeys(("tau", "spread"), _POSITIVE)
    found = maximise(bound, start | free, positive)
    best = maximise(log_evidence, start, positive)
    learned, fitted = split_values(found, best)
    height = float(bound(found))
    return HarmedModel(
        "Poisson, random intercepts",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip
