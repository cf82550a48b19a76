"""Laws 1–5, 8 and 10 of evidence, each over every inference method that it applies to."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vharm as vh
from pyro_vharm.inference.annealed_runs import anneal_forward
from pyro_vharm.inference.estimation import estimate_units, pooled_upper_bounds
from pyro_vharm.inference.gaussians import UnitGaussian
from pyro_vharm.inference.sequential import run_sequence
from pyro_vharm.inference.start import StartDensity, match_start
from pyro_vharm.model import compilation
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.vectorising import by_loop
from pyro_vharm.particles import log_mean_exp, log_mean_exp_error
from tests.statistics import Z, assert_mean, rejects, z_score
from tests.zoo import (
    beta_binomial,
    linear_gaussian,
    linear_gaussian_posterior,
    normal_guide,
    normal_model,
)
from tests.zoo.effects import deterministic_site, reparameterized, scaled
from tests.zoo.plates import minibatch, subsampled_plate

REPEATS = 1000
KERNEL = vh.HamiltonianKernel(num_leapfrog=2)
ANNEALING = vh.AnnealedImportanceSampling(8, num_steps=3, kernel=KERNEL, num_settling=2)
IMPORTANCE = {
    "importance, defensive": vh.ImportanceSampling(8),
    "importance, matched": vh.ImportanceSampling(8, vh.MatchedGaussian()),
    "importance, guide": vh.ImportanceSampling(8, vh.GuideProposal()),
}
ANNEALED = {
    "annealing": ANNEALING,
    "annealing, start not refitted": replace(ANNEALING, start=vh.MatchedStart(0.3, refit=False)),
    "annealing, from the prior": replace(
        ANNEALING, start=vh.PriorStart(), schedule=vh.SigmoidSchedule(), num_steps=5
    ),
    "annealing, not whitened": replace(
        ANNEALING, kernel=vh.HamiltonianKernel(2, whitened=False), schedule=vh.LinearSchedule()
    ),
    "annealing, to a width": replace(ANNEALING, target_width=0.2, max_steps=6),
}
SWARM = vh.SequentialMonteCarlo(16, num_groups=4, num_sweeps=1, kernel=KERNEL)
SEQUENTIAL = {
    "sequential, from the prior": SWARM,
    "sequential, matched": replace(SWARM, num_groups=2, start=vh.MatchedStart()),
}
BRIDGE = vh.BridgeSampling(
    vh.HamiltonianMonteCarlo(num_draws=40, num_warmup=40, kernel=vh.HamiltonianKernel(4))
)
WEIGHTED = IMPORTANCE | ANNEALED | SEQUENTIAL
STOCHASTIC = WEIGHTED | {"bridge": BRIDGE}


def over(methods):
    return pytest.mark.parametrize("method", methods.values(), ids=methods.keys())


def densities_of(case):
    return prepare(case.model, case.guide, case.data).densities[0]


def from_its_own_start(method):
    """The method, made to keep a start density that it is given."""
    if not hasattr(method, "start"):
        return method
    return replace(method, start=vh.MatchedStart(refit=False))


@pytest.fixture
def replicated():
    """One asymmetric unit many times: each copy is an independent repetition."""
    case = linear_gaussian(repeat=REPEATS)
    return densities_of(case), case.exact, case.data[0]


def inside(v):
    """A start inside the posterior: with wider tails 1/Ẑ has no finite variance to test."""
    posterior = linear_gaussian_posterior(v)
    return StartDensity(UnitGaussian(posterior.mean + 0.1, 0.7 * posterior.scale_tril), 0.0)


@over(STOCHASTIC)
def test_law_1_from_the_posterior_every_weight_is_the_evidence(method):
    case = linear_gaussian()
    posterior = StartDensity(linear_gaussian_posterior(case.data[0]), 0.0)
    run = from_its_own_start(method).run(densities_of(case), start=posterior)
    found = run.log_weights if run.log_evidence is None else run.log_evidence.values
    assert (found - case.exact).abs().max() < 1e-9
    if run.reverse_log_weights is not None:
        assert (run.reverse_log_weights - case.exact).abs().max() < 1e-9
    if run.log_evidence is not None:
        assert float(run.log_evidence.errors.max()) < 1e-9


def test_law_1_by_a_guide_that_is_the_posterior():
    case = linear_gaussian()
    posterior = linear_gaussian_posterior(case.data[0])

    def guide(v):
        with pyro.plate("units", len(v)):
            law = dist.MultivariateNormal(posterior.mean, scale_tril=posterior.scale_tril)
            pyro.sample("h", law)

    densities = prepare(case.model, guide, case.data).densities[0]
    run = IMPORTANCE["importance, guide"].run(densities)
    assert (run.log_weights - case.exact).abs().max() < 1e-9


@over(WEIGHTED)
def test_law_2_the_mean_weight_is_the_evidence(method, replicated):
    densities, exact, _ = replicated
    log_ratio = log_mean_exp(method.run(densities).log_weights) - exact
    assert_mean(log_ratio.exp(), 1.0)
    assert float(log_ratio.mean()) < Z * float(log_ratio.std()) / REPEATS**0.5


def test_the_errors_are_those_of_repetitions():
    """Also where no particle of a unit, of few, came from the share of prior in its start."""
    case = linear_gaussian(repeat=REPEATS)
    start = StartDensity(linear_gaussian_posterior(case.data[0]), 0.05)
    fixed = replace(ANNEALING, num_particles=16, start=vh.MatchedStart(refit=False))
    run = fixed.run(densities_of(case), start=start)
    units = estimate_units(run)
    off = units.values - case.exact
    # with V and V' alike, E max(V, (V + V')/2) = E V + E|V − V'|/4 lies between E V and 1.5 E V
    squares = units.mc_errors.square()
    for share, side in ((1.0, -1.0), (1.5, 1.0)):
        assert side * float(z_score(squares - share * off.square(), 0.0)) < Z
    alone, _ = log_mean_exp_error(run.log_weights)
    far = [float((off.abs() > 5 * error).double().mean()) for error in (units.mc_errors, alone)]
    none = 0.95**32  # no particle from the prior, nor in the pilot: all weights alike, and off
    most = none + Z * (none * (1 - none) / REPEATS) ** 0.5
    assert far[0] < most < far[1], "a wrong twin: from the weights that count alone"


def test_law_2_rejects_draws_of_another_start(replicated):
    densities, exact, _ = replicated
    plan, _ = ANNEALING.pilot(densities, match_start(densities, 0.05))
    wrong = anneal_forward(plan, match_start(densities, 0.05).sample(densities, 8))
    assert rejects((log_mean_exp(wrong.log_weights) - exact).exp(), 1.0)

    start = match_start(densities, 0.0)
    shifted = replace(start, gaussian=replace(start.gaussian, mean=start.gaussian.mean + 0.4))
    draws = shifted.sample(densities, 8)
    terms = densities.terms(draws)
    log_weights = terms.log_joint - start.log_prob(draws, terms.log_prior)
    assert rejects((log_mean_exp(log_weights) - exact).exp(), 1.0)


@over(ANNEALED)
def test_law_3_runs_back_from_exact_draws(method, replicated):
    densities, exact, v = replicated
    draws = linear_gaussian_posterior(v).sample(8)
    fixed = from_its_own_start(method)
    run = fixed.run(densities, start=inside(v), exact=draws)
    inverse = log_mean_exp(exact - run.reverse_log_weights)
    assert_mean(inverse.exp(), 1.0)
    error = float(inverse.std()) / REPEATS**0.5
    assert float(-inverse.mean()) > -Z * error, "log Ẑ of the reverse is above log Z on average"
    wrong = fixed.run(densities, start=inside(v), exact=draws + 0.6)
    assert rejects(log_mean_exp(exact - wrong.reverse_log_weights).exp(), 1.0), "no exact draws"


@over(ANNEALED)
def test_law_3_forward_runs_and_one_back(method, replicated):
    """Pooled, the start may be too wide: no weight is divided by alone."""
    densities, exact, v = replicated
    posterior = linear_gaussian_posterior(v)
    draws = posterior.sample(1)
    wide = StartDensity(UnitGaussian(posterior.mean + 0.5, 2.0 * posterior.scale_tril), 0.0)
    fixed = from_its_own_start(method)
    run = fixed.run(densities, start=wide, exact=draws)
    upper, lower = pooled_upper_bounds(run), log_mean_exp(run.log_weights)
    assert_mean((exact - upper).exp(), 1.0)
    for above in (upper - exact, exact - lower):
        assert float(above.mean()) > -Z * float(above.std()) / REPEATS**0.5
    forward = replace(run, reverse_log_weights=run.log_weights[:1])
    assert rejects((exact - pooled_upper_bounds(forward)).exp(), 1.0), "a forward run for it"
    wrong = fixed.run(densities, start=wide, exact=draws + 1.0)
    assert rejects((exact - pooled_upper_bounds(wrong)).exp(), 1.0), "no exact draws"


@over(ANNEALED)
def test_law_4_exact_draws_decide_nothing(method):
    """Whatever adapts is frozen before the draw that made the data is looked at."""
    case = linear_gaussian(num_units=6)
    densities = densities_of(case)
    draws = linear_gaussian_posterior(case.data[0]).sample(1)
    runs = []
    for exact in (draws, draws + 2.0):
        torch.manual_seed(0)
        runs.append(method.run(densities, exact=exact))
    assert torch.equal(runs[0].log_weights, runs[1].log_weights)
    assert torch.equal(runs[0].num_steps, runs[1].num_steps)
    assert not torch.equal(runs[0].reverse_log_weights, runs[1].reverse_log_weights)


def test_law_4_plans_are_frozen():
    densities = densities_of(linear_gaussian(num_units=6))
    start = match_start(densities, 0.05)
    annealed, _ = ANNEALING.pilot(densities, start)
    sequence = SEQUENTIAL["sequential, matched"].pilot(densities, start)
    for plan, carry in (
        (annealed, lambda draws: anneal_forward(annealed, draws)),
        (sequence, lambda draws: run_sequence(sequence, draws, 8, 0.5, 1)),
    ):
        fixed = [field for field in plan if isinstance(field, torch.Tensor)]
        fixed += plan.moves.start.gaussian.fields
        before = [field.clone() for field in fixed]
        carry(plan.moves.start.sample(densities, 16))
        assert all(torch.equal(*pair) for pair in zip(fixed, before, strict=True))


V = torch.tensor([0.8, -1.7, 2.4])
GUIDE = normal_guide(0.4, 0.8)


def recorded(v):
    """`normal_model` with a deterministic site."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(pyro.deterministic("mean", h), 1.0), obs=v)


def found_with_the_same_noise(method, densities, **options):
    torch.manual_seed(0)
    return estimate_units(method.run(densities, **options)).values


@over(STOCHASTIC)
def test_law_5_scales_and_deterministic_sites_change_no_number(method):
    pairs = {
        "plain": (normal_model, GUIDE),
        "scaled": (poutine.scale(normal_model, scale=0.1), poutine.scale(GUIDE, scale=0.1)),
        "recorded": (recorded, GUIDE),
    }
    values = [
        found_with_the_same_noise(method, prepare(*pair, (V,)).densities[0])
        for pair in pairs.values()
    ]
    assert all(torch.allclose(other, values[0], atol=1e-9) for other in values[1:])


@over(
    {
        "importance": vh.ImportanceSampling(8),
        "annealing": replace(ANNEALING, start=vh.MatchedStart(refit=False)),
        "sequential": replace(SWARM, num_particles=8, num_groups=2),
    }
)
def test_law_5_looping_changes_no_number(method):
    densities = prepare(normal_model, GUIDE, (V,)).densities[0]
    looped = replace(densities, structure=replace(densities.structure, model_runs=by_loop))
    fixed, start = from_its_own_start(method), match_start(densities, 0.0)
    values = [found_with_the_same_noise(fixed, d, start=start) for d in (densities, looped)]
    assert torch.allclose(*values, atol=1e-9)


@over(
    {
        "annealing": ANNEALED["annealing, start not refitted"],
        "sequential": SWARM,
        "bridge": BRIDGE,
    }
)
def test_law_5_graphs_change_no_number(method, monkeypatch):
    """Over few moves: along many, rounding grows until one run accepts what the other does not."""
    if isinstance(method, vh.BridgeSampling):
        method = replace(method, draws=replace(method.draws, num_draws=16, num_warmup=20))
    densities = prepare(normal_model, GUIDE, (V,)).densities[0]
    monkeypatch.setattr(compilation, "_WORTH_COMPILING", float("inf"))
    monkeypatch.setattr(compilation, "_FEW_CALLS", 0)
    values = []
    for limit in (float("inf"), 0.0):
        monkeypatch.setattr(compilation, "_WORTH_TRACING", limit)
        values.append(found_with_the_same_noise(method, densities))
    assert torch.allclose(*values, atol=1e-9)


PRECISE = {
    "importance, defensive": vh.ImportanceSampling(400),
    "importance, matched": vh.ImportanceSampling(400, vh.MatchedGaussian()),
    "importance, guide": vh.ImportanceSampling(400, vh.GuideProposal()),
    "annealing": replace(ANNEALING, num_particles=128),
    "annealing, from the prior": replace(ANNEALED["annealing, from the prior"], num_particles=64),
    "sequential": vh.SequentialMonteCarlo(256, num_groups=32, num_sweeps=1, kernel=KERNEL),
    "bridge": BRIDGE,
    "quadrature": vh.Quadrature(),
}


def shuffled():
    """The units of a case in another order, which goes with their evidence."""
    case = beta_binomial()
    order = torch.tensor([2, 0, 1])
    return replace(case, data=(case.data[0][order],), exact=case.exact[order])


def in_batches():
    case = beta_binomial()
    return replace(case, data=[(part,) for part in case.data[0].split(2)])


CASES = (
    shuffled,
    in_batches,
    deterministic_site,
    reparameterized,
    scaled,
    minibatch,
    subsampled_plate,
)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
@over(PRECISE)
def test_law_5_the_evidence_of_a_unit_is_its_own(method, make):
    """In any order, batch, subsample, coordinates or scale."""
    case = make()
    options = {"guide": case.guide, "confirmation": None, "progress": False}
    units = vh.log_evidence(case.model, case.data, method=method, **options).per_unit
    error = float(units.errors.square().mean().sqrt())  # the units are alike, their weights few
    assert float((units.values - case.exact).abs().max()) < Z * error + 1e-9
    another = (units.values - case.exact.roll(1)).abs()
    assert float(another.max()) > Z * error, "a wrong twin: the evidence of the next unit"


CUT, DATUM = 1.5, 0.3
BELOW = float(dist.Normal(DATUM / 2, 0.5**0.5).cdf(torch.tensor(CUT)))


def undefined_above(v):
    """h ~ N(0, 1), v | h ~ N(h, 1), whose density is not a number for h above `CUT`."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        loc = torch.where(h > CUT, torch.nan, h)
        pyro.sample("v", dist.Normal(loc, 1.0, validate_args=False), obs=v)


@pytest.fixture
def undefined():
    """Many copies of one unit, with its log evidence were there no such h."""
    v = torch.full((REPEATS,), DATUM)
    guide = normal_guide(0.5, 0.9)
    exact = dist.Normal(0.0, 2**0.5).log_prob(v)
    return prepare(undefined_above, guide, (v,)).densities[0], exact


@over(WEIGHTED)
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_law_8_weights_that_are_no_numbers_count_as_zero(method, undefined):
    """What is left is the evidence from where there is a density: below, and no less."""
    densities, exact = undefined
    run = method.run(densities)
    assert run.num_nonfinite > 0
    ratio = (log_mean_exp(run.log_weights) - exact).exp()
    assert_mean(ratio, BELOW)
    left_out = torch.isfinite(run.log_weights).double().mean(0)
    assert rejects(ratio / left_out.clamp(min=1e-3), BELOW), "a wrong twin: as if never drawn"


@over(ANNEALED)
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_law_8_in_reverse_they_raise_the_bound(method, undefined):
    densities, exact = undefined
    draws = dist.Normal(DATUM / 2, 0.5**0.5).sample((1, REPEATS, 1))
    run = from_its_own_start(method).run(densities, exact=draws)
    assert run.num_nonfinite > 0
    inverse = log_mean_exp(exact - run.reverse_log_weights).exp()
    assert float(inverse.mean()) < 1 + Z * float(inverse.std()) / REPEATS**0.5


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_law_8_of_a_bridge(undefined):
    """Draws of the proposal without a density weigh nothing; no chain stays where there is none."""
    densities, exact = undefined
    run = BRIDGE.run(densities)
    assert run.num_nonfinite > 0
    units = estimate_units(run)
    assert bool(torch.isfinite(units.errors).all())
    assert_mean((units.values - exact).exp(), BELOW)
    squares = ((units.values - exact - math.log(BELOW)) / units.errors).square()
    assert_mean(squares, 1.0)
    posterior = dist.Normal(DATUM / 2, 0.5**0.5)
    left_out = float(posterior.cdf(torch.tensor(CUT)))  # by a proposal that is the posterior
    assert rejects((units.values - exact).exp() / left_out, BELOW), (
        "a wrong twin: as if never drawn"
    )


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_law_8_of_a_chain_that_begins_where_there_is_no_density(undefined):
    densities, _ = undefined
    path = BRIDGE.draws.kernel.moves(densities, match_start(densities, 0.0), 4, 1).path
    latents = torch.full((4, REPEATS, 1), CUT + 1.0)
    latents[1, :9] = 0.5  # all others have none to go to
    state = path.state(path.position(latents)).where_defined()
    assert torch.allclose(path.latents(state.position)[:, :9], torch.tensor(0.5))
    assert bool(torch.isnan(state.log_joint[:, 9:]).all())
    latents = torch.linspace(-1.0, 1.0, 4)[:, None, None].expand(-1, REPEATS, -1)
    state = path.state(path.position(latents))
    assert state.where_defined() is state, "else nothing is drawn, and nothing changes"


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_law_8_of_quadrature(undefined):
    """The integral is that below, and no error is claimed for what is not known."""
    _, exact = undefined
    few = prepare(undefined_above, None, (torch.full((5,), DATUM),)).densities[0]
    run = vh.Quadrature().run(few)
    assert run.num_nonfinite > 0
    units = estimate_units(run)
    assert float((units.values - exact[:5] - math.log(BELOW)).abs().max()) < 1e-4
    assert bool(torch.isinf(units.errors).all())
    evidence = vh.log_evidence(
        undefined_above, (torch.full((3,), DATUM),), method=vh.Quadrature(), progress=False
    )
    assert evidence.standing == "doubtful" and evidence.num_nonfinite > 0
