"""A comparison of guides as datasets over candidates and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

import numpy as np
import xarray as xr

from pyro_vharm.diagnostics.guide_comparison import CandidateRun, GuideComparison
from pyro_vharm.output.labelled import NATS

__all__ = ["comparison_datasets"]


def comparison_datasets(result: GuideComparison) -> dict[str, xr.Dataset]:
    """Group ``comparison`` over ``candidate``, best first, and ``runs`` over ``seed`` as well."""
    names = np.array(result.ranking)
    leads = [result.harm(name) for name in result.ranking]
    held = [result.heldout_lead(result.ranking[0], name) for name in result.ranking]
    evidence = [result.log_evidence(name) for name in result.ranking]
    gaps = [result.gap(name) for name in result.ranking]
    columns = {
        "log_evidence": [each.value for each in evidence],
        "log_evidence_mc_error": [each.mc_error for each in evidence],
        "harm": [lead.value for lead in leads],
        "harm_mc_error": [lead.error for lead in leads],
        "gap": [np.nan if gap is None else gap.value for gap in gaps],
        "gap_mc_error": [np.nan if gap is None else gap.mc_error for gap in gaps],
        "heldout_harm": [np.nan if lead is None else lead.value for lead in held],
        "heldout_harm_mc_error": [np.nan if lead is None else lead.error for lead in held],
    }
    summary = xr.Dataset(
        {name: ("candidate", np.array(column), NATS) for name, column in columns.items()},
        coords={"candidate": names},
        attrs={"num_units": evidence[0].num_units},
    )
    summary["harm_is_clear"] = ("candidate", np.array([lead.is_clear for lead in leads]))
    summary["objective"] = ("candidate", np.array([result.objectives[str(n)] for n in names]))
    return {"comparison": summary, "runs": _runs(result, names)}


def _runs(result: GuideComparison, names: np.ndarray) -> xr.Dataset:
    table: Mapping[str, list[list[float]]] = {
        "log_evidence": [
            [run.evidence.per_unit.total().value for run in result.runs[name]] for name in names
        ],
        "heldout_log_evidence": [[_heldout(run) for run in result.runs[name]] for name in names],
        **{
            field: [[attrgetter(field)(run) for run in result.runs[name]] for name in names]
            for field in ("num_steps", "seconds", "cpu_seconds")
        },
    }
    variables = {name: (("candidate", "seed"), np.array(rows)) for name, rows in table.items()}
    return xr.Dataset(variables, coords={"candidate": names, "seed": np.arange(result.num_seeds)})


def _heldout(run: CandidateRun) -> float:
    return np.nan if run.heldout is None else run.heldout.total().value
