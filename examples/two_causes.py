"""Two causes explain one effect: a prophecy without loss, and one with, both solved exactly.

h ∈ R² is standard normal and v | h ~ N(wᵀh, 1), so the causes compete to explain v and their
posterior is correlated. The guide is a mean-field Gaussian. With w free, the likelihood depends on
|w| alone, and learning rotates w until one cause does nothing: the posterior now factorises, and
nothing is lost. With w₁ = w₂ = a tied, there is nowhere to rotate to: learning shrinks a instead.

Run with ``python examples/two_causes.py``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

import pyro_vharm as vh

TRUE_A = 1.5


def causes_and_effect(weights: Tensor, effects: Tensor) -> None:
    """The model, given its weights."""
    with pyro.plate("units", len(effects)):
        causes = pyro.sample("causes", dist.Normal(effects.new_zeros(2), 1.0).to_event(1))
        pyro.sample("effect", dist.Normal(causes @ weights, 1.0), obs=effects)


def free_model(effects: Tensor) -> None:
    """Both weights are learned."""
    causes_and_effect(pyro.param("weights", effects.new_tensor([1.5, 1.2])), effects)


def tied_model(effects: Tensor) -> None:
    """One weight for both causes is learned."""
    a = pyro.param("a", effects.new_tensor(TRUE_A), constraint=constraints.positive)
    causes_and_effect(a.expand(2), effects)


def guide(effects: Tensor) -> None:
    """Mean field; its optimum is linear in v with one variance for all units."""
    slopes = pyro.param("slopes", effects.new_tensor([0.3, 0.3]))
    scales = pyro.param("scales", effects.new_tensor([0.7, 0.7]), constraint=constraints.positive)
    with pyro.plate("units", len(effects)):
        pyro.sample("causes", dist.Normal(effects[:, None] * slopes, scales).to_event(1))


def train(model: Callable[[Tensor], None], effects: Tensor, num_steps: int) -> list[list[float]]:
    """SVI from the initial values; returns the path of the model's parameter."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=4, vectorize_particles=True))
    path = []
    for _ in range(num_steps):
        svi.step(effects)
        name = "weights" if model is free_model else "a"
        path.append(pyro.param(name).detach().reshape(-1).tolist())
    return path


def exact_optima(effects: Tensor) -> tuple[float, float]:
    """The tied weight that maximises the evidence, and the one that maximises the ELBO."""
    S = float(effects.square().mean())
    return math.sqrt((S - 1) / 2), math.sqrt((S - 4 + math.sqrt(S**2 + 8 * S)) / 8)


def exact_ledger(effects: Tensor, reference: float, learned: float) -> dict[str, float]:
    """Closed forms of the tied model at two weights, totals in nats."""
    n, S = len(effects), float(effects.square().mean())

    def log_evidence(a: float) -> float:
        variance = 1 + 2 * a**2
        return -0.5 * n * (math.log(2 * math.pi * variance) + S / variance)

    def gap(a: float) -> float:
        return 0.5 * n * math.log((1 + a**2) ** 2 / (1 + 2 * a**2))

    return {
        "weight at reference": reference,
        "weight as learned": learned,
        "− learning harm": log_evidence(reference) - log_evidence(learned),
        "inference gap": gap(learned),
        "reachability gap": gap(reference),
    }


def draw_path(path: list[list[float]], file: Path) -> None:
    """The free weights' way from their start to an axis, along a circle of equal evidence."""
    points = np.array(path)
    figure, axis = plt.subplots(figsize=(4.2, 4.0), layout="constrained")
    angle = np.linspace(0, 2 * np.pi, 200)
    radius = np.hypot(*points[-1])
    axis.plot(
        radius * np.cos(angle), radius * np.sin(angle), color="0.8", label="evidence as learned"
    )
    axis.plot(points[:, 0], points[:, 1], color="#bf3f4a", label="SVI")
    axis.plot(*points[0], "o", color="#bf3f4a", mfc="white")
    axis.plot(*points[-1], "o", color="#bf3f4a")
    axis.set(xlabel="w₁", ylabel="w₂", xlim=(-0.3, 2.7), ylim=(-0.6, 2.4), aspect="equal")
    axis.set_title("the model rotates until its posterior factorises", fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Train both models, audit them, and compare with the closed forms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="steps of SVI and of the reference")
    parser.add_argument("--units", type=int, default=500, help="how many effects are observed")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    pyro.set_rng_seed(1)
    effects = torch.randn(options.units, dtype=torch.float64) * math.sqrt(1 + 2 * TRUE_A**2)
    learner = vh.GradientLearner(
        vh.ImportanceWeightedELBO(64), num_steps=options.steps, learning_rate=0.01
    )

    print("BOTH WEIGHTS FREE: exact harm 0, exact gap 0 after the rotation\n")
    path = train(free_model, effects, options.steps)
    free = vh.audit(free_model, guide, (effects,), learner=learner)
    print(free)
    print(f"weights: {path[0]} at first, {path[-1]} as learned")
    draw_path(path, options.out / "two_causes_free.png")

    print("\n\nWEIGHTS TIED: harm without a way out\n")
    path = train(tied_model, effects, options.steps)
    tied = vh.audit(tied_model, guide, (effects,), learner=learner)
    print(tied)
    assert tied.harm is not None
    reference, learned = float(tied.reference.parameters["a"]), path[-1][0]
    here = exact_ledger(effects, reference, learned)
    optimum = exact_ledger(effects, *exact_optima(effects))
    print(f"\n{'':20}{'measured':>10}{'± 1 se':>10}{'exact here':>12}{'at the optima':>15}")
    for name, value in here.items():
        line = tied.harm.ledger().get(name)
        measured, error = (value, 0.0) if line is None else (line.value, line.mc_error)
        print(f"{name:20}{measured:10.3f}{error:10.3f}{value:12.3f}{optimum[name]:15.3f}")
    vh.plot_ledger(vh.to_datatree(tied)).savefig(options.out / "two_causes_tied.png", dpi=150)
    print(
        f"\nwritten: {options.out / 'two_causes_free.png'}, {options.out / 'two_causes_tied.png'}"
    )


if __name__ == "__main__":
    main()
