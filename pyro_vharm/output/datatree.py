"""Results as xarray DataTrees, for ArviZ, figures and storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import singledispatch
from importlib.metadata import version

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vharm.diagnostics.audit_result import Audit
from pyro_vharm.diagnostics.discrete_shape import DiscreteShape
from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.diagnostics.guide_comparison import GuideComparison
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.diagnostics.pull import Reachability
from pyro_vharm.diagnostics.shape import IN_NATS, ContinuousShape, PosteriorShape
from pyro_vharm.diagnostics.trajectory import DiagnosedHistory, Diagnosis
from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.inference.evidence import Evidence
from pyro_vharm.learning.evidence_pair import EvidencePair
from pyro_vharm.output.comparison_tree import comparison_datasets
from pyro_vharm.output.ladder import ladder_groups

__all__ = ["to_datatree"]

_UNITS = {"units": "nats"}


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
    * ``families``: of an inference gap, totals of ``elbo`` and ``gap`` with each one's
      ``_mc_error`` over the coordinate ``family``; ``active_units``: ``variance``,
      ``prior_variance`` and ``active`` over the coordinate ``latent``.
    * ``trajectory``: of a diagnosed history, totals of the same over the coordinate
      ``checkpoint``, whose values are steps; its ``units`` have that coordinate in place of
      ``parameters``, and ``theta`` has the parameters on the user-facing scale.
    * ``reachability``: of a `Reachability`, its ledger; its ``trajectory`` has ``objective`` and
      ``log_evidence`` per unit from the reference on, and its ``units`` have the four endpoints as
      ``parameters``.
    * ``comparison`` and ``runs``: of a `GuideComparison`, over ``candidate`` (best first), and over
      ``candidate`` and ``seed``.
    * ``shape`` and ``posterior``: of a posterior shape, its measures per ``unit`` and ``latent``,
      with each one's ``_mc_error``, and unweighted draws on the unconstrained scale;
      ``discrete_shape``: of discrete latents, with the most probable configurations by ``rank``.

    Args:
        result: an `Audit`, `LearningHarm`, `InferenceGap`, `Evidence`, `DiagnosedHistory`,
            `Reachability`, `GuideComparison` or `PosteriorShape`.

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
    return _tree(groups | ladder_groups(result), {"method": result.evidence.method})


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
    found = list(result.diagnoses.values())
    steps = np.array(result.steps)
    theta = {
        name: (("checkpoint", *(f"{name}_dim_{i}" for i in range(value.dim()))), stacked)
        for name, value in found[0].parameters.items()
        for stacked in [np.stack([_numpy(each.parameters[name]) for each in found])]
    }
    per_unit = [_gap_units(each.gap) for each in found]
    common = set.intersection(*map(set, per_unit))
    units = {
        step: {name: part for name, part in each.items() if name in common}
        for step, each in zip(result.steps, per_unit, strict=True)
    }
    groups = {
        "trajectory": _totals([_lines(each) for each in found], steps),
        "units": _units(units, "checkpoint"),
        "theta": xr.Dataset(theta, coords={"checkpoint": steps}),
    }
    return _tree(groups, {f"setting_{name}": value for name, value in result.settings.items()})


@to_datatree.register
def _(result: Reachability) -> xr.DataTree:
    variables = {}
    for name in ("objective", "log_evidence"):
        line = [getattr(point, name).per_unit for point in result.training.points]
        for suffix, field in (("", "value"), ("_mc_error", "mc_error")):
            values = np.array([getattr(each, field) for each in line])
            variables[f"{name}{suffix}"] = ("checkpoint", values, _UNITS)
    steps = np.array([point.step for point in result.training.points])
    endpoints = {
        name: {"log_evidence": point.evidence.per_unit} for name, point in result.endpoints.items()
    }
    groups = {
        "reachability": _ledger(result.ledger()),
        "trajectory": xr.Dataset(variables, coords={"checkpoint": steps}),
        "units": _units(endpoints),
    }
    settings = {f"setting_{name}": value for name, value in result.settings.items()}
    noise = {"training_noise": str(result.training_noise)}
    return _tree(groups, settings | noise | {"sentences": " ".join(result.sentences())})


@to_datatree.register
def _(result: GuideComparison) -> xr.DataTree:
    settings = {f"setting_{name}": value for name, value in result.settings.items()}
    return _tree(comparison_datasets(result), settings | {"notes": "; ".join(result.notes)})


@to_datatree.register
def _(result: PosteriorShape) -> xr.DataTree:
    groups: dict[str, xr.Dataset] = {}
    if result.continuous is not None:
        groups |= _continuous_shape(result.continuous)
    if result.discrete is not None:
        groups["discrete_shape"] = _discrete_shape(result.discrete)
    method = "enumeration" if result.continuous is None else result.continuous.method
    return _tree(groups, {"method": method})


def _continuous_shape(result: ContinuousShape) -> dict[str, xr.Dataset]:
    variables: dict[str, tuple[tuple[str, ...], np.ndarray, Mapping[str, str]]] = {}
    for name in IN_NATS:
        units: UnitEstimates = getattr(result, name)
        variables[name] = (("unit",), _numpy(units.values), _UNITS)
        variables[f"{name}_mc_error"] = (("unit",), _numpy(units.errors), _UNITS)
    measured = {"effective_rank": result.effective_rank, **result.coordinates}
    for name, (values, errors) in measured.items():
        dims = ("unit", "latent")[: values.dim()]
        variables[name] = (dims, _numpy(values), {})
        variables[f"{name}_mc_error"] = (dims, _numpy(errors), {})
    modes = result.modes
    variables |= {
        "dip": (("unit", "axis"), _numpy(result.dips), {}),
        "dip_p_value": (("unit", "axis"), _numpy(result.dip_p_values), {}),
        "num_modes": (("unit",), modes.counts.cpu().numpy(), {}),
        "mode_mass": (("unit", "mode"), _numpy(modes.masses), {}),
        "mode_location": (("mode", "unit", "latent"), _numpy(modes.locations), {}),
        "effective_size": (("unit",), _numpy(result.effective_sizes), {}),
    }
    labels = np.array(result.labels, dtype=f"U{max(map(len, result.labels))}")
    coords = {"unit": np.arange(len(modes.counts)), "latent": labels}
    draws = (("chain", "draw", "unit", "latent"), _numpy(result.draws)[None])
    index = {"chain": [0], "draw": np.arange(len(result.draws))}
    return {
        "shape": xr.Dataset(variables, coords=coords),
        "posterior": xr.Dataset({"latents": draws}, coords={**coords, **index}),
    }


def _discrete_shape(result: DiscreteShape) -> xr.Dataset:
    variables: dict[str, tuple[tuple[str, ...], np.ndarray, Mapping[str, str]]] = {}
    for name in ("entropy", "total_correlation"):
        units: UnitEstimates = getattr(result, name)
        variables[name] = (("unit",), _numpy(units.values), _UNITS)
        variables[f"{name}_mc_error"] = (("unit",), _numpy(units.errors), _UNITS)
    values, errors = result.probabilities
    variables["probability"] = (("unit", "rank"), _numpy(values), {})
    variables["probability_mc_error"] = (("unit", "rank"), _numpy(errors), {})
    codes = result.configurations.cpu().numpy()
    variables["configuration"] = (("unit", "rank", "element"), codes, {})
    labels = np.array(result.labels, dtype=f"U{max(map(len, result.labels))}")
    return xr.Dataset(variables, coords={"unit": np.arange(len(codes)), "element": labels})


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


def _totals(lines: Sequence[Mapping[str, UnitEstimates]], steps: np.ndarray) -> xr.Dataset:
    """Totals along checkpoints; NaN where a checkpoint has no such number."""
    names = dict.fromkeys(name for each in lines for name in each)
    variables = {}
    for name in names:
        totals = [each[name].total() if name in each else None for each in lines]
        for suffix, field in (("", "value"), ("_mc_error", "mc_error")):
            column = [np.nan if t is None else getattr(t, field) for t in totals]
            variables[f"{name}{suffix}"] = ("checkpoint", np.array(column), _UNITS)
    num_units = next(iter(lines[0].values())).num_units
    return xr.Dataset(variables, coords={"checkpoint": steps}, attrs={"num_units": num_units})


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
    variables = {name: ("quantity", np.array(column), _UNITS) for name, column in columns.items()}
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
                **{name: ("unit", _numpy(part.values), _UNITS) for name, part in units.items()},
                **{
                    f"{name}_mc_error": ("unit", _numpy(part.mc_errors), _UNITS)
                    for name, part in units.items()
                },
            }
        )
        for units in by_label.values()
    ]
    index = xr.DataArray(list(by_label), dims=dim, name=dim)
    joined = xr.concat(datasets, dim=index, data_vars="all", join="exact")
    return joined.assign_coords(unit=np.arange(joined.sizes["unit"]))


def _bounds(group: str, pair: EvidencePair) -> dict[str, xr.Dataset]:
    variables = {}
    for parameters, evidence in (("learned", pair.learned), ("reference", pair.reference)):
        sides = {"lower": evidence.lower_replicates, "upper": evidence.upper_replicates}
        for side, replicates in sides.items():
            if replicates is not None:
                dim = f"{parameters}_replicate"
                variables[f"{parameters}_{side}"] = (dim, _numpy(replicates), _UNITS)
    return {group: xr.Dataset(variables)} if variables else {}


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().to("cpu", torch.float64).numpy()
