"""Local harm as datasets."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pyro_vharm.diagnostics.local import LocalHarm
from pyro_vharm.output.labelled import labels_of
from pyro_vharm.output.ledger_datasets import ledger

__all__ = ["local_datasets"]

_FIELDS = {
    "value": "value",
    "shift": "shift",
    "shift_mc_error": "mc_error",
    "standard_error": "standard_error",
}


def local_datasets(result: LocalHarm) -> dict[str, xr.Dataset]:
    """Group ``local_harm``, and ``shifts`` where every parameter was looked at."""
    lines = {
        "predicted by the score": result.predicted,
        "more where log evidence hardly curves": result.slope,
        "predicted by the ELBO's own gradient": result.unconverged,
        f"gained {result.along.name}": result.along.gain,
        f"gained {result.after_em.name}": result.after_em.gain,
    }
    groups = {"local_harm": ledger(lines)}
    if result.shifts:
        variables = {
            name: ("parameter", np.array([getattr(shift, field) for shift in result.shifts]))
            for name, field in _FIELDS.items()
        }
        labels = labels_of([shift.label for shift in result.shifts])
        groups["shifts"] = xr.Dataset(variables, coords={"parameter": labels})
    return groups
