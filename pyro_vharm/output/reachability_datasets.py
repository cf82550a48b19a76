"""Reachability as datasets."""

from __future__ import annotations

from dataclasses import replace

import xarray as xr

from pyro_vharm.diagnostics.pull import Reachability
from pyro_vharm.estimates import Estimate
from pyro_vharm.output.labelled import totals_along
from pyro_vharm.output.ledger_datasets import ledger, units

__all__ = ["reachability_datasets"]


def reachability_datasets(result: Reachability) -> dict[str, xr.Dataset]:
    """Group ``reachability``, the ``trajectory`` from θ_ref on, and the endpoints' ``units``."""
    points, count = result.training.points, result.harm.num_units
    totals = [
        {"objective": _of_all(p.objective, count), "log_evidence": _of_all(p.log_evidence, count)}
        for p in points
    ]
    endpoints = {
        name: {"log_evidence": point.evidence.per_unit} for name, point in result.endpoints.items()
    }
    return {
        "reachability": ledger(result.ledger()),
        "trajectory": totals_along(totals, [point.step for point in points], count),
        "units": units(endpoints),
    }


def _of_all(estimate: Estimate, num_units: int) -> Estimate:
    """A total over some of the units, scaled to all: log evidence was looked at on a part."""
    unit = estimate.per_unit
    return replace(
        unit,
        value=unit.value * num_units,
        mc_error=unit.mc_error * num_units,
        num_units=num_units,
    )
