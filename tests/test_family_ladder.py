"""The gap of richer families: exact values, bimodal and curved posteriors, flows' densities."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.optimize import minimize

import pyro_vharm as vh
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.learning import family_fitting
from pyro_vharm.learning.family_fitting import family_elbos
from pyro_vharm.learning.monotone_splines import bend
from pyro_vharm.learning.unit_families import UnitFit
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED, Z, assert_mean, rejects
from tests.zoo import normal_guide, normal_model

LADDER = (vh.MeanField(), vh.FullRank(), vh.Flow())
WEIGHTS, SCALE = torch.tensor([1.5, -0.7], dtype=torch.float64), 0.6
UNFINISHED = 0.01  # nats per unit that a fit of few steps may leave


def crossed(v):
    """h ~ N(0, I₂), v | h ~ N(1.5 h₁ − 0.7 h₂, 0.6²): a Gaussian posterior of one precision."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h @ WEIGHTS, SCALE), obs=v)


def crossed_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(0.3 * v[:, None] * WEIGHTS, 0.5).to_event(1))


def squared(v):
    """v | h ~ N(0.8 h² + 0.1, 0.4²): two modes for large v."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(0.8 * h**2 + 0.1, 0.4), obs=v)


def squared_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(v.clamp(min=0.1).sqrt(), 0.3))


def banana(v):
    """b | a ~ N(a², 0.5²), v ~ N(b + 0.3 a, 1): curved, with two unequal arms."""
    with pyro.plate("units", len(v)):
        a = pyro.sample("a", dist.Normal(v.new_zeros(()), 1.0))
        b = pyro.sample("b", dist.Normal(a**2, 0.5))
        pyro.sample("v", dist.Normal(b + 0.3 * a, 1.0), obs=v)


def banana_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("a", dist.Normal(torch.zeros_like(v), 1.0))
        pyro.sample("b", dist.Normal(0.5 * v, 1.0))


def on_a_line(v, loc, scale):
    """Log ∫ N(h; 0, 1) N(v; loc(h), scale²) dh by the trapezoid rule."""
    h = torch.linspace(-9.0, 9.0, 20001)
    log_joint = dist.Normal(0.0, 1.0).log_prob(h) + dist.Normal(loc(h), scale).log_prob(v[:, None])
    return log_joint.logsumexp(1) + math.log(float(h[1] - h[0]))


def best_gaussian(v):
    """Max over m, t of L(N(m, t²)) for `squared`, in closed form but for the maximisation."""

    def minus_bound(at, v):
        m, t, r = at[0] ** 2, np.exp(2 * at[1]), v - 0.1
        squares = r**2 - 1.6 * r * (m + t) + 0.64 * (m * m + 6 * m * t + 3 * t * t)
        entropy = at[1] + 0.5
        return np.log(0.4) + squares / 0.32 + 0.5 * np.log(2 * np.pi) + 0.5 * (m + t) - entropy

    starts = [(m, s) for m in (0.0, 0.7, 2.0) for s in (-2.0, -0.5)]
    options = {"xatol": 1e-8, "fatol": 1e-10}
    found = [
        min(minimize(minus_bound, s, (one,), "Nelder-Mead", options=options).fun for s in starts)
        for one in v.tolist()
    ]
    return -torch.tensor(found)


def ladder_gaps(model, guide, v, exact, families=LADDER, refit=None):
    problem = prepare(model, guide, (v,))
    found = family_elbos(problem, families, refit or vh.Refit(), progress=False)
    return {name: (exact - units.values, units.mc_errors) for name, units in found.items()}


def meets(gap, exact):
    """An upper bound may lie above by what is unfinished, and by chance on both sides."""
    values, errors = gap
    error = Z * float(errors.square().sum().sqrt())
    off = float((values - exact).sum())
    return -error < off < error + UNFINISHED * len(values)


def test_a_gaussian_posterior():
    """Mean field: ½ (Σ log P_ii − log det P); full rank: 0, with next to no error."""
    v = torch.randn(5) * 2
    precision = torch.eye(2) + WEIGHTS.outer(WEIGHTS) / SCALE**2
    covariance = precision.inverse()
    scale = math.sqrt(SCALE**2 + float(WEIGHTS.square().sum()))
    families = (vh.MeanField(), vh.FullRank(), vh.Flow(num_components=2, num_layers=1))
    log_evidence = dist.Normal(0.0, scale).log_prob(v)
    gaps = ladder_gaps(crossed, crossed_guide, v, log_evidence, families, vh.Refit(100))
    exact = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    assert exact > 0.3
    assert meets(gaps["mean field"], exact)
    assert meets(gaps["full rank"], 0.0) and meets(gaps["flow"], 0.0)
    assert not meets(gaps["mean field"], 0.0)
    moments = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet())
    variances = covariance.diagonal() * precision.diagonal()
    matched = 0.5 * (variances.sum() - 2) - moments  # KL(q ‖ p) of the posterior's own variances
    assert not meets(gaps["mean field"], float(matched)), "moments are not the best mean field"


def test_two_modes_cost_a_gaussian_log_2_and_a_flow_little():
    v = torch.tensor([0.5, 2.0, 4.0, -1.0])
    exact = on_a_line(v, lambda h: 0.8 * h**2 + 0.1, 0.4)
    gaps = ladder_gaps(squared, squared_guide, v, exact)
    best = exact - best_gaussian(v)
    assert float(best[1]) > 0.6
    assert meets(gaps["mean field"], best) and meets(gaps["full rank"], best)
    values, errors = gaps["flow"]
    assert bool((values > -Z * errors).all()), "L ≤ ℓ"
    assert bool((values < 0.05 + Z * errors).all())
    assert not meets(gaps["flow"], best)


@pytest.mark.slow
def test_a_curved_posterior():
    v = torch.tensor([0.2, 1.0, 3.0])
    exact = on_a_line(v, lambda a: a**2 + 0.3 * a, 1.25**0.5)
    gaps = ladder_gaps(banana, banana_guide, v, exact)
    (mean, mean_errors), (full, errors), (flow, flow_errors) = gaps.values()
    assert float((mean - full).sum()) > -Z * float(mean_errors.norm() + errors.norm())
    assert bool((full > 0.2).all()) and bool((flow > -Z * flow_errors).all())
    assert bool((flow < 0.25 * full).all())


def test_units_in_blocks_and_in_batches_give_the_same(monkeypatch):
    v = torch.tensor([0.5, -2.0, 1.0, 3.0])
    scale = math.sqrt(SCALE**2 + float(WEIGHTS.square().sum()))
    exact = dist.Normal(0.0, scale).log_prob(v)
    precision = torch.eye(2) + WEIGHTS.outer(WEIGHTS) / SCALE**2
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    monkeypatch.setattr(family_fitting, "_ROWS_PER_STEP", 8 * 7 * 2)
    refit, families = vh.Refit(num_steps=100), (vh.MeanField(),)
    found = ladder_gaps(crossed, crossed_guide, v, exact, families, refit)
    assert meets(found["mean field"], gap)
    problem = prepare(crossed, crossed_guide, [(v[:1],), (v[1:],)])
    batches = family_elbos(problem, families, refit, progress=False)["mean field"]
    assert meets((exact - batches.values, batches.mc_errors), gap)


def test_choosing_and_evaluating_by_different_draws_is_unbiased():
    """N(±m, t²) have one L under a posterior that is even: the choice between them is by chance."""
    v = torch.full((1000,), 2.0)
    densities = prepare(squared, squared_guide, (v,)).densities[0]
    family, refit = vh.FullRank(), vh.Refit(num_particles=10)
    mean, scale = torch.full((1000, 1), 1.4), torch.full((1000, 1, 1), 0.4)
    both = UnitGaussian(torch.cat([mean, -mean]), torch.cat([scale, scale]))
    fit = UnitFit(family, family.begin(both))
    m, t = 1.4**2, 0.4**2
    squares = 1.9**2 - 1.6 * 1.9 * (m + t) + 0.64 * (m * m + 6 * m * t + 3 * t * t)
    exact = -math.log(0.4) - squares / 0.32 - 0.5 * math.log(2 * math.pi) - 0.5 * (m + t)
    exact += math.log(0.4) + 0.5
    best = family_fitting._best(densities, fit, refit)
    fresh = family_fitting._bounds(densities, best, family_fitting._noise(densities, family, 10))
    assert_mean(fresh.mean(0), exact)
    noise = family_fitting._noise(densities, family, 10)
    seen = family_fitting._bounds(densities, fit, noise).mean(0).reshape(2, -1).amax(0)
    assert rejects(seen, exact), "the draws that chose are optimistic"


def test_a_point_without_a_finite_density_spoils_no_other_unit():
    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)
            pyro.factor("odd", 0.0 * torch.where(v > 2, h - 2.2, torch.ones_like(h)).sqrt())

    v = torch.tensor([0.5, 3.0, -1.0])
    exact = dist.Normal(0.0, 1.25**0.5).log_prob(v)
    guide = normal_guide(0.5, 1.0)
    with pyro.validation_enabled(False):
        gaps = ladder_gaps(model, guide, v, exact, (vh.FullRank(),), vh.Refit(num_steps=100))
    values, errors = gaps["full rank"]
    assert meets((values[[0, 2]], errors[[0, 2]]), 0.0)


def random_flow(num_layers, num_components, dim):
    flow = vh.Flow(num_components, num_layers, num_bins=4, num_hidden=5)
    scale_tril = torch.randn(3, dim, dim).tril(-1) + torch.diag_embed(torch.rand(3, dim) + 0.5)
    tensors = flow.begin(UnitGaussian(torch.randn(3, dim), scale_tril))
    return flow, {n: t + 0.5 * torch.randn(t.shape) * (n in flow.free) for n, t in tensors.items()}


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_density_of_a_flow_is_that_of_its_draws(num_layers, dim):
    """By automatic differentiation: log q(h) = log q(z) − log |det dh/dz|, for each component."""
    flow, tensors = random_flow(num_layers, 2, dim)
    noise = torch.randn(4, 2, 3, dim)
    drawn = flow.draw(tensors, noise)
    pieces = tensors["log_share"].log_softmax(-1), tensors["centre"], tensors["log_width"]

    def log_base(z, unit):
        log_share, centre, log_width = (piece[unit] for piece in pieces)
        each = dist.Normal(centre, log_width.exp()).log_prob(z).sum(-1)
        return (log_share + each).logsumexp(0)

    for p, k, u in [(0, 0, 0), (1, 1, 2), (3, 0, 1)]:

        def latent(eps, p=p, k=k, u=u):
            at = noise.clone()
            at[p, k, u] = eps
            return flow.draw(tensors, at).latents[p, k, u]

        slope = torch.autograd.functional.jacobian(latent, noise[p, k, u]).det().abs().log()
        width = pieces[2][u, k]
        z = pieces[1][u, k] + width.exp() * noise[p, k, u]
        expected = log_base(z, u) - (slope - width.sum())
        assert float((drawn.log_density[p, k, u] - expected).abs()) < 1e-9
        assert float((slope - width.sum()).abs()) > 1e-3, "without the slope it would be wrong"
    assert torch.allclose(drawn.shares, pieces[0].exp().T)
    moved = flow.draw(flow.rebased(tensors), noise)
    assert torch.allclose(moved.latents, drawn.latents)
    assert torch.allclose(moved.log_density, drawn.log_density)


@pytest.mark.parametrize("family", [vh.FullRank(), vh.Flow(), vh.Flow(1, 1)], ids=str)
def test_richer_families_hold_the_gaussians_of_lower_rungs(family):
    scale_tril = torch.randn(2, 3, 3).tril(-1) + torch.diag_embed(torch.rand(2, 3) + 0.5)
    gaussian = UnitGaussian(torch.randn(2, 3), scale_tril)
    drawn = family.draw(family.begin(gaussian), torch.randn(5, family.num_strata, 2, 3))
    found = drawn.latents.flatten(0, 1)
    assert torch.allclose(gaussian.log_prob(found), drawn.log_density.flatten(0, 1))
    precision = torch.linalg.inv(scale_tril @ scale_tril.mT)
    field = vh.MeanField().gaussian(vh.MeanField().begin(gaussian))
    deviations = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    assert torch.allclose(field.scale_tril, torch.diag_embed(deviations))


def test_a_spline_is_monotone_and_knows_its_slope():
    points = torch.linspace(-5.0, 5.0, 2001).requires_grad_()
    parameters = 1.5 * torch.randn(25)
    moved, log_slopes = bend(points, parameters.expand(2001, -1))
    (slopes,) = torch.autograd.grad(moved.sum(), points)
    assert torch.allclose(slopes.log(), log_slopes)
    steps = (moved.diff() / points.diff()).detach()
    assert bool((steps > 0).all()), "also across the ends of the bent part"
    assert float(steps.max()) < 1.01 * float(slopes.max())


def test_a_flow_begins_at_the_modes_of_draws():
    draws = torch.cat([-3 + 0.2 * torch.randn(400, 1, 1), 2 + 0.5 * torch.randn(100, 1, 1)])
    flow, gaussian = vh.Flow(2), UnitGaussian(torch.zeros(1, 1), torch.ones(1, 1, 1))
    tensors = flow.begin(gaussian, draws[torch.randperm(500)])
    order = tensors["centre"][0, :, 0].argsort()
    shares = tensors["log_share"].softmax(-1)[0, order]
    assert torch.allclose(shares, torch.tensor([0.8, 0.2]), atol=0.01)
    widths = tensors["log_width"][0, order, 0].exp()
    assert torch.allclose(widths, torch.tensor([0.2, 0.5]), rtol=Z * 200**-0.5)


QUIET = {"progress": False, "refit": vh.Refit(num_steps=20, num_particles=50)}


def test_the_result_shows_the_ladder():
    v = torch.tensor([1.0, -2.0, 0.5])
    families = (vh.Flow(num_components=2, num_layers=1), vh.MeanField(), vh.FullRank())
    gap = vh.inference_gap(crossed, crossed_guide, (v,), families=families, **QUIET)
    assert list(gap.families) == ["mean field", "full rank", "flow"], "from the lowest rung up"
    total = gap.family_gap("full rank").total()
    expected = gap.evidence.per_unit.total().value - gap.families["full rank"].total().value
    assert total.value == pytest.approx(expected, abs=1e-9)
    gain = gap.family_gain("flow").total().value
    assert gain == pytest.approx(
        gap.gap.total().value - gap.family_gap("flow").total().value, abs=1e-9
    )
    text = str(gap)
    assert all(f"\n  {name} " in text for name in gap.families) and "gain on guide" in text
    assert "latent dims in use: 2 of 2" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "<pre>" in gap._repr_html_()
    with pytest.raises(vh.InputError, match=r"that was fitted, .*'flow'.*, not 'iaf'"):
        gap.family_gap("iaf")
    tree = vh.to_datatree(gap)
    found = tree["families"].to_dataset().sel(family="full rank")
    assert float(found["gap"]) == total.value and float(found["gap_mc_error"]) == total.mc_error
    assert float(found["elbo"]) == gap.families["full rank"].total().value
    without = vh.inference_gap(crossed, crossed_guide, (v,), **QUIET)
    assert without.families == {} and "families" not in vh.to_datatree(without).children
    assert without.elbo.values.equal(gap.elbo.values), "families change no other number"


def test_a_guide_whose_density_is_known_in_total_only():
    v = torch.tensor([1.0, -2.0])
    guide = AutoMultivariateNormal(crossed)
    guide(v)
    gap = vh.inference_gap(crossed, guide, (v,), families=(vh.FullRank(),), **QUIET)
    assert len(gap.families["full rank"].values) == 2, "per unit, unlike the guide's"
    gain = gap.family_gain("full rank")
    assert len(gain.values) == 1 and gain.num_units == 2 and "full rank" in str(gap)


def test_bad_families_are_refused():
    v = torch.tensor([1.0, -2.0])

    def refused(match, model=normal_model, guide=None, **options):
        guide = guide or normal_guide(0.5, 0.7)
        with pytest.raises(vh.InputError, match=match):
            vh.inference_gap(model, guide, (v,), progress=False, **options)

    refused("families must hold objects", families=(vh.MeanField,))
    refused("families must hold objects", families=("flow",))
    refused("different names", families=(vh.Flow(), vh.Flow(num_layers=1)))

    def coin(v):
        with pyro.plate("units", len(v)):
            k = pyro.sample("k", dist.Bernoulli(torch.full_like(v, 0.3)))
            pyro.sample("v", dist.Normal(k, 1.0), obs=v)

    refused("all latents of the model are", coin, lambda v: None, families=(vh.MeanField(),))
    for name in ("num_components", "num_layers", "num_bins", "num_hidden"):
        with pytest.raises(vh.InputError, match=f"{name} must be at least 1, not 0"):
            vh.Flow(**{name: 0})


def test_the_seed_decides():
    v = torch.tensor([1.0, -2.0])
    options = {"families": (vh.MeanField(),), **QUIET, "method": vh.ImportanceSampling(100)}
    once, again, other = (
        vh.inference_gap(normal_model, normal_guide(0.3, 0.9), (v,), seed=SEED + s, **options)
        for s in (0, 0, 1)
    )
    first, second = once.families["mean field"].values, again.families["mean field"].values
    assert first.equal(second) and not first.equal(other.families["mean field"].values)
