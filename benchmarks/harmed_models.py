"""Small models that variational inference harms, each with its optima known exactly.

For each: the model and guide in Pyro, data, log evidence ℓ(θ) in closed form (or enumerated, or
by a fine trapezoid rule), θ̂ where the bound L is highest over θ and the guide's family, and θ*
where ℓ is. ℓ and L are written by hand in torch, without this package, and maximised by scipy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyro
import pyro.distributions as dist
import statsmodels.api as sm
import torch
from pyro import poutine
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from examples import nile

__all__ = ["HARMED_MODELS", "HarmedModel", "collapsed_mixture"]

type Values = dict[str, Tensor]

_POSITIVE, _UNIT, _REAL = constraints.positive, constraints.unit_interval, constraints.real


@dataclass(frozen=True)
class HarmedModel:
    """A model, its guide and data, with θ̂ and θ*.

    Attributes:
        name: for tables.
        model: the Pyro model.
        guide: its guide.
        data: their arguments.
        log_evidence: ℓ(θ) in total, in nats, from parameters on the user-facing scale.
        learned: θ̂, where L is highest.
        guide_values: q̂ there.
        best: θ*.
    """

    name: str
    model: Callable[..., None]
    guide: Callable[..., None]
    data: tuple[Tensor, ...]
    log_evidence: Callable[[Mapping[str, Tensor]], Tensor] = field(repr=False)
    learned: Values = field(repr=False)
    guide_values: Values = field(repr=False)
    best: Values = field(repr=False)

    def install(self) -> None:
        """Set Pyro's param store to θ̂ and q̂, and to nothing else."""
        pyro.clear_param_store()
        for function in (self.model, self.guide):
            poutine.trace(function).get_trace(*self.data)
        store = pyro.get_param_store()
        for name, value in (self.learned | self.guide_values).items():
            store[name] = value

    def lost_at(self, values: Mapping[str, Tensor]) -> float:
        """ℓ(θ*) − ℓ(θ), in nats."""
        with torch.no_grad():
            return float(self.log_evidence(self.best) - self.log_evidence(values))


def _maximise(
    function: Callable[[Values], Tensor],
    start: Values,
    constrained: Mapping[str, Constraint] | None = None,
) -> Values:
    """The maximum that scipy's L-BFGS finds over unconstrained values, from a start."""
    known = constrained or {}
    transforms = {name: transform_to(known.get(name, _REAL)) for name in start}
    begun = {name: transforms[name].inv(value).double() for name, value in start.items()}

    def split(point: np.ndarray) -> tuple[Tensor, Values]:
        flat = torch.tensor(point, requires_grad=True)
        parts = flat.split([value.numel() for value in begun.values()])
        pairs = zip(begun.items(), parts, strict=True)
        return flat, {name: transforms[name](part.view_as(old)) for (name, old), part in pairs}

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        flat, values = split(point)
        value = -function(values)
        (gradient,) = torch.autograd.grad(value, flat)
        return float(value.detach()), gradient.numpy()

    first = torch.cat([value.reshape(-1) for value in begun.values()]).numpy()
    options = {"maxiter": 20_000, "maxfun": 50_000, "ftol": 1e-14, "gtol": 1e-7}
    found = minimize(loss, first, jac=True, method="L-BFGS-B", options=options)
    return {name: value.detach() for name, value in split(found.x)[1].items()}


def _mean_field_gap(precision: Tensor) -> Tensor:
    """KL of the best mean-field Gaussian from N(μ, P⁻¹): ½ (Σ log P_ii − log |P|)."""
    gap: Tensor = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    return gap


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _rand(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def two_causes() -> HarmedModel:
    """Two causes h ~ N(0, I) with one weight: v | h ~ N(a (h₁ + h₂), 1); mean field."""
    v = _randn(200, generator=_generator()) * math.sqrt(1 + 2 * 1.5**2)

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
        return dist.Normal(0.0, scale).log_prob(v).sum()

    def bound(values: Values) -> Tensor:
        precision = torch.eye(2, dtype=v.dtype) + values["a"].square()
        return log_evidence(values) - len(v) * _mean_field_gap(precision)

    start = {"a": _tensor(1.0)}
    learned = _maximise(bound, start, {"a": _POSITIVE})
    a = learned["a"]
    fitted = {
        "slopes": (a / (1 + 2 * a.square())).repeat(2),
        "scales": (1 + a.square()).rsqrt().repeat(2),
    }
    best = _maximise(log_evidence, start, {"a": _POSITIVE})
    return HarmedModel("two causes, tied", model, guide, (v,), log_evidence, learned, fitted, best)


_CROSS, _INDICATORS = 0.5, 6


def _loadings(own: Tensor) -> Tensor:
    """Each indicator loads on its own factor freely, and on the other by a fixed amount."""
    first = torch.arange(_INDICATORS) < _INDICATORS // 2
    fixed = torch.full_like(own, _CROSS)
    return torch.stack([torch.where(first, own, fixed), torch.where(first, fixed, own)], -1)


def factor_analysis() -> HarmedModel:
    """Confirmatory factor analysis with fixed cross-loadings, so no rotation is free; mean field.

    h ∈ R² standard normal, v | h ~ N(Λh, s² I) with v ∈ R⁶.
    """
    generator = _generator()
    truth = _loadings(_tensor(1.0, 0.9, 0.8, 1.0, 0.9, 0.8))
    h, noise = _randn(200, 2, generator=generator), _randn(200, 6, generator=generator)
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
        return marginal.log_prob(v).sum()

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - len(v) * _mean_field_gap(precision(values))

    start = {"own": _tensor(1.0, 0.9, 0.8, 1.0, 0.9, 0.8), "scale": _tensor(0.7)}
    learned = _maximise(bound, start, {"scale": _POSITIVE})
    P, variance = precision(learned), learned["scale"].square()
    fitted = {
        "slopes": _loadings(learned["own"]) @ P.inverse() / variance,
        "scales": P.diagonal().rsqrt(),
    }
    best = _maximise(log_evidence, start, {"scale": _POSITIVE})
    return HarmedModel("factor analysis", model, guide, (v,), log_evidence, learned, fitted, best)


def sign_symmetric() -> HarmedModel:
    """A latent seen squared, h ~ N(0, 1), v | h ~ N(a h² + b, s²); a Gaussian for each unit."""
    generator = _generator()
    h, noise = _randn(100, generator=generator), _randn(100, generator=generator)
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
        return (log_prior + log_likelihood).logsumexp(1).sum()

    def bound(values: Values) -> Tensor:
        a, residual = values["a"], v - values["b"]
        m, t = values["loc"].square(), values["spread"].square()
        squares = residual.square() - 2 * a * residual * (m + t)
        squares = squares + a.square() * (m.square() + 6 * m * t + 3 * t.square())
        log_joint = -values["scale"].log() - squares / (2 * values["scale"].square())
        entropy = values["spread"].log() + 0.5
        return (log_joint - 0.5 * math.log(2 * math.pi) - 0.5 * (m + t) + entropy).sum()

    start = {"a": _tensor(1.0), "b": _tensor(0.0), "scale": _tensor(0.5)}
    free = {"loc": v.clamp(min=0.1).sqrt(), "spread": torch.full_like(v, 0.3)}
    found = _maximise(bound, start | free, {"scale": _POSITIVE, "spread": _POSITIVE})
    best = _maximise(log_evidence, start, {"scale": _POSITIVE})
    return _split("sign-symmetric", model, guide, v, log_evidence, found, best)


def _split(
    name: str,
    model: Callable[..., None],
    guide: Callable[..., None],
    v: Tensor,
    log_evidence: Callable[[Mapping[str, Tensor]], Tensor],
    found: Values,
    best: Values,
) -> HarmedModel:
    """θ̂ and q̂ from one set of values, by the names in θ*."""
    learned = {name: value for name, value in found.items() if name in best}
    fitted = {name: value for name, value in found.items() if name not in best}
    return HarmedModel(name, model, guide, (v,), log_evidence, learned, fitted, best)


_CAUSES, _EFFECTS = 6, 8


def _log_bernoulli(states: Tensor, logits: Tensor) -> Tensor:
    """Of all states, shape ``(*logits without the last, state)``."""
    return logsigmoid(logits) @ states.T + logsigmoid(-logits) @ (1 - states).T


def noisy_or() -> HarmedModel:
    """Six causes of eight effects with three parameters; independent causes for each unit.

    P(cause) = prior; an effect stays off with (1 − leak) Π (1 − weight) over its causes.
    """
    generator = _generator()
    linked = (_rand(_EFFECTS, _CAUSES, generator=generator) < 0.5).double()
    causes = (_rand(150, _CAUSES, generator=generator) < 0.3).double()
    off = (1 - 0.05) * (1 - 0.7) ** (causes @ linked.T)
    v = (_rand(150, _EFFECTS, generator=generator) > off).double()
    states = torch.cartesian_prod(*[torch.arange(2.0, dtype=v.dtype)] * _CAUSES)
    names = ("prior", "weight", "leak")

    def model(v: Tensor) -> None:
        prior, weight, leak = (
            pyro.param(name, v.new_tensor(0.4), constraint=_UNIT) for name in names
        )
        with pyro.plate("units", len(v)):
            log_off = (-leak).log1p()
            for i in range(_CAUSES):
                cause = pyro.sample(
                    f"cause_{i}", dist.Bernoulli(prior), infer={"enumerate": "parallel"}
                )
                log_off = log_off + cause[..., None] * linked[:, i] * (-weight).log1p()
            pyro.sample("v", dist.Bernoulli(-log_off.expm1()).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        logits = pyro.param("logits", v.new_zeros(len(v), _CAUSES))
        with pyro.plate("units", len(v)):
            for i in range(_CAUSES):
                pyro.sample(f"cause_{i}", dist.Bernoulli(logits=logits[:, i]))

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        """Shape ``(unit, state)``."""
        log_off = (-values["leak"]).log1p() + states @ linked.T * (-values["weight"]).log1p()
        log_likelihood = v @ (-log_off.expm1()).log().T + (1 - v) @ log_off.T
        return _log_bernoulli(states, values["prior"].logit().repeat(_CAUSES)) + log_likelihood

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        return log_joint(values).logsumexp(1).sum()

    def bound(values: Values) -> Tensor:
        log_guide = _log_bernoulli(states, values["logits"])
        return (log_guide.exp() * (log_joint(values) - log_guide)).sum()

    start = {"prior": _tensor(0.3), "weight": _tensor(0.7), "leak": _tensor(0.05)}
    unit = dict.fromkeys(names, _UNIT)
    found = _maximise(bound, start | {"logits": v.new_zeros(len(v), _CAUSES)}, unit)
    best = _maximise(log_evidence, start, unit)
    return _split("noisy-OR", model, guide, v, log_evidence, found, best)


def mixture() -> HarmedModel:
    """Three classes of equal weight on a line, and a guide that assigns each unit to one of them.

    L = Σ_u max_z log p(v_u, z; θ): hard EM, which pulls the classes apart.
    """
    generator = _generator()
    centres = _tensor(-2.0, 0.0, 2.0)
    z = torch.randint(3, (300,), generator=generator)
    v = centres[z] + _randn(300, generator=generator)

    def model(v: Tensor) -> None:
        locs = pyro.param("locs", centres)
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            probs = v.new_full((3,), 1 / 3)
            z = pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample("v", dist.Normal(locs[z], scale), obs=v)

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        return dist.Normal(values["locs"], values["scale"]).log_prob(v[:, None]) - math.log(3)

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        return log_joint(values).logsumexp(1).sum()

    start = {"locs": centres, "scale": _tensor(1.0)}
    learned = _hard_em(log_joint, start, {"scale": _POSITIVE})
    best = _maximise(log_evidence, start, {"scale": _POSITIVE})
    guide = _assigning_guide(log_joint(learned).argmax(1))
    return HarmedModel("mixture", model, guide, (v,), log_evidence, learned, {}, best)


def collapsed_mixture() -> HarmedModel:
    """Three classes in the plane whose weights are learned too: hard EM keeps only one of them.

    It starts with the classes close together and one of them heavier, which then takes every unit.
    What it leaves is a fixed point: the bound is tight, the score is 0, and two classes are dead.
    """
    generator = _generator()
    angles = 2 * math.pi / 3 * torch.arange(3.0, dtype=torch.float64)
    centres = 1.5 * torch.stack([angles.cos(), angles.sin()], -1)
    z = torch.randint(3, (300,), generator=generator)
    v = centres[z] + _randn(300, 2, generator=generator)

    def model(v: Tensor) -> None:
        weights = pyro.param("weights", v.new_full((3,), 1 / 3), constraint=constraints.simplex)
        locs = pyro.param("locs", centres)
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("v", dist.Normal(locs[z], 1.0).to_event(1), obs=v)

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        log_likelihood = dist.Normal(values["locs"], 1.0).log_prob(v[:, None]).sum(-1)
        return log_likelihood + values["weights"].log()

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        return log_joint(values).logsumexp(1).sum()

    start = {"weights": torch.full((3,), 1 / 3, dtype=v.dtype), "locs": centres}
    simplex = {"weights": constraints.simplex}
    best = _maximise(log_evidence, start, simplex)
    together = {"weights": _tensor(0.5, 0.25, 0.25), "locs": 0.02 * centres}
    found = _hard_em(log_joint, together, simplex)
    assigned = log_joint(found).argmax(1)
    if bool(assigned.any()):
        raise ArithmeticError("hard EM was to keep the first class only")
    dead = 1e-9
    learned = found | {"weights": _tensor(1 - 2 * dead, dead, dead)}
    guide = _assigning_guide(assigned)
    return HarmedModel("mixture, collapsed", model, guide, (v,), log_evidence, learned, {}, best)


def _hard_em(
    log_joint: Callable[[Mapping[str, Tensor]], Tensor],
    values: Values,
    constrained: Mapping[str, Constraint],
) -> Values:
    """Assign each unit to its best class and fit θ to that, until nothing changes."""
    before = None
    while before is None or not torch.equal(before, log_joint(values).argmax(1)):
        before = assigned = log_joint(values).argmax(1)

        def complete(values: Values, assigned: Tensor = assigned) -> Tensor:
            return log_joint(values).gather(1, assigned[:, None]).sum()

        values = _maximise(complete, values, constrained)
    return values


def _assigning_guide(assigned: Tensor) -> Callable[..., None]:
    def guide(v: Tensor) -> None:
        with pyro.plate("units", len(v)):
            pyro.sample("z", dist.Delta(assigned))

    return guide


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
        return marginal.log_prob(flow)

    def precision(values: Mapping[str, Tensor]) -> Tensor:
        noise = torch.eye(len(flow), dtype=flow.dtype) / values["observation_variance"]
        return covariance(values).inverse() + noise

    def bound(values: Values) -> Tensor:
        return log_evidence(values) - _mean_field_gap(precision(values))

    start = {"observation_variance": _tensor(15000.0), "level_variance": _tensor(1500.0)}
    positive = dict.fromkeys(start, _POSITIVE)
    learned = _maximise(bound, start, positive)
    P = precision(learned)
    shift = torch.linalg.solve(P, (flow - 1e3) / learned["observation_variance"])
    fitted = {"loc": shift / 100, "scale": P.diagonal().rsqrt() / 100}
    best = _maximise(log_evidence, start, positive)
    return HarmedModel("Nile", nile.model, nile.guide, (flow,), log_evidence, learned, fitted, best)


HARMED_MODELS: dict[str, Callable[[], HarmedModel]] = {
    "two causes": two_causes,
    "factor analysis": factor_analysis,
    "sign-symmetric": sign_symmetric,
    "noisy-OR": noisy_or,
    "mixture": mixture,
    "Nile": local_level,
}
