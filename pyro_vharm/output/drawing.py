"""What all figures share: colours, axes, labels at lines, and the check that a group is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

__all__ = [
    "COLOURS",
    "draw_line",
    "group_of",
    "in_one_style",
    "label_ends",
    "nats_unit",
    "new_figure",
    "num_units_of",
    "step_axis",
]

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = {
    "learned": "#d55e00",
    "reference": "#0072b2",
    "gap": "#e69f00",
    "harm": "#d55e00",
    "level": "#5a5a5a",
    "evidence": "#000000",
    "pale": "#d9d9d9",
}
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
}
_RARER = 10  # times: the longest gap between checkpoints beside the shortest
_APART = 11.0  # points between the baselines of two labels


def group_of(tree: xr.DataTree, group: str, needed: Sequence[str], mend: str) -> xr.Dataset:
    """A group of the tree with certain variables.

    Raises:
        KeyError: if it is not there, saying how to make it.
    """
    if group not in tree.children:
        raise KeyError(f"the tree has no group {group!r}; {mend}")
    dataset = tree[group].to_dataset()
    missing = [name for name in needed if name not in dataset.variables]
    if missing:
        raise KeyError(f"the group {group!r} of the tree has no {missing}; {mend}")
    return dataset


def in_one_style[**Arguments](
    draw: Callable[Arguments, Figure],
) -> Callable[Arguments, Figure]:
    """Give what a function draws the style of all figures, and leave matplotlib's as it was."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with plt.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return drawn


def new_figure(
    num_rows: int, num_columns: int, figsize: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, a two-dimensional array of them."""
    return plt.subplots(
        num_rows, num_columns, figsize=figsize, squeeze=False, layout="constrained", **options
    )


def num_units_of(dataset: xr.Dataset) -> int:
    """How many units its totals are of; 1 if it does not say, so that totals stay totals."""
    return int(dataset.attrs.get("num_units", 1))


def nats_unit(num_units: int) -> str:
    """The unit of a mean over units, or of one joint unit."""
    return "nats" if num_units == 1 else "nats per unit"


def step_axis(axis: Axes, alongs: Sequence[xr.Dataset]) -> None:
    """Steps to the right, up to the last; logarithmic where checkpoints become ever rarer."""
    steps = np.unique(np.concatenate([along["checkpoint"].values for along in alongs]))
    gaps = np.diff(steps)
    if len(gaps) > 1 and gaps.max() > _RARER * gaps.min():
        axis.set_xscale("symlog", linthresh=float(gaps.min()))
        powers = [10**k for k in range(12) if gaps.min() <= 10**k < steps[-1]]
        ticks = [int(steps[0]), *(power for power in powers if power > steps[0]), int(steps[-1])]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_xlim(left=float(steps[0]), right=float(steps[-1]))
    axis.set_xlabel("step")


def draw_line(axis: Axes, along: xr.Dataset, name: str, colour: str) -> float:
    """Draw a mean over units along checkpoints, with two standard errors; return its last value."""
    num_units = num_units_of(along)
    steps, values = along["checkpoint"].values, along[name].values / num_units
    errors = 2 * along[f"{name}_mc_error"].values / num_units
    axis.plot(steps, values, color=colour, marker="o", markersize=3, clip_on=False)
    axis.fill_between(steps, values - errors, values + errors, color=colour, alpha=0.2, lw=0)
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else float("nan")


def label_ends(axis: Axes, x: float, labels: Sequence[tuple[float, str, str]]) -> None:
    """Labels (y, text, colour) to the right of where lines end, apart from each other."""
    known = sorted(label for label in labels if np.isfinite(label[0]))
    if not known:
        return
    points = [
        float(axis.transData.transform((x, y))[1]) * 72 / axis.figure.dpi for y, _, _ in known
    ]
    placed = list(points)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + _APART)
    middle = (sum(placed) - sum(points)) / len(points)
    for (y, text, colour), at, point in zip(known, placed, points, strict=True):
        axis.annotate(
            text,
            (x, y),
            xytext=(5, at - middle - point),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
        )
