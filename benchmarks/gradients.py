"""Value and gradient of log p(v, h) with respect to the latents: ours beside peers.

Each peer returns log p per (particle, unit) and its gradient per (particle, unit, dim), in float32,
on one thread of one core. Their results are compared before anything is timed. Run with
``python -m benchmarks gradients``; JAX joins in if it is installed (``pip install
'pyro-vharm[bench]'``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from statistics import quantiles
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from benchmarks.problems import LATENT, NUM_PARTICLES, PROBLEMS, Problem
from benchmarks.tables import print_table
from benchmarks.timing import Timing, time_interleaved
from pyro_vharm.model.compilation import compiled, eager, traced
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.problem import prepare

if find_spec("jax") is not None:
    import jax
    import jax.numpy as jnp

__all__ = ["add_options", "compare", "ours", "run"]

REFERENCE = "hand-written torch"
PYRO = "Pyro, traced"
JAX = "hand-written JAX, jit"
_HEADER = ("problem", "peer", "ms", "quartiles", "/ torch", "/ Pyro", "/ JAX", "cores")

type Peer = Callable[[], tuple[Any, ...]]


def ours(densities: UnitDensities, latents: Tensor) -> dict[str, Peer]:
    """The ways in which this package evaluates a model."""
    plain = eager(_ours, densities)
    graph = traced(_ours, densities, (latents,))
    fast = compiled(_ours, densities, (latents,))
    return {
        "ours, eager": lambda: plain(latents),
        "ours, graph": lambda: graph(latents),
        "ours, compiled": lambda: fast(latents),
    }


def _ours(densities: UnitDensities, latents: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        return _value_and_gradient(densities.log_joint, latents)


def _peers(problem: Problem) -> dict[str, Peer]:
    densities = prepare(problem.model, None, problem.data).densities[0]
    peers: dict[str, Peer] = {
        REFERENCE: lambda: _value_and_gradient(
            lambda latents: problem.torch_log_joint(latents, *problem.arrays), problem.latents
        ),
        PYRO: lambda: _value_and_gradient(
            lambda latents: _pyro_log_joint(problem, latents), problem.latents
        ),
    }
    if find_spec("jax") is not None:
        peers[JAX] = _jax_peer(problem)
    return peers | ours(densities, problem.latents)


def _value_and_gradient(
    log_joint: Callable[[Tensor], Tensor], latents: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = latents.detach().requires_grad_()
    value = log_joint(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _pyro_log_joint(problem: Problem, latents: Tensor) -> Tensor:
    """What a user of Pyro would write: condition, trace under a plate of particles, sum."""
    conditioned = poutine.condition(problem.model, {LATENT: latents})
    with pyro.validation_enabled(False):
        with pyro.plate("particles", NUM_PARTICLES, dim=-2):
            trace = poutine.trace(conditioned).get_trace(*problem.data)
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
    log_probs = [
        site["unscaled_log_prob"] for site in trace.nodes.values() if site["type"] == "sample"
    ]
    return torch.stack(log_probs).sum(0)


def _jax_peer(problem: Problem) -> Peer:
    """Data and weights are arguments, so that the graph outlives an update of either."""

    def total(latents: Any, *arrays: Any) -> tuple[Any, Any]:
        value = problem.jax_log_joint(latents, *arrays)
        return value.sum(), value

    compiled = jax.jit(jax.value_and_grad(total, has_aux=True))
    inputs = [jnp.asarray(tensor.numpy()) for tensor in (problem.latents, *problem.arrays)]

    def evaluate() -> tuple[Any, Any]:
        (_, value), gradient = compiled(*inputs)
        return value.block_until_ready(), gradient.block_until_ready()

    return evaluate


def compare(peers: Mapping[str, Peer]) -> None:
    """Check that all peers return the same.

    Raises:
        ValueError: if a value or gradient of one differs from the hand-written formula's.
    """
    expected = peers[REFERENCE]()
    for name, peer in peers.items():
        for what, found, right in zip(("value", "gradient"), peer(), expected, strict=True):
            tensor = torch.tensor(np.asarray(found))
            tolerance = 1e3 * torch.finfo(torch.float32).eps
            if tensor.dtype != torch.float32 or tensor.shape != right.shape:
                raise ValueError(f"{name}: {what} is {tensor.dtype} of shape {tensor.shape}")
            if not torch.allclose(tensor, right, rtol=tolerance, atol=tolerance):
                worst = float((tensor - right).abs().max())
                raise ValueError(f"{name}: {what} is off by up to {worst:.2g}")


def _rows(problem: str, timings: Mapping[str, Timing]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, timing in timings.items():
        low, _, high = quantiles(timing.rounds, n=4)
        ratios = [
            f"{timing.milliseconds / timings[peer].milliseconds:.2f}" if peer in timings else ""
            for peer in (REFERENCE, PYRO, JAX)
        ]
        spread = f"{low:.3g}–{high:.3g}"
        cells = f"{timing.milliseconds:.3g}", spread, *ratios, f"{timing.cores:.2f}"
        rows.append((problem, name, *cells))
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--rounds", type=int, default=15, help="turns of each peer (at least 2)")
    parser.add_argument(
        "--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), help="which to run"
    )


def run(options: argparse.Namespace) -> None:
    """Check and time every peer on every problem, and print one table."""
    rows: list[tuple[str, ...]] = []
    for name in options.problems:
        pyro.clear_param_store()
        peers = _peers(PROBLEMS[name]())
        compare(peers)
        rows += _rows(name, time_interleaved(peers, num_rounds=options.rounds))
    print(f"{NUM_PARTICLES} particles, float32; times over those of peers; cores = CPU / wall\n")
    print_table(_HEADER, rows)
