"""DataTrees of guides and chains: ArviZ's functions run on them, and nothing is lost on disk."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.mcmc import api

import pyro_vharm as vh
from tests.statistics import assert_mean, rejects
from tests.zoo.discrete import class_above_latent, mixture_of_priors
from tests.zoo.plates import far_left_plate

Y = torch.tensor([[2.0, 1.1], [0.3, -0.4], [1.2, 0.9], [2.8, 3.1]], dtype=torch.float64)
NOISE = 2.0
TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


def schools(y, times):
    """y_st ~ N(level + effect_s + slope · t, NOISE²), with a mean that is named."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    level = pyro.sample("level", dist.Normal(1.0, 2.0))
    with pyro.plate("school", len(y), dim=-2):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        with pyro.plate("time", len(times), dim=-1):
            mean = pyro.deterministic("mean", level + effect + slope.sum() * times)
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


OPTIONS = {
    "constant_data": {"times": TIMES},
    "coords": {"school": list("abcd"), "power": [1, 2]},
    "extra_event_dims": {"slope": ["power"]},
    "dims": {"times": ["time"]},
    "progress": False,
}


@pytest.fixture
def tree():
    """The guide is so narrow beside the noise that LOO can use it untrained."""
    guide = AutoDiagonalNormal(schools, init_scale=0.2)
    return vh.from_svi(schools, guide, (Y, TIMES), num_draws=200, **OPTIONS)


def test_groups_dims_and_coords(tree):
    assert set(tree.children) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "prior",
        "prior_predictive",
        "observed_data",
        "constant_data",
    }
    posterior = tree["posterior"]
    assert set(posterior.data_vars) == {"slope", "level", "effect", "mean"}
    assert posterior["slope"].dims == ("chain", "draw", "power")
    assert posterior["effect"].dims == ("chain", "draw", "school"), "no empty dim beside the plate"
    assert posterior["mean"].dims == ("chain", "draw", "school", "time")
    assert posterior["school"].values.tolist() == list("abcd")
    assert tree["prior"]["effect"].dims == posterior["effect"].dims
    assert tree["log_likelihood"]["y"].dims == posterior["mean"].dims
    assert np.array_equal(tree["observed_data"]["y"], Y.numpy())
    assert tree["constant_data"]["times"].dims == ("time",)
    assert tree["posterior"].attrs["inference_library"] == "pyro"


def test_numbers_belong_together(tree):
    """The log likelihood is that of the data at the posterior's means, draw by draw."""
    mean = torch.from_numpy(tree["posterior"]["mean"].values)
    expected = dist.Normal(mean, NOISE).log_prob(Y)
    assert np.allclose(tree["log_likelihood"]["y"], expected.numpy())
    noise = (tree["posterior_predictive"]["y"] - tree["posterior"]["mean"]).values
    assert_mean(torch.from_numpy(noise).flatten(), 0.0)
    assert_mean(torch.from_numpy(noise).flatten().square(), NOISE**2)
    prior = torch.from_numpy(tree["prior"]["level"].values).flatten()
    assert_mean(prior, 1.0)
    assert float(tree["prior_predictive"]["y"].std()) > NOISE


def test_arviz_runs_on_them(tree):
    summary = az.summary(tree, var_names=["level", "effect"])
    assert list(summary.index) == ["level", *(f"effect[{s}]" for s in "abcd")]
    loo = az.loo(tree)
    assert np.isfinite(loo.elpd) and loo.n_data_points == 8
    for plot in (az.plot_forest, az.plot_dist, az.plot_trace_dist, az.plot_ridge):
        plot(tree, var_names=["level", "effect"], backend="none")


def test_zarr_loses_nothing(tree, tmp_path):
    tree.to_zarr(tmp_path / "svi.zarr", mode="w", consolidated=False)
    with xr.open_datatree(tmp_path / "svi.zarr", engine="zarr", consolidated=False) as found:
        for group in tree.children:
            xr.testing.assert_identical(found[group].to_dataset(), tree[group].to_dataset())


def test_nothing_changes_and_the_seed_decides():
    guide = AutoNormal(schools)
    options = {**OPTIONS, "num_draws": 5, "groups": ["posterior"]}
    before = torch.random.get_rng_state()
    first = vh.from_svi(schools, guide, (Y, TIMES), **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = vh.from_svi(schools, guide, {"y": Y, "times": TIMES}, **options)
    xr.testing.assert_equal(first["posterior"].to_dataset(), again["posterior"].to_dataset())
    other = vh.from_svi(schools, guide, (Y, TIMES), **options, seed=1)
    assert not first["posterior"]["level"].equals(other["posterior"]["level"])
    assert set(first.children) == {"posterior", "observed_data", "constant_data"}


def test_discrete_latents_without_a_guide_site_follow_their_posterior():
    v = torch.tensor([-1.0, 0.2, 3.0])
    means, probs = torch.tensor([-1.0, 1.5]), torch.tensor([0.3, 0.7])

    def model(v):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("unit", len(v)):
            z = pyro.sample("z", dist.Categorical(probs))
            pyro.sample("v", dist.Normal(means[z] + shift, 1.0), obs=v)

    def guide(v):
        pyro.sample("shift", dist.Normal(torch.tensor(0.2), 1e-6))

    found = vh.from_svi(model, guide, (v,), num_draws=400, progress=False)
    classes = found["posterior"]["z"]
    assert classes.dims == ("chain", "draw", "unit")
    log_joint = probs.log() + dist.Normal(means + 0.2, 1.0).log_prob(v[:, None])
    exact = log_joint.softmax(-1)[:, 1]
    assert_mean(torch.from_numpy(classes.values[0]).double(), exact)
    prior = torch.from_numpy(found["prior"]["z"].values[0]).double()
    assert rejects(prior, exact), "the prior is another distribution"


def test_discrete_latents_above_continuous_ones():
    """z ~ Cat(π), h | z, v | h: given h, the class no longer depends on v."""
    case = class_above_latent()
    found = vh.from_svi(case.model, case.guide, case.data, num_draws=300, progress=False)
    _, probs, loc, scale, _ = mixture_of_priors()
    h = torch.from_numpy(found["posterior"]["h"].values[0])
    exact = (probs.log() + dist.Normal(loc, scale).log_prob(h[..., None])).softmax(-1)[..., 1]
    z = torch.from_numpy(found["posterior"]["z"].values[0])
    assert_mean(z - exact, 0.0)


def test_names_with_slashes():
    case = far_left_plate()
    found = vh.from_svi(case.model, case.guide, case.data, num_draws=2, progress=False)
    assert all("/" not in name for name in found["posterior"].data_vars)


def test_chains_of_nuts(monkeypatch):
    monkeypatch.setattr(api.mp, "cpu_count", lambda: 1)  # one after the other
    with pytest.warns(UserWarning, match="drawn sequentially"):
        mcmc = MCMC(
            NUTS(schools, max_tree_depth=4), 25, warmup_steps=25, num_chains=2, disable_progbar=True
        )
    with pytest.raises(vh.InputError, match="no draws yet"):
        vh.from_mcmc(mcmc)
    mcmc.run(Y, TIMES)
    found = vh.from_mcmc(mcmc, **OPTIONS)
    assert np.array_equal(
        found["posterior"]["level"], mcmc.get_samples(group_by_chain=True)["level"].numpy()
    )
    assert found["posterior"]["effect"].dims == ("chain", "draw", "school")
    assert found["posterior"].sizes["chain"] == 2
    mean = torch.from_numpy(found["posterior"]["mean"].values)
    expected = dist.Normal(mean, NOISE).log_prob(Y).numpy()
    assert np.allclose(found["log_likelihood"]["y"], expected)
    assert found["sample_stats"]["diverging"].shape == (2, 25)
    divergences = mcmc.diagnostics()["divergences"].values()
    assert int(found["sample_stats"]["diverging"].sum()) == sum(map(len, divergences))
    assert "level" in az.summary(found).index
    again = vh.from_mcmc(mcmc, data=(Y, TIMES), groups=["log_likelihood"], progress=False)
    assert np.allclose(again["log_likelihood"]["y"], expected)


def test_what_cannot_be_converted_is_refused():
    guide = AutoNormal(schools)
    for options, message in (
        ({"groups": ["posteriors"]}, "groups must be some of"),
        ({"groups": "posterior"}, "groups must be some of"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
    ):
        with pytest.raises(vh.InputError, match=message):
            vh.from_svi(schools, guide, (Y, TIMES), **options, progress=False)
    with pytest.raises(vh.InputError, match="2 batches"):
        vh.from_svi(schools, guide, [(Y, TIMES), (Y, TIMES)], progress=False)

    def subsampled(v):
        with pyro.plate("units", len(v), subsample_size=2) as index:
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])

    with pytest.raises(vh.InputError, match=r"\['units'\] pick elements at random"):
        vh.from_svi(subsampled, AutoNormal(subsampled), (torch.ones(4),), progress=False)

    def partial(y, times):
        pyro.sample("level", dist.Normal(torch.tensor(0.0), 1.0))

    with pytest.raises(vh.InputError, match=r"lack \['effect', 'slope'\]"):
        vh.from_svi(schools, partial, (Y, TIMES), progress=False)
    kernel = NUTS(potential_fn=lambda z: z["x"].square().sum())
    mcmc = MCMC(kernel, 1, initial_params={"x": torch.zeros(1)}, disable_progbar=True)
    with pytest.raises(vh.InputError, match="without a model"):
        vh.from_mcmc(mcmc)
