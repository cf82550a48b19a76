"""``python -m benchmarks TABLE``: print one of the tables; ``--help`` lists them."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

import torch

from benchmarks import gradients, recording, scaling, throughput, widths
from benchmarks.timing import use_one_core

TABLES = {
    "gradients": (gradients, "value and gradient of log p(v, h), beside hand-written code"),
    "throughput": (throughput, "annealed importance sampling at a frozen plan, beside JAX"),
    "widths": (widths, "time to a width of the sandwich, beside the classical recipe"),
    "recording": (recording, "what a recorder costs a training"),
    "scaling": (scaling, "seconds and memory by number of units"),
}


def main() -> None:
    """Print the table that was asked for, on one thread of one core."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    tables = parser.add_subparsers(dest="table", required=True)
    for name, (table, description) in TABLES.items():
        table.add_options(tables.add_parser(name, help=description, description=description))
    options = parser.parse_args()
    if getattr(options, "rounds", 2) < 2:
        parser.error(f"--rounds must be at least 2, for the quartiles; got {options.rounds}")
    use_one_core()
    torch.set_num_threads(1)
    if find_spec("jax") is None:
        print("jax is not installed: its rows are left out")
    TABLES[options.table][0].run(options)


if __name__ == "__main__":
    main()
