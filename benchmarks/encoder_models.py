"""Harmed models with a net: a sigmoid belief net, and a linear encoder of a curved model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from benchmarks.exact_optima import (
    HarmedModel,
    Values,
    generator,
    highest,
    maximise,
    rand,
    randn,
    split_values,
    tensor,
)

__all__ = ["linear_encoder", "sigmoid_belief_net"]

_POSITIVE = constraints.positive
_HIDDEN, _VISIBLE = 3, 6


def sigmoid_belief_net(num_units: int = 100, *, seed: int = 0) -> HarmedModel:
    """Three fair hidden states, six visible ones with logits Σ_i h_i w_i C_ij + b; mean field.

    Which hidden state is linked to which visible one, C, is known; a weight for each hidden state
    and the bias are learned. See "Mean Field Theory for Sigmoid Belief Networks", Saul, Jaakkola,
    Jordan (1996).
    """
    source = generator(seed)
    h = (rand(num_units, _HIDDEN, generator=source) < 0.5).double()
    links = tensor(1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0, 1, 1, 1).view(_HIDDEN, _VISIBLE)
    truth = {"weights": tensor(3.0, 2.5, 3.5), "bias": tensor(-2.0)}
    chance = (h @ (truth["weights"][:, None] * links) + truth["bias"]).sigmoid()
    v = (rand(num_units, _VISIBLE, generator=source) < chance).double()
    states = torch.cartesian_prod(*[torch.arange(2.0, dtype=v.dtype)] * _HIDDEN)

    def model(v: Tensor) -> None:
        weights = pyro.param("weights", v.new_tensor([1.0, 1.5, 2.0]))
        bias = pyro.param("bias", v.new_tensor(-1.0))
        with pyro.plate("units", len(v)):
            logits = bias.expand(_VISIBLE)
            for i in range(_HIDDEN):
                prior = dist.Bernoulli(v.new_tensor(0.5))
                state = pyro.sample(f"h_{i}", prior, infer={"enumerate": "parallel"})
                logits = logits + state[..., None] * weights[i] * links[i]
            pyro.sample("v", dist.Bernoulli(logits=logits).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        logits = pyro.param("logits", v.new_zeros(len(v), _HIDDEN))
        with pyro.plate("units", len(v)):
            for i in range(_HIDDEN):
                pyro.sample(f"h_{i}", dist.Bernoulli(logits=logits[:, i]))

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        """Shape ``(unit, state)``."""
        logits = states @ (values["weights"][:, None] * links) + values["bias"]
        log_likelihood = v @ logsigmoid(logits).T + (1 - v) @ logsigmoid(-logits).T
        return log_likelihood - _HIDDEN * math.log(2)

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        return log_joint(values).logsumexp(1).sum()

    def bound(values: Values) -> Tensor:
        logits = values["logits"]
        log_guide = logsigmoid(logits) @ states.T + logsigmoid(-logits) @ (1 - states).T
        return (log_guide.exp() * (log_joint(values) - log_guide)).sum()

    learned, fitted = split_values(maximise(bound, truth | {"logits": 4 * h - 2}), truth)
    shapes = ((1.0, 1.0, 1.0, 0.0), (0.5, 3.0, 3.0, -1.0), (3.0, 3.0, 0.5, -1.0))
    others = [{"weights": tensor(*w[:3]), "bias": tensor(w[3])} for w in shapes]
    best = highest(log_evidence, [truth, learned, *others])
    height = float(bound(learned | fitted))
    return HarmedModel(
        "sigmoid belief net",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip


def linear_encoder(num_units: int = 100, *, seed: int = 0) -> HarmedModel:
    """A parabola, v | h ~ N((ah, bh² + c), s² I), h ~ N(0, 1), and an encoder linear in v.

    q(h) = N(wᵀv + w₀, t²), with the same t for all units.
    """
    source = generator(seed)
    h, noise = randn(num_units, generator=source), randn(num_units, 2, generator=source)
    v = torch.stack([h, 0.4 * h.square() - 0.4], -1) + 0.5 * noise
    nodes = torch.linspace(-8.0, 8.0, 801, dtype=v.dtype)
    log_prior = dist.Normal(0.0, 1.0).log_prob(nodes) + math.log(float(nodes[1] - nodes[0]))

    def model(v: Tensor) -> None:
        a, b = pyro.param("a", v.new_tensor(1.0)), pyro.param("b", v.new_tensor(0.5))
        c = pyro.param("c", v.new_tensor(0.0))
        scale = pyro.param("scale", v.new_tensor(0.7), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            loc = torch.stack([a * h, b * h.square() + c], -1)
            pyro.sample("v", dist.Normal(loc, scale).to_event(1), obs=v)

    def guide(v: Tensor) -> None:
        slopes = pyro.param("slopes", v.new_tensor([0.5, 0.0]))
        offset = pyro.param("offset", v.new_tensor(0.0))
        spread = pyro.param("spread", v.new_tensor(0.5), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v @ slopes + offset, spread))

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        first = dist.Normal(values["a"] * nodes, values["scale"]).log_prob(v[:, :1])
        curve = values["b"] * nodes.square() + values["c"]
        second = dist.Normal(curve, values["scale"]).log_prob(v[:, 1:])
        density: Tensor = (log_prior + first + second).logsumexp(1).sum()
        return density

    def bound(values: Values) -> Tensor:
        loc = v @ values["slopes"] + values["offset"]
        m, t = loc.square(), values["spread"].square()
        first = (v[:, 0] - values["a"] * loc).square() + values["a"].square() * t
        residual = v[:, 1] - values["c"]
        second = residual.square() - 2 * values["b"] * residual * (m + t)
        second = second + values["b"].square() * (m.square() + 6 * m * t + 3 * t.square())
        inner = values["scale"].square()
        log_likelihood = -0.5 * (first + second) / inner - (2 * math.pi * inner).log()
        divergence = 0.5 * (m + t - 1 - t.log())
        return (log_likelihood - divergence).sum()

    starts = [
        {"a": tensor(a), "b": tensor(b), "c": tensor(-0.4), "scale": tensor(0.5)}
        for a, b in ((1.0, 0.4), (1.0, 0.1), (0.2, 1.0))
    ]
    free = {"slopes": tensor(1.0, 0.0), "offset": tensor(0.0), "spread": tensor(0.5)}
    positive = {"scale": _POSITIVE, "spread": _POSITIVE}
    found = highest(bound, [start | free for start in starts], positive)
    learned, fitted = split_values(found, starts[0])
    best = highest(log_evidence, [*starts, learned], {"scale": _POSITIVE})
    height = float(bound(found))
    return HarmedModel(
        "linear encoder, curved model",
        model, guide, (v,), log_evidence, learned, fitted, best, height, bound,
    )  # fmt: skip
