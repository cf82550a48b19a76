"""Figures over training: the gap and its parts, the pull, what became of the posteriors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from arviz_stats.base import array_stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vharm.output.drawing import (
    COLOURS,
    draw_line,
    group_of,
    in_one_style,
    label_ends,
    nats_unit,
    new_figure,
    num_units_of,
    step_axis,
)

__all__ = ["plot_posteriors", "plot_pull", "plot_self_fulfilment", "plot_shape"]

_FULFILMENT = "make it with to_datatree(self_fulfilment(diagnosed, reference))"
_DIAGNOSED = "make it with to_datatree(diagnose(history, data))"
_RIDGES = 3  # units that are drawn if none are named
_LEAST_PERCENT = 10.0  # at the top of the axis
_OVERLAP = 1.5  # heights of ridges, in rows


@in_one_style
def plot_self_fulfilment(tree: xr.DataTree, *, figsize: tuple[float, float] = (6.6, 2.6)) -> Figure:
    """The two parts of the inference gap over training, beside a reference's training.

    Left A(θ), what the model's posteriors keep from the guide's family: its fall is the model
    bending. Right G − A, what inference leaves undone: its fall is inference improving. Bands are
    two standard errors of our random numbers.

    Args:
        tree: what `to_datatree` gives for a `SelfFulfilment`, or a `DiagnosedHistory`.
        figsize: inches.

    Raises:
        KeyError: if the tree has no trajectory of the parts.
    """
    parts = {"approximation_gap": "approximation gap A", "amortization_gap": "the rest, G − A"}
    trained = group_of(tree, "trajectory", list(parts), _FULFILMENT)
    lines = {"as trained": (trained, COLOURS["learned"])}
    if "reference_trajectory" in tree.children:
        beside = tree["reference_trajectory"].to_dataset()
        lines["reference"] = (beside, COLOURS["reference"])
    figure, axes = new_figure(1, 2, figsize)
    for axis, (name, title) in zip(axes[0], parts.items(), strict=True):
        ends = [
            (draw_line(axis, along, name, colour), label, colour)
            for label, (along, colour) in lines.items()
        ]
        axis.set(title=title, ylabel=nats_unit(num_units_of(trained)))
        axis.axhline(0.0, color=COLOURS["level"], linewidth=0.6)
        _finish(figure, axis, ends, [along for along, _ in lines.values()])
    return figure


@in_one_style
def plot_pull(tree: xr.DataTree, *, figsize: tuple[float, float] = (3.5, 2.8)) -> Figure:
    """Log evidence and ELBO over training, with the gap between them shaded.

    Trained on from θ_ref, log evidence that falls while the ELBO rises is the objective driving
    the model away. Bands are two standard errors of our random numbers.

    Args:
        tree: one with the group ``trajectory``: of a `Reachability`, or of a
            `DiagnosedHistory`.
        figsize: inches.

    Raises:
        KeyError: if the tree has no trajectory with evidence and ELBO.
    """
    bound = "objective" if "reachability" in tree.children else "elbo"
    along = group_of(tree, "trajectory", ["log_evidence", bound], _DIAGNOSED)
    figure, axes = new_figure(1, 1, figsize)
    axis, num_units = axes[0, 0], num_units_of(along)
    levels = [along[name].values / num_units for name in (bound, "log_evidence")]
    axis.fill_between(along["checkpoint"], *levels, color=COLOURS["gap"], alpha=0.15, lw=0)
    ends = [
        (draw_line(axis, along, name, COLOURS[colour]), label, COLOURS[colour])
        for name, label, colour in (
            ("log_evidence", "log evidence ℓ", "evidence"),
            (bound, "ELBO L" if bound == "elbo" else "objective L", "learned"),
        )
    ]
    axis.set_ylabel(nats_unit(num_units))
    _finish(figure, axis, ends, [along])
    return figure


@in_one_style
def plot_shape(
    tree: xr.DataTree,
    reference: xr.DataTree | None = None,
    *,
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """The true posteriors over training: units with several modes, distances from two families.

    The share of units in which several modes were found; KL to the Gaussian of the same mean and
    covariance; and, of several latents, KL to the product of the marginals. Bands are two standard
    errors of our random numbers.

    Args:
        tree: what `to_datatree` gives for a `DiagnosedHistory`.
        reference: the same of a better learner's training, drawn beside it.
        figsize: inches.

    Raises:
        KeyError: if a tree has no posterior shape along checkpoints.
    """
    trees = {"as trained": (tree, COLOURS["learned"])}
    if reference is not None:
        trees["reference"] = (reference, COLOURS["reference"])
    shapes = {
        label: (_along(group_of(each, "shape", ["checkpoint", "num_modes"], _DIAGNOSED)), colour)
        for label, (each, colour) in trees.items()
    }
    num_units = shapes["as trained"][0].attrs["num_units"]
    panels = {"several": ("several modes", "units, %"), "non_gaussianity": ("non-Gaussianity", "")}
    if shapes["as trained"][0].attrs["num_latents"] > 1:
        panels["total_correlation"] = ("dependence", "")
    size = (3.3 * len(panels), 2.6) if figsize is None else figsize
    figure, axes = new_figure(1, len(panels), size)
    for axis, (name, (title, unit)) in zip(axes[0], panels.items(), strict=True):
        ends = [
            (draw_line(axis, along, name, colour), label, colour)
            for label, (along, colour) in shapes.items()
        ]
        axis.set(title=title, ylabel=unit or nats_unit(num_units))
        bottom, top = axis.get_ylim()
        axis.set_ylim((0.0, max(top, _LEAST_PERCENT)) if unit else (min(bottom, 0.0), top))
        _finish(figure, axis, ends, [along for along, _ in shapes.values()])
    return figure


def _along(shape: xr.Dataset) -> xr.Dataset:
    """Sums over units, as a trajectory has them; the share of units in per cent."""
    num_units = shape.sizes["unit"]
    names = [name for name in ("non_gaussianity", "total_correlation") if name in shape]
    sums = {name: shape[name].sum("unit") for name in names}
    sums |= {
        f"{name}_mc_error": (shape[f"{name}_mc_error"] ** 2).sum("unit") ** 0.5 for name in names
    }
    several = 100.0 * (shape["num_modes"] > 1).sum("unit")
    sums |= {"several": several, "several_mc_error": 0.0 * several}
    attrs = {"num_units": num_units, "num_latents": shape.sizes["latent"]}
    return xr.Dataset(sums, attrs=attrs)


@in_one_style
def plot_posteriors(
    tree: xr.DataTree,
    *,
    units: Sequence[int] | None = None,
    latent: str | None = None,
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """The true posterior of single units over training: a ridge of densities, the start on top.

    Densities are smoothed from the draws in the tree by ArviZ; the scale is unconstrained.

    Args:
        tree: what `to_datatree` gives for a `DiagnosedHistory`.
        units: coordinates of the units; if left out, the three whose non-Gaussianity changed most.
        latent: label of the latent; the first if left out.
        figsize: inches.

    Raises:
        KeyError: if the tree has no draws along checkpoints, or no such unit or latent.
    """
    draws = group_of(tree, "posterior", ["latents", "checkpoint"], _DIAGNOSED)["latents"]
    label = str(draws["latent"].values[0]) if latent is None else latent
    chosen = _changed_most(tree) if units is None else list(units)
    height = 1.2 + 0.22 * draws.sizes["checkpoint"]
    size = (1.0 + 2.0 * len(chosen), height) if figsize is None else figsize
    figure, axes = new_figure(1, len(chosen), size, sharey=True)
    for axis, unit in zip(axes[0], chosen, strict=True):
        one = draws.sel(unit=unit, latent=label).stack(sample=("chain", "draw"))
        _ridge(axis, one.transpose("checkpoint", "sample").values)
        axis.set(title=f"unit {unit}", xlabel=label)
        axis.spines["left"].set_visible(False)
        axis.tick_params("y", length=0)
    steps = [str(step) for step in draws["checkpoint"].values]
    axes[0, 0].set_yticks(range(0, -len(steps), -1), steps)
    axes[0, 0].set_ylabel("step")
    return figure


def _changed_most(tree: xr.DataTree) -> list[int]:
    shape = group_of(tree, "shape", ["non_gaussianity"], _DIAGNOSED)["non_gaussianity"]
    change = (shape.max("checkpoint") - shape.min("checkpoint")).values
    order = np.argsort(-change)[:_RIDGES]
    return [int(unit) for unit in shape["unit"].values[np.sort(order)]]


def _ridge(axis: Axes, draws: np.ndarray) -> None:
    """One density per row of draws, each scaled to the same height."""
    for row, values in enumerate(draws):
        margin = 0.1 * np.ptp(values)
        limits = (values.min() - margin, values.max() + margin)
        grid, density, _ = array_stats.kde(values, bw="isj", custom_lims=limits)
        height = density / density.max() * _OVERLAP
        share = row / max(len(draws) - 1, 1)
        axis.fill_between(
            grid, -row, height - row, color=COLOURS["learned"], alpha=0.25 + 0.5 * share, lw=0
        )
        axis.plot(grid, height - row, color="white", linewidth=2.2)
        axis.plot(grid, height - row, color=COLOURS["evidence"], linewidth=0.7)


def _finish(
    figure: Figure,
    axis: Axes,
    ends: Sequence[tuple[float, str, str]],
    alongs: Sequence[xr.Dataset],
) -> None:
    """The axis of steps, and labels at the ends of the lines where there are several."""
    step_axis(axis, alongs)
    if len(ends) < 2:
        return
    last = max(float(along["checkpoint"].values[-1]) for along in alongs)
    figure.draw_without_rendering()
    label_ends(axis, last, ends)
