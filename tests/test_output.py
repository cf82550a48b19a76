"""DataTrees and figures: what is in them is what was found, and storage loses nothing."""

import functools
import math

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from matplotlib import pyplot as plt

import pyro_vharm as vh
from tests.learners import importance_weighted
from tests.test_diagnostics import set_tied, tied_guide, tied_model

METHOD = vh.AnnealedImportanceSampling(num_particles=4, num_steps=2, kernel=vh.HamiltonianKernel(2))


@pytest.fixture
def audit():
    return made_audit()


@functools.cache
def made_audit():
    set_tied(1.1)
    v = torch.randn(20) * 2
    return vh.audit(
        tied_model,
        tied_guide,
        (v,),
        heldout=(v[:7],),
        reference={"a": 1.4},
        method=METHOD,
        learner=importance_weighted(guide_steps=2),
        refit=vh.Refit(2, num_particles=20),
        progress=False,
    )


def test_the_tree_holds_what_was_found(audit):
    tree = vh.to_datatree(audit)
    line = tree["ledger"].to_dataset().sel(quantity="− learning harm")
    assert float(line["total"]) == audit.harm.harm.value
    assert str(line["kind"].item()) == str(audit.harm.harm.kind)
    held = tree["heldout_ledger"].to_dataset().sel(quantity="− learning harm")
    assert float(held["sampling_error"]) == audit.harm.heldout_harm.sampling_error
    units = tree["units"].to_dataset()
    harm = units["log_evidence"].sel(parameters="reference") - units["log_evidence"].sel(
        parameters="learned"
    )
    assert float(harm.sum()) == pytest.approx(audit.harm.harm.value)
    assert units["log_evidence"].attrs["units"] == "nats"
    lower = audit.harm.train.learned.lower_replicates
    assert np.array_equal(tree["bounds"]["learned_lower"].values, lower.numpy())
    assert tree.attrs["outcome"] == audit.verdict.outcome
    assert tree.attrs["setting_seed"] == "0" and "torch_version" in tree.attrs


def test_zarr_round_trip_loses_nothing_and_can_be_drawn(audit, tmp_path):
    tree = vh.to_datatree(audit)
    tree.to_zarr(tmp_path / "audit.zarr", mode="w", consolidated=False)
    with xr.open_datatree(tmp_path / "audit.zarr", engine="zarr", consolidated=False) as found:
        for path in ("ledger", "heldout_ledger", "units", "heldout_units", "bounds"):
            xr.testing.assert_identical(found[path].to_dataset(), tree[path].to_dataset())
        assert found.attrs == tree.attrs
        plt.close(vh.plot_ledger(found))


def test_the_waterfall_ends_where_it_began(audit, tmp_path):
    figure = vh.plot_ledger(vh.to_datatree(audit), figsize=(8, 3))
    assert len(figure.axes) == 2
    bars = figure.axes[0].patches
    heights = [bar.get_width() for bar in bars]
    assert len(bars) == 6
    assert heights[0] - heights[1] == pytest.approx(heights[2])
    assert heights[2] - heights[3] - heights[4] == pytest.approx(0.0, abs=1e-9)
    assert heights[5] == 0.0
    figure.savefig(tmp_path / "ledger.png")
    plt.close(figure)


def test_trees_of_parts(audit):
    gap = vh.to_datatree(audit.gap)
    assert float(gap["ledger"]["total"].sel(quantity="inference gap")) == pytest.approx(
        audit.gap.gap.total().value
    )
    plt.close(vh.plot_ledger(gap))
    evidence = vh.to_datatree(audit.gap.evidence)
    assert evidence["units"]["log_evidence"].shape == (1, 20)
    without = vh.audit(
        lambda v: pyro.poutine.block(tied_model, hide_types=["param"])(v),
        tied_guide,
        (torch.ones(3),),
        refit=vh.Refit(2, num_particles=5),
        progress=False,
    )
    assert without.harm is None and "ledger" in vh.to_datatree(without).children
    with pytest.raises(TypeError, match="no form for int"):
        vh.to_datatree(3)
    with pytest.raises(KeyError, match="no group 'ledger'"):
        vh.plot_ledger(xr.DataTree())


def test_results_print_what_they_are(audit):
    text = str(audit)
    assert "one joint unit" not in text and "20 units" in text and "7 units" in text
    assert "sampling error" in text and "held-out data" in text
    assert "<pre>" in audit._repr_html_()
    evidence = str(audit.gap.evidence)
    assert "certified" in evidence and "conditional" in evidence and "acceptance" in evidence
    assert math.isfinite(audit.gap.evidence.lower().value)
