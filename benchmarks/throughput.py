"""Annealed importance sampling at a frozen plan: ours beside a hand-written JAX version.

All run forward with the same start density, temperatures, step sizes, chains and leapfrog steps, in
float32 on one thread of one core, drawing the start included. Their estimates are compared before
anything is timed. JAX carries whitened positions and the gradients of both ends, as we do.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import quantiles
from unittest.mock import patch

import numpy as np
import pyro
import torch
from scipy.stats import norm
from torch import Tensor

from benchmarks.problems import NUM_PARTICLES, PROBLEMS, Problem
from benchmarks.tables import print_table
from benchmarks.timing import time_interleaved
from pyro_vharm.inference.annealed_runs import AnnealedPlan, anneal_forward
from pyro_vharm.inference.annealing import AnnealedImportanceSampling
from pyro_vharm.inference.start import MatchedStart, match_start
from pyro_vharm.model.compilation import Accelerated, compiled, eager, traced
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import log_mean_exp

if find_spec("jax") is not None:
    import jax
    import jax.numpy as jnp

    from benchmarks.jax_annealing import JaxAnnealing, JaxStart

__all__ = ["add_options", "check", "run"]

JAX = "hand-written JAX"
_PRIOR_SHARE = 0.05
_FAILURE_RATE = 1e-6
_HEADER = ("problem", "temperatures", "peer", "ms", "quartiles", "JAX / this", "compile s", "cores")

type Run = Callable[[], Tensor]

_FORMS: dict[str, Callable[..., Accelerated]] = {
    "ours, compiled": lambda function, densities, inputs, _: compiled(function, densities, inputs),
    "ours, graph": lambda function, densities, inputs, _: traced(function, densities, inputs),
    "ours, eager": lambda function, densities, _inputs, _: eager(function, densities),
}


def _plan(problem: Problem, num_steps: int) -> AnnealedPlan:
    densities = prepare(problem.model, None, problem.data).densities[0]
    method = AnnealedImportanceSampling(
        NUM_PARTICLES, num_steps=num_steps, start=MatchedStart(_PRIOR_SHARE, refit=False)
    )
    plan, _ = method.pilot(densities, match_start(densities, _PRIOR_SHARE))
    return plan


def _ours(plan: AnnealedPlan, form: Callable[..., Accelerated]) -> Run:
    """The plan, its transitions in a given form."""
    with patch("pyro_vharm.inference.hamiltonian.accelerate", form):
        kernel, path = plan.moves.kernel, plan.moves.path
        moves = kernel.moves(path.densities, path.start, NUM_PARTICLES, 0)
    frozen = plan._replace(moves=moves)

    def run() -> Tensor:
        latents = moves.start.sample(moves.densities, NUM_PARTICLES)
        return anneal_forward(frozen, latents).log_weights

    return run


def _jax(problem: Problem, plan: AnnealedPlan) -> Run:
    def array(tensor: Tensor) -> jax.Array:
        return jnp.asarray(tensor.detach().numpy())

    gaussian = plan.moves.start.gaussian
    start = JaxStart(array(gaussian.mean), array(gaussian.scale_tril), jnp.float32(_PRIOR_SHARE))
    annealing = JaxAnnealing(problem.jax_log_joint, plan.moves.kernel.num_leapfrog)
    schedule = array(plan.temperatures), array(plan.step_sizes)
    arrays = tuple(array(tensor) for tensor in problem.arrays)
    forward = jax.jit(annealing.forward, static_argnums=1)
    seeds = itertools.count()

    def run() -> Tensor:
        key = jax.random.key(next(seeds))
        found = forward(key, NUM_PARTICLES, start, *schedule, arrays)
        return torch.tensor(np.asarray(found.block_until_ready()))

    return run


def check(first: Tensor, second: Tensor, name: str) -> None:
    """Two sets of log weights of the same units must give the same mean evidence.

    Raises:
        ValueError: if they differ by more than their errors.
    """
    apart = (log_mean_exp(first) - log_mean_exp(second)).double()
    error = float(apart.std()) / len(apart) ** 0.5
    if not abs(float(apart.mean())) < float(norm.isf(_FAILURE_RATE)) * error:
        raise ValueError(f"{name}: log evidence differs by {float(apart.mean()):.3f} ± {error:.3f}")


def _rows_of(name: str, num_steps: int, num_rounds: int) -> list[tuple[str, ...]]:
    problem = PROBLEMS[name]()
    plan = _plan(problem, num_steps)
    makers: dict[str, Callable[[], Run]] = {
        peer: partial(_ours, plan, form) for peer, form in _FORMS.items()
    }
    if find_spec("jax") is not None:
        makers[JAX] = partial(_jax, problem, plan)
    runs: dict[str, Run] = {}
    seconds, weights = {}, {}
    for peer, make in makers.items():
        started = time.process_time()
        runs[peer] = make()
        runs[peer]()
        seconds[peer] = time.process_time() - started
        started = time.process_time()
        weights[peer] = runs[peer]()
        seconds[peer] -= time.process_time() - started
    first, *others = weights
    for peer in others:
        check(weights[peer], weights[first], peer)
    timings = time_interleaved(runs, num_rounds=num_rounds)
    rows: list[tuple[str, ...]] = []
    for peer, timing in timings.items():
        low, _, high = quantiles(timing.rounds, n=4)
        ratio = timings[JAX].milliseconds / timing.milliseconds if JAX in timings else math.nan
        shown = "" if math.isnan(ratio) else f"{ratio:.2f}"
        spread = f"{low:.4g}–{high:.4g}"
        cells = f"{timing.milliseconds:.4g}", spread, shown, f"{max(seconds[peer], 0.0):.1f}"
        rows.append((name, str(num_steps), peer, *cells, f"{timing.cores:.2f}"))
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--rounds", type=int, default=9, help="turns of each peer (at least 2)")
    parser.add_argument("--temperatures", type=int, default=20, help="temperatures of a run")
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="which to run"
    )


def run(options: argparse.Namespace) -> None:
    """Check and time every peer on every problem, and print one table."""
    rows = []
    for name in options.problems:
        pyro.clear_param_store()
        torch.manual_seed(0)
        rows += _rows_of(name, options.temperatures, options.rounds)
    print(f"{NUM_PARTICLES} chains, 5 leapfrog steps, float32; compile s is CPU time\n")
    print_table(_HEADER, rows)
