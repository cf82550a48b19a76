"""The figure of width against time, from what ``python -m benchmarks widths --save`` wrote.

Run with ``python -m benchmarks.figures benchmarks/results/widths.json --out FILE.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.widths import CLASSICAL, GUIDED, JAX, OURS, PUBLISHED, Point

__all__ = ["draw", "load"]

_STYLES = {
    OURS: ("C0", "o", "-"),
    GUIDED: ("C4", "v", "-."),
    CLASSICAL: ("C1", "s", "--"),
    PUBLISHED: ("C3", "D", "--"),
    JAX: ("C2", "^", ":"),
}
_LEAST = 2e-3  # widths below, or negative by chance, are drawn here


def load(paths: Sequence[Path]) -> list[Point]:
    """The points of one or more saved runs."""
    return [Point(**entry) for path in paths for entry in json.loads(path.read_text())]


def draw(points: Sequence[Point], width: float) -> Figure:
    """One panel for each VAE: mean width, with its standard error, against CPU seconds."""
    names = list(dict.fromkeys(point.vae for point in points))
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(3.4 * len(names), 3.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names, strict=True):
        for recipe, (colour, marker, line) in _STYLES.items():
            own = sorted(
                (point for point in points if (point.vae, point.recipe) == (name, recipe)),
                key=lambda point: point.seconds,
            )
            drawn = [max(point.width, _LEAST) for point in own]
            below = [
                max(min(point.error, w - _LEAST), 0.0) for point, w in zip(own, drawn, strict=True)
            ]
            axis.errorbar(
                [point.seconds for point in own],
                drawn,
                yerr=(below, [point.error for point in own]),
                color=colour,
                marker=marker,
                linestyle=line,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=recipe,
            )
        axis.axhline(width, color="0.6", linewidth=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", title=f"VAE {name}", xlabel="CPU seconds")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("mean width / nats")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Draw saved points to a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("saved", nargs="+", type=Path)
    parser.add_argument("--width", type=float, default=0.1, help="nats, where to draw a line")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw(load(options.saved), options.width).savefig(options.out, dpi=200)


if __name__ == "__main__":
    main()
