"""Posteriors with two modes, and a guide with one: what learning does about it, over training.

h ~ N(0, 1) and v | h ~ N(a h² + b, s²), with a, b and s learned. Where v is large beside the
noise, its posterior has a mode on either side of zero. The guide is one Gaussian for each unit.
Exact learning and SVI start from the same parameters and take the same steps of Adam; one climbs
the log evidence, the other the ELBO. The share of units whose true posterior has two modes, the
inference gap and the harm are measured along both, at three levels of noise, and at the end beside
a quadrature that has nothing to do with the package.

Run with ``python examples/unimodal.py``; see ``--help`` for budgets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from matplotlib.figure import Figure
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints

import pyro_vharm as vh

NOISE_LEVELS = (0.5, 1.0, 2.0)
CHECKPOINTS = (0, 5, 10, 20, 40, 80, 160, 320)  # most of it happens early
START = {"a": 0.5, "b": 0.5, "s": 1.0}
COLOURS = {"SVI": "#d55e00", "exact learning": "#0072b2"}


def simulate(num_units: int, noise: float, seed: int) -> Tensor:
    """Data from a = 1, b = 0 and this noise; the same h at every level."""
    generator = torch.Generator().manual_seed(seed)
    h, e = (torch.randn(num_units, generator=generator, dtype=torch.float64) for _ in range(2))
    return h.square() + noise * e


def model(v: Tensor) -> None:
    """A square with an offset, and noise."""
    a = pyro.param("a", v.new_tensor(START["a"]))
    b = pyro.param("b", v.new_tensor(START["b"]))
    s = pyro.param("s", v.new_tensor(START["s"]), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(a * h.square() + b, s), obs=v)


def guide(v: Tensor) -> None:
    """A Gaussian of its own for each unit."""
    loc = pyro.param("loc", torch.full_like(v, 0.3))
    scale = pyro.param("scale", torch.full_like(v, 0.5), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(loc, scale))


def train(v: Tensor, objective: ELBO, num_steps: int) -> vh.History:
    """The same start and the same optimiser, whatever the objective."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.02 ** (1 / num_steps)})
    svi = SVI(model, guide, optimizer, objective)
    for function in (model, guide):  # make the parameters, so that the start itself is recorded
        function(v)
    recorder = vh.Recorder(model, guide)
    for step in range(num_steps):
        if step in CHECKPOINTS:
            recorder.checkpoint(step)
        svi.step(v)
    recorder.checkpoint(num_steps)
    return recorder.history


class Outcome(NamedTuple):
    """One level of noise: along both trainings, and at their ends."""

    svi: xr.DataTree
    exact: xr.DataTree
    harm: vh.LearningHarm
    v: Tensor


def compare(v: Tensor, num_steps: int) -> Outcome:
    """Train twice from one start, and measure both at the same steps."""
    exact = train(v, vh.ExactEvidence(), num_steps)
    with exact.at(-1):
        reference = {name: pyro.param(name).detach().clone() for name in START}
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    svi = train(v, elbo, num_steps)
    along_svi, along_exact = (vh.to_datatree(vh.diagnose(each, (v,))) for each in (svi, exact))
    harm = vh.learning_harm(model, guide, (v,), reference=reference)
    return Outcome(along_svi, along_exact, harm, v)


def parameters(tree: xr.DataTree, index: int) -> dict[str, float]:
    """θ at one checkpoint."""
    theta = tree["theta"].to_dataset().isel(checkpoint=index)
    return {name: float(theta[name]) for name in START}


def by_quadrature(v: np.ndarray, theta: Mapping[str, float]) -> tuple[float, float, float]:
    """By numpy on an even grid: log evidence in total, and the share of units with two modes.

    The first share counts every second maximum of the density. The second asks, as the package
    does, that the density falls by 0.1 nats between the two.
    """
    h = np.linspace(-9.0, 9.0, 6001)
    residual = (v[:, None] - theta["a"] * h**2 - theta["b"]) / theta["s"]
    log_joint = -0.5 * h**2 - 0.5 * residual**2 - math.log(2 * math.pi * theta["s"])
    top = log_joint.max(1, keepdims=True)
    total = float((top[:, 0] + np.log(np.exp(log_joint - top).sum(1) * (h[1] - h[0]))).sum())
    inner = log_joint[:, 1:-1]
    maxima = (inner > log_joint[:, :-2]) & (inner >= log_joint[:, 2:])
    falls = top[:, 0] - log_joint[:, len(h) // 2]  # the modes lie at ±√…, and the valley at 0
    return total, float((maxima.sum(1) > 1).mean()), float((falls > 0.1).mean())


def share_with_two_modes(tree: xr.DataTree) -> np.ndarray:
    """The share of units whose posterior has more than one mode, at each checkpoint."""
    counts = tree["shape"].to_dataset()["num_modes"]
    return np.asarray((counts > 1).mean("unit"))


def print_table(noise: float, outcome: Outcome) -> None:
    """What the package found at the ends of both trainings, beside numpy's quadrature."""
    v = outcome.v.numpy()
    print(f"\nnoise {noise:g}, {len(v)} units")
    print(f"{'':16}{'a':>8}{'b':>8}{'s':>8}{'log evidence':>15}{'by numpy':>12}", end="")
    print(f"{'two modes':>12}{'by numpy':>10}{'any dent':>10}")
    exact = {}
    for name, tree in (("exact learning", outcome.exact), ("SVI", outcome.svi)):
        theta = parameters(tree, -1)
        exact[name], any_dent, share = by_quadrature(v, theta)
        evidence = float(tree["trajectory"].to_dataset()["log_evidence"][-1])
        print(f"{name:16}" + "".join(f"{value:8.3f}" for value in theta.values()), end="")
        print(f"{evidence:15.4f}{exact[name]:12.4f}", end="")
        print(f"{share_with_two_modes(tree)[-1]:12.0%}{share:10.0%}{any_dent:10.0%}")
    gap = outcome.harm.learned.gap
    assert gap is not None
    print(f"harm {outcome.harm.harm} nats", end="")
    print(f" (by numpy {exact['exact learning'] - exact['SVI']:.3f})", end="")
    print(f"   visible gap {gap.total()} nats")


def draw(outcomes: Mapping[float, Outcome]) -> Figure:
    """For each noise: the share of units with two modes, and what is and is not visible."""
    figure, axes = plt.subplots(
        2, len(outcomes), figsize=(7.2, 4.4), sharex=True, sharey="row", layout="constrained"
    )
    for column, (noise, outcome) in zip(axes.T, outcomes.items(), strict=True):
        for name, tree in (("exact learning", outcome.exact), ("SVI", outcome.svi)):
            per_unit, colour = tree["trajectory"].to_dataset() / len(outcome.v), COLOURS[name]
            steps = per_unit["checkpoint"]
            column[0].plot(steps, 100 * share_with_two_modes(tree), color=colour, label=name)
            column[1].plot(steps, per_unit["log_evidence"], color=colour)
            if name == "SVI":
                column[1].plot(steps[1:], per_unit["elbo"][1:], color=colour, ls="--", lw=1)
        column[0].set_title(f"noise {noise:g}", fontsize=10)
        column[1].set_xlabel("step")
    axes[0, 0].set_xscale("symlog", linthresh=10)
    axes[0, 0].set_xlim(left=0)
    axes[0, 0].set(ylabel="units with two modes, %", ylim=(0, 100))
    axes[1, 0].set_ylabel("nats per unit")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left")
    axes[1, -1].annotate(
        "solid: log evidence\ndashed: ELBO of SVI",
        (0.97, 0.95),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=8,
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Train twice at each level of noise, compare, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=100, help="how many values are observed")
    parser.add_argument("--steps", type=int, default=600, help="steps of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    outcomes = {}
    for noise in NOISE_LEVELS:
        v = simulate(options.units, noise, options.seed)
        outcomes[noise] = compare(v, options.steps)
        print_table(noise, outcomes[noise])
        for name, tree in (("svi", outcomes[noise].svi), ("exact", outcomes[noise].exact)):
            file = options.out / f"unimodal_{name}_{noise:g}.zarr"
            tree.to_zarr(file, mode="w", consolidated=False)
    draw(outcomes).savefig(options.out / "unimodal.png", dpi=150)
    print(f"\nwritten: {options.out / 'unimodal.png'}, and DataTrees beside it")


if __name__ == "__main__":
    main()
