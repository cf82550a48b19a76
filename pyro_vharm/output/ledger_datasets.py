"""Ledgers, numbers per unit and bounds as datasets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.learning.evidence_pair import EvidencePair
from pyro_vharm.output.labelled import NATS, as_array

__all__ = ["bounds", "gap_units", "ledger", "observed", "units"]


def ledger(lines: Mapping[str, Estimate | None]) -> xr.Dataset:
    """Totals by ``quantity``, with errors and kinds; what is unknown is left out."""
    known = {name: line for name, line in lines.items() if line is not None}
    sampling = [
        np.nan if line.sampling_error is None else line.sampling_error for line in known.values()
    ]
    columns: dict[str, list[float]] = {
        "total": [line.value for line in known.values()],
        "mc_error": [line.mc_error for line in known.values()],
        "sampling_error": sampling,
    }
    variables = {name: ("quantity", np.array(column), NATS) for name, column in columns.items()}
    kinds = ("quantity", np.array([str(line.kind) for line in known.values()], dtype="U12"))
    num_units = next(iter(known.values())).num_units
    return xr.Dataset(
        {**variables, "kind": kinds},
        coords={"quantity": np.array(list(known), dtype="U40")},
        attrs={"num_units": num_units},
    )


def gap_units(gap: InferenceGap) -> dict[str, UnitEstimates]:
    """What is known per unit at one θ."""
    found = {
        "log_evidence": gap.evidence.per_unit,
        "elbo": gap.elbo,
        "refitted_elbo": gap.refitted_elbo,
    }
    return {
        name: units for name, units in found.items() if units is not None and units.units_each == 1
    }


def units[Label: (str, int)](
    by_label: Mapping[Label, Mapping[str, UnitEstimates]], dim: str = "parameters"
) -> xr.Dataset:
    """Numbers per ``unit``, at each of the labels."""
    datasets = [
        xr.Dataset(
            {
                **{name: ("unit", as_array(part.values), NATS) for name, part in units.items()},
                **{
                    f"{name}_mc_error": ("unit", as_array(part.mc_errors), NATS)
                    for name, part in units.items()
                },
            }
        )
        for units in by_label.values()
    ]
    index = xr.DataArray(list(by_label), dims=dim, name=dim)
    joined = xr.concat(datasets, dim=index, data_vars="all", join="exact")
    return joined.assign_coords(unit=np.arange(joined.sizes["unit"]))


def observed(data: Mapping[str, Tensor]) -> xr.Dataset:
    """The data of each unit."""
    variables = {
        name: (("unit", *(f"{name}_dim_{i}" for i in range(value.dim() - 1))), value.numpy())
        for name, value in sorted(data.items())
    }
    return xr.Dataset(variables).assign_coords(unit=np.arange(len(next(iter(data.values())))))


def bounds(group: str, pair: EvidencePair) -> dict[str, xr.Dataset]:
    """Replicates of the stochastic bounds, under a name; nothing where there are none."""
    variables = {}
    for parameters, evidence in (("learned", pair.learned), ("reference", pair.reference)):
        sides = {"lower": evidence.lower_replicates, "upper": evidence.upper_replicates}
        for side, replicates in sides.items():
            if replicates is not None:
                dim = f"{parameters}_replicate"
                variables[f"{parameters}_{side}"] = (dim, as_array(replicates), NATS)
    return {group: xr.Dataset(variables)} if variables else {}
