"""Harmed state space models, each one joint unit: a mean field over time, or across two chains."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.continuous_models import mean_field_gap
from benchmarks.exact_optima import HarmedModel, Values, generator, highest, maximise, randn, tensor

__all__ = ["autoregression", "two_chains", "two_chains_near"]

_POSITIVE, _UNIT = constraints.positive, constraints.unit_interval


def _correlation(decay: Tensor, length: int) -> Tensor:
    """Of a stationary AR(1) chain, λ^|i − j|."""
    order = torch.arange(length)
    return decay.pow((order[:, None] - order).abs())


def _noisy(covariance: Tensor, noise: Tensor | float) -> Tensor:
    variance = torch.as_tensor(noise, dtype=covariance.dtype).square()
    return covariance + variance * torch.eye(len(covariance), dtype=covariance.dtype)


def _normal(covariance: Tensor) -> dist.MultivariateNormal:
    zeros = covariance.new_zeros(len(covariance))
    return dist.MultivariateNormal(zeros, scale_tril=torch.linalg.cholesky(covariance))


_NOISE = 0.6


def autoregression(length: int = 40, *, seed: int = 0) -> HarmedModel:
    """An AR(1) chain h with decay λ and scale τ, v_t | h ~ N(h_t, 0.6²); mean field over time."""
    source = generator(seed)
    chain = torch.linalg.cholesky(_correlation(tensor(0.9), length))
    v = 1.5 * chain @ randn(length, generator=source) + _NOISE * randn(length, generator=source)

    def covariance(values: Mapping[str, Tensor]) -> Tensor:
        return values["scale"].square() * _correlation(values["decay"], length)

    def model(v: Tensor) -> None:
        decay = pyro.param("decay", v.new_tensor(0.5), constraint=_UNIT)
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=_POSITIVE)
        h = pyro.sample("h", _normal(covariance({"decay": decay, "scale": scale})))
        pyro.sample("v", dist.Normal(h, _NOISE).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros_like(v))
        spread = pyro.param("spread", torch.full_like(v, 0.5), constraint=_POSITIVE)
        pyro.sample("h", dist.Normal(loc, spread).to_event(1))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        density: Tensor = _normal(_noisy(covariance(values), _NOISE)).log_prob(v)
        return density

    def precision(values: Mapping[str, Tensor]) -> Tensor:
        return _noisy(covariance(values).inverse(), 1 / _NOISE)

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - mean_field_gap(precision(values))

    constrained = {"decay": _UNIT, "scale": _POSITIVE}
    starts = [
        {"decay": tensor(decay), "scale": tensor(scale)}
        for decay, scale in ((0.9, 1.5), (0.5, 1.0), (0.2, 1.0))
    ]
    learned = highest(bound, starts, constrained)
    best = highest(log_evidence, [*starts, learned], constrained)
    P = precision(learned)
    fitted = {
        "loc": torch.linalg.solve(P, v / _NOISE**2),
        "spread": P.diagonal().rsqrt(),
    }
    height = float(bound(learned))
    return HarmedModel(
        "AR(1), mean field over time",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


_LENGTH, _SLOW, _FAST, _SMALL_NOISE = 60, 0.95, -0.2, 0.4


def two_chains(*, seed: int = 0) -> HarmedModel:
    """v_t = w₁h₁ₜ + w₂h₂ₜ + noise of two AR(1) chains; a full Gaussian for each chain.

    A mean field across chains. Where a weight is 0 one chain is dead and the bound is tight: that
    is where L is highest. See "Two Problems with Variational Expectation Maximisation for
    Time-Series Models", Turner, Sahani (2011).
    """
    return _two_chains(seed, near=False)


def two_chains_near(*, seed: int = 0) -> HarmedModel:
    """The same at the local maximum of L where both chains live: L is lower, evidence higher.

    Raises:
        ArithmeticError: if the data of this seed have no such maximum.
    """
    return _two_chains(seed, near=True)


def _two_chains(seed: int, near: bool) -> HarmedModel:
    chains = [_correlation(tensor(decay), _LENGTH) for decay in (_SLOW, _FAST)]
    source = generator(seed)
    paths = [torch.linalg.cholesky(K) @ randn(_LENGTH, generator=source) for K in chains]
    v = paths[0] + paths[1] + _SMALL_NOISE * randn(_LENGTH, generator=source)
    inverses = [K.inverse() for K in chains]
    normals = [_normal(K) for K in chains]

    def model(v: Tensor) -> None:
        weights = pyro.param("weights", v.new_ones(2))
        slow, fast = pyro.sample("slow", normals[0]), pyro.sample("fast", normals[1])
        loc = weights[0] * slow + weights[1] * fast
        pyro.sample("v", dist.Normal(loc, _SMALL_NOISE).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        for name in ("slow", "fast"):
            loc = pyro.param(f"{name}_loc", torch.zeros_like(v))
            tril = pyro.param(
                f"{name}_tril",
                torch.eye(_LENGTH, dtype=v.dtype),
                constraint=constraints.lower_cholesky,
            )
            pyro.sample(name, dist.MultivariateNormal(loc, scale_tril=tril))

    def covariance(values: Mapping[str, Tensor]) -> Tensor:
        first, second = values["weights"].square()
        return _noisy(first * chains[0] + second * chains[1], _SMALL_NOISE)

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        density: Tensor = _normal(covariance(values)).log_prob(v)
        return density

    def blocks(values: Mapping[str, Tensor]) -> list[Tensor]:
        """Of the posterior's precision, one for each chain."""
        pairs = zip(inverses, values["weights"], strict=True)
        return [_noisy(inverse, weight / _SMALL_NOISE) for inverse, weight in pairs]

    def bound(values: Values) -> Tensor:
        """|P| = |K₁|⁻¹ |K₂|⁻¹ |cov(v)| / |noise|."""
        joint = covariance(values) / _SMALL_NOISE**2
        log_det = joint.logdet() - sum(K.logdet() for K in chains)
        each = torch.stack([block.logdet() for block in blocks(values)]).sum()
        return log_evidence(values) - 0.5 * (each - log_det)

    alive = {"weights": tensor(1.0, 1.0)}
    starts = [{"weights": tensor(*w)} for w in product((0.01, 0.3, 1.0, 3.0), repeat=2)]
    learned = maximise(bound, alive) if near else highest(bound, starts)
    if bool((learned["weights"].abs() < 0.1).any()) == near:
        raise ArithmeticError(f"seed {seed} has no maximum of the kind that was asked for")
    best = highest(log_evidence, [alive, *starts])
    height = float(bound(learned))
    fitted = _chain_posteriors(blocks(learned), learned["weights"], v, covariance(learned), chains)
    return HarmedModel(
        f"two chains, {'local maximum of L' if near else 'global maximum of L'}",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


def _chain_posteriors(
    blocks: list[Tensor], weights: Tensor, v: Tensor, covariance: Tensor, chains: list[Tensor]
) -> Values:
    """The best mean field: the posterior's means, and the inverses of its precision's blocks."""
    explained = torch.linalg.solve(covariance, v)
    fitted = {}
    for name, block, weight, K in zip(("slow", "fast"), blocks, weights, chains, strict=True):
        fitted[f"{name}_loc"] = weight * K @ explained
        fitted[f"{name}_tril"] = torch.linalg.cholesky(block.inverse())
    return fitted
