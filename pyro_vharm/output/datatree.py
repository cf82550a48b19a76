"""Results as xarray DataTrees, for ArviZ, figures and storage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from importlib.metadata import version

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_vharm.diagnostics.fulfilment import SelfFulfilment
from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.diagnostics.shape import PosteriorShape
from pyro_vharm.diagnostics.trajectory import DiagnosedHistory
from pyro_vharm.diagnostics.verdict import Audit
from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.inference.evidence import Evidence
from pyro_vharm.learning.evidence_pair import EvidencePair
from pyro_vharm.output.labelled import NATS, as_array
from pyro_vharm.output.shape_datasets import shape_datasets, shapes_along
from pyro_vharm.output.trajectory_datasets import gap_parts, parameters_along, trajectory

__all__ = ["to_datatree"]


@singledispatch
def to_datatree(result: object) -> xr.DataTree:
    """A result as a DataTree: one group per question, numbers in nats, settings as attributes.

    Groups, as far as the result has them:

    * ``ledger``, ``heldout_ledger``: variables ``total``, ``mc_error``, ``sampling_error`` and
      ``kind`` over the coordinate ``quantity``; ``num_units`` is an attribute.
    * ``units``, ``heldout_units``: variables per ``unit`` at each of ``parameters`` (``learned``,
      ``reference``): ``log_evidence``, ``elbo``, ``refitted_elbo`` and each one's ``_mc_error``,
      without those that are known in total only.
    * ``bounds``, ``heldout_bounds``: replicates of the stochastic bounds on the totals.
    * ``trajectory``: of a diagnosed history, totals of the same over the coordinate
      ``checkpoint``, whose values are steps; its ``units`` have that coordinate in place of
      ``parameters``, and ``theta`` has the parameters on the user-facing scale. Of
      self-fulfilment, also ``reference_trajectory``.
    * ``shape`` and ``posterior``: of a posterior shape, its measures per ``unit`` and ``latent``,
      with each one's ``_mc_error``, and unweighted draws on the unconstrained scale;
      ``discrete_shape``: of discrete latents, with the most probable configurations by ``rank``.
      Of a diagnosed history both have the dim ``checkpoint``, and at most 200 draws.
    * ``observed_data``: the data of each unit, by the names of the model's arguments.

    Args:
        result: an `Audit`, `LearningHarm`, `InferenceGap`, `Evidence`, `DiagnosedHistory`,
            `SelfFulfilment` or `PosteriorShape`.

    Raises:
        TypeError: for anything else.
    """
    raise TypeError(f"to_datatree has no form for {type(result).__name__}")


@to_datatree.register
def _(result: Audit) -> xr.DataTree:
    tree = to_datatree(result.gap if result.harm is None else result.harm)
    tree.attrs |= {f"setting_{name}": value for name, value in result.settings.items()}
    tree.attrs |= {"outcome": result.verdict.outcome, "verdict": str(result.verdict)}
    return tree


@to_datatree.register
def _(result: LearningHarm) -> xr.DataTree:
    gaps = {"learned": result.learned, "reference": result.reference_gap}
    groups = {
        "ledger": _ledger(result.ledger()),
        "units": _units({name: _gap_units(gap) for name, gap in gaps.items()}),
        **_bounds("bounds", result.train),
    }
    if result.heldout is not None:
        learned = {"log_evidence": result.heldout.learned.per_unit}
        if result.heldout_elbo is not None:
            learned["elbo"] = result.heldout_elbo
        reference = {"log_evidence": result.heldout.reference.per_unit}
        groups["heldout_ledger"] = _ledger(result.heldout_ledger())
        groups["heldout_units"] = _units({"learned": learned, "reference": reference})
        groups |= _bounds("heldout_bounds", result.heldout)
    if result.reference.unit_data:
        groups["observed_data"] = _observed(result.reference.unit_data)
    tried = "; ".join(attempt.name for attempt in result.reference.attempts)
    return _tree(groups, {"tried": tried, "notes": "; ".join(result.notes)})


@to_datatree.register
def _(result: InferenceGap) -> xr.DataTree:
    lines = {
        "log evidence as learned": result.evidence.per_unit,
        "− approximation gap": result.approximation,
        "− amortization gap": result.amortization,
        "= ELBO as learned": result.elbo,
        "inference gap": result.gap,
    }
    totals = {name: None if line is None else line.total() for name, line in lines.items()}
    groups = {"ledger": _ledger(totals), "units": _units({"learned": _gap_units(result)})}
    return _tree(groups, {"method": result.evidence.method})


@to_datatree.register
def _(result: Evidence) -> xr.DataTree:
    groups = {
        "ledger": _ledger({"log evidence": result.per_unit.total()}),
        "units": _units({"learned": {"log_evidence": result.per_unit}}),
    }
    return _tree(groups, {"method": result.method})


@to_datatree.register
def _(result: DiagnosedHistory) -> xr.DataTree:
    if not result.diagnoses:
        raise ValueError("no checkpoint is diagnosed yet; call diagnose(history, data) first")
    found = result.diagnoses
    per_unit = {step: _gap_units(each.gap) for step, each in found.items()}
    common = set.intersection(*map(set, per_unit.values()))
    units = {
        step: {name: part for name, part in each.items() if name in common}
        for step, each in per_unit.items()
    }
    groups = {
        "trajectory": trajectory(found),
        "units": _units(units, "checkpoint"),
        "theta": parameters_along(found),
        **shapes_along({step: each.shape for step, each in found.items()}),
    }
    return _tree(groups, {f"setting_{name}": value for name, value in result.settings.items()})


@to_datatree.register
def _(result: SelfFulfilment) -> xr.DataTree:
    groups = {"trajectory": gap_parts(result.trained)}
    if result.reference:
        groups["reference_trajectory"] = gap_parts(result.reference)
    return _tree(groups, {})


@to_datatree.register
def _(result: PosteriorShape) -> xr.DataTree:
    method = "enumeration" if result.continuous is None else result.continuous.method
    return _tree(shape_datasets(result), {"method": method})


def _tree(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, str]) -> xr.DataTree:
    tree = xr.DataTree.from_dict(dict(groups))
    versions = {
        f"{name}_version": version(package)
        for name, package in (
            ("pyro_vharm", "pyro-vharm"),
            ("pyro", "pyro-ppl"),
            ("torch", "torch"),
        )
    }
    tree.attrs |= {"creation_library": "pyro_vharm", **versions, **attrs}
    return tree


def _ledger(lines: Mapping[str, Estimate | None]) -> xr.Dataset:
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


def _gap_units(gap: InferenceGap) -> dict[str, UnitEstimates]:
    found = {
        "log_evidence": gap.evidence.per_unit,
        "elbo": gap.elbo,
        "refitted_elbo": gap.refitted_elbo,
    }
    return {
        name: units for name, units in found.items() if units is not None and units.units_each == 1
    }


def _units[Label: (str, int)](
    by_label: Mapping[Label, Mapping[str, UnitEstimates]], dim: str = "parameters"
) -> xr.Dataset:
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


def _observed(data: Mapping[str, Tensor]) -> xr.Dataset:
    variables = {
        name: (("unit", *(f"{name}_dim_{i}" for i in range(value.dim() - 1))), value.numpy())
        for name, value in sorted(data.items())
    }
    return xr.Dataset(variables).assign_coords(unit=np.arange(len(next(iter(data.values())))))


def _bounds(group: str, pair: EvidencePair) -> dict[str, xr.Dataset]:
    variables = {}
    for parameters, evidence in (("learned", pair.learned), ("reference", pair.reference)):
        sides = {"lower": evidence.lower_replicates, "upper": evidence.upper_replicates}
        for side, replicates in sides.items():
            if replicates is not None:
                dim = f"{parameters}_replicate"
                variables[f"{parameters}_{side}"] = (dim, as_array(replicates), NATS)
    return {group: xr.Dataset(variables)} if variables else {}
