"""Figures that compare guides with each other, and parameters with where they should be."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vharm.output.drawing import (
    COLOURS,
    group_of,
    in_one_style,
    nats_unit,
    new_figure,
    num_units_of,
)

__all__ = ["plot_families", "plot_shifts"]

_COMPARED = {"families": "family", "comparison": "candidate"}
_PANELS = {"gap": ("inference gap", "gap"), "harm": ("learning harm", "harm")}
_SIGNIFICANT = 2.0


@in_one_style
def plot_families(tree: xr.DataTree, *, figsize: tuple[float, float] | None = None) -> Figure:
    """The gap, and the harm where it is known, along a ladder of families or guides.

    Bars are nats per unit, whiskers two standard errors. A negative gap is one that our random
    numbers do not tell from 0.

    Args:
        tree: one with a group ``families`` over the coordinate ``family``, or ``comparison`` over
            ``candidate``, in the order of the ladder.
        figsize: inches.

    Raises:
        KeyError: if the tree has neither.
    """
    group = next((name for name in _COMPARED if name in tree.children), "families")
    mend = "make it with to_datatree of a comparison of families or guides"
    found = group_of(tree, group, [_COMPARED[group], "gap", "gap_mc_error"], mend)
    names = [str(name) for name in found[_COMPARED[group]].values]
    panels = [name for name in _PANELS if name in found]
    size = (1.2 + 2.7 * len(panels), 0.9 + 0.34 * len(names)) if figsize is None else figsize
    figure, axes = new_figure(1, len(panels), size, sharey=True)
    num_units = num_units_of(found)
    for axis, name in zip(axes[0], panels, strict=True):
        title, colour = _PANELS[name]
        values = found[name].values / num_units
        errors = 2 * found[f"{name}_mc_error"].values / num_units
        _bars(axis, values, errors, COLOURS[colour])
        axis.set(title=title, xlabel=nats_unit(num_units))
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return figure


def _bars(axis: Axes, values: np.ndarray, errors: np.ndarray, colour: str) -> None:
    position = np.arange(len(values))
    axis.barh(position, values, 0.65, color=colour)
    axis.errorbar(values, position, xerr=errors, fmt="none", color=COLOURS["evidence"], capsize=3)
    axis.axvline(0.0, color=COLOURS["evidence"], linewidth=0.8)
    for at, value, error in zip(position, values, np.nan_to_num(errors), strict=True):
        shown = "unknown" if np.isnan(value) else f"{value:.3f}"
        axis.annotate(
            shown,
            (max(np.nan_to_num(value), 0.0) + error, at),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.margins(x=0.25)


@in_one_style
def plot_shifts(
    tree: xr.DataTree, *, most: int = 20, figsize: tuple[float, float] | None = None
) -> Figure:
    """Where exact learning would move the parameters, in standard errors of each.

    A point is the predicted shift over the parameter's own standard error, which the data alone
    would give it; whiskers are two standard errors of our random numbers. Outside of the grey band,
    two standard errors wide on either side, variational learning moved a parameter by more than
    the data leave open. On the right the shift itself, on the user-facing scale.

    Args:
        tree: one with a group ``shifts`` over the coordinate ``parameter``.
        most: how many parameters are drawn, those with the largest shifts.
        figsize: inches.

    Raises:
        KeyError: if the tree has no shifts.
        ValueError: if `most` is less than 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, not {most}")
    needed = ["parameter", "shift", "shift_mc_error", "standard_error"]
    found = group_of(tree, "shifts", needed, "make it with to_datatree of a local harm")
    scale = found["standard_error"].where(found["standard_error"] > 0)
    ratio = (found["shift"] / scale).values
    size_of = np.nan_to_num(np.abs(ratio), nan=-1.0)
    chosen = np.sort(np.argsort(-size_of, kind="stable")[:most])
    names = [str(name) for name in found["parameter"].values[chosen]]
    error = 2 * (found["shift_mc_error"] / scale).values[chosen]
    size = (4.2, 0.9 + 0.26 * len(chosen)) if figsize is None else figsize
    figure, axes = new_figure(1, 1, size)
    axis, position = axes[0, 0], np.arange(len(chosen))
    axis.axvspan(-_SIGNIFICANT, _SIGNIFICANT, color=COLOURS["pale"], alpha=0.6, lw=0)
    axis.axvline(0.0, color=COLOURS["level"], linewidth=0.8)
    axis.errorbar(
        ratio[chosen], position, xerr=error, fmt="o", markersize=4, color=COLOURS["learned"]
    )
    axis.set_yticks(position, names)
    axis.set_ylim(len(chosen) - 0.5, -0.5)
    axis.set_xlabel("predicted shift, standard errors of the parameter")
    shifts = [f"{value:+.3g}" for value in found["shift"].values[chosen]]
    beside = axis.secondary_yaxis("right")
    beside.set_yticks(position, shifts)
    beside.tick_params(length=0, labelsize=8)
    beside.spines["right"].set_visible(False)
    return figure
