"""The evidence that each learner of a digits VAE reaches, against time, from the same θ̂.

θ̂ is where ordinary SVI left the model of ``examples/digits_vae.py``. Each learner then has the
same seconds of CPU on one thread. A learner with one objective knows its time: its step size falls
along one half cosine, to the end of it. The automatic learner does not: it goes in its own rounds,
looks at evidence between them, and what it had when the time was up is the end of its last whole
round. Evidence on the way is measured afterwards, by one annealed importance sampling for all, with
random numbers that no learner saw. Run with ``python -m benchmarks.digits_learners``; with
``--learners`` some alone are measured, beside the numbers of an earlier run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pyro
import torch
from matplotlib.figure import Figure

import pyro_vharm as vh
from benchmarks.learning_time import Learned, learn_from_here
from examples.digits_vae import load_images, make_vae, train
from pyro_vharm.inference.choice import Choice
from pyro_vharm.inference.evidence import estimate_evidence
from pyro_vharm.learning.history import Checkpoint
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.objectives.objective import UnitObjective

__all__ = ["draw", "main", "measure"]

_METHOD = vh.AnnealedImportanceSampling(8, num_steps=20, start=vh.MatchedStart(refit=True))
_TRAIN_IMAGES = 500  # on which evidence is measured
_TRIAL_STEPS = 60
_NAMES = {
    "elbo": "ELBO, continued",
    "iw": "importance weights, K = 50",
    "annealed": "annealed bound, 4 × 5",
    "chains": "Markov chain EM, 8 × 5",
    "climbing": "automatic: ClimbingLearner()",
}
_COLOURS = dict(zip(_NAMES, ("#7f8694", "#d98e32", "#7a5195", "#2f8f6b", "#bf3f4a"), strict=True))
_OBJECTIVES: dict[str, UnitObjective] = {
    "elbo": vh.ImportanceWeightedELBO(1),
    "iw": vh.ImportanceWeightedELBO(50),
    "annealed": vh.AnnealedELBO(4, num_steps=5),
    "chains": vh.MarkovChainEM(8, chains=vh.PersistentChains()),
}
_RATE = 0.03  # as the automatic learner begins
_RATES = {"annealed": 0.003}  # with 0.03 log evidence falls to −38 per image

type Curve = list[dict[str, float]]


def _by_gradients(name: str, num_steps: int) -> vh.GradientLearner:
    rate = _RATES.get(name, _RATE)
    return vh.GradientLearner(
        _OBJECTIVES[name], num_steps=num_steps, learning_rate=rate, max_rounds=1
    )


def _seconds_per_step(problem: Problem, name: str, seed: int) -> float:
    """By the second half of a short trial: the first may compile."""
    learned = learn_from_here(problem, _by_gradients(name, _TRIAL_STEPS), seed)
    at = {point.step: point.scalars["seconds"] for point in learned.checkpoints if point.step}
    first = min(step for step in at if step >= _TRIAL_STEPS // 2)
    last = max(step for step in at if step < _TRIAL_STEPS)  # the last one waits for the evidence
    return (at[last] - at[first]) / (last - first)


def _learn(name: str, problem: Problem, budget: float, seed: int) -> tuple[Learned, float | None]:
    """What a learner did in its time, and the seconds of a step where it had only one kind."""
    if name == "climbing":
        return learn_from_here(problem, vh.ClimbingLearner(), seed, budget), None
    cost = _seconds_per_step(problem, name, seed)
    learner = _by_gradients(name, max(int(budget / cost), 1))
    return learn_from_here(problem, learner, seed), cost


def _reached(name: str, learned: Learned, budget: float) -> list[Checkpoint]:
    """Of the automatic learner, the ends of rounds that were in time; else all checkpoints."""
    timed = [point for point in learned.checkpoints if "seconds" in point.scalars]
    if name != "climbing":
        return timed
    return [p for p in timed if "evidence" in p.scalars and p.scalars["seconds"] <= budget]


def _evidence(problem: Problem, seed: int) -> tuple[float, float]:
    """Log evidence per image, with its Monte Carlo error, at the parameters as they are."""
    with untouched(seed, problem.model, problem.guide):
        found = estimate_evidence(problem.densities, Choice(_METHOD)).per_unit.total().per_unit
    return found.value, found.mc_error


def _curve(kept: Sequence[Checkpoint], train_part: Problem, heldout: Problem, points: int) -> Curve:
    """Evidence at a few checkpoints, evenly chosen by number."""
    chosen = sorted({round(i * (len(kept) - 1) / (points - 1)) for i in range(points)})
    history = vh.History(train_part.model, train_part.guide, tuple(kept))
    curve = []
    for i in chosen:
        with history.at(i) as point:
            values = {"seconds": point.scalars["seconds"], "step": float(point.step)}
            for name, problem in (("train", train_part), ("heldout", heldout)):
                values[name], values[f"{name}_error"] = _evidence(problem, seed=1000)
        curve.append(values)
    return curve


def measure(
    names: Sequence[str], *, epochs: int, budget: float, points: int, seed: int
) -> dict[str, Any]:
    """Train by SVI, let every learner go from there, and measure evidence on the way."""
    images, heldout_images = load_images()
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = make_vae()
    train(model, guide, images, epochs, seed)
    problem = prepare(model, guide, (images,))
    train_part = prepare(model, guide, (images[:_TRAIN_IMAGES],))
    heldout = prepare(model, guide, (heldout_images,))
    curves: dict[str, Any] = {}
    for name in names:
        learned, cost = _learn(name, problem, budget, seed)
        curve = _curve(_reached(name, learned, budget), train_part, heldout, points)
        curves[name] = {
            "seconds_per_step": cost,
            "seconds": learned.seconds,
            "num_steps": learned.num_steps,
            "ending": str(learned.ending),
            "curve": curve,
        }
        print(_row(name, curves[name]), flush=True)
    return curves


def _row(name: str, found: Mapping[str, Any]) -> str:
    last = found["curve"][-1]
    cells = [f"{last[part]:10.3f} ± {last[f'{part}_error']:.3f}" for part in ("train", "heldout")]
    return f"{_NAMES[name]:44}{found['num_steps']:>8}{found['seconds']:>8.0f} s" + "".join(cells)


def draw(found: Mapping[str, Any]) -> Figure:
    """Evidence per image against seconds of CPU, on training and on held-out images."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharex=True, layout="constrained")
    titles = {"train": "training images", "heldout": "held-out images"}
    for axis, (part, title) in zip(axes, titles.items(), strict=True):
        for name, learned in found.items():
            curve = learned["curve"]
            seconds, values = ([point[key] for point in curve] for key in ("seconds", part))
            errors = [2 * point[f"{part}_error"] for point in curve]
            axis.errorbar(seconds, values, errors, color=_COLOURS[name], label=_NAMES[name], lw=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("seconds of CPU after SVI", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("log evidence, nats per image", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write numbers and figure."""
    parser = argparse.ArgumentParser(description="Evidence of digits learners against time.")
    parser.add_argument("--learners", nargs="*", choices=_NAMES, default=list(_NAMES))
    parser.add_argument("--epochs", type=int, default=400, help="passes of SVI")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of CPU per learner")
    parser.add_argument("--points", type=int, default=5, help="measured on each curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="numbers there are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "learners_digits.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    found = known | measure(
        options.learners,
        epochs=options.epochs,
        budget=options.budget,
        points=options.points,
        seed=options.seed,
    )
    file.write_text(json.dumps(found, indent=1))
    draw(found).savefig(options.out / "learners_digits.png", dpi=200)


if __name__ == "__main__":
    main()
