"""Harmed models with discrete latents: a noisy-OR, and mixtures with a hard assignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraints import Constraint
from torch.nn.functional import logsigmoid

from benchmarks.exact_optima import (
    HarmedModel,
    Values,
    generator,
    maximise,
    rand,
    randn,
    split_values,
    tensor,
)

__all__ = ["collapsed_mixture", "mixture", "noisy_or"]

_POSITIVE, _UNIT = constraints.positive, constraints.unit_interval


_CAUSES, _EFFECTS = 6, 8


def _log_bernoulli(states: Tensor, logits: Tensor) -> Tensor:
    """Of all states, shape ``(*logits without the last, state)``."""
    return logsigmoid(logits) @ states.T + logsigmoid(-logits) @ (1 - states).T


def noisy_or(num_units: int = 150, *, seed: int = 0) -> HarmedModel:
    """Six causes of eight effects with three parameters; independent causes for each unit.

    P(cause) = prior; an effect stays off with (1 − leak) Π (1 − weight) over its causes.
    """
    source = generator(seed)
    linked = (rand(_EFFECTS, _CAUSES, generator=source) < 0.5).double()
    causes = (rand(num_units, _CAUSES, generator=source) < 0.3).double()
    off = (1 - 0.05) * (1 - 0.7) ** (causes @ linked.T)
    v = (rand(num_units, _EFFECTS, generator=source) > off).double()
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

    start = {"prior": tensor(0.3), "weight": tensor(0.7), "leak": tensor(0.05)}
    unit = dict.fromkeys(names, _UNIT)
    found = maximise(bound, start | {"logits": v.new_zeros(len(v), _CAUSES)}, unit)
    best = maximise(log_evidence, start, unit)
    learned, fitted = split_values(found, best)
    height = float(bound(found))
    return HarmedModel(
        "noisy-OR", model, guide, (v,), log_evidence, learned, fitted, best, height, bound
    )


def mixture(num_units: int = 300, *, seed: int = 0) -> HarmedModel:
    """Three classes of equal weight on a line, and a guide that assigns each unit to one of them.

    L = Σ_u max_z log p(v_u, z; θ): hard EM, which pulls the classes apart.
    """
    source = generator(seed)
    centres = tensor(-2.0, 0.0, 2.0)
    z = torch.randint(3, (num_units,), generator=source)
    v = centres[z] + randn(num_units, generator=source)

    def model(v: Tensor) -> None:
        locs = pyro.param("locs", centres)
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=_POSITIVE)
        with pyro.plate("units", len(v)):
            probs = v.new_full((3,), 1 / 3)
            z = pyro.sample("z", dist.Categorical(probs), infer={"enumerate": "parallel"})
            pyro.sample("v", dist.Normal(locs[z], scale), obs=v)

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        density: Tensor = dist.Normal(values["locs"], values["scale"]).log_prob(
            v[:, None]
        ) - math.log(3)
        return density

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        return log_joint(values).logsumexp(1).sum()

    def bound(values: Values) -> Tensor:
        return log_joint(values).amax(1).sum()

    start = {"locs": centres, "scale": tensor(1.0)}
    learned = _hard_em(log_joint, start, {"scale": _POSITIVE})
    best = maximise(log_evidence, start, {"scale": _POSITIVE})
    guide = _assigning_guide(log_joint(learned).argmax(1))
    return HarmedModel(
        "mixture", model, guide, (v,), log_evidence, learned, {}, best, float(bound(learned)), bound
    )


def collapsed_mixture(*, seed: int = 0) -> HarmedModel:
    """Three classes in the plane whose weights are learned too: hard EM keeps only one of them.

    It starts with the classes close together and one of them heavier, which then takes every unit.
    What it leaves is a fixed point: the bound is tight, the score is 0, and two classes are dead.
    """
    source = generator(seed)
    angles = 2 * math.pi / 3 * torch.arange(3.0, dtype=torch.float64)
    centres = 1.5 * torch.stack([angles.cos(), angles.sin()], -1)
    z = torch.randint(3, (300,), generator=source)
    v = centres[z] + randn(300, 2, generator=source)

    def model(v: Tensor) -> None:
        weights = pyro.param("weights", v.new_full((3,), 1 / 3), constraint=constraints.simplex)
        locs = pyro.param("locs", centres)
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("v", dist.Normal(locs[z], 1.0).to_event(1), obs=v)

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        log_likelihood = dist.Normal(values["locs"], 1.0).log_prob(v[:, None]).sum(-1)
        density: Tensor = log_likelihood + values["weights"].log()
        return density

    def log_evidence(values: Mapping[str, Tensor]) -> Tensor:
        return log_joint(values).logsumexp(1).sum()

    def bound(values: Values) -> Tensor:
        return log_joint(values).amax(1).sum()

    start = {"weights": torch.full((3,), 1 / 3, dtype=v.dtype), "locs": centres}
    simplex = {"weights": constraints.simplex}
    best = maximise(log_evidence, start, simplex)
    together = {"weights": tensor(0.5, 0.25, 0.25), "locs": 0.02 * centres}
    found = _hard_em(log_joint, together, simplex)
    assigned = log_joint(found).argmax(1)
    if bool(assigned.any()):
        raise ArithmeticError("hard EM was to keep the first class only")
    dead = 1e-9
    learned = found | {"weights": tensor(1 - 2 * dead, dead, dead)}
    guide = _assigning_guide(assigned)
    height = float(bound(learned))
    return HarmedModel(
        "mixture, collapsed", model, guide, (v,), log_evidence, learned, {}, best, height, bound
    )


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

        values = maximise(complete, values, constrained)
    return values


def _assigning_guide(assigned: Tensor) -> Callable[..., None]:
    def guide(v: Tensor) -> None:
        with pyro.plate("units", len(v)):
            pyro.sample("z", dist.Delta(assigned))

    return guide
