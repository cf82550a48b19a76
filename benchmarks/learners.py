"""How near θ* each learner comes on models whose optima are known exactly, from θ̂.

A row says how much log evidence is still missing where a learner ended, by the exact formula, the
steps and the seconds of CPU that it took, and how it ended. The last rows take a mixture that hard
EM collapsed onto one class, where the bound is tight and the score is 0. Run with
``python -m benchmarks.learners``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributions import transform_to

import pyro_vharm as vh
from benchmarks.discrete_models import collapsed_mixture
from benchmarks.exact_optima import HarmedModel
from benchmarks.harmed_models import HARMED_MODELS
from benchmarks.learning_time import learn_from_here
from pyro_vharm.learning.learners import Learner
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.objectives.objective import UnitObjective
from pyro_vharm.tables import nats, text_table

__all__ = ["LEARNERS", "main", "missing_after"]

AIM = 0.05  # nats in total
_NO_GUIDE = vh.GuideTraining(0)
_HEADER = ("model", "learner", "harm at θ̂", "still missing", "steps", "CPU s", "how it ended")


def _gradient(objective: UnitObjective) -> vh.GradientLearner:
    return vh.GradientLearner(
        objective,
        num_steps=1000,
        learning_rate=0.01,
        batch_size=1000,
        max_rounds=2,
        guide_training=_NO_GUIDE,
    )


def _annealed(num_particles: int, num_steps: int) -> vh.AnnealedELBO:
    return vh.AnnealedELBO(num_particles, num_steps=num_steps, name=f"annealed_{num_steps}")


_CHAINS = vh.MarkovChainEM(8, chains=vh.PersistentChains())
LEARNERS: dict[str, Learner] = {
    "exact": vh.ExactLearner(guide_training=_NO_GUIDE),
    "EM": vh.ExpectationMaximization(guide_training=_NO_GUIDE),
    "importance": _gradient(vh.ImportanceWeightedELBO(50)),
    "annealed": _gradient(_annealed(4, 5)),
    "annealed, climbing": vh.ClimbingLearner(
        tuple(_gradient(_annealed(*size)) for size in ((4, 5), (16, 10), (32, 20))),
        guide_training=_NO_GUIDE,
    ),
    "chains": _gradient(_CHAINS),
    "climbing": vh.ClimbingLearner(
        (_gradient(vh.ImportanceWeightedELBO(50)), _gradient(_CHAINS)),
        guide_training=_NO_GUIDE,
    ),
}


def missing_after(harmed: HarmedModel, learner: Learner, seed: int) -> dict[str, Any]:
    """ℓ(θ*) − ℓ(θ_ref) in nats for one learner from θ̂, and what it took.

    Raises:
        InputError: if the learner cannot learn from the model.
    """
    harmed.install()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    learned = learn_from_here(problem, learner, seed)
    return {
        "missing": harmed.lost_at(_user_facing(problem, learned.values.model)),
        "steps": learned.num_steps,
        "seconds": learned.seconds,
        "ending": str(learned.ending),
    }


def _user_facing(problem: Problem, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return Parameters(values, problem.model_parameters.constraints).constrained()


def leave_the_saddle(seed: int) -> list[tuple[str, ...]]:
    """A collapsed mixture: its gap, its score, its harm, and what references reach."""
    harmed = collapsed_mixture()
    harmed.install()
    found = vh.inference_gap(harmed.model, harmed.guide, harmed.data, progress=False)
    assert found.gap is not None, "a guide of discrete sites has a bound"
    gap = found.gap.total().value
    score = float(_score(harmed).norm())
    harm = nats(harmed.lost_at(harmed.learned))
    rows: list[tuple[str, ...]] = [
        (harmed.name, "none", harm, harm, "", "", f"gap {gap:.1e}, |score| {score:.1e}")
    ]
    for name in ("exact", "EM"):
        reference = vh.learn_reference(
            harmed.model, harmed.data, guide=harmed.guide, learner=LEARNERS[name],
            start="current", seed=seed, progress=False,
        )  # fmt: skip
        for attempt in reference.attempts[1:]:
            assert attempt.log_evidence is not None
            best = float(harmed.log_evidence(harmed.best))
            missing = nats(best - attempt.log_evidence.value)
            start = attempt.name.rpartition(", ")[2]
            cells = (f"{name}, {start}", harm, missing, str(attempt.num_steps), "", attempt.ending)
            rows.append((harmed.name, *cells))
    return rows


def _score(harmed: HarmedModel) -> torch.Tensor:
    """∇ log p(v; θ) at θ̂ with respect to unconstrained θ, by the exact formula."""
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    theta = problem.model_parameters
    leaves = {name: value.requires_grad_() for name, value in theta.values().items()}
    values = {name: transform_to(theta.constraints[name])(leaf) for name, leaf in leaves.items()}
    total = harmed.log_evidence(values)
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(leaves.values()))])


def _row(harmed: HarmedModel, name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    mark = "" if found["missing"] <= AIM else "  > aim"
    return (
        harmed.name,
        name,
        nats(harmed.lost_at(harmed.learned)),
        nats(found["missing"]) + mark,
        str(found["steps"]),
        f"{found['seconds']:.1f}",
        found["ending"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the grid, and print and write one table."""
    parser = argparse.ArgumentParser(description="How near θ* each learner comes from θ̂.")
    parser.add_argument("--models", nargs="+", choices=HARMED_MODELS, default=list(HARMED_MODELS))
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=list(LEARNERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the numbers, as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows, written = [], []
    for model in options.models:
        harmed = HARMED_MODELS[model]()
        for name in options.learners:
            try:
                found = missing_after(harmed, LEARNERS[name], options.seed)
            except vh.InputError as error:
                print(f"{harmed.name}, {name}: not applicable: {error}", flush=True)
                continue
            written.append({"model": harmed.name, "learner": name, **found})
            rows.append(_row(harmed, name, found))
            print(*rows[-1], sep=" | ", flush=True)
    rows += leave_the_saddle(options.seed)
    print("\n" + text_table(_HEADER, rows))
    print(f"\nnats in total; the aim is {AIM} still missing")
    if options.out is not None:
        options.out.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
