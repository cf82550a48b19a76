"""Log evidence of more and more units: seconds and peak memory, each size in a fresh process."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import NamedTuple
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.tables import print_table
from pyro_vharm import AnnealedImportanceSampling, MatchedStart, log_evidence
from pyro_vharm.model import compilation

__all__ = ["Cost", "add_options", "measure", "run"]

_DIM = 3
_WARM_UP = 50
_HEADER = ("units", "CPU s", "ms / unit", "peak MiB", "data and results MiB", "beyond them MiB")


class Cost(NamedTuple):
    """What one size took.

    Attributes:
        seconds: CPU time.
        peak: bytes of the process at its largest, less those before the call.
        results: bytes of the data and of the particles that came out.
    """

    seconds: float
    peak: int
    results: int


def _model(observed: Tensor) -> None:
    with pyro.plate("units", len(observed)):
        latent = pyro.sample("latent", dist.Normal(observed.new_zeros(_DIM), 1.0).to_event(1))
        pyro.sample("observed", dist.Normal(latent.square(), 0.5).to_event(1), obs=observed)


def measure(num_units: int, method: AnnealedImportanceSampling) -> Cost:
    """Run `log_evidence` on so many units, after a few that load what is loaded once."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    observed = torch.randn(max(num_units, _WARM_UP), _DIM, generator=generator).square()

    def evaluate(count: int) -> None:
        log_evidence(_model, (observed[:count],), method=method, confirmation=None, progress=False)

    # always traced: a busy machine must not decide what is loaded and kept
    with patch.multiple(compilation, _WORTH_TRACING=0.0, _FEW_CALLS=0):
        evaluate(_WARM_UP)
        before, started = _peak(), time.process_time()
        evaluate(num_units)
        seconds = time.process_time() - started
    per_unit = method.num_particles * (_DIM + 2) + 8  # latents, weights each way; per-unit fields
    return Cost(seconds, _peak() - before, 4 * num_units * (per_unit + _DIM))


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--units", nargs="+", type=int, default=[10**n for n in range(2, 6)])
    parser.add_argument("--temperatures", type=int, default=5)


def run(options: argparse.Namespace) -> None:
    """Measure each size in a process of its own, and print one table."""
    context, rows = multiprocessing.get_context("spawn"), []
    method = AnnealedImportanceSampling(
        num_steps=options.temperatures, start=MatchedStart(refit=False)
    )
    for num_units in options.units:
        with context.Pool(1) as pool:
            cost = pool.apply(measure, (num_units, method))
        mebibytes = [f"{n / 2**20:.1f}" for n in (cost.peak, cost.results)]
        beyond = f"{(cost.peak - cost.results) / 2**20:.1f}"
        per_unit = f"{1e3 * cost.seconds / num_units:.3g}"
        rows.append((str(num_units), f"{cost.seconds:.3g}", per_unit, *mebibytes, beyond))
    print(f"{_DIM} dims, 16 chains each way, {options.temperatures} temperatures, no refit\n")
    print_table(_HEADER, rows)
