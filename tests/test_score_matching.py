"""Gaussians matched by scores: exact where posteriors are Gaussian, refused where they are not."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vharm.inference import refitting
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.hamiltonian import HamiltonianKernel
from pyro_vharm.inference.refitting import match_by_scores, refit_start
from pyro_vharm.inference.score_matching import match_scores, score_draws
from pyro_vharm.inference.start import match_start
from pyro_vharm.model.densities import UnitDensities
from pyro_vharm.model.minibatches import unit_selector
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import relative_variance
from tests.zoo.hard import far_modes


def regression(dim, num_units):
    """h ~ N(0, 1), v = B h + noise of 0.3: posteriors N(Λ⁻¹ Bᵀ v / s², Λ⁻¹), Λ = 1 + BᵀB / s²."""
    generator = torch.Generator().manual_seed(dim)
    loadings = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    loadings[:, 0] *= 3
    data = torch.randn(num_units, dim, generator=generator, dtype=torch.float64) + 1

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ loadings.T, 0.3).to_event(1), obs=v)

    precision = torch.eye(dim, dtype=torch.float64) + loadings.T @ loadings / 0.09
    covariance = torch.linalg.inv(precision)
    mean = data @ loadings / 0.09 @ covariance
    return prepare(model, None, (data,)).densities[0], mean, covariance


def off_by(gaussian, mean, covariance):
    """KL(found ‖ exact) of every unit."""
    exact = UnitGaussian(mean, torch.linalg.cholesky(covariance).expand(len(mean), -1, -1))
    turned = torch.linalg.solve_triangular(exact.scale_tril, gaussian.scale_tril, upper=False)
    apart = exact.whiten(gaussian.mean[None])[0]
    square = turned.square().sum((-1, -2)) + apart.square().sum(-1) - mean.shape[-1]
    return 0.5 * square + exact.log_abs_det - gaussian.log_abs_det


@pytest.mark.parametrize("dim", [1, 2, 30])
def test_a_gaussian_posterior_is_met_by_two_steps(dim):
    densities, mean, covariance = regression(dim, 5)
    prior = UnitGaussian(torch.zeros_like(mean), torch.eye(dim).double().expand(5, -1, -1))
    draws = score_draws(densities, prior, torch.randn(2 * dim + 10, 5, dim).double())
    assert float(off_by(prior, mean, covariance).min()) > 0.3
    found = match_scores(prior, draws)
    assert float(off_by(found, mean, covariance).max()) < 0.5 * dim, "the pull to the prior is left"
    again = match_scores(found, score_draws(densities, found, draws.whitened))
    assert float(off_by(again, mean, covariance).max()) < 1e-3
    doubled = score_draws(densities, found, draws.whitened)
    wrong = match_scores(found, doubled._replace(scores=2 * doubled.scores))
    assert float(off_by(wrong, mean, covariance).min()) > 0.05 * dim, "a wrong twin"
    few = draws._replace(whitened=draws.whitened[:dim], scores=draws.scores[:dim])
    assert bool(torch.isfinite(match_scores(prior, few).mean).all())


def test_scores_are_those_of_whitened_coordinates():
    densities, mean, covariance = regression(3, 4)
    gaussian = UnitGaussian(mean, torch.linalg.cholesky(covariance).expand(4, -1, -1))
    draws = score_draws(densities, gaussian, torch.randn(6, 4, 3).double())
    assert torch.allclose(draws.scores, -draws.whitened, atol=1e-9), "∇ log N(e; 0, 1) = −e"


LONG = refitting.Effort(12, 40)


def matched(model, data, start=None):
    densities = prepare(model, None, data).densities[0]
    start = match_start(densities, 0.05).gaussian if start is None else start
    return match_by_scores(densities, start, LONG)


def test_a_start_far_off_and_far_too_narrow_or_wide_is_mended():
    densities, mean, covariance = regression(4, 6)
    for scale in (1e-3, 30.0):
        eye = scale * torch.eye(4).double().expand(6, -1, -1)
        found, good = match_by_scores(densities, UnitGaussian(mean + 2 * scale, eye), LONG)
        assert bool(good.all())
        assert float(off_by(found, mean, covariance).max()) < 0.5, scale


def square_model(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(1), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h[..., 0].square(), 0.3), obs=v)


def test_a_gaussian_on_one_of_two_modes_is_refused():
    """Units of v = 1.5 have modes near ±1.15; a Gaussian on one of them fits it well."""
    v = torch.full((40,), 1.5)
    one_mode = UnitGaussian(torch.full((40, 1), 1.15), torch.full((40, 1, 1), 0.12))
    _, good = matched(square_model, (v,), one_mode)
    assert not bool(good.any())

    def half_model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.HalfNormal(v.new_ones(1)).to_event(1))
            pyro.sample("v", dist.Normal(h[..., 0].square(), 0.3), obs=v)

    # the same mode without the other, on the scale of log h
    _, good = matched(half_model, (v,))
    assert float(good.double().mean()) > 0.7


def test_modes_a_few_deviations_apart_are_refused():
    """Where a Gaussian on one of them has the other in its tail."""
    case = far_modes(5, apart=4.0, num_units=20)
    densities = prepare(case.model, case.guide, case.data).densities[0]
    _, good = match_by_scores(densities, match_start(densities, 0.05).gaussian, LONG)
    assert float(good.double().mean()) < 0.2


def test_mass_beyond_a_peak_is_refused():
    """Spike and slab: one peak at 0, and half of the mass spread like the prior, without a peak."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            spike = dist.Normal(0.0, 0.02).log_prob(h).sum(-1) - dist.Normal(0, 1).log_prob(h).sum(
                -1
            )
            pyro.factor("v", torch.logaddexp(spike, torch.zeros_like(spike)))

    v = torch.zeros(30)
    spike = UnitGaussian(torch.zeros(30, 2), 0.02 * torch.eye(2).expand(30, -1, -1))
    _, good = matched(model, (v,), spike)
    assert float(good.double().mean()) < 0.2


def test_a_funnel_is_refused():
    def model(v):
        with pyro.plate("units", len(v)):
            log_scale = pyro.sample("log_scale", dist.Normal(torch.zeros_like(v), 3.0))
            scale = (log_scale / 2).exp()[..., None].expand(*log_scale.shape, 9)
            h = pyro.sample("h", dist.Normal(0.0, scale).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 3.0), obs=v)

    _, good = matched(model, (torch.linspace(-1, 1, 20),))
    assert not bool(good.any())


def test_slopes_too_steep_for_the_dtype_are_refused():
    """Their squares overflow in single precision: such units are left to tempering."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1e-12), obs=v)

    _, good = matched(model, (torch.linspace(-1, 1, 10),))
    assert not bool(good.any())


@pytest.mark.parametrize("cut", [True, False])
def test_each_unit_is_told_by_itself_whether_all_go_on_or_those_alone_that_must(cut):
    """Units of two modes and of one in turn, and one that takes more rounds than the others."""
    v = torch.tensor([1.5, -1.0]).repeat(30)
    densities = prepare(square_model, None, (v,)).densities[0]
    start = match_start(densities, 0.05).gaussian
    start.mean[1], start.scale_tril[1] = 4.0, 1e-3
    select = unit_selector(densities) if cut else None
    found, good = match_by_scores(densities, start, LONG, select)
    assert not bool(good[0::2].any()) and float(good[1::2].double().mean()) > 0.9
    widths = found.scale_tril.flatten()[1::2][good[1::2]]
    assert float(widths.max() / widths.min()) < 1.5, "these units are all the same"


def test_one_joint_unit_has_a_second_try(monkeypatch):
    """As chance may speak against a unit that cannot be run alone, too."""
    densities, *_ = regression(3, 1)
    efforts, original = [], refitting.match_by_scores

    def refuse_once(densities, gaussian, effort, select):
        found, good = original(densities, gaussian, effort, select)
        efforts.append(effort)
        return found, good & (len(efforts) > 1)

    monkeypatch.setattr(refitting, "match_by_scores", refuse_once)
    monkeypatch.setattr(refitting, "_match_by_tempering", None)
    refit_start(densities, match_start(densities, 0.05), HamiltonianKernel(), 16)
    assert len(efforts) == 2 and efforts[1].num_steps > efforts[0].num_steps


@pytest.mark.parametrize("dim", [1, 4, 50])
def test_a_wider_gaussian_costs_the_variance_it_is_given(dim):
    """Weights N(h; m, Σ) / N(h; m, (1 + δ) Σ) at draws of the wider one."""
    root = torch.eye(dim).double() + 0.3 * torch.ones(dim, dim).double().tril(-1)
    target = UnitGaussian(torch.ones(1, dim).double(), root[None])
    wider = target.widened(torch.tensor([0.1]).double())
    draws = wider.sample(400_000)
    variance = relative_variance(target.log_prob(draws) - wider.log_prob(draws))
    assert float(variance) == pytest.approx(0.1, rel=0.02)
    same = target.widened(torch.zeros(1).double())
    assert torch.equal(same.scale_tril, target.scale_tril)


def test_a_hundred_near_gaussian_dims_cost_little(monkeypatch):
    """Evaluations of each unit's density, beside what a covariance matrix needs by draws alone."""
    densities, mean, covariance = regression(100, 3)
    rows, original = [], UnitDensities.run_at

    def counted(self, latents, **options):
        rows.append(len(latents))
        return original(self, latents, **options)

    monkeypatch.setattr(UnitDensities, "run_at", counted)
    found = refit_start(densities, match_start(densities, 0.05), HamiltonianKernel(), 16)
    assert float(off_by(found.gaussian, mean, covariance).max()) < 0.05
    assert sum(rows) < 12 * 100, "tempering alone takes 12 transitions of 5 gradients for each dim"


def sized_model(num_units):
    """A model that knows how many units there are, and refuses more."""
    offset = torch.full((num_units,), 0.1)

    def model(v):
        with pyro.plate("units", num_units, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(3), 1.0).to_event(1))
            loc = h.sum(-1).square() / 2 + offset[: len(v)]
            pyro.sample("v", dist.Normal(loc, 0.5), obs=v)

    return model


@pytest.mark.parametrize("num_units", [30, 100])
def test_climbers_of_a_model_that_knows_its_size_never_outnumber_its_units(num_units):
    v = torch.linspace(-1.0, 3.0, num_units)
    densities = prepare(sized_model(num_units), None, (v,)).densities[0]
    select = unit_selector(densities)
    assert select is not None
    with pytest.raises(ValueError, match="subsample_size"):
        select(torch.zeros(2 * num_units, dtype=torch.long)).draw_prior(1)
    start = match_start(densities, 0.05)
    found = refit_start(densities, start, HamiltonianKernel(), 16)
    assert bool(torch.isfinite(found.gaussian.scale_tril).all())
