"""Quadrature: its error is kept on a zoo of hard posteriors, and by no wrong rule."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import halfcauchy, multivariate_normal

import pyro_vharm as vh
from pyro_vharm import Kind, Quadrature, log_evidence
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference import quadrature, region, trapezoidal
from pyro_vharm.inference.choice import choose_method
from pyro_vharm.inference.start import match_start
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import log_mean_exp
from tests.statistics import SEED
from tests.zoo import two_modes
from tests.zoo.hard import EFFECTS, ERRORS, correlated, far_modes

V = torch.tensor([0.0, 1.5], dtype=torch.float64)
EXACT_TO = 2e-8  # of the references by fine grids


class Posterior(NamedTuple):
    """A model with its exact log evidence per unit, and a guide that may be poor."""

    model: Callable
    v: torch.Tensor
    exact: torch.Tensor
    guide: Callable | None = None


def normalised(prior):
    """A prior seen through a factor e^v: log evidence v, whatever its shape."""

    def model(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", prior())
            pyro.factor("likelihood", v)

    return Posterior(model, V, V)


def student(df, dim):
    tril = torch.linalg.cholesky(torch.full((dim, dim), 0.5) + 0.5 * torch.eye(dim))
    loc = torch.arange(dim).double()
    return normalised(lambda: dist.MultivariateStudentT(torch.tensor(df), loc, 2.0 * tril))


def cauchy_twice():
    v = torch.tensor([0.0, 3.0, 100.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Cauchy(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Cauchy(h, 0.5), obs=v)

    return Posterior(model, v, dist.Cauchy(0.0, 1.5).log_prob(v))


def square(sd):
    v = torch.tensor([0.01, 0.5, 4.0])
    line = torch.linspace(-9, 9, 400_001)[:, None]
    log_joint = dist.Normal(0.0, 1.0).log_prob(line) + dist.Normal(line**2, sd).log_prob(v)
    exact = torch.logsumexp(log_joint, 0) + (line[1, 0] - line[0, 0]).log()

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h**2, sd), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.sqrt(), 0.5 * sd / v.sqrt()))

    return Posterior(model, v, exact, guide)


def mixture(dim):
    """Four modes of unequal widths and masses; no guide."""
    means = torch.tensor([[-4.0, -3, 1], [5, -2, 0], [3, 6, -2], [-5, 4, 3]])[:, :dim]
    shares, sds = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.6, 1.0, 0.5])

    def seen(at, more):
        parts = dist.Normal(means, (sds**2 + more).sqrt()[:, None]).log_prob(at[..., None, :])
        return torch.logsumexp(parts.sum(-1) + shares.log(), -1)

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(dim), 5.0).to_event(1))
            pyro.factor("likelihood", seen(h, 0.0) + v)

    return Posterior(model, V, seen(torch.zeros(dim), 25.0) + V)


def narrow(dim):
    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h, 1e-4).to_event(1), obs=v[:, None].expand(-1, dim))

    marginal = dist.Normal(0.0, (1 + 1e-8) ** 0.5)
    return Posterior(model, V, dim * marginal.log_prob(V))


def missed(dim):
    """The guide is sure of where the posterior is not."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(dim), 5.0).to_event(1))
            pyro.sample("v", dist.Normal(h, 0.5).to_event(1), obs=(v + 6)[:, None].expand(-1, dim))

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.new_full((len(v), dim), -3.0), 0.2).to_event(1))

    return Posterior(model, V, dim * dist.Normal(0.0, 25.25**0.5).log_prob(V + 6), guide)


def curved(bend):
    def model(v):
        with pyro.plate("units", len(v)):
            x = pyro.sample("x", dist.Normal(v.new_zeros(()), 2.0))
            pyro.sample("y", dist.Normal(bend * x**2, 0.3))
            pyro.factor("likelihood", v)

    return Posterior(model, V, V)


def funnel():
    def model(v):
        with pyro.plate("units", len(v)):
            s = pyro.sample("s", dist.Normal(v.new_zeros(()), 3.0))
            pyro.sample("h", dist.Normal(torch.zeros_like(s), (s / 2).exp()))
            pyro.factor("likelihood", v)

    return Posterior(model, V, V)


def schools():
    """Eight schools with the effects integrated out: one joint unit of two dimensions."""
    effects, errors = torch.tensor(EFFECTS), torch.tensor(ERRORS)

    def model(v):
        mu = pyro.sample("mu", dist.Normal(v.new_zeros(()), 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(v.new_tensor(5.0)))
        scale = (tau[..., None] ** 2 + errors**2).sqrt()
        pyro.factor("y", dist.Normal(mu[..., None], scale).log_prob(v).sum(-1))

    def given(tau):
        covariance = np.diag(tau**2 + np.array(ERRORS) ** 2) + 25.0
        return multivariate_normal.pdf(EFFECTS, cov=covariance) * halfcauchy.pdf(tau, scale=5.0)

    parts = [quad(given, *ends, epsabs=1e-24)[0] for ends in ((0, 5), (5, 30), (30, np.inf))]
    return Posterior(model, effects, torch.tensor([math.log(sum(parts))]))


def exponential():
    v = torch.tensor([0.1, 2.0, 5.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Exponential(2.0 * torch.ones_like(v)))
            pyro.sample("v", dist.Exponential(h), obs=v)

    return Posterior(model, v, (2 / (2 + v) ** 2).log())


def window(num_units=3):
    """A window in the likelihood, whose two edges can deceive two rules at once."""
    v = torch.linspace(-1.1, 1.3, num_units)

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.factor("window", torch.where((h - v).abs() < 0.7, 0.0, -40.0))

    below, above = (dist.Normal(0.0, 1.0).cdf(v + edge) for edge in (-0.7, 0.7))
    return Posterior(model, v, (above - below).log())


def of_zoo(case):
    return Posterior(case.model, case.data[0], case.exact, case.guide)


def gamma(shape):
    return normalised(lambda: dist.Gamma(torch.tensor(shape), 2.0))


EASY = {
    "correlated 1": lambda: of_zoo(correlated(1, 0.99)),
    "correlated 2": lambda: of_zoo(correlated(2, 0.99)),
    "correlated 3": lambda: of_zoo(correlated(3, 0.99)),
    "modes 8 apart 1": lambda: of_zoo(far_modes(1, 8.0)),
    "modes 16 apart 1": lambda: of_zoo(far_modes(1, 16.0, 0.1)),
    "modes 16 apart 2": lambda: of_zoo(far_modes(2, 16.0, 0.1)),
    "modes 8 apart 3": lambda: of_zoo(far_modes(3, 8.0, num_units=2)),
    "four modes 2": lambda: mixture(2),
    "Cauchy": lambda: student(1.0, 1),
    "Student 2 in 2": lambda: student(2.0, 2),
    "Student 3 in 1": lambda: student(3.0, 1),
    "Cauchy twice": cauchy_twice,
    "eight schools": schools,
    "banana": lambda: curved(0.2),
    "square 0.001": lambda: square(0.001),
    "square 0.05": lambda: square(0.05),
    "square 0.3": lambda: square(0.3),
    "square 1": lambda: square(1.0),
    "exponential": exponential,
    "gamma 0.05": lambda: gamma(0.05),
    "gamma 3": lambda: gamma(3.0),
    "half normal": lambda: normalised(lambda: dist.HalfNormal(torch.tensor(3.0))),
    "half Cauchy": lambda: normalised(lambda: dist.HalfCauchy(torch.tensor(5.0))),
    "beta": lambda: normalised(lambda: dist.Beta(torch.tensor(0.5), 3.0)),
    "narrow 1": lambda: narrow(1),
    "narrow 3": lambda: narrow(3),
    "missed 1": lambda: missed(1),
    "missed 3": lambda: missed(3),
    "Laplace": lambda: normalised(lambda: dist.Laplace(torch.tensor(0.3), 1.0)),
}
HARD = {
    "four modes 3": lambda: mixture(3),
    "modes 16 apart 3": lambda: of_zoo(far_modes(3, 16.0, 0.1, num_units=2)),
    "Cauchy in 2": lambda: student(1.0, 2),
    "Cauchy in 3": lambda: student(1.0, 3),
    "bent banana": lambda: curved(0.5),
    "thin banana": lambda: curved(3.0),
    "funnel": funnel,
    "window": window,
    "square 1e-5": lambda: square(1e-5),
}
METHOD = Quadrature(max_nodes=2**18)


def is_a_lie(estimates, exact):
    """Whether an error is finite and the number farther off."""
    off = (estimates.values - exact).abs()
    return bool((~(off <= estimates.errors + EXACT_TO) & estimates.errors.isfinite()).any())


def by_quadrature(posterior, method=METHOD, seed=SEED):
    evidence = log_evidence(
        posterior.model,
        (posterior.v,),
        guide=posterior.guide,
        method=method,
        seed=seed,
        progress=False,
    )
    return evidence.per_unit


@pytest.mark.parametrize("name", EASY)
def test_the_error_is_small_and_kept(name):
    posterior = EASY[name]()
    found = by_quadrature(posterior)
    assert not is_a_lie(found, posterior.exact)
    assert float(found.errors.max()) < 1e-3


@pytest.mark.parametrize("name", HARD)
def test_a_hard_posterior_is_right_or_owned_up_to(name):
    posterior = HARD[name]()
    assert not is_a_lie(by_quadrature(posterior), posterior.exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EASY, *HARD])
@pytest.mark.parametrize("seed", range(1, 11))
def test_the_error_is_kept_over_many_seeds(name, seed):
    pyro.set_rng_seed(seed)
    posterior = {**EASY, **HARD}[name]()
    assert not is_a_lie(by_quadrature(posterior, seed=seed), posterior.exact)


def by_gauss_hermite(posterior):
    """A wrong twin: rules of two orders about the guide's one mode, which agree."""
    densities = prepare(posterior.model, posterior.guide, (posterior.v,)).densities[0]
    gaussian = match_start(densities, 0.0).gaussian
    values = []
    for order in (24, 32):
        nodes, weights = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(order))
        at = gaussian.unwhiten(nodes[:, None, None].expand(-1, densities.num_units, 1))
        log_weight = weights.log() + nodes**2 / 2
        summed = torch.logsumexp(densities.log_joint(at) + log_weight[:, None], 0)
        values.append(summed + gaussian.log_abs_det)
    error = (values[1] - values[0]).abs()
    return UnitEstimates(values[1], torch.zeros_like(error), Kind.NUMERICAL, error)


@pytest.mark.parametrize("name", ["square 0.05", "square 0.3", "modes 16 apart 1"])
def test_gauss_hermite_about_one_mode_is_caught(name):
    posterior = EASY[name]()
    assert is_a_lie(by_gauss_hermite(posterior), posterior.exact)


@pytest.mark.parametrize("name", ["Cauchy", "Student 3 in 1", "gamma 0.05", "half Cauchy"])
def test_a_cut_box_without_its_tail_check_is_caught(name, monkeypatch):
    posterior = EASY[name]()
    monkeypatch.setattr(region, "_DEPTH", 4.0)
    assert not is_a_lie(by_quadrature(posterior), posterior.exact), "the check mends the cut"
    monkeypatch.setattr(trapezoidal, "_beyond", lambda *args: torch.zeros_like(args[-1]))
    assert is_a_lie(by_quadrature(posterior), posterior.exact)


def test_a_window_needs_more_than_two_rules(monkeypatch):
    posterior, method = window(60), Quadrature(max_nodes=2**13)

    def two_rules(shares):
        return (2 * shares[::2].sum(0)).log().abs()

    assert not is_a_lie(by_quadrature(posterior, method), posterior.exact)
    monkeypatch.setattr(trapezoidal, "_change", two_rules)
    assert is_a_lie(by_quadrature(posterior, method), posterior.exact)


def test_a_ridge_aslant_is_seen_line_by_line():
    """Its rule is wrong, while that of twice the spacing along either axis gives the same sum."""
    line = torch.linspace(-12, 12, 61)
    x, y = line[:, None, None], line[None, :, None]
    heights = torch.exp(-0.5 * ((x - y) / 0.2) ** 2 - 0.5 * ((x + y) / 3.0) ** 2)
    total = heights.sum((0, 1))
    exact = math.pi * 0.2 * 3.0  # the Jacobian of (x − y, x + y) is 2
    off = float((total * (line[1] - line[0]) ** 2 / exact).log().abs())
    marginal = heights.sum(1) / total
    assert off == pytest.approx(2 * math.exp(-2 * (math.pi * 0.2 / 0.4) ** 2), rel=0.1)
    assert float(trapezoidal._change(marginal)) < 0.1 * off
    assert all(float(trapezoidal._change_of_lines(heights, a, total)) > off for a in (0, 1))


def test_the_nodes_stand_for_the_posterior():
    case = correlated(3, 0.9)
    densities = prepare(case.model, case.guide, case.data).densities[0]
    run = Quadrature().run(densities)
    assert run.kind is Kind.NUMERICAL
    assert torch.allclose(log_mean_exp(run.log_weights), case.exact, atol=1e-8)
    share = torch.softmax(run.log_weights, 0)
    index = torch.arange(3)
    prior = 0.9 ** (index[:, None] - index).abs().double()
    gain = prior @ torch.linalg.inv(prior + 0.25 * torch.eye(3))
    mean = torch.einsum("pu,pui->ui", share, run.unconstrained)
    assert torch.allclose(mean, case.data[0] @ gain.T, atol=1e-7)
    second = torch.einsum("pu,pui,puj->uij", share, run.unconstrained, run.unconstrained)
    covariance = second - mean[:, :, None] * mean[:, None, :]
    assert torch.allclose(covariance, (prior - gain @ prior).expand(3, 3, 3), atol=1e-7)


def test_few_nodes_are_kept_where_units_are_many(monkeypatch):
    monkeypatch.setattr(quadrature, "_MOST_KEPT", 6 * 1024)
    case = correlated(2, 0.5, num_units=6)
    densities = prepare(case.model, case.guide, case.data).densities[0]
    whole = Quadrature().run(densities)
    monkeypatch.setattr(quadrature, "_MOST_KEPT", 0)
    monkeypatch.setattr(quadrature, "_LEAST_KEPT", 500)
    thin = Quadrature().run(densities)
    assert len(thin.log_weights) == 500 < len(whole.log_weights)
    values = [log_mean_exp(run.log_weights) for run in (whole, thin)]
    assert torch.allclose(*values, atol=1e-7)
    means = [
        torch.einsum("pu,pui->ui", torch.softmax(run.log_weights, 0), run.unconstrained)
        for run in (whole, thin)
    ]
    assert float((means[0] - means[1]).abs().max()) < 0.02


def test_units_that_cannot_be_cut_are_refined_together():
    loadings = torch.tensor([0.5, 2.0, 40.0])

    def model():
        with pyro.plate("units", 3):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(loadings * h.sum(-1), 0.3), obs=torch.ones(3))

    evidence = log_evidence(model, (), method=Quadrature(), progress=False)
    exact = dist.Normal(0.0, (2 * loadings**2 + 0.09).sqrt()).log_prob(torch.ones(3))
    assert not is_a_lie(evidence.per_unit, exact) and float(evidence.per_unit.errors.max()) < 1e-5


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_density_that_is_unknown_beside_high_density_is_owned_up_to():
    v = torch.tensor([0.3, 30.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            loc = torch.where(h > v + 1.0, h * torch.nan, h)
            pyro.sample("v", dist.Normal(loc, 40.0, validate_args=False), obs=v)

    method = Quadrature(max_nodes=2**12)
    evidence = log_evidence(model, (v,), method=method, progress=False)
    assert evidence.per_unit.errors.isfinite().tolist() == [False, True]
    assert "not finite" in str(evidence) and evidence.standing == "doubtful"


def test_quadrature_finds_both_modes_from_a_guide_on_one():
    case = two_modes()
    evidence = log_evidence(case.model, case.data, guide=case.guide, progress=False)
    assert (evidence.per_unit.values - case.exact).abs().max() < 1e-8


@pytest.mark.parametrize("sd", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("offset", [0.0, 5.0, -30.0])
def test_quadrature_zooms_in_on_narrow_and_far_posteriors(sd, offset):
    v = torch.tensor([offset])

    def model(v):
        with pyro.plate("units", 1):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, sd), obs=v)

    evidence = log_evidence(model, (v,), progress=False)
    exact = dist.Normal(0.0, (1 + sd**2) ** 0.5).log_prob(v)
    error = (evidence.per_unit.values - exact).abs()
    assert bool((error <= evidence.per_unit.errors + 1e-7).all())


def test_quadrature_says_so_when_it_has_not_converged():
    case = two_modes()
    coarse = Quadrature(max_nodes=32, num_box_steps=1)
    evidence = log_evidence(case.model, case.data, method=coarse, progress=False)
    assert not is_a_lie(evidence.per_unit, case.exact)
    assert bool((evidence.per_unit.errors > 1e-6).any())


@pytest.mark.parametrize(
    "num_units, name", [(3, "Quadrature"), (2000, "AnnealedImportanceSampling")]
)
def test_auto_counts_evaluations_in_three_dimensions(num_units, name):
    case = correlated(3, 0.5, num_units=num_units)
    choice = choose_method(prepare(case.model, case.guide, case.data).densities)
    assert str(choice).startswith(name)
    assert ("90,000 evaluations" in choice.reason) == (num_units > 1000)


def test_quadrature_refuses_four_dimensions():
    def four(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(4), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    with pytest.raises(vh.InputError, match="one to three latent dimensions, not 4"):
        log_evidence(four, (V,), method=Quadrature(), progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_precision_stops_at_its_rounding(dtype):
    v = torch.tensor([0.5, -1.0], dtype=dtype)

    def model(v):
        with pyro.plate("units", len(v)):
            zeros = torch.zeros(3, dtype=torch.float32)
            h = pyro.sample("h", dist.Normal(zeros, 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    evidence = log_evidence(model, (v,), method=Quadrature(), progress=False)
    assert evidence.per_unit.values.dtype == dtype
    exact = dist.Normal(0.0, 2.0).log_prob(v.double())
    assert not is_a_lie(evidence.per_unit, exact) and float(evidence.per_unit.errors.max()) < 1e-4
    assert evidence.num_particles < 64**3, "rounding does not drive the grid to its limit"
    assert math.isfinite(evidence.per_unit.total().mc_error)
