"""Who was harmed: learning harm of each unit, with the units' data where they are images."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vharm.output.drawing import COLOURS, group_of, in_one_style, new_figure

__all__ = ["plot_units"]

_MEND = "make it with to_datatree(audit), of a model whose latents lie in a plate of units"
_SHOWN = 6  # images at either end


@in_one_style
def plot_units(
    tree: xr.DataTree,
    *,
    images: str | None = None,
    image_shape: tuple[int, int] | None = None,
    figsize: tuple[float, float] | None = None,
) -> Figure:
    """Learning harm of each unit, from the most harmed to the most helped.

    Bars are two standard errors of our random numbers. Where these are large, the ends are
    exaggerated: what was chosen for being extreme is so partly by chance.

    Args:
        tree: what `to_datatree` gives for an `Audit` or `LearningHarm`.
        images: the variable of ``observed_data`` with an image for each unit; the units at both
            ends are shown below.
        image_shape: height and width, where the variable has images as rows of pixels.
        figsize: inches.

    Raises:
        KeyError: if the tree has no evidence per unit at a reference, or no such images.
        ValueError: if the images cannot have that shape.
    """
    evidence = group_of(tree, "units", ["log_evidence", "parameters"], _MEND)
    if "reference" not in evidence.indexes["parameters"]:
        raise KeyError(f"the group 'units' of the tree has no reference; {_MEND}")
    here, there = (evidence.sel(parameters=name) for name in ("learned", "reference"))
    harm = there["log_evidence"].values - here["log_evidence"].values
    error = np.hypot(there["log_evidence_mc_error"].values, here["log_evidence_mc_error"].values)
    order = np.argsort(-harm)
    pixels = None if images is None else _images(tree, images, image_shape)[order]
    size = ((5.0, 2.6) if pixels is None else (5.0, 3.3)) if figsize is None else figsize
    if pixels is None:
        figure, axes = new_figure(1, 1, size)
        _ranked(axes[0, 0], harm[order], error[order])
        return figure
    figure, axes = new_figure(2, 1, size, height_ratios=(2.4, 0.8))
    _ranked(axes[0, 0], harm[order], error[order])
    _gallery(axes[1, 0], pixels, harm[order])
    return figure


def _images(tree: xr.DataTree, name: str, shape: tuple[int, int] | None) -> np.ndarray:
    data = group_of(
        tree, "observed_data", [name], "images= names one of the model's arguments with all units"
    )[name].values
    wanted = data.shape[1:] if shape is None else shape
    if len(wanted) != 2 or np.prod(wanted) != np.prod(data.shape[1:]):
        raise ValueError(
            f"image_shape must be (height, width) of {int(np.prod(data.shape[1:]))} pixels for "
            f"{name!r}, which has the shape {data.shape}; got {shape}"
        )
    return np.asarray(data.reshape(len(data), *wanted), dtype=float)


def _ranked(axis: Axes, harm: np.ndarray, error: np.ndarray) -> None:
    rank = np.arange(1, len(harm) + 1)
    worse = harm > 0
    for chosen, colour in ((worse, COLOURS["learned"]), (~worse, COLOURS["reference"])):
        axis.bar(rank[chosen], harm[chosen], 1.0, color=colour, linewidth=0)
    bars = 2 * np.where(np.isfinite(error), error, 0.0)
    axis.vlines(rank, harm - bars, harm + bars, color=COLOURS["level"], linewidth=0.5, alpha=0.6)
    mean = float(harm.mean())
    axis.axhline(mean, color=COLOURS["evidence"], linewidth=0.8, linestyle="--")
    axis.axhline(0.0, color=COLOURS["evidence"], linewidth=0.8)
    axis.annotate(
        f"{worse.mean():.0%} of units were harmed; the mean is {mean:.3f}",
        (0.98, 0.95),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=8,
    )
    axis.set(
        xlabel="units, the most harmed first", ylabel="harm, nats", xlim=(0.5, len(harm) + 0.5)
    )


def _gallery(axis: Axes, pixels: np.ndarray, harm: np.ndarray) -> None:
    """Images of the most harmed units on the left, of the most helped on the right."""
    axis.set_axis_off()
    count = min(_SHOWN, len(pixels) // 2)
    shares = (slice(0, count), 0.0, "most harmed"), (slice(-count, None), 0.52, "least harmed")
    for chosen, left, title in shares:
        axis.text(left, 1.0, title, transform=axis.transAxes, fontsize=8, va="bottom")
        width = 0.48 / count
        for i, (image, value) in enumerate(zip(pixels[chosen], harm[chosen], strict=True)):
            inset = axis.inset_axes((left + i * width, 0.12, width * 0.9, 0.85))
            inset.imshow(image, cmap="gray_r", vmin=pixels.min(), vmax=pixels.max())
            inset.set(xticks=[], yticks=[])
            inset.set_xlabel(f"{value:.1f}", fontsize=7, labelpad=2)
            for spine in inset.spines.values():
                spine.set_visible(True)
                spine.set_linewidth(0.5)
