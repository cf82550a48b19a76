"""Posterior shapes as datasets: of one parameter value, or along the checkpoints of a training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from pyro_vharm.diagnostics.discrete_shape import DiscreteShape
from pyro_vharm.diagnostics.shape import IN_NATS, ContinuousShape, PosteriorShape
from pyro_vharm.output.labelled import Variables, as_array, labels_of, per_unit

__all__ = ["shape_datasets", "shapes_along"]

_DRAWS_ALONG = 200
_ALONG = (
    *(f"{name}{suffix}" for name in (*IN_NATS, "mean", "sd") for suffix in ("", "_mc_error")),
    "num_modes",
)
_DISCRETE_ALONG = ("entropy", "total_correlation")


def shape_datasets(result: PosteriorShape) -> dict[str, xr.Dataset]:
    """Groups ``shape``, ``posterior`` and ``discrete_shape``, as far as there are such latents."""
    groups: dict[str, xr.Dataset] = {}
    if result.continuous is not None:
        groups["shape"] = _continuous(result.continuous)
        groups["posterior"] = _posterior(result.continuous)
    if result.discrete is not None:
        groups["discrete_shape"] = _discrete(result.discrete)
    return groups


def shapes_along(shapes: Mapping[int, PosteriorShape]) -> dict[str, xr.Dataset]:
    """The same groups with the dim ``checkpoint``, and in them what is drawn over training.

    Of the draws at most 200 are kept; ``checkpoint`` is the last of their dims, so that ArviZ takes
    it for one more index of the latents.
    """
    steps = xr.DataArray(list(shapes), dims="checkpoint", name="checkpoint")
    every = [shape_datasets(shape) for shape in shapes.values()]
    common = set.intersection(*map(set, every))
    groups = {}
    for group, names in (("shape", _ALONG), ("discrete_shape", _DISCRETE_ALONG)):
        if group in common:
            kept = [each[group][list(names)] for each in every]
            groups[group] = xr.concat(kept, dim=steps, data_vars="all", join="exact")
    if "posterior" in common:
        fewest = min(_DRAWS_ALONG, *(each["posterior"].sizes["draw"] for each in every))
        draws = [each["posterior"].isel(draw=slice(fewest)) for each in every]
        joined = xr.concat(draws, dim=steps, data_vars="all", join="exact")
        groups["posterior"] = joined.transpose("chain", "draw", "unit", "latent", "checkpoint")
    return groups


def _continuous(result: ContinuousShape) -> xr.Dataset:
    variables: Variables = {}
    for name in IN_NATS:
        variables |= per_unit(name, getattr(result, name))
    measured = {"effective_rank": result.effective_rank, **result.coordinates}
    for name, (values, errors) in measured.items():
        dims = ("unit", "latent")[: values.dim()]
        variables[name] = (dims, as_array(values), {})
        variables[f"{name}_mc_error"] = (dims, as_array(errors), {})
    modes = result.modes
    variables |= {
        "dip": (("unit", "axis"), as_array(result.dips), {}),
        "dip_p_value": (("unit", "axis"), as_array(result.dip_p_values), {}),
        "num_modes": (("unit",), modes.counts.cpu().numpy(), {}),
        "mode_mass": (("unit", "mode"), as_array(modes.masses), {}),
        "mode_location": (("mode", "unit", "latent"), as_array(modes.locations), {}),
        "effective_size": (("unit",), as_array(result.effective_sizes), {}),
    }
    return xr.Dataset(variables, coords=_coords(result))


def _posterior(result: ContinuousShape) -> xr.Dataset:
    draws = (("chain", "draw", "unit", "latent"), as_array(result.draws)[None])
    index = {"chain": [0], "draw": np.arange(len(result.draws))}
    return xr.Dataset({"latents": draws}, coords={**_coords(result), **index})


def _coords(result: ContinuousShape) -> dict[str, np.ndarray]:
    return {"unit": np.arange(len(result.modes.counts)), "latent": labels_of(result.labels)}


def _discrete(result: DiscreteShape) -> xr.Dataset:
    variables: Variables = {}
    for name in ("entropy", "total_correlation"):
        variables |= per_unit(name, getattr(result, name))
    values, errors = result.probabilities
    variables["probability"] = (("unit", "rank"), as_array(values), {})
    variables["probability_mc_error"] = (("unit", "rank"), as_array(errors), {})
    codes = result.configurations.cpu().numpy()
    variables["configuration"] = (("unit", "rank", "element"), codes, {})
    coords = {"unit": np.arange(len(codes)), "element": labels_of(result.labels)}
    return xr.Dataset(variables, coords=coords)
