"""Active units: exact variances, noise that is corrected for, priors of other scales."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.diagnostics.activity import measure_activity
from pyro_vharm.model.problem import prepare
from tests.statistics import Z, assert_mean, rejects
from tests.zoo import normal_guide, normal_model

QUIET = {
    "progress": False,
    "refit": vh.Refit(num_steps=2, num_particles=200),
    "method": vh.ImportanceSampling(100),
}


def scaled(v):
    """Latents of scales 2, 1 and 0.1; the data know of the first and the last."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(0.0, v.new_tensor([2.0, 1.0, 0.1])).to_event(1))
        g = pyro.sample("g", dist.Normal(v.new_zeros(()), 1.0))
        loc = torch.stack([h[..., 0], g], -1)
        pyro.sample("v", dist.Normal(loc, 0.5).to_event(1), obs=v)


def scaled_guide(v):
    """Means 0.9 v₁, 0 and 0.03 v₁ of h, and 0.04 v₂ of g."""
    with pyro.plate("units", len(v)):
        loc = torch.stack([0.9 * v[:, 0], 0 * v[:, 0], 0.03 * v[:, 0]], -1)
        pyro.sample("h", dist.Normal(loc, v.new_tensor([0.5, 1.0, 0.2])).to_event(1))
        pyro.sample("g", dist.Normal(0.04 * v[:, 1], 1.0))


def exact_variances(v):
    first, second = v.var(0)
    return torch.stack([0.81 * first, 0 * first, 0.0009 * first, 0.0016 * second])


@pytest.fixture
def data():
    return torch.randn(30, 2) * torch.tensor([2.0, 1.1])


def test_variances_of_means_are_unbiased_and_know_their_error(data):
    problem = prepare(scaled, scaled_guide, (data,))
    runs = [measure_activity(problem, 5, 0.01) for _ in range(400)]
    found = torch.stack([run.variances for run in runs])
    exact = exact_variances(data)
    assert_mean(found, exact)
    stated = torch.stack([run.errors for run in runs]).square().mean(0).sqrt()
    ratio = found.std(0) / stated
    assert bool(((ratio - 1).abs() < Z * (2 / 400) ** 0.5).all())
    noise = torch.tensor([0.25, 1.0, 0.04, 1.0]) / 5
    assert rejects(found + noise, exact), "uncorrected, noise looks like use"


def test_dims_in_use_are_judged_by_the_scale_of_their_prior(data):
    used = measure_activity(prepare(scaled, scaled_guide, (data,)), 200, 0.01)
    assert used.labels == ("h[0]", "h[1]", "h[2]", "g")
    prior = torch.tensor([4.0, 1.0, 0.01, 1.0])
    assert bool(((used.prior_variances / prior - 1).abs() < Z * (2 / 2**14) ** 0.5 * 1.1).all())
    assert used.active.tolist() == [True, False, True, False] and used.count == 2
    assert used.unused == ("h[1]", "g") and used.num_units == 30
    assert bool(((used.variances - exact_variances(data)).abs() < Z * used.errors).all())
    absolute = used.variances > 0.01
    assert absolute.tolist() == [True, False, False, False], "a rule for a prior of scale 1"
    text = str(used)
    assert "latent dims in use: 2 of 4; not in use: h[1], g" in text and "prior variance" in text
    assert max(map(len, text.splitlines())) <= 100 and "<pre>" in used._repr_html_()


def test_the_threshold_is_an_argument(data):
    gap = vh.inference_gap(scaled, scaled_guide, (data,), active_threshold=0.9, **QUIET)
    assert gap.active_units.threshold == 0.9 and gap.active_units.count < 2
    tree = vh.to_datatree(gap)["active_units"].to_dataset()
    assert tree["active"].values.tolist() == gap.active_units.active.tolist()
    assert float(tree["variance"].sel(latent="g")) == float(gap.active_units.variances[3])
    assert tree.attrs == {"threshold": 0.9, "num_units": 30}
    for wrong in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(vh.InputError, match="active_threshold must lie in"):
            vh.inference_gap(
                normal_model,
                normal_guide(0.5, 0.7),
                (data[:, 0],),
                active_threshold=wrong,
                progress=False,
            )


def test_batches_are_one_set_of_units(data):
    problem = prepare(scaled, scaled_guide, [(data[:7],), (data[7:],)])
    used = measure_activity(problem, 400, 0.01)
    off = (used.variances - exact_variances(data)).abs()
    assert used.num_units == 30 and bool((off < Z * used.errors).all())


def test_undefined_for_one_unit_and_without_continuous_latents():
    def joint(v):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        pyro.sample("h", dist.Normal(v.new_zeros(()), 0.5))

    with pytest.warns(vh.JointUnitWarning):
        gap = vh.inference_gap(joint, guide, (torch.ones(3),), **QUIET)
    assert gap.active_units is None and "in use" not in str(gap)
    assert "active_units" not in vh.to_datatree(gap).children

    def coin(v):
        with pyro.plate("units", len(v)):
            k = pyro.sample("k", dist.Bernoulli(torch.full_like(v, 0.3)))
            pyro.sample("v", dist.Normal(k, 1.0), obs=v)

    exact = QUIET | {"method": None}
    assert vh.inference_gap(coin, lambda v: None, (torch.ones(3),), **exact).active_units is None
