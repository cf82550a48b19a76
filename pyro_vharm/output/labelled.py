"""Tensors and estimates as arrays with names, the smallest parts of every DataTree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vharm.estimates import Estimate, UnitEstimates

__all__ = ["NATS", "Variables", "as_array", "labels_of", "per_unit", "totals_along"]

NATS = {"units": "nats"}

type Variables = dict[str, tuple[tuple[str, ...], np.ndarray, Mapping[str, str]]]


def as_array(values: Tensor) -> np.ndarray:
    """A tensor in double precision, off its device and graph."""
    return values.detach().to("cpu", torch.float64).numpy()


def labels_of(names: Sequence[str]) -> np.ndarray:
    """Names as an array of fixed width, which every storage keeps."""
    return np.array(names, dtype=f"U{max(map(len, names))}")


def per_unit(name: str, units: UnitEstimates) -> Variables:
    """One number per unit and its error, as two variables."""
    return {
        name: (("unit",), as_array(units.values), NATS),
        f"{name}_mc_error": (("unit",), as_array(units.errors), NATS),
    }


def totals_along(
    lines: Sequence[Mapping[str, Estimate]], steps: Sequence[int], num_units: int
) -> xr.Dataset:
    """Totals along checkpoints with their errors; NaN where a checkpoint has no such number."""
    variables: Variables = {}
    for name in dict.fromkeys(name for each in lines for name in each):
        found = [each.get(name) for each in lines]
        values = [np.nan if total is None else total.value for total in found]
        errors = [np.nan if total is None else total.mc_error for total in found]
        variables[name] = (("checkpoint",), np.array(values), NATS)
        variables[f"{name}_mc_error"] = (("checkpoint",), np.array(errors), NATS)
    coords = {"checkpoint": np.array(steps)}
    return xr.Dataset(variables, coords=coords, attrs={"num_units": num_units})
