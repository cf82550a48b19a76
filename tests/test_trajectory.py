"""Diagnosing a recorded training: exact values are met, and what is known is kept."""

import math

import arviz as az
import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from torch import nn

import pyro_vharm as vh
from tests.statistics import Z
from tests.test_diagnostics import closed, set_tied, tied_guide, tied_model

REFIT = vh.Refit(num_steps=50, num_particles=500)
STEPS = {0: 0.5, 10: 1.0, 20: 1.6}
V = torch.tensor([0.5, -2.0, 3.0, 1.1, -4.0], dtype=torch.float64)
OPTIONS = {"refit": REFIT, "progress": False}


@pytest.fixture
def history():
    recorder = vh.Recorder(tied_model, tied_guide, every=10)
    for step, a in STEPS.items():
        set_tied(a)
        recorder.record(step)
    set_tied(1.2)
    return recorder.history


def test_exact_evidence_and_gap_at_every_checkpoint(history, tmp_path):
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        diagnosed = vh.diagnose(history, (V,), **OPTIONS)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert float(pyro.param("a").detach()) == pytest.approx(1.2), "left as it was"
    assert diagnosed.steps == tuple(STEPS)
    for step, a in STEPS.items():
        evidence, gap = closed(V, a)
        found = diagnosed.diagnoses[step]
        assert float(found.parameters["a"]) == pytest.approx(a)
        assert found.gap.evidence.per_unit.total().value == pytest.approx(evidence, abs=1e-5)
        measured = found.gap.gap.total()
        assert abs(measured.value - gap) < Z * measured.mc_error
        dependence = math.log(1 + a**2) - 0.5 * math.log(1 + 2 * a**2)
        shape = found.shape.continuous
        assert torch.allclose(shape.gaussian_dependence.values, torch.tensor(dependence), atol=1e-5)
        assert torch.allclose(shape.non_gaussianity.values, torch.zeros(5), atol=1e-5)
    text = str(diagnosed)
    tree = vh.to_datatree(diagnosed)
    assert tree["trajectory"]["checkpoint"].values.tolist() == list(STEPS)
    assert np.allclose(tree["theta"]["a"], list(STEPS.values()))
    for suffix in ("log_evidence", "elbo"):
        total = tree["units"][suffix].sum("unit")
        assert np.allclose(total, tree["trajectory"][suffix])
    assert float(tree["trajectory"]["inference_gap_mc_error"].min()) > 0
    tree.to_zarr(tmp_path / "tree.zarr", mode="w", consolidated=False)
    with xr.open_datatree(tmp_path / "tree.zarr", engine="zarr", consolidated=False) as found:
        for path in ("trajectory", "units", "theta"):
            xr.testing.assert_identical(found[path].to_dataset(), tree[path].to_dataset())
    with pytest.raises(ValueError, match="no checkpoint is diagnosed"):
        vh.to_datatree(vh.DiagnosedHistory(history))
    assert np.allclose(tree["trajectory"]["non_gaussianity"], 0.0, atol=1e-4)
    assert "3 of 3 checkpoints" in text and "<pre>" in diagnosed._repr_html_()


def test_arviz_runs_on_checkpoints(history):
    """On all of them at once, with the checkpoint as one more index, and on a chosen one."""
    tree = vh.to_datatree(vh.diagnose(history, (V,), **OPTIONS))
    chosen = tree.sel(checkpoint=20)
    for part, count in ((tree, 30), (chosen, 10)):
        assert len(az.summary(part)) == count
        for plot in (az.plot_forest, az.plot_ridge, az.plot_dist):
            plot(part, backend="none")
        az.plot_trace_dist(part, compact=True, backend="none")
    mean = az.summary(chosen, round_to="none")["mean"].to_numpy(dtype=float)
    exact = (V[:, None] * 1.6 / (1 + 2 * 1.6**2)).expand(-1, 2).flatten().numpy()
    spread = math.sqrt((1 + 1.6**2) / (1 + 2 * 1.6**2) / 200)
    assert np.all(np.abs(mean - exact) < Z * spread)
    with history.at(2):
        drawn = vh.from_svi(tied_model, tied_guide, (V,), num_draws=100, progress=False)
    with pytest.warns(UserWarning, match="Pareto"):  # each unit has latents of its own
        assert az.loo(drawn).n_data_points == len(V)


def test_what_is_known_is_kept_and_the_rest_does_not_depend_on_it(history, monkeypatch):
    part = vh.diagnose(history, (V,), checkpoints=[-1], **OPTIONS)
    assert part.steps == (20,)
    whole = vh.diagnose(part, (V,), checkpoints=[0, 2], **OPTIONS)
    assert whole.steps == (0, 20)
    assert whole.diagnoses[20] is part.diagnoses[20]
    afresh = vh.diagnose(history, (V,), checkpoints=[0], **OPTIONS)
    values = [d.diagnoses[0].gap.elbo.values for d in (whole, afresh)]
    assert torch.equal(*values)
    for changed in ((V + 1.0,), {"seed": 1}):
        data, other = (changed, {}) if isinstance(changed, tuple) else ((V,), changed)
        with pytest.raises(vh.InputError, match="diagnosed with other settings"):
            vh.diagnose(part, data, **(OPTIONS | other))


def test_a_history_from_disk_needs_no_earlier_run(history, tmp_path):
    history.save(tmp_path)
    pyro.clear_param_store()
    loaded = vh.History.load(tmp_path, tied_model, tied_guide)
    with pytest.raises(vh.InputError, match="run model and guide once"):
        loaded.restore(1)
    found = vh.diagnose(loaded, (V,), checkpoints=[1], **OPTIONS).diagnoses[10]
    assert found.gap.evidence.per_unit.total().value == pytest.approx(closed(V, 1.0)[0], abs=1e-5)
    assert not pyro.get_param_store().keys(), "left as it was"


def test_a_checkpoint_without_a_parameter_is_refused(history):
    first = history[0]
    lacking = {name: value for name, value in first.values.items() if name != "slope"}
    short = vh.History(tied_model, tied_guide, (vh.Checkpoint(0, lacking),))
    with pytest.raises(vh.InputError, match=r"step 0 lacks the parameters \['slope'\]"):
        vh.diagnose(short, (V,), **OPTIONS)
    with pytest.raises(vh.InputError, match=r"indices of 3 checkpoints, got \[3\]"):
        vh.diagnose(history, (V,), checkpoints=[0, 3], **OPTIONS)


def test_discrete_latents_and_no_guide():
    def model(v):
        rate = pyro.param("rate", torch.tensor(0.3))
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", pyro.distributions.Bernoulli(rate))
            pyro.sample("v", pyro.distributions.Normal(z, 1.0), obs=v)

    model(V)
    recorder = vh.Recorder(model, None, every=1)
    recorder.record(0)
    found = vh.diagnose(recorder.history, (V,), **OPTIONS)
    shape, tree = found.diagnoses[0].shape, vh.to_datatree(found)
    assert shape.continuous is None and found.diagnoses[0].gap.elbo is None
    assert float(tree["trajectory"]["discrete_entropy"].sum()) == pytest.approx(
        float(shape.discrete.entropy.values.sum())
    )
    assert "—" in str(found)


def test_modules_outside_the_store_are_set_too():
    """With parameters that are local to modules, names of model and guide may be the same."""

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.0))

        def forward(self, v):
            with pyro.plate("units", len(v)):
                h = pyro.sample("h", pyro.distributions.Normal(self.loc, 1.0))
                pyro.sample("v", pyro.distributions.Normal(h, 1.0), obs=v)

    class Guide(Model):
        def forward(self, v):
            with pyro.plate("units", len(v)):
                pyro.sample("h", pyro.distributions.Normal(self.loc + v / 2, 0.5**0.5))

    with pyro.settings.context(module_local_params=True):
        model, guide = Model(), Guide()
        recorder = vh.Recorder(model, guide, every=1)
        for step in range(2):
            with torch.no_grad():
                model.loc += step
                guide.loc += step / 2
            recorder.record(step)
        diagnosed = vh.diagnose(recorder.history, (V,), **OPTIONS)
    for step in range(2):
        exact = pyro.distributions.Normal(step, math.sqrt(2)).log_prob(V).sum()
        gap = diagnosed.diagnoses[step].gap
        assert gap.elbo.total().value == pytest.approx(float(exact), abs=1e-9), "an exact guide"
