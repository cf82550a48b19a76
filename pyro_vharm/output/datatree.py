"""Results as xarray DataTrees, for ArviZ, figures and storage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch
from importlib.metadata import version

import xarray as xr

from pyro_vharm.diagnostics.audit_result import Audit
from pyro_vharm.diagnostics.fulfilment import SelfFulfilment
from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.diagnostics.guide_comparison import GuideComparison
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.diagnostics.local import LocalHarm
from pyro_vharm.diagnostics.pull import Reachability
from pyro_vharm.diagnostics.shape import PosteriorShape
from pyro_vharm.diagnostics.trajectory import DiagnosedHistory
from pyro_vharm.inference.evidence import Evidence
from pyro_vharm.output.comparison_tree import comparison_datasets
from pyro_vharm.output.ladder import ladder_groups
from pyro_vharm.output.ledger_datasets import bounds, gap_units, ledger, observed, units
from pyro_vharm.output.local_datasets import local_datasets
from pyro_vharm.output.reachability_datasets import reachability_datasets
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
    * ``families``: of an inference gap, totals of ``elbo`` and ``gap`` with each one's
      ``_mc_error`` over the coordinate ``family``; ``active_units``: ``variance``,
      ``prior_variance`` and ``active`` over the coordinate ``latent``.
    * ``local_harm``: of a `LocalHarm`, its totals; ``shifts``: ``shift``, ``shift_mc_error`` and
      ``standard_error`` over the coordinate ``parameter``.
    * ``trajectory``: of a diagnosed history, totals of the same over the coordinate
      ``checkpoint``, whose values are steps; its ``units`` have that coordinate in place of
      ``parameters``, and ``theta`` has the parameters on the user-facing scale. Of
      self-fulfilment, also ``reference_trajectory``.
    * ``reachability``: of a `Reachability`, its ledger; its ``trajectory`` has totals of
      ``objective`` and ``log_evidence`` from the reference on, and its ``units`` have the four
      endpoints as ``parameters``.
    * ``comparison`` and ``runs``: of a `GuideComparison`, over ``candidate`` (best first), and over
      ``candidate`` and ``seed``.
    * ``shape`` and ``posterior``: of a posterior shape, its measures per ``unit`` and ``latent``,
      with each one's ``_mc_error``, and unweighted draws on the unconstrained scale;
      ``discrete_shape``: of discrete latents, with the most probable configurations by ``rank``.
      Of a diagnosed history both have the dim ``checkpoint``, and at most 200 draws.
    * ``observed_data``: the data of each unit, by the names of the model's arguments.

    Args:
        result: an `Audit`, `LearningHarm`, `InferenceGap`, `Evidence`, `DiagnosedHistory`,
            `SelfFulfilment`, `LocalHarm`, `Reachability`, `GuideComparison` or `PosteriorShape`.

    Raises:
        TypeError: for anything else.
    """
    raise TypeError(f"to_datatree has no form for {type(result).__name__}")


@to_datatree.register
def _(result: Audit) -> xr.DataTree:
    tree = to_datatree(result.gap if result.harm is None else result.harm)
    groups = {name: child.to_dataset() for name, child in tree.children.items()}
    if result.local is not None:
        groups |= local_datasets(result.local)
    if result.reachability is not None:
        found = reachability_datasets(result.reachability)
        groups |= {name: found[name] for name in ("reachability", "trajectory")}
    tree = _tree(groups, {str(name): value for name, value in tree.attrs.items()})
    tree.attrs |= {f"setting_{name}": value for name, value in result.settings.items()}
    tree.attrs |= {"outcome": result.verdict.outcome, "verdict": str(result.verdict)}
    return tree


@to_datatree.register
def _(result: LearningHarm) -> xr.DataTree:
    gaps = {"learned": result.learned, "reference": result.reference_gap}
    groups = {
        "ledger": ledger(result.ledger()),
        "units": units({name: gap_units(gap) for name, gap in gaps.items()}),
        **bounds("bounds", result.train),
    }
    if result.heldout is not None:
        learned = {"log_evidence": result.heldout.learned.per_unit}
        if result.heldout_elbo is not None:
            learned["elbo"] = result.heldout_elbo
        reference = {"log_evidence": result.heldout.reference.per_unit}
        groups["heldout_ledger"] = ledger(result.heldout_ledger())
        groups["heldout_units"] = units({"learned": learned, "reference": reference})
        groups |= bounds("heldout_bounds", result.heldout)
    if result.reference.unit_data:
        groups["observed_data"] = observed(result.reference.unit_data)
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
    groups = {"ledger": ledger(totals), "units": units({"learned": gap_units(result)})}
    return _tree(groups | ladder_groups(result), {"method": result.evidence.method})


@to_datatree.register
def _(result: Evidence) -> xr.DataTree:
    groups = {
        "ledger": ledger({"log evidence": result.per_unit.total()}),
        "units": units({"learned": {"log_evidence": result.per_unit}}),
    }
    return _tree(groups, {"method": result.method})


@to_datatree.register
def _(result: DiagnosedHistory) -> xr.DataTree:
    if not result.diagnoses:
        raise ValueError("no checkpoint is diagnosed yet; call diagnose(history, data) first")
    found = result.diagnoses
    per_unit = {step: gap_units(each.gap) for step, each in found.items()}
    common = set.intersection(*map(set, per_unit.values()))
    each_step = {
        step: {name: part for name, part in each.items() if name in common}
        for step, each in per_unit.items()
    }
    groups = {
        "trajectory": trajectory(found),
        "units": units(each_step, "checkpoint"),
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
def _(result: LocalHarm) -> xr.DataTree:
    return _tree(local_datasets(result), {"findings": " ".join(result.findings)})


@to_datatree.register
def _(result: Reachability) -> xr.DataTree:
    settings = {f"setting_{name}": value for name, value in result.settings.items()}
    noise = {"training_noise": str(result.training_noise)}
    told = {"sentences": " ".join(result.sentences())}
    return _tree(reachability_datasets(result), settings | noise | told)


@to_datatree.register
def _(result: GuideComparison) -> xr.DataTree:
    settings = {f"setting_{name}": value for name, value in result.settings.items()}
    return _tree(comparison_datasets(result), settings | {"notes": "; ".join(result.notes)})


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
