"""Groups of a DataTree for the ladder of families, and for the latents in use."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pyro_vharm.diagnostics.activity import ActiveUnits
from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.output.labelled import NATS, labels_of

__all__ = ["ladder_groups"]


def ladder_groups(gap: InferenceGap) -> dict[str, xr.Dataset]:
    """``families`` and ``active_units``, as far as the gap has them."""
    groups = {"families": _families(gap)} if gap.families else {}
    if gap.active_units is not None:
        groups["active_units"] = _active_units(gap.active_units)
    return groups


def _families(gap: InferenceGap) -> xr.Dataset:
    lines = {
        "elbo": [units.total() for units in gap.families.values()],
        "gap": [gap.family_gap(name).total() for name in gap.families],
    }
    variables = {}
    for name, totals in lines.items():
        errors = [each.mc_error for each in totals]
        variables[name] = ("family", np.array([each.value for each in totals]), NATS)
        variables[f"{name}_mc_error"] = ("family", np.array(errors), NATS)
    return xr.Dataset(variables, coords={"family": labels_of(list(gap.families))})


def _active_units(used: ActiveUnits) -> xr.Dataset:
    columns = {
        "variance": used.variances,
        "variance_mc_error": used.errors,
        "prior_variance": used.prior_variances,
        "active": used.active,
    }
    return xr.Dataset(
        {name: ("latent", column.cpu().numpy()) for name, column in columns.items()},
        coords={"latent": labels_of(used.labels)},
        attrs={"threshold": used.threshold, "num_units": used.num_units},
    )
