"""Hamiltonian chains: their draws, and what they say of themselves."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats

import pyro_vharm as vh
from pyro_vharm.inference.chains import convergence, mean_draws
from pyro_vharm.model.problem import prepare
from tests.statistics import Z
from tests.zoo import linear_gaussian, linear_gaussian_posterior, normal_model, two_modes
from tests.zoo.hard import far_modes

CHAINS = vh.HamiltonianMonteCarlo(num_draws=100, num_warmup=100)


def densities_of(case):
    return prepare(case.model, case.guide, case.data).densities[0]


def autoregressive(shape, correlation=0.6):
    noise = torch.randn(*shape)
    for t in range(1, shape[-1]):
        noise[..., t] = (
            correlation * noise[..., t - 1] + (1 - correlation**2) ** 0.5 * noise[..., t]
        )
    return noise


@pytest.mark.parametrize("kind", ["mixed", "apart", "heavy", "few values"])
def test_convergence_is_arvizs(kind):
    series = autoregressive((3, 4, 101))
    if kind == "apart":
        series[:, 0] += 2.0
    if kind == "heavy":
        series = series.pow(3).exp()
    if kind == "few values":
        series = (2 * series).round()
    found = convergence(series)
    for one, rhat, size in zip(series.numpy(), found.rhat, found.sizes, strict=True):
        bulk = array_stats.ess(one, method="bulk")
        tail = array_stats.ess(one, method="tail", prob=(0.05, 0.95))
        assert float(rhat) == pytest.approx(float(array_stats.rhat(one)), rel=1e-6)
        assert float(size) == pytest.approx(float(min(bulk, tail)), rel=0.02)
    for one, size in zip(series.numpy(), mean_draws(series), strict=True):
        assert float(size) == pytest.approx(float(array_stats.ess(one, method="mean")), rel=1e-6)


def test_draws_are_the_posteriors():
    case = linear_gaussian(num_units=12)
    run = CHAINS.run(densities_of(case))
    posterior = linear_gaussian_posterior(case.data[0])
    assert run.unconstrained.shape == (8 * 100, 12, 2) and run.group_size == 100
    assert float(run.rhat.max()) < 1.05 and float(run.chain_sizes.min()) > 200
    deviation = posterior.scale_tril.square().sum(-1).sqrt()
    error = deviation / run.chain_sizes.sqrt()[:, None]
    assert bool(((run.unconstrained.mean(0) - posterior.mean).abs() < Z * error).all())
    found = run.unconstrained.std(0) / deviation
    assert float((found - 1).abs().max()) < Z / (2 * float(run.chain_sizes.min())) ** 0.5
    wrong = (run.unconstrained.mean(0) + 0.5 * deviation - posterior.mean).abs()
    assert bool((wrong > Z * error).any()), "a shift is seen"


def test_chains_that_do_not_mix_say_so():
    short = vh.HamiltonianMonteCarlo(num_draws=60, num_warmup=60)
    run = short.run(densities_of(far_modes(2, apart=16.0, share=0.5)))
    assert float(run.rhat.max()) > 1.05
    separate = short.run(densities_of(two_modes()))
    assert float(separate.rhat.max()) > 1.05


def test_chains_that_stand_still_have_no_draws():
    still = torch.arange(4.0)[:, None].expand(4, 30)[None]
    found = convergence(still)
    assert torch.isinf(found.rhat).all() and float(found.sizes) == 0.0


def test_units_in_blocks_go_back_where_they_belong(monkeypatch):
    monkeypatch.setattr("pyro_vharm.inference.chains._ROWS_AT_ONCE", 8 * 5)
    v = torch.linspace(-6, 6, 12)
    run = vh.HamiltonianMonteCarlo(num_draws=30, num_warmup=30).run(
        prepare(normal_model, None, (v,)).densities[0]
    )
    assert float((run.unconstrained.mean(0)[:, 0] - v / 2).abs().max()) < 0.5


def test_what_chains_refuse():
    for make, message in [
        (lambda: vh.HamiltonianMonteCarlo(num_chains=1), "num_chains"),
        (lambda: vh.HamiltonianMonteCarlo(num_draws=2), "num_draws"),
        (lambda: vh.HamiltonianMonteCarlo(num_warmup=2), "num_warmup"),
        (lambda: vh.HamiltonianMonteCarlo(prior_share=1.5), "prior_share"),
    ]:
        with pytest.raises(vh.InputError, match=message):
            make()
    case = linear_gaussian()
    with pytest.raises(vh.InputError, match="BridgeSampling"):
        vh.log_evidence(case.model, case.data, method=CHAINS, progress=False)

    def discrete(v):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Bernoulli(v.new_tensor(0.5)))
            pyro.sample("v", dist.Normal(z, 1.0), obs=v)

    with pytest.raises(vh.InputError, match="nothing to draw"):
        CHAINS.run(prepare(discrete, None, (torch.ones(2),)).densities[0])
