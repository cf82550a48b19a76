"""The ledger as a waterfall."""

from __future__ import annotations

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vharm.output.drawing import COLOURS, in_one_style, nats_unit, new_figure

__all__ = ["plot_ledger"]

_TITLES = {"ledger": "training data", "heldout_ledger": "held-out data"}


@in_one_style
def plot_ledger(tree: xr.DataTree, *, figsize: tuple[float, float] | None = None) -> Figure:
    """The ledger as a waterfall: from log evidence at the reference down to the ELBO as learned.

    Bars are nats per unit above the ELBO as learned; whiskers are two standard errors, of our
    random numbers and, for held-out data, of which units were held out.

    Args:
        tree: what `to_datatree` gives for an `Audit` or `LearningHarm`, or that tree read back.
        figsize: inches.

    Raises:
        KeyError: if the tree has no ledger.
    """
    groups = [group for group in _TITLES if group in tree.children]
    if not groups:
        raise KeyError("the tree has no group 'ledger'; make it with to_datatree(audit)")
    size = (5.4 * len(groups) + 1.0, 3.0) if figsize is None else figsize
    figure, axes = new_figure(1, len(groups), size)
    for axis, group in zip(axes[0], groups, strict=True):
        ledger = tree[group].to_dataset()
        _waterfall(axis, ledger)
        num_units = ledger.attrs["num_units"]
        units = "one joint unit" if num_units == 1 else f"{num_units} units"
        axis.set_title(f"{_TITLES[group]}, {units}")
        axis.set_xlabel(f"{nats_unit(num_units)} above the ELBO as learned")
    return figure


def _waterfall(axis: Axes, ledger: xr.Dataset) -> None:
    num_units = ledger.attrs["num_units"]
    names = [str(name) for name in ledger["quantity"].values]
    steps = [name for name in names if name[0] in "−=" or name.startswith("log evidence")]
    totals = {name: float(ledger["total"].sel(quantity=name)) / num_units for name in steps}
    base = totals.get("= ELBO as learned", totals[steps[-1]])
    level = totals[steps[0]] - base
    for position, name in enumerate(steps):
        value, error = totals[name], 2 * _error(ledger, name) / num_units
        if name.startswith("−"):
            left, width, level = level - value, value, level - value
            colour, label = COLOURS["harm" if "harm" in name else "gap"], f"{value:.3f}"
        else:
            left, width, level = 0.0, value - base, value - base
            colour, label = COLOURS["level"], f"{value:.2f}"
        end = left + width
        axis.barh(position, width, 0.7, left, color=colour)
        axis.errorbar(end, position, xerr=error, color="black", capsize=3)
        axis.annotate(
            label,
            (max(left, end) + error, position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_yticks(range(len(steps)), steps)
    axis.invert_yaxis()
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.margins(x=0.2)


def _error(ledger: xr.Dataset, name: str) -> float:
    line = ledger.sel(quantity=name)
    sampling = 0.0
    if name.startswith("−"):
        sampling = float(line["sampling_error"].fillna(0.0))
    return float((float(line["mc_error"]) ** 2 + sampling**2) ** 0.5)
