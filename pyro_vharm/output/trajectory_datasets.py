"""What changes along a training, as datasets over the coordinate ``checkpoint``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from pyro_vharm.diagnostics.fulfilment import GapParts
from pyro_vharm.diagnostics.shape import IN_NATS
from pyro_vharm.diagnostics.trajectory import Diagnosis
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.output.labelled import as_array, totals_along

__all__ = ["gap_parts", "parameters_along", "trajectory"]

_PARTS = {
    "log_evidence": "log_evidence",
    "inference_gap": "gap",
    "approximation_gap": "approximation",
    "amortization_gap": "amortization",
}


def trajectory(found: Mapping[int, Diagnosis]) -> xr.Dataset:
    """Totals of bound, evidence, gaps and shape."""
    lines = [_lines(each) for each in found.values()]
    totals = [{name: line.total() for name, line in each.items()} for each in lines]
    return totals_along(totals, list(found), next(iter(lines[0].values())).num_units)


def gap_parts(found: Mapping[int, GapParts]) -> xr.Dataset:
    """Totals of the gap and its parts, by the names they have in a trajectory."""
    totals = [
        {name: getattr(each, part) for name, part in _PARTS.items()} for each in found.values()
    ]
    return totals_along(totals, list(found), totals[0]["log_evidence"].num_units)


def parameters_along(found: Mapping[int, Diagnosis]) -> xr.Dataset:
    """θ on the user-facing scale."""
    first = next(iter(found.values()))
    variables = {}
    for name, value in first.parameters.items():
        stacked = np.stack([as_array(each.parameters[name]) for each in found.values()])
        variables[name] = (
            ("checkpoint", *(f"{name}_dim_{i}" for i in range(value.dim()))),
            stacked,
        )
    return xr.Dataset(variables, coords={"checkpoint": list(found)})


def _lines(found: Diagnosis) -> dict[str, UnitEstimates]:
    gap, shape, discrete = found.gap, found.shape.continuous, found.shape.discrete
    lines = {
        "log_evidence": gap.evidence.per_unit,
        "elbo": gap.elbo,
        "inference_gap": gap.gap,
        "approximation_gap": gap.approximation,
        "amortization_gap": gap.amortization,
        **({} if shape is None else {name: getattr(shape, name) for name in IN_NATS}),
    }
    if discrete is not None:
        lines["discrete_entropy"] = discrete.entropy
        lines["discrete_total_correlation"] = discrete.total_correlation
    return {name: line for name, line in lines.items() if line is not None}
