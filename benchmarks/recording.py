"""What a recorder costs: SVI on the digits VAE with and without it, in alternation."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import quantiles

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_vharm as vh
from benchmarks.tables import print_table
from examples.digits_vae import BATCH_SIZE, load_images, make_vae

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The budget."""
    parser.add_argument("--rounds", type=int, default=40, help="turns of each peer")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")


class _Training:
    """A training that goes on, with steps counted."""

    def __init__(self) -> None:
        pyro.clear_param_store()
        torch.manual_seed(0)
        self.model, self.guide = make_vae()
        self.batches = load_images()[0].split(BATCH_SIZE)
        self.svi = SVI(self.model, self.guide, pyro.optim.ClippedAdam({"lr": 1e-3}), Trace_ELBO())
        self.step = 0

    def run(self, num_steps: int, record: Callable[[int], None]) -> float:
        """CPU seconds of so many steps; a busy machine does not enter them."""
        begun = time.process_time()
        for _ in range(num_steps):
            self.svi.step(self.batches[self.step % len(self.batches)])
            record(self.step)
            self.step += 1
        return time.process_time() - begun


def run(options: argparse.Namespace) -> None:
    """CPU time per step beside that of the same training without a recorder, round by round."""
    with tempfile.TemporaryDirectory() as folder:
        training = _Training()
        recorders = {
            "in memory": vh.Recorder(training.model, training.guide, every=options.every),
            "on disk": vh.Recorder(
                training.model, training.guide, every=options.every, path=folder
            ),
        }
        peers: dict[str, Callable[[int], None]] = {"without": lambda _step: None}
        peers |= {name: recorder.record for name, recorder in recorders.items()}
        training.run(options.every, peers["without"])
        found: dict[str, list[float]] = {name: [] for name in peers}
        names = list(peers)
        for i in range(options.rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(training.run(options.every, peers[name]))
    print(f"SVI on the digits VAE, a checkpoint at every step that {options.every} divides")
    rows = []
    for name, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found["without"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        milliseconds = 1e3 * quantiles(seconds, n=4)[1] / options.every
        rows.append([name, f"{milliseconds:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"])
    print_table(["recorder", "CPU ms per step", "ratio", "quartiles"], rows)
