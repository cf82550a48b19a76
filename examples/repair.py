"""Repair a model that variational inference harmed, and check the repair on held-out data.

A latent is seen squared: h ~ N(0, 1), v | h ~ N(a h² + b, s²), so its posterior has a mode on
either side of zero. The guide, an encoder with one Gaussian, can hold only one of them. To make
the modes merge, learning flattens the square and takes what it cannot explain for noise. A better
learner finds the parameters that the data come from, and the guide is retrained there.

Run with ``python examples/repair.py``; see ``--help`` for budgets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import constraints

import pyro_vharm as vh

TRUTH = {"a": 1.0, "b": 0.0, "scale": 0.3}
NUM_TRAIN, NUM_HELDOUT = 400, 400

type PyroFunction = Callable[[Tensor], None]


def simulate(num_units: int) -> Tensor:
    """Data from the true parameters."""
    h = torch.randn(num_units)
    return TRUTH["a"] * h.square() + TRUTH["b"] + TRUTH["scale"] * torch.randn(num_units)


def model(v: Tensor) -> None:
    """A square with an offset, and noise."""
    a, b = pyro.param("a", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(a * h.square() + b, scale), obs=v)


def make_guide() -> PyroFunction:
    """An encoder that computes the location and scale of one Gaussian for each unit."""
    encoder = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2))

    def guide(v: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("units", len(v)):
            loc, log_scale = encoder(v[:, None]).unbind(-1)
            pyro.sample("h", dist.Normal(1.0 + loc, log_scale.exp()))

    return guide


def objective(num_particles: int) -> Trace_ELBO:
    """The ELBO, averaged over draws."""
    return Trace_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


def train(guide: PyroFunction, v: Tensor, num_steps: int) -> None:
    """Ordinary SVI."""
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.01 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, objective(4))
    for _ in range(num_steps):
        svi.step(v)


def elbo(guide: PyroFunction, v: Tensor) -> float:
    """Per unit, at the parameters as they are."""
    loss: float = objective(500).loss(model, guide, v)
    return -loss / len(v)


def parameters() -> str:
    """What the model holds now."""
    return "   ".join(f"{name} = {float(pyro.param(name).detach()):.3f}" for name in TRUTH)


def print_table(reference: vh.Reference, bounds: Mapping[str, Sequence[float]]) -> None:
    """Evidence and ELBO per unit, before and after, on training and on held-out data."""
    assert reference.train is not None and reference.heldout is not None
    pairs = reference.train, reference.heldout
    rows = {
        "log evidence, as learned": [pair.learned for pair in pairs],
        "log evidence, repaired": [pair.reference for pair in pairs],
    }
    print(f"{'nats per unit':34}{'training':>10}{'held-out':>10}")
    for name, found in rows.items():
        values = (evidence.per_unit.total().per_unit.value for evidence in found)
        print(f"{name:34}" + "".join(f"{value:10.4f}" for value in values))
    for name, numbers in bounds.items():
        print(f"{f'ELBO, {name}':34}" + "".join(f"{value:10.4f}" for value in numbers))


def main() -> None:
    """Train, look for better parameters, apply them, and compare before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000, help="steps of SVI")
    parser.add_argument("--guide-steps", type=int, default=2000, help="of retraining the guide")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a directory to resume the learner from")
    options = parser.parse_args()

    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(options.seed)
    v, heldout = simulate(NUM_TRAIN), simulate(NUM_HELDOUT)
    guide = make_guide()
    train(guide, v, options.steps)
    print(f"true      {'   '.join(f'{name} = {value:.3f}' for name, value in TRUTH.items())}")
    print(f"learned   {parameters()}")
    bounds = {"as learned": [elbo(guide, v), elbo(guide, heldout)]}

    reference = vh.learn_reference(
        model,
        (v,),
        guide=guide,
        learner=vh.ExactLearner(
            guide_training=vh.GuideTraining(options.guide_steps, learning_rate=0.01)
        ),
        heldout=(heldout,),
        checkpoint=options.checkpoint,
        seed=options.seed,
    )
    print(f"\n{reference}\n")

    for name, value in reference.parameters.items():
        pyro.get_param_store()[name] = value
    bounds["repaired, guide as it was"] = [elbo(guide, v), elbo(guide, heldout)]
    reference.apply()
    print(f"repaired  {parameters()}\n")
    bounds["repaired, guide retrained"] = [elbo(guide, v), elbo(guide, heldout)]
    print_table(reference, bounds)


if __name__ == "__main__":
    main()
