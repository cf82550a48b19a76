"""Densities per unit: against quadrature-free exact sums, and invariances (law 5)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vharm.learning.refit import elbo_over_batches
from pyro_vharm.model.problem import prepare
from tests.statistics import Z, assert_mean
from tests.zoo import BASICS, LOADINGS, NOISE, joint_unit, linear_gaussian, nested_plates, two_modes


@pytest.mark.parametrize("make", [make for make in BASICS if make is not two_modes])
def test_importance_weights_of_guide_draws_have_the_evidence_as_their_mean(make):
    case = make()
    problem = prepare(case.model, case.guide, case.data)
    with torch.no_grad():
        draws = problem.densities[0].draw_guide(20000)
    assert_mean((draws.log_weights - case.exact).exp(), 1.0)
    assert torch.allclose(draws.log_joint, problem.densities[0].log_joint(draws.latents))


def test_linear_gaussian_by_hand():
    case = linear_gaussian()
    (v,) = case.data
    densities = prepare(case.model, case.guide, case.data).densities[0]
    h = torch.randn(7, len(v), 2)
    terms = densities.terms(h)
    prior = dist.Normal(0.0, 1.0).log_prob(h).sum(-1)
    likelihood = dist.Normal(h @ LOADINGS, NOISE).log_prob(v).sum(-1)
    assert torch.allclose(terms.log_prior, prior)
    assert torch.allclose(terms.log_likelihood, likelihood)


def test_packing_is_inverted():
    case = nested_plates()
    densities = prepare(case.model, case.guide, case.data).densities[0]
    assert (densities.num_units, densities.dim) == (4, 4)
    latents = torch.randn(6, 4, 4)
    values = densities.constrain(latents)
    assert values["level"].shape == (6, 4, 1) and values["h"].shape == (6, 4, 3)
    assert torch.equal(values["level"][..., 0], latents[..., 0])
    assert torch.equal(values["h"], latents[..., 1:])


def test_units_may_be_shuffled_split_and_looped():
    case = linear_gaussian(num_units=6)
    (v,) = case.data
    h = torch.randn(3, 6, 2)
    whole = prepare(case.model, case.guide, (v,)).densities[0].log_joint(h)
    order = torch.randperm(6)
    shuffled = prepare(case.model, case.guide, (v[order],)).densities[0].log_joint(h[:, order])
    assert torch.allclose(shuffled, whole[:, order])
    split = prepare(case.model, case.guide, list(v.split(4))).densities
    parts = [d.log_joint(h[:, s]) for d, s in zip(split, (slice(0, 4), slice(4, 6)), strict=True)]
    assert torch.allclose(torch.cat(parts, 1), whole)
    one = prepare(case.model, case.guide, (v,)).densities[0]
    looped = torch.cat([one.log_joint(h[i : i + 1]) for i in range(3)])
    assert torch.allclose(looped, whole)


def test_scale_and_deterministic_sites_never_enter_evidence_per_unit():
    case = linear_gaussian()
    (v,) = case.data

    def subsampled(v):
        with pyro.plate("units", 50, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.deterministic("mean", h @ LOADINGS, event_dim=1)
            pyro.sample("v", dist.Normal(h @ LOADINGS, NOISE).to_event(1), obs=v)

    h = torch.randn(3, 5, 2)
    plain = prepare(case.model, None, (v,)).densities[0].log_joint(h)
    assert torch.allclose(prepare(subsampled, None, (v,)).densities[0].log_joint(h), plain)


def test_masked_observations_drop_out():
    v = torch.tensor([1.0, 2.0, 3.0])
    seen = torch.tensor([True, False, True])

    def model(v):
        with pyro.plate("units", 3):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0).mask(seen), obs=v)

    h = torch.randn(4, 3, 1)
    terms = prepare(model, None, (v,)).densities[0].terms(h)
    assert torch.equal(terms.log_likelihood[:, 1], torch.zeros(4))
    assert torch.allclose(terms.log_likelihood[:, 0], dist.Normal(h[:, 0, 0], 1.0).log_prob(v[0]))


@pytest.mark.parametrize("make", [linear_gaussian, nested_plates, joint_unit])
def test_sum_of_unit_elbos_is_pyros_own(make):
    case = make()
    problem = prepare(case.model, case.guide, case.data)
    ours = elbo_over_batches(problem, 4000).total()
    pyros = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    theirs = -pyros.loss(case.model, case.guide, *case.data)
    assert abs(ours.value - theirs) < Z * 2**0.5 * ours.mc_error


def test_autonormal_is_read_through_its_auxiliary_sites():
    case = linear_gaussian()
    guide = AutoNormal(case.model)
    guide(*case.data)
    problem = prepare(case.model, guide, case.data)
    draws = problem.densities[0].draw_guide(5)
    loc, scale = guide.locs.h, guide.scales.h
    expected = dist.Normal(loc, scale).log_prob(draws.latents).sum(-1)
    assert torch.allclose(draws.log_proposal, expected)
