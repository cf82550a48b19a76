"""The algebra of log weights, and the certificate."""

import math

import torch

from pyro_vharm.particles import (
    choose_num_replicates,
    drop_nonfinite,
    effective_sample_size,
    log_mean_exp,
    log_mean_exp_error,
    pareto_shape,
    relative_variance,
    replicate_totals,
    resample,
)
from tests.statistics import assert_mean


def test_log_mean_exp_and_its_error_against_lognormal_weights():
    sigma, count = 0.7, 400
    log_weights = sigma * torch.randn(count, 3000)
    values = log_mean_exp(log_weights)
    errors, corrections = log_mean_exp_error(log_weights)
    truth = sigma**2 / 2
    assert abs(float(values.std() / errors.mean()) - 1) < 0.1
    bias = float((values - truth).mean())
    assert bias < 0
    assert abs(float((values + corrections - truth).mean())) < abs(bias) / 2
    expected = torch.tensor(math.exp(sigma**2) - 1)
    assert abs(float(relative_variance(log_weights).mean() / expected) - 1) < 0.1


def test_equal_weights_have_no_error():
    log_weights = torch.full((8, 2), -700.0)
    assert torch.equal(log_mean_exp(log_weights), torch.tensor([-700.0, -700.0]))
    assert torch.allclose(effective_sample_size(log_weights), torch.tensor(8.0))
    assert float(log_mean_exp_error(log_weights)[0].max()) < 1e-6


def test_nonfinite_weights_keep_the_side_of_the_bound():
    log_weights = torch.tensor([[0.0], [math.nan], [math.inf], [-math.inf]])
    forward, dropped = drop_nonfinite(log_weights)
    assert dropped == 2
    assert float(log_mean_exp(forward)) == math.log(1 / 4)
    reverse, dropped = drop_nonfinite(log_weights, reverse=True)
    assert dropped == 2
    assert float(-log_mean_exp(-reverse)) == math.log(4)


def test_replicates_partition_the_particles():
    log_weights = torch.randn(12, 5)
    totals = replicate_totals(log_weights, 3)
    by_hand = [log_mean_exp(part).sum() for part in log_weights.split(4)]
    assert torch.allclose(totals, torch.stack(by_hand))
    reverse = replicate_totals(log_weights, 3, reverse=True)
    assert bool((reverse < totals).all()), "the harmonic mean is below the arithmetic one"


def test_number_of_replicates_divides_and_trades_slack_for_spread():
    chosen = [choose_num_replicates(v, 60) for v in (0.0, 0.1, 1.0, 10.0, 1e4, math.inf)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 60 and chosen[-1] == 1
    assert all(60 % m == 0 for m in chosen)


def test_the_certificate_fails_no_more_often_than_it_says():
    delta, replicates, trials = 0.05, 4, 4000
    sigma = 1.5
    log_z = sigma * torch.randn(trials, replicates) - sigma**2 / 2
    certified = log_z.amin(1) - math.log(1 / delta) / replicates
    assert float((certified > 0).double().mean()) <= delta
    greedy = log_z.amax(1) - math.log(1 / delta) / replicates
    assert float((greedy > 0).double().mean()) > delta, "the maximum is no certificate"


def test_resampling_follows_the_weights():
    values = torch.arange(4.0).reshape(4, 1, 1).expand(4, 5000, 1)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    drawn = resample(values, weights.log()[:, None].expand(4, 5000))
    assert_mean(drawn[0, :, 0], 2.0)


def test_pareto_shapes_tell_heavy_weights_from_light_ones():
    """For w = exp(e/λ) with e exponential, weights are Pareto of shape 1/λ."""
    exponential = torch.distributions.Exponential(torch.ones(())).sample((4000, 3))
    shapes = pareto_shape(exponential * torch.tensor([0.2, 0.5, 0.9]))
    assert (shapes - torch.tensor([0.2, 0.5, 0.9])).abs().max() < 0.25
    assert torch.isneginf(pareto_shape(torch.zeros(200, 1))).all()
    level = torch.cat([1e-4 * torch.rand(990, 40), 0.18 * torch.rand(10, 40)])
    assert torch.isneginf(pareto_shape(level)).all(), "a fit would find k̂ near 1 in what is noise"
    assert torch.isfinite(pareto_shape(torch.cat([level[:-1], torch.full((1, 40), 0.8)]))).all()
    assert torch.isposinf(pareto_shape(torch.full((200, 1), -torch.inf))).all()
    with_zeros = exponential.clone()
    with_zeros[:50] = -torch.inf
    assert torch.isfinite(pareto_shape(with_zeros)).all()
