"""Figures and the report: they show the numbers of a tree, and say what a tree lacks."""

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib import pyplot as plt

import pyro_vharm as vh
from pyro_vharm.output.captions import drawings_of
from tests.learners import importance_weighted
from tests.test_diagnostics import set_tied, tied_guide, tied_model
from tests.test_output import made_audit
from tests.test_self_fulfilment import recorded


@pytest.fixture(scope="module")
def trained():
    """Two causes with one weight, whose posteriors factorise more and more."""
    return recorded([(1.5, 0.6), (1.0, 0.8), (0.5, 1.0)])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def ladder(group="families", dim="family", **more):
    """Totals of 10 units."""
    names = ["mean field", "full rank", "exact"]
    found = {"gap": [3.0, 1.0, -0.01], "gap_mc_error": [0.2, 0.1, 0.02], **more}
    variables = {name: (dim, np.array(values)) for name, values in found.items()}
    dataset = xr.Dataset(variables, coords={dim: names}, attrs={"num_units": 10})
    return xr.DataTree.from_dict({group: dataset})


def shifts():
    variables = {
        "shift": ("parameter", np.array([0.3, -4.0, 0.001])),
        "shift_mc_error": ("parameter", np.array([0.02, 0.5, 0.0])),
        "standard_error": ("parameter", np.array([0.1, 8.0, 0.0])),
    }
    coords = {"parameter": ["a", "weights[0,1]", "collapsed"]}
    return xr.DataTree.from_dict({"shifts": xr.Dataset(variables, coords=coords)})


def pulled():
    steps = np.array([0, 50, 100, 200])
    variables = {
        name: ("checkpoint", np.array(values))
        for name, values in {
            "log_evidence": [-100.0, -104.0, -108.0, -109.0],
            "log_evidence_mc_error": [0.1, 0.1, 0.1, 0.1],
            "elbo": [-130.0, -121.0, -115.0, -113.0],
            "elbo_mc_error": [1.0, 1.0, 1.0, 1.0],
        }.items()
    }
    along = xr.Dataset(variables, coords={"checkpoint": steps}, attrs={"num_units": 50})
    return xr.DataTree.from_dict({"trajectory": along})


def heights(axis):
    return [line.get_ydata() for line in axis.get_lines() if len(line.get_xdata()) > 2]


def texts(axis):
    return {text.get_text() for text in axis.texts}


def test_self_fulfilment_is_drawn_beside_the_reference(trained):
    reference = recorded([(1.5, 0.6), (1.6, 1.0), (1.7, 1.0)])
    tree = vh.to_datatree(vh.self_fulfilment(trained, reference))
    for axis, name in zip(
        vh.plot_self_fulfilment(tree).axes, ("approximation_gap", "amortization_gap"), strict=True
    ):
        drawn = heights(axis)
        for values, group in zip(drawn, ("trajectory", "reference_trajectory"), strict=True):
            assert np.allclose(values, tree[group][name] / 5)
        assert texts(axis) == {"as trained", "reference"}
    found = vh.self_fulfilment(trained, reference)
    assert float(tree["trajectory"]["approximation_gap"][-1]) == (
        found.trained[2].approximation.value
    )
    alone = vh.plot_self_fulfilment(vh.to_datatree(vh.self_fulfilment(trained)), figsize=(4, 2))
    assert not texts(alone.axes[0])
    with pytest.raises(KeyError, match=r"no group 'trajectory'; make it with to_datatree\(self_"):
        vh.plot_self_fulfilment(xr.DataTree())


def test_shape_over_training(trained):
    tree = vh.to_datatree(trained)
    shapes = [trained.diagnoses[step].shape.continuous for step in range(3)]
    figure = vh.plot_shape(tree, tree)
    several, non_gaussianity, dependence = (heights(axis)[0] for axis in figure.axes)
    assert np.allclose(several, 0.0)
    for drawn, name in ((non_gaussianity, "non_gaussianity"), (dependence, "total_correlation")):
        wanted = [float(getattr(shape, name).values.mean()) for shape in shapes]
        assert np.allclose(drawn, wanted)
    assert texts(figure.axes[2]) == {"as trained", "reference"}
    with pytest.raises(KeyError, match=r"no \['checkpoint'\]"):
        vh.plot_shape(vh.to_datatree(trained.diagnoses[0].shape))


def test_one_latent_has_no_dependence():
    one = xr.Dataset(
        {
            "num_modes": (("checkpoint", "unit"), np.array([[2, 1, 2, 1], [1, 1, 1, 2]])),
            "non_gaussianity": (("checkpoint", "unit"), np.ones((2, 4))),
            "non_gaussianity_mc_error": (("checkpoint", "unit"), np.zeros((2, 4))),
        },
        coords={"checkpoint": [0, 5], "latent": ["h"]},
    )
    figure = vh.plot_shape(xr.DataTree.from_dict({"shape": one}))
    assert len(figure.axes) == 2
    assert np.allclose(figure.axes[0].get_lines()[0].get_ydata(), [50.0, 25.0])


def test_ridges_of_chosen_units(trained):
    tree = vh.to_datatree(trained)
    assert tree["posterior"]["latents"].dims == ("chain", "draw", "unit", "latent", "checkpoint")
    assert tree["posterior"].sizes["draw"] == 200
    kept = trained.diagnoses[1].shape.continuous.draws[:200]
    assert np.allclose(tree["posterior"]["latents"].sel(checkpoint=1)[0], kept)
    figure = vh.plot_posteriors(tree)
    assert len(figure.axes) == 3
    label = str(tree["posterior"]["latent"].values[1])
    figure = vh.plot_posteriors(tree, units=[4], latent=label, figsize=(3, 3))
    (axis,) = figure.axes
    assert axis.get_title() == "unit 4" and axis.get_xlabel() == label
    assert len(axis.get_lines()) == 6, "an outline around each of three densities"
    assert [text.get_text() for text in axis.get_yticklabels()] == ["0", "1", "2"]
    with pytest.raises(KeyError, match="no group 'posterior'"):
        vh.plot_posteriors(xr.DataTree())


def test_evidence_and_elbo_part():
    tree = pulled()
    evidence, elbo = heights(vh.plot_pull(tree, figsize=(3, 2)).axes[0])
    assert np.allclose(evidence, tree["trajectory"]["log_evidence"] / 50)
    assert np.allclose(elbo, tree["trajectory"]["elbo"] / 50)
    assert vh.plot_pull(tree).axes[0].get_xscale() == "linear"
    without = tree["trajectory"].to_dataset().drop_attrs()
    axis = vh.plot_pull(xr.DataTree.from_dict({"trajectory": without})).axes[0]
    assert axis.get_ylabel() == "nats" and np.allclose(heights(axis)[0], without["log_evidence"])
    rarer = tree["trajectory"].to_dataset().assign_coords(checkpoint=[0, 5, 40, 600])
    figure = vh.plot_pull(xr.DataTree.from_dict({"trajectory": rarer}))
    assert figure.axes[0].get_xscale() == "symlog" and figure.axes[0].get_xlim() == (0.0, 600.0)
    with pytest.raises(KeyError, match=r"has no \['elbo'\]"):
        without = tree["trajectory"].to_dataset().drop_vars("elbo")
        vh.plot_pull(xr.DataTree.from_dict({"trajectory": without}))


def test_families_and_guides():
    figure = vh.plot_families(ladder())
    (axis,) = figure.axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx([0.3, 0.1, -0.001])
    assert texts(axis) == {"0.300", "0.100", "-0.001"}
    harm = {"harm": [2.0, np.nan, 0.0], "harm_mc_error": [0.1, np.nan, 0.1]}
    figure = vh.plot_families(ladder("comparison", "candidate", **harm), figsize=(5, 2))
    assert texts(figure.axes[1]) == {"0.200", "unknown", "0.000"}
    with pytest.raises(KeyError, match="no group 'families'"):
        vh.plot_families(xr.DataTree())


def test_shifts_in_standard_errors():
    figure = vh.plot_shifts(shifts())
    axis = figure.axes[0]
    points = axis.containers[0].lines[0].get_xdata()
    assert np.allclose(points[:2], [3.0, -0.5]) and np.isnan(points[2]), "no error, no ratio"
    assert [text.get_text() for text in axis.get_yticklabels()] == [
        "a",
        "weights[0,1]",
        "collapsed",
    ]
    largest = vh.plot_shifts(shifts(), most=1, figsize=(4, 2)).axes[0]
    assert [text.get_text() for text in largest.get_yticklabels()] == ["a"]
    with pytest.raises(ValueError, match="most must be at least 1"):
        vh.plot_shifts(shifts(), most=0)
    with pytest.raises(KeyError, match="no group 'shifts'"):
        vh.plot_shifts(xr.DataTree())


def images_tree():
    """Six units with images of 2 × 3 pixels; unit 4 is harmed most, unit 1 least."""
    learned = np.array([-3.0, -1.0, -2.0, -2.5, -6.0, -2.0])
    reference = np.array([-2.0, -1.5, -1.9, -2.0, -3.0, -2.0])
    units = xr.Dataset(
        {
            "log_evidence": (("parameters", "unit"), np.stack([learned, reference])),
            "log_evidence_mc_error": (("parameters", "unit"), np.full((2, 6), 0.1)),
        },
        coords={"parameters": ["learned", "reference"]},
    )
    pixels = np.repeat(np.arange(6.0), 6).reshape(6, 6)
    data = xr.Dataset({"images": (("unit", "pixel"), pixels)})
    return xr.DataTree.from_dict({"units": units, "observed_data": data})


def test_units_with_their_images():
    tree = images_tree()
    figure = vh.plot_units(tree, images="images", image_shape=(2, 3))
    ranked, gallery = figure.axes[:2]
    drawn = sorted((bar.get_x(), bar.get_height()) for bar in ranked.patches)
    assert [height for _, height in drawn] == pytest.approx([3.0, 1.0, 0.5, 0.1, 0.0, -0.5])
    assert "67% of units were harmed; the mean is 0.683" in texts(ranked)
    shown = [float(inset.images[0].get_array()[0, 0]) for inset in gallery.child_axes]
    assert shown == [4.0, 0.0, 3.0, 2.0, 5.0, 1.0]
    assert len(vh.plot_units(tree, figsize=(4, 2)).axes) == 1
    for options, error, message in (
        ({"images": "image"}, KeyError, r"has no \['image'\]"),
        ({"images": "images"}, ValueError, "image_shape must be .* of 6 pixels"),
        ({"images": "images", "image_shape": (3, 3)}, ValueError, r"got \(3, 3\)"),
    ):
        with pytest.raises(error, match=message):
            vh.plot_units(tree, **options)
    with pytest.raises(KeyError, match="no reference"):
        learned = tree["units"].to_dataset().isel(parameters=[0])
        vh.plot_units(xr.DataTree.from_dict({"units": learned}))


def test_the_data_of_units_are_in_the_tree():
    audit = made_audit()
    tree = vh.to_datatree(audit)
    assert tree["observed_data"]["v"].dims == ("unit",)
    assert len(vh.plot_units(tree).axes) == 1
    v = torch.randn(4, dtype=torch.float64)
    set_tied(1.1)
    batches, quiet = [v[:3], v[3:]], {"progress": False}
    brief = importance_weighted(4, num_steps=2, guide_steps=1, max_rounds=1)
    options = {"guide": tied_guide, "learner": brief, "start": "current"}
    reference = vh.learn_reference(tied_model, batches, **options, **quiet)
    options = {"reference": reference, "refit": vh.Refit(2, num_particles=5)}
    batched = vh.learning_harm(tied_model, tied_guide, batches, **options, **quiet)
    found = vh.to_datatree(batched)["observed_data"]["v"]
    assert np.array_equal(found, v), "of all batches, in order"


def test_report_of_whatever_the_tree_has(trained, tmp_path):
    audit = made_audit()
    page = vh.report(audit, tmp_path / "audit.html").read_text(encoding="utf-8")
    assert audit.verdict.outcome in page and "audit = vh.audit(" in page
    assert "method=vh.AnnealedImportanceSampling(" in page and "kernel=vh.Hamiltonian" in page
    assert "reference=reference" in page and "heldout=heldout" in page
    assert page.count("<img") == 4 and "http" not in page, "needs no network"
    assert f"{audit.harm.harm.value:.3f}" in page
    shown = vh.report(images_tree(), tmp_path / "u.html", images="images", image_shape=(2, 3))
    assert shown.read_text(encoding="utf-8").count("<img") == 1
    with pytest.raises(KeyError, match="observed_data"):
        vh.report(audit, tmp_path / "u.html", images="pixels")
    groups = {
        "trajectory": pulled()["trajectory"],
        "families": ladder()["families"],
        "shifts": shifts()["shifts"],
        "shape": vh.to_datatree(trained)["shape"],
    }
    whole = xr.DataTree.from_dict({name: group.to_dataset() for name, group in groups.items()})
    assert len(drawings_of(whole)) == 4
    page = vh.report(whole, tmp_path / "whole.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4 and "<h2>Ledger" not in page
    page = vh.report(trained, tmp_path / "trained.html").read_text(encoding="utf-8")
    assert page.count("<img") == 4
    escaped = xr.DataTree()
    escaped.attrs |= {"outcome": "harm", "verdict": "VERDICT\n  • a <b> & c", "tried": ""}
    page = vh.report(escaped, tmp_path / "escaped.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; &amp; c" in page
    for path in (tmp_path, tmp_path / "missing" / "audit.html"):
        with pytest.raises(vh.InputError, match="path must name a file in a folder that exists"):
            vh.report(audit, path)
    with pytest.raises(TypeError, match="no form for int"):
        vh.report(3, tmp_path / "none.html")


def test_every_line_of_a_ledger_is_explained():
    tree = vh.to_datatree(made_audit())
    lines = {*tree["ledger"]["quantity"].values, *tree["heldout_ledger"]["quantity"].values}
    assert lines <= set(vh.output.glossary.MEANINGS)
    assert {str(kind) for kind in vh.Kind} == set(vh.output.glossary.KINDS)


def test_figures_leave_matplotlib_as_it_was():
    before = dict(plt.rcParams)
    vh.plot_pull(pulled())
    assert dict(plt.rcParams) == before
