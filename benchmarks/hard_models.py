"""Two models whose visible gap misleads: none with much harm, and much with none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from benchmarks.continuous_models import mean_field_gap
from benchmarks.exact_optima import HarmedModel, Values, generator, highest, maximise, randn, tensor

__all__ = ["known_weights", "vanished_variance"]

_POSITIVE = constraints.positive
_NEGLIGIBLE = 1e-5
_SHARED = 4


def vanished_variance(num_units: int = 150, *, seed: int = 0) -> HarmedModel:
    """Factor analysis whose first unique variance goes to 0, which makes mean field exact.

    h ∈ R² standard normal; v₁ | h ~ N(ah₁, ψ₁), and four v_j | h ~ N(b(h₁ + h₂), ψ_j). Mean field
    pays for the sum, unless v₁ tells h₁ exactly. L rises all the way as ψ₁ falls, so θ̂ is where
    all else is best at a ψ₁ of next to nothing.
    """
    source = generator(seed)
    h, noise = randn(num_units, 2, generator=source), randn(num_units, 5, generator=source)
    v = h @ _loadings(tensor(0.9), tensor(1.0)).T + tensor(0.8, 0.4, 0.5, 0.4, 0.5) * noise

    def model(v: Tensor) -> None:
        a = pyro.param("a", v.new_tensor(1.0), constraint=_POSITIVE)
        b = pyro.param("b", v.new_tensor(1.0), constraint=_POSITIVE)
        unique = pyro.param("unique", v.new_full((5,), 0.5), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            loc = h @ _loadings(a, b).T
            pyro.sample("v", dist.Normal(loc, unique.sqrt()).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_full((5, 2), 0.1))
        scales = pyro.param("scales", v.new_full((2,), 0.7), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v @ slopes, scales).to_event(1))

    def weighed(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        loadings = _loadings(values["a"], values["b"])
        return loadings, loadings / values["unique"][:, None]

    def precision(values: Mapping[str, Tensor]) -> Tensor:
        loadings, weighed_loadings = weighed(values)
        return torch.eye(2, dtype=v.dtype) + loadings.T @ weighed_loadings

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        loadings = _loadings(values["a"], values["b"])
        covariance = loadings @ loadings.T + values["unique"].diag()
        density: Tensor = dist.MultivariateNormal(v.new_zeros(5), covariance).log_prob(v).sum()
        return density

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - num_units * mean_field_gap(precision(values))

    def complete(values: Values) -> Values:
        unique = torch.cat([values["rest"].new_full((1,), _NEGLIGIBLE), values["rest"]])
        return {"a": values["a"], "b": values["b"], "unique": unique}

    positive = dict.fromkeys(("a", "b", "rest", "unique"), _POSITIVE)
    start = {"a": tensor(0.9), "b": tensor(1.0)}
    rest = {"rest": v.new_full((_SHARED,), 0.2)}
    learned = complete(maximise(lambda values: bound(complete(values)), start | rest, positive))
    begun = start | {"unique": v.new_full((5,), 0.25)}
    best = highest(log_evidence, [begun, learned], positive)
    if float(bound(maximise(bound, begun, positive))) > float(bound(learned)) + 0.1:
        raise ArithmeticError(f"seed {seed}: L is higher where no variance vanishes")
    _, slopes = weighed(learned)
    P = precision(learned)
    fitted = {"slopes": slopes @ P.inverse(), "scales": P.diagonal().rsqrt()}
    height = float(bound(learned))
    return HarmedModel(
        "factor analysis, a variance gone",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


def _loadings(a: Tensor, b: Tensor) -> Tensor:
    shared = torch.stack([b, b])
    return torch.stack([torch.stack([a, torch.zeros_like(a)]), *[shared] * _SHARED])


def known_weights(num_units: int = 60, *, seed: int = 0) -> HarmedModel:
    """Two causes whose weight is known, and only the mean b is learned; mean field.

    v | h ~ N(b + 2(h₁ + h₂), 1): the posterior's precision does not depend on b, so the gap is
    large and the same at every b, and there is no harm at all.
    """
    weight = 2.0
    v = 1.0 + randn(num_units, generator=generator(seed)) * math.sqrt(1 + 2 * weight**2)

    def model(v: Tensor) -> None:
        b = pyro.param("b", v.new_tensor(0.0))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(b + weight * h.sum(-1), 1.0), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_tensor([0.3, 0.3]))
        offset = pyro.param("offset", v.new_zeros(2))
        scales = pyro.param("scales", v.new_full((2,), 0.7), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v[:, None] * slopes + offset, scales).to_event(1))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        density: Tensor = dist.Normal(values["b"], math.sqrt(1 + 2 * weight**2)).log_prob(v).sum()
        return density

    gap = num_units * float(mean_field_gap(torch.eye(2, dtype=v.dtype) + weight**2))

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - gap

    learned = {"b": v.mean()}
    slopes = torch.full_like(v[:2], weight / (1 + 2 * weight**2))
    scales = torch.full_like(v[:2], (1 + weight**2) ** -0.5)
    fitted = {"slopes": slopes, "offset": -v.mean() * slopes, "scales": scales}
    height = float(bound(learned))
    return HarmedModel(
        "two causes, weight known",
        model, guide, (v,), log_evidence, learned, fitted, learned, height, bound,
    )  # fmt: skip
