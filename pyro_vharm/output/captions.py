"""Which figures a tree can have, with a caption for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import xarray as xr
from matplotlib.figure import Figure

from pyro_vharm.output.comparison_figures import plot_families, plot_shifts
from pyro_vharm.output.training_figures import (
    plot_posteriors,
    plot_pull,
    plot_self_fulfilment,
    plot_shape,
)
from pyro_vharm.output.unit_figures import plot_units

__all__ = ["Drawing", "drawings_of"]


class Drawing(NamedTuple):
    """A figure that a tree may have: which groups and variables it needs, and what it shows."""

    needs: Mapping[str, Sequence[str]]
    draw: Callable[..., Figure]
    caption: str
    of_units: bool = False


_DRAWINGS = (
    Drawing(
        {"units": ["parameters"]},
        plot_units,
        "Harm of each unit of the training data, in nats, the most harmed first. Orange was "
        "harmed, blue was helped. Lines are two standard errors of the estimator's random numbers.",
        of_units=True,
    ),
    Drawing(
        {"families": ["family"]},
        plot_families,
        "The inference gap along a ladder of guide families; whiskers are two standard errors.",
    ),
    Drawing(
        {"comparison": ["candidate"]},
        plot_families,
        "The guides that were compared; whiskers are two standard errors.",
    ),
    Drawing(
        {"shifts": ["parameter"]},
        plot_shifts,
        "Where exact learning would move the parameters. Outside of the grey band the shift is "
        "larger than two standard errors of the parameter itself.",
    ),
    Drawing(
        {"trajectory": ["log_evidence", "objective"], "reachability": ["total"]},
        plot_pull,
        "Log evidence and the user's own objective while training goes on from the reference. "
        "Evidence that falls while the objective rises is the objective driving the model away.",
    ),
    Drawing(
        {"trajectory": ["log_evidence", "elbo"]},
        plot_pull,
        "Log evidence and ELBO along training. Evidence that falls while the ELBO rises is the "
        "objective driving the model away.",
    ),
    Drawing(
        {"trajectory": ["approximation_gap", "amortization_gap"]},
        plot_self_fulfilment,
        "The inference gap's parts along training: left falls as the model bends to the guide's "
        "family, right as inference improves.",
    ),
    Drawing(
        {"shape": ["checkpoint"]}, plot_shape, "The shape of the true posteriors along training."
    ),
    Drawing(
        {"posterior": ["checkpoint"], "shape": ["checkpoint"]},
        plot_posteriors,
        "True posteriors of the units that changed most, from the start on top to the end.",
    ),
)


def drawings_of(tree: xr.DataTree) -> list[Drawing]:
    """The figures for which the tree has what they need, besides the ledger."""
    return [
        drawing
        for drawing in _DRAWINGS
        if all(_has(tree, group, names) for group, names in drawing.needs.items())
    ]


def _has(tree: xr.DataTree, group: str, names: Sequence[str]) -> bool:
    if group not in tree.children:
        return False
    dataset = tree[group].to_dataset()
    has_reference = "parameters" not in names or "reference" in dataset.indexes.get(
        "parameters", []
    )
    return has_reference and all(name in dataset.variables for name in names)
