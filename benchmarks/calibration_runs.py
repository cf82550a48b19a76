"""One data set of a control simulated, measured by this package, and kept as a line of JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pyro_vharm as vh
from benchmarks.controls import CONTROLS
from benchmarks.exact_optima import HarmedModel
from pyro_vharm.diagnostics.verdict import material_harm
from pyro_vharm.model.problem import prepare

__all__ = ["MEASUREMENTS", "Run", "measure", "measure_all", "read_lines"]

type Line = dict[str, Any]

_BRIEF = vh.GuideTraining(200, max_rounds=1)
_EM_STEPS = 2
_REFIT = vh.Refit(num_steps=20, num_particles=100)

# exact: the learner and method that `audit` takes by itself in up to two dimensions. sampled: quick
# learning and annealing, where nothing is exact. chains: more of both, for one joint unit. All
# retrain and refit the guide briefly, which touches only the causes that a verdict names.
MEASUREMENTS: dict[str, Callable[[], Mapping[str, Any]]] = {
    "exact": lambda: {"learner": vh.ExactLearner(guide_training=_BRIEF)},
    "sampled": lambda: {
        "learner": vh.ExpectationMaximization(guide_training=_BRIEF),
        "method": vh.AnnealedImportanceSampling(64, num_steps=5, target_width=0.05),
    },
    "chains": lambda: {
        "learner": vh.GradientLearner(
            vh.MarkovChainEM(8, chains=vh.PersistentChains()),
            num_steps=1000,
            learning_rate=0.01,
            max_rounds=2,
            guide_training=_BRIEF,
        ),
        "method": vh.AnnealedImportanceSampling(2048, num_steps=30),
    },
}


class Run(NamedTuple):
    """What identifies a line."""

    control: str
    seed: int
    measurement: str


def measure(run: Run) -> Line:
    """Simulate a data set, set θ̂ and q̂, audit, and set the exact answers beside.

    ``reached`` is ℓ(θ_ref) − ℓ(θ̂) by the exact formula: what the learner found, without the
    error of the estimate.
    """
    control = CONTROLS[run.control]
    harmed = control.simulate(run.seed)
    harmed.install()
    started = time.perf_counter()
    audit = vh.audit(
        harmed.model,
        harmed.guide,
        harmed.data,
        **MEASUREMENTS[run.measurement](),
        refit=_REFIT,
        num_em_steps=_EM_STEPS,
        seed=run.seed,
        progress=False,
    )
    seconds = time.perf_counter() - started
    exact = {
        "role": control.role,
        "size": control.size(run.seed),
        "harm": harmed.harm,
        "gap": harmed.gap,
        "reached": harmed.lost_at(harmed.learned) - harmed.lost_at(audit.reference.parameters),
    }
    found = {**_found(audit, harmed), **_near(audit)}
    return {**run._asdict(), **exact, **found, "seconds": round(seconds, 1)}


def _found(audit: vh.Audit, harmed: HarmedModel) -> Line:
    assert audit.harm is not None, "every control has parameters"
    estimate, pair = audit.harm.harm, audit.harm.train
    lower, upper = pair.lower(), pair.upper()
    gap = None if audit.gap.gap is None else audit.gap.gap.total()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    return {
        "estimate": estimate.value,
        "mc_error": estimate.mc_error,
        "lower": None if lower is None else lower.value,
        "upper": None if upper is None else upper.value,
        "kind": str(estimate.kind),
        "outcome": audit.verdict.outcome,
        "material": material_harm(problem.model_parameters, problem.num_units),
        "gap_estimate": None if gap is None else gap.value,
        "gap_error": None if gap is None else gap.mc_error,
        "attempts": [str(attempt) for attempt in audit.reference.attempts],
    }


def _near(audit: vh.Audit) -> Line:
    """What `local_harm` foretells and gains without learning anew."""
    local = audit.local
    assert local is not None, "the audit was asked to look near θ̂"
    lower = local.lower
    return {
        "predicted": local.predicted.value,
        "predicted_error": local.predicted.mc_error,
        "near": local.best.gain.value,
        "near_lower": None if lower is None else lower.value,
        "findings": list(local.findings),
    }


def read_lines(path: Path) -> list[Line]:
    """Every whole line; what a kill tore off the last one is cut from the file."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _append(path: Path, line: Line) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _begin() -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)


def _attempt(run: Run) -> Line:
    """A failure is a line too, and is tried again by the next call."""
    try:
        return measure(run)
    except Exception as error:  # whatever it is, the other data sets go on
        return {**run._asdict(), "error": f"{type(error).__name__}: {error}"}


def measure_all(runs: list[Run], path: Path, num_workers: int) -> Iterator[Line]:
    """Measure what the file does not hold yet, and add each line as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {
        Run(line["control"], line["seed"], line["measurement"])
        for line in read_lines(path)
        if "error" not in line
    }
    missing = [run for run in runs if run not in done]
    with get_context("spawn").Pool(num_workers, _begin, maxtasksperchild=20) as pool:
        for line in pool.imap_unordered(_attempt, missing):
            _append(path, line)
            yield line
