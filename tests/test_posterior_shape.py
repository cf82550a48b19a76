"""The shape of posteriors: exact values are met by quadrature and by weighted particles."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_vharm as vh
from pyro_vharm.diagnostics.marginals import dips, marginal_negentropies, quantiles
from pyro_vharm.diagnostics.weighted_moments import measure_moments, random_blocks, standardise
from pyro_vharm.particles import resample
from tests.statistics import Z, assert_mean, rejects
from tests.zoo import joint_unit, linear_gaussian, linear_gaussian_posterior, two_modes

QUIET = {"progress": False}
PARTICLES, REPEATS = 192, 300


def correlated(inflation):
    """Draws of a Gaussian that is too wide, and the target: TC = ½ log (1 / (1 − ρ²))."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]])
    target = dist.MultivariateNormal(torch.tensor([1.0, -1.0]), covariance)
    proposal = dist.MultivariateNormal(target.mean, inflation * covariance)
    draws = proposal.sample((PARTICLES, REPEATS))
    return target, draws, target.log_prob(draws) - proposal.log_prob(draws)


def measures(draws, log_weights, log_joint):
    """Every measure in every version of the particles, and how to make an estimate of them."""
    particles = standardise(draws, log_weights, log_joint)
    blocks = random_blocks(len(draws), 1)
    sizes = 1 / particles.weights.square().sum(0)
    found = measure_moments(particles, blocks)
    marginals = marginal_negentropies(particles, blocks, sizes).sum(-1)
    found["marginals"] = marginals
    found["total"] = found["gaussian_dependence"] + found["non_gaussianity"] - marginals
    return found, blocks


@pytest.mark.parametrize("inflation", [1.0, 2.0])
def test_weighted_draws_of_a_gaussian_have_unbiased_measures_with_right_errors(inflation):
    target, draws, log_weights = correlated(inflation)
    log_joint = target.log_prob(draws) + 3.0  # log Ẑ = 3 is known from the weights
    found, blocks = measures(draws, log_weights + 3.0, log_joint)
    dependence = -0.5 * math.log(1 - 0.36 / 2)
    truth = {
        "entropy": target.entropy(),
        "non_gaussianity": 0.0,
        "gaussian_dependence": dependence,
        "total": dependence,
        "mean": target.mean,
        "sd": target.variance.sqrt(),
        "skewness": torch.zeros(2),
    }
    for name, exact in truth.items():
        values, errors = blocks.measured(found[name])
        smallest = 0.005 * values.std(0)  # bias of second order in one over the particles
        z = (values - exact).mean(0).abs() / (values.std(0) / REPEATS**0.5 + smallest)
        assert float(z.max()) < Z, name
        ratio = errors.square().mean(0).sqrt() / values.std(0)  # the jackknife errs upward
        assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.6, name
    if inflation == 1.0:
        assert rejects(found["non_gaussianity"][0], 0.0), "plug-in moments are biased down"
    else:
        flat, _ = measures(draws, torch.full_like(log_weights, 3.0), log_joint)
        for name in ("entropy", "sd"):
            assert rejects(blocks.measured(flat[name]).values, truth[name]), "without weights"


def test_a_mixture_is_as_far_from_a_gaussian_as_quadrature_says():
    components = dist.Normal(torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 1.0]))
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), components)
    grid = torch.linspace(-15, 15, 20001)
    log_density = mixture.log_prob(grid)
    entropy = -torch.trapezoid(log_density.exp() * log_density, grid)
    exact = 0.5 * (2 * math.pi * math.e * mixture.variance).log() - entropy
    draws = 3.0 * torch.randn(PARTICLES, REPEATS, 1)
    log_joint = mixture.log_prob(draws)[..., 0]
    log_weights = log_joint - dist.Normal(0.0, 3.0).log_prob(draws)[..., 0]
    found, blocks = measures(draws, log_weights, log_joint)
    assert_mean(blocks.measured(found["non_gaussianity"]).values, exact)
    smoothed = blocks.measured(found["marginals"]).values
    assert 0 < float(smoothed.mean()) < float(exact), "smoothing only takes away"
    flat, _ = measures(draws, torch.zeros_like(log_weights), log_joint)
    assert rejects(blocks.measured(flat["non_gaussianity"]).values, exact)


def test_the_dip_of_weighted_particles_holds_its_level_and_sees_two_modes():
    """The uniform is the least favourable of unimodal distributions."""
    draws = torch.rand(PARTICLES, 600, 1)
    log_weights = torch.randn(PARTICLES, 600)
    weights = log_weights.softmax(0)
    sizes = 1 / weights.square().sum(0)
    _, p_values = dips(quantiles(draws, weights, sizes))
    limit = 0.05 + Z * (0.05 * 0.95 / 600) ** 0.5
    assert float((p_values < 0.05).double().mean()) < limit
    repeated = resample(draws, log_weights).sort(0).values
    _, wrong = dips(repeated)
    assert float((wrong < 0.05).double().mean()) > limit, "particles drawn twice look like modes"
    two = draws[:, :50] + 2.0 * (torch.rand(PARTICLES, 50, 1) < 0.5)
    _, p_values = dips(quantiles(two, weights[:, :50], sizes[:50]))
    assert float((p_values < 0.05).double().mean()) > 0.9


@pytest.mark.parametrize(
    "method", [None, vh.ImportanceSampling(2048)], ids=["quadrature", "importance"]
)
def test_a_correlated_gaussian_posterior(method):
    case = linear_gaussian()
    shape = vh.posterior_shape(
        case.model, case.data, guide=case.guide, method=method, **QUIET
    ).continuous
    exact = linear_gaussian_posterior(case.data[0])
    covariance = exact.scale_tril @ exact.scale_tril.mT
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    dependence = 0.5 * (variances.log().sum(-1) - covariance.logdet())
    entropy = dist.MultivariateNormal(exact.mean, covariance).entropy()
    pairs = (
        (shape.entropy, entropy),
        (shape.non_gaussianity, 0.0),
        (shape.gaussian_dependence, dependence),
        (shape.total_correlation, dependence),
    )
    for units, truth in pairs:
        assert bool(((units.values - truth).abs() < Z * units.errors + 1e-6).all())
    mean = shape.coordinates["mean"]
    assert bool(((mean.values - exact.mean).abs() < Z * mean.errors + 1e-6).all())
    assert shape.modes.counts.tolist() == [1] * 5
    assert shape.labels == ("h[0]", "h[1]")
    assert float(shape.dip_p_value.min()) > 1e-3


def four_modes(v):
    """Two independent latents with two modes each: no dependence, and far from a Gaussian."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h**2, 0.3).to_event(1), obs=v[:, None].expand(-1, 2))


def test_independent_latents_of_two_modes_each():
    v = torch.tensor([0.5, 2.0])
    shape = vh.posterior_shape(four_modes, (v,), **QUIET).continuous
    assert float(shape.total_correlation.values.abs().max()) < 1e-3
    assert shape.modes.counts.tolist() == [4, 4]
    assert bool(((shape.modes.masses - 0.25).abs() < Z * shape.modes.errors).all())
    assert shape.modes.share_with_several == (1.0, pytest.approx(0.0, abs=1e-6))
    assert float(shape.dip_p_value.max()) < 0.01
    intervals = shape.hdi()
    lengths = (intervals[..., 1] - intervals[..., 0]).nan_to_num(nan=0.0).sort(-1).values
    assert bool((lengths[..., -2] > 0.3 * lengths.sum(-1)).all()), "two intervals each"
    assert bool((lengths[..., :-2].sum(-1) < 0.1 * lengths.sum(-1)).all()), "and next to nothing"


def test_two_modes_by_quadrature_and_by_particles():
    """v | h ~ N(h², 0.3²): exact entropy and moments from a fine grid; one unit has one mode."""
    case = two_modes()
    (v,) = case.data
    grid = torch.linspace(-8, 8, 40001)[:, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.3).log_prob(v)
    log_density = log_joint - torch.logsumexp(log_joint, 0) - (grid[1] - grid[0]).log()
    weights = log_density.softmax(0)
    entropy, variance = -(weights * log_density).sum(0), (weights * grid**2).sum(0)
    far = 0.5 * (2 * math.pi * math.e * variance).log() - entropy
    annealed = vh.AnnealedImportanceSampling(256, num_steps=10, start=vh.PriorStart())
    for method in (None, annealed):
        shape = vh.posterior_shape(
            case.model, case.data, guide=case.guide, method=method, **QUIET
        ).continuous
        for units, truth in ((shape.entropy, entropy), (shape.non_gaussianity, far)):
            assert bool(((units.values - truth).abs() < Z * units.errors + 1e-6).all())
        sd, kurtosis = shape.coordinates["sd"], shape.coordinates["excess_kurtosis"]
        assert bool(((sd.values[:, 0] - variance.sqrt()).abs() < Z * sd.errors[:, 0] + 1e-6).all())
        tails = (weights * grid**4).sum(0) / variance**2 - 3
        off = (kurtosis.values[:, 0] - tails).abs()
        assert bool((off < Z * kurtosis.errors[:, 0] + 1e-6).all())
        assert shape.modes.counts.tolist() == [2, 2, 2, 1]
        assert [bool(p < 0.05) for p in shape.dip_p_value] == [True, True, True, False]
        assert bool(torch.isnan(shape.hdi()[3, 0, 1]).all()), "one interval"
        expected = v[1:3, None].sqrt() * torch.tensor([-1.0, 1.0])
        assert torch.allclose(shape.modes.locations[:, 1:3, 0].T.sort().values, expected, atol=0.1)
    assert "more than one mode: 75.0%" in str(shape)


def test_a_curved_ridge_is_one_mode_until_it_has_two():
    """Along b = 2a² the density has its maxima at a² = (v − 9/4)/2, or at 0 if that is negative."""

    def model(v):
        with pyro.plate("units", len(v)):
            a = pyro.sample("a", dist.Normal(v.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(2 * a**2, 0.2))
            pyro.sample("v", dist.Normal(b, 3.0), obs=v)

    shape = vh.posterior_shape(model, (torch.tensor([0.5, 2.0, 5.0]),), **QUIET).continuous
    assert shape.modes.counts.tolist() == [1, 1, 2]
    assert bool((shape.modes.num_settled == 32).all())
    assert shape.labels == ("a", "b")
    tops = shape.modes.locations[:, 2, 0].abs()
    assert torch.allclose(tops, torch.tensor((5 - 9 / 4) / 2).sqrt().expand(2), atol=0.05)


def test_units_do_not_depend_on_batches_and_nothing_changes():
    case = linear_gaussian(num_units=4)
    (v,) = case.data
    before = torch.random.get_rng_state()
    whole = vh.posterior_shape(case.model, (v,), guide=case.guide, **QUIET).continuous
    assert torch.equal(torch.random.get_rng_state(), before)
    parts = vh.posterior_shape(
        case.model, [(v[:1],), (v[1:],)], guide=case.guide, **QUIET
    ).continuous
    assert torch.allclose(whole.entropy.values, parts.entropy.values, atol=1e-5)
    assert parts.draws.shape[1] == 4 and parts.modes.counts.tolist() == [1] * 4


def test_one_joint_unit_of_several_sites():
    """Level and offsets, of which the data know the sums: strong dependence, all Gaussian."""
    case = joint_unit()
    shape = vh.posterior_shape(case.model, case.data, guide=case.guide, **QUIET).continuous
    precision = torch.eye(4) * torch.tensor([1.0, 4.0, 4.0, 4.0])
    mixing = torch.cat([torch.ones(3, 1), torch.eye(3)], 1)
    covariance = torch.linalg.inv(precision + mixing.T @ mixing / 0.4**2)
    dependence = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet())
    for units, truth in ((shape.non_gaussianity, 0.0), (shape.gaussian_dependence, dependence)):
        assert abs(float(units.values) - truth) < Z * float(units.errors)
    assert shape.labels == ("level", "offset[0]", "offset[1]", "offset[2]")


def test_too_few_particles_are_refused():
    case = linear_gaussian()
    few = vh.ImportanceSampling(8)
    with pytest.raises(vh.InputError, match="at least 12 particles for units of 2 dim"):
        vh.posterior_shape(case.model, case.data, method=few, **QUIET)
    together = vh.SequentialMonteCarlo(num_particles=32, num_groups=2)
    with pytest.raises(vh.InputError, match="at least 4 independent groups of particles"):
        vh.posterior_shape(case.model, case.data, method=together, **QUIET)


def test_the_tree_can_be_summarised_and_stored(tmp_path):
    case = two_modes()
    found = vh.posterior_shape(case.model, case.data, guide=case.guide, **QUIET)
    shape, tree = found.continuous, vh.to_datatree(found)
    assert "<pre>" in found._repr_html_() and "continuous latents" in str(found)
    assert tree["posterior"]["latents"].dims == ("chain", "draw", "unit", "latent")
    assert np.allclose(tree["shape"]["non_gaussianity"], shape.non_gaussianity.values)
    assert np.allclose(tree["shape"]["sd"], shape.coordinates["sd"].values)
    assert tree["shape"]["num_modes"].values.tolist() == [2, 2, 2, 1]
    tree.to_zarr(tmp_path / "shape.zarr", mode="w", consolidated=False)
    with xr.open_datatree(tmp_path / "shape.zarr", engine="zarr", consolidated=False) as read:
        for path in ("shape", "posterior"):
            xr.testing.assert_identical(read[path].to_dataset(), tree[path].to_dataset())
