"""Harmed models with Gaussian latents: one weight for two causes, factors, a square, the Nile."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.exact_optima import (
    HarmedModel,
    Values,
    generator,
    maximise,
    randn,
    split_values,
    tensor,
)
from examples import nile

__all__ = ["factor_analysis", "local_level", "mean_field_gap", "sign_symmetric", "two_causes"]

_POSITIVE = constraints.positive


def mean_field_gap(precision: Tensor) -> Tensor:
    """KL of the best mean-field Gaussian from N(μ, P⁻¹): ½ (Σ log P_ii − log |P|)."""
    gap: Tensor = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    return gap


def two_causes(num_units: int = 200, *, seed: int = 0) -> HarmedModel:
    """Two causes h ~ N(0, I) with one weight: v | h ~ N(a (h₁ + h₂), 1); mean field."""
    v = randn(num_units, generator=generator(seed)) * math.sqrt(1 + 2 * 1.5**2)

    def model(v: Tensor) -> None:
        a = pyro.param("a", v.new_tensor(1.0), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(a * h.sum(-1), 1.0), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_tensor([0.3, 0.3]))
        scales = pyro.param("scales", v.new_tensor([0.7, 0.7]), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v[:, None] * slopes, scales).to_event(1))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        scale = (1 + 2 * values["a"].square()).sqrt()
        density: Tensor = dist.Normal(0.0, scale).log_prob(v).sum()
        return density

    def bound(values: Values) -> Tensor:
        precision = torch.eye(2, dtype=v.dtype) + values["a"].square()
        return log_evidence(values) - len(v) * mean_field_gap(precision)

    start = {"a": tensor(1.0)}
    learned = maximise(bound, start, {"a": _POSITIVE})
    a = learned["a"]
    fitted = {
        "slopes": (a / (1 + 2 * a.square())).repeat(2),
        "scales": (1 + a.square()).rsqrt().repeat(2),
    }
    best = maximise(log_evidence, start, {"a": _POSITIVE})
    height = float(bound(learned))
    return HarmedModel(
        "two causes, tied", model, guide, (v,), log_evidence, learned, fitted, best, height, bound
    )


_CROSS, _INDICATORS = 0.5, 6


def _loadings(own: Tensor) -> Tensor:
    """Each indicator loads on its own factor freely, and on the other by a fixed amount."""
    first = torch.arange(_INDICATORS) < _INDICATORS // 2
    fixed = torch.full_like(own, _CROSS)
    return torch.stack([torch.where(first, own, fixed), torch.where(first, fixed, own)], -1)


def factor_analysis(num_units: int = 200, *, seed: int = 0) -> HarmedModel:
    """Confirmatory factor analysis with fixed cross-loadings, so no rotation is free; mean field.

    h ∈ R² standard normal, v | h ~ N(Λh, s² I) with v ∈ R⁶.
    """
    source = generator(seed)
    truth = _loadings(tensor(1.0, 0.9, 0.8, 1.0, 0.9, 0.8))
    h, noise = randn(num_units, 2, generator=source), randn(num_units, 6, generator=source)
    v = h @ truth.T + 0.7 * noise

    def model(v: Tensor) -> None:
        own = pyro.param("own", v.new_ones(_INDICATORS))
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ _loadings(own).T, scale).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_full((_INDICATORS, 2), 0.1))
        scales = pyro.param("scales", v.new_tensor([0.7, 0.7]), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v @ slopes, scales).to_event(1))

    def precision(values: Mapping[str, Tensor]) -> Tensor:
        loadings = _loadings(values["own"])
        return torch.eye(2, dtype=v.dtype) + loadings.T @ loadings / values["scale"].square()

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        loadings = _loadings(values["own"])
        noise = values["scale"].square() * torch.eye(_INDICATORS, dtype=v.dtype)
        marginal = dist.MultivariateNormal(v.new_zeros(_INDICATORS), loadings @ loadings.T + noise)
        density: Tensor = marginal.log_prob(v).sum()
        return density

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - len(v) * mean_field_gap(precision(values))

    start = {"own": tensor(1.0, 0.9, 0.8, 1.0, 0.9, 0.8), "scale": tensor(0.7)}
    learned = maximise(bound, start, {"scale": _POSITIVE})
    P, variance = precision(learned), learned["scale"].square()
    fitted = {
        "slopes": _loadings(learned["own"]) @ P.inverse() / variance,
        "scales": P.diagonal().rsqrt(),
    }
    best = maximise(log_evidence, start, {"scale": _POSITIVE})
    height = float(bound(learned))
    return HarmedModel(
        "factor analysis", model, guide, (v,), log_evidence, learned, fitted, best, height, bound
    )


def sign_symmetric(num_units: int = 100, *, seed: int = 0) -> HarmedModel:
    """A latent seen squared, h ~ N(0, 1), v | h ~ N(a h² + b, s²); a Gaussian for each unit."""
    source = generator(seed)
    h, noise = randn(num_units, generator=source), randn(num_units, generator=source)
    v = h.square() + 0.5 * noise
    nodes = torch.linspace(-8.0, 8.0, 4001, dtype=v.dtype)
    log_prior = dist.Normal(0.0, 1.0).log_prob(nodes) + math.log(float(nodes[1] - nodes[0]))

    def model(v: Tensor) -> None:
        a, b = pyro.param("a", v.new_tensor(1.0)), pyro.param("b", v.new_tensor(0.0))
        scale = pyro.param("scale", v.new_tensor(0.5), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(a * h.square() + b, scale), obs=v)

    def guide(v: Tensor) -> None:
        loc = pyro.param("loc", torch.ones_like(v))
        spread = pyro.param("spread", torch.full_like(v, 0.3), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(loc, spread))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        loc = values["a"] * nodes.square() + values["b"]
        log_likelihood = dist.Normal(loc, values["scale"]).log_prob(v[:, None])
        density: Tensor = (log_prior + log_likelihood).logsumexp(1).sum()
        return density

    def bound(values: Values) -> Tensor:
        a, residual = values["a"], v - values["b"]
        m, t = values["loc"].square(), values["spread"].square()
        squares = residual.square() - 2 * a * residual * (m + t)
        squares = squares + a.square() * (m.square() + 6 * m * t + 3 * t.square())
        log_joint = -values["scale"].log() - squares / (2 * values["scale"].square())
        entropy = values["spread"].log() + 0.5
        return (log_joint - 0.5 * math.log(2 * math.pi) - 0.5 * (m + t) + entropy).sum()

    start = {"a": tensor(1.0), "b": tensor(0.0), "scale": tensor(0.5)}
    free = {"loc": v.clamp(min=0.1).sqrt(), "spread": torch.full_like(v, 0.3)}
    found = maximise(bound, start | free, {"scale": _POSITIVE, "spread": _POSITIVE})
    best = maximise(log_evidence, start, {"scale": _POSITIVE})
    learned, fitted = split_values(found, best)
    height = float(bound(found))
    return HarmedModel(
        "sign-symmetric", model, guide, (v,), log_evidence, learned, fitted, best, height, bound
    )


def local_level() -> HarmedModel:
    """The Nile of ``examples/nile.py``: 100 states as one unit, and mean field."""
    flow = torch.tensor(sm.datasets.nile.load_pandas().data["volume"].to_numpy())
    order = torch.arange(len(flow), dtype=flow.dtype)
    steps = torch.minimum(order[:, None], order)

    def covariance(values: Mapping[str, Tensor]) -> Tensor:
        return 1e6 + values["level_variance"] * steps

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        noise = values["observation_variance"] * torch.eye(len(flow), dtype=flow.dtype)
        marginal = dist.MultivariateNormal(
            flow.new_full(flow.shape, 1e3), covariance(values) + noise
        )
        density: Tensor = marginal.log_prob(flow)
        return density

    def precision(values: Mapping[str, Tensor]) -> Tensor:
        noise = torch.eye(len(flow), dtype=flow.dtype) / values["observation_variance"]
        return covariance(values).inverse() + noise

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - mean_field_gap(precision(values))

    start = {"observation_variance": tensor(15000.0), "level_variance": tensor(1500.0)}
    positive = dict.fromkeys(start, _POSITIVE)
    learned = maximise(bound, start, positive)
    P = precision(learned)
    shift = torch.linalg.solve(P, (flow - 1e3) / learned["observation_variance"])
    fitted = {"loc": shift / 100, "scale": P.diagonal().rsqrt() / 100}
    best = maximise(log_evidence, start, positive)
    height = float(bound(learned))
    return HarmedModel(
        "Nile", nile.model, nile.guide, (flow,), log_evidence, learned, fitted, best, height, bound
    )
