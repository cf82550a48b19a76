"""Schedules, budgets and blocks of units."""

import dataclasses
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.inference import annealing, tempering
from pyro_vharm.inference.annealed_runs import anneal_forward
from pyro_vharm.inference.estimation import unit_widths
from pyro_vharm.inference.start import match_start
from pyro_vharm.model.minibatches import unit_blocks, unit_selector
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import log_mean_exp, relative_variance
from tests.statistics import assert_mean, rejects
from tests.zoo import linear_gaussian, two_modes
from tests.zoo.hard import correlated

SCHEDULES = [vh.LinearSchedule(), vh.SigmoidSchedule(), vh.AdaptiveSchedule()]
LENGTH = vh.ThermodynamicLength(
    torch.tensor([[0.0, 0.0], [0.1, 0.5], [1.0, 1.0]]).double(),
    torch.tensor([[0.0, 0.0], [3.0, 0.0], [4.0, 0.0]]).double(),
)


def densities_of(case):
    return prepare(case.model, case.guide, case.data).densities[0]


def foreseen_log(log_weights):
    """σ² as `_lognormal_variance` has it: log(1 + V)."""
    return annealing._lognormal_variance(log_weights).log1p()


def test_the_variance_of_lognormal_weights_is_that_of_their_logs():
    """V = exp(σ²) − 1 whatever their mean, and next to nothing added changes it little.

    Shares ∝ √w tilt N(μ, σ²) to N(μ + σ²/2, σ²); fixed shares s leave σ² (1 − Σ s²) on average.
    """
    sigma = torch.tensor([0.3, 1.0]).repeat(100)
    log_weights = sigma * torch.randn(20_000, 200) - 700.0
    found = foreseen_log(log_weights)
    for start, value in enumerate((0.3, 1.0)):
        assert_mean(found[start::2], value**2)
    assert rejects(annealing._lognormal_variance(log_weights)[1::2], 1.0), "V is not σ²"
    light = torch.where(torch.rand(20_000, 200) < 0.3, log_weights - 60.0, log_weights)
    assert_mean(foreseen_log(light)[1::2], 1.0)
    assert rejects(light.var(0)[1::2], 1.0), "a wrong twin: all particles alike"
    none = torch.cat([log_weights, torch.full((50, 200), -torch.inf)])
    assert torch.allclose(foreseen_log(none), found)


def test_the_variance_of_few_lognormal_weights_is_not_low():
    log_weights = 0.1 * torch.randn(16, 20_000) + 3.0
    assert_mean(foreseen_log(log_weights), 0.01)
    share = torch.softmax(0.5 * log_weights, 0)
    plain = (share * (log_weights - (share * log_weights).sum(0)).square()).sum(0)
    assert rejects(plain, 0.01), "a wrong twin: divided by the number, not the degrees of freedom"


def test_few_weights_foresee_more_than_they_show():
    """Of 16 weights with V = e² − 1 ≈ 6.4 few have one of the largest among them."""
    log_weights = 2**0.5 * torch.randn(16, 20_000)
    true = math.expm1(2.0)
    short = [
        float((found < 0.25 * true).double().mean())
        for found in (relative_variance(log_weights), annealing._lognormal_variance(log_weights))
    ]
    assert short[1] < 0.5 * short[0], short
    most = annealing._lognormal_variance(9.0 * torch.randn(16, 100))
    assert bool((most <= 16).all()), "never more than their number"
    assert annealing._lognormal_variance(torch.full((16, 1), -torch.inf)).tolist() == [0.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_schedules_rise_from_0_to_1(schedule, num_steps):
    placed = schedule.place(num_steps, LENGTH)
    assert placed.shape == (num_steps + 1, 2)
    assert bool((placed[0] == 0).all()) and bool((placed[-1] == 1).all())
    assert bool((placed.diff(dim=0) > 0).all())


def test_adaptive_steps_have_equal_length():
    placed = vh.AdaptiveSchedule(even_share=0.01).place(4, LENGTH)
    # three quarters of the first unit's length lie below 0.1; the second's is unknown
    expected = torch.tensor([0.0, 0.1 / 3, 0.2 / 3, 0.1, 1.0])
    assert torch.allclose(placed[:, 0], expected, atol=0.03)
    assert torch.allclose(placed[:, 1], torch.linspace(0, 1, 5))


def test_the_length_is_that_of_gaussians(monkeypatch):
    """By short steps, as long ones undervalue skewed weights.

    From N(0, 1) to N(0, 1) N(v; h, s²) the length is ∫ sd_β[log N(v; h, s²)] dβ, in closed form.

    The density f_β has precision 1 + β/s² and mean βv/s² over that; the variance of
    −(v − h)²/2s² under N(m, c) is (2c² + 4c (v − m)²) / 4s⁴.
    """
    monkeypatch.setattr(tempering, "_LEAST_SHARE", 0.97)
    v, s = torch.full((50,), 1.5), 0.5

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(torch.zeros_like(v), 1.0))
            pyro.sample("v", dist.Normal(h, s), obs=v)

    densities = prepare(model, None, (v,)).densities[0]
    method = vh.AnnealedImportanceSampling(256, start=vh.PriorStart())
    path = method._length(densities, match_start(densities, 1.0), 10)
    length = path.lengths[-1].mean()
    beta = torch.linspace(0, 1, 2001)
    c = 1 / (1 + beta / s**2)
    m = c * beta * 1.5 / s**2
    exact = torch.trapezoid(((2 * c**2 + 4 * c * (1.5 - m) ** 2) / (4 * s**4)).sqrt(), beta)
    assert abs(float(length / exact) - 1) < 0.1, (float(length), float(exact))


def test_an_adaptive_schedule_beats_a_linear_one_from_the_prior():
    densities = densities_of(correlated(5, 0.5, num_units=400))
    start = match_start(densities, 1.0)
    linear, adaptive = (
        vh.AnnealedImportanceSampling(
            16, num_steps=8, start=vh.PriorStart(), schedule=schedule
        ).run(densities, start=start)
        for schedule in (vh.LinearSchedule(), vh.AdaptiveSchedule())
    )
    assert float(unit_widths(adaptive).mean()) < 0.9 * float(unit_widths(linear).mean())


def test_the_last_move_leaves_weights_as_they_are():
    densities = densities_of(linear_gaussian(num_units=20))
    start = match_start(densities, 0.05)
    plan, _ = vh.AnnealedImportanceSampling(num_steps=3).pilot(densities, start)
    latents = start.sample(densities, 8)
    ends = []
    for step_sizes in (plan.step_sizes, plan.step_sizes[:2]):
        torch.manual_seed(1)
        ends.append(anneal_forward(plan._replace(step_sizes=step_sizes), latents))
    moved, stayed = ends
    assert torch.equal(moved.log_weights, stayed.log_weights)
    assert not torch.equal(moved.latents, stayed.latents)


def test_few_temperatures_are_placed_without_measuring(monkeypatch):
    """Units that need more have their path measured then."""
    measured, original = [], annealing.measure_length

    def spy(moves, num_particles):
        measured.append(moves.densities.num_units)
        return original(moves, num_particles)

    monkeypatch.setattr(annealing, "measure_length", spy)
    model, noise = mixed()
    densities = prepare(model, None, (noise,)).densities[0]
    vh.AnnealedImportanceSampling(8, num_steps=3).run(densities)
    assert measured == []
    vh.AnnealedImportanceSampling(8, num_steps=1, target_width=0.3, max_steps=4).run(densities)
    assert len(measured) == 1 and 0 < measured[0] < 40


def mixed():
    """Units of two kinds in turn: an easy posterior, and a narrow one of many dimensions."""
    noise = torch.tensor([1.0, 0.03]).repeat(20)

    def model(noise):
        with pyro.plate("units", len(noise)):
            h = pyro.sample("h", dist.Normal(noise.new_zeros(6), 1.0).to_event(1))
            scale = noise[..., None]
            pyro.sample("v", dist.Normal(h.square(), scale).to_event(1), obs=0.5 + 0 * h.detach())

    return model, noise


@pytest.mark.filterwarnings("ignore::pyro_vharm.UncompiledWarning")
def test_each_unit_gets_the_temperatures_it_needs():
    model, noise = mixed()
    densities = prepare(model, None, (noise,)).densities[0]
    method = vh.AnnealedImportanceSampling(8, num_steps=2, target_width=0.3, max_steps=16)
    run = method.run(densities)
    easy, hard = run.num_steps[0::2], run.num_steps[1::2]
    assert float(easy.mean()) < float(hard.mean())
    assert float(run.num_steps.max()) <= 16
    assert run.log_weights.shape == (8, 40)


def test_budgets_keep_the_estimate_unbiased():
    """The pilot decides on other random numbers; weights that decide about themselves do not."""
    case = linear_gaussian(repeat=3000)
    densities = densities_of(case)
    options = {"start": vh.MatchedStart(0.5, refit=False), "kernel": vh.HamiltonianKernel(1)}
    method = vh.AnnealedImportanceSampling(
        4, num_steps=1, target_width=0.15, max_steps=4, num_settling=1, **options
    )
    run = method.run(densities)
    assert len(run.num_steps.unique()) > 1, "budgets differ"
    assert_mean((log_mean_exp(run.log_weights) - case.exact).exp(), 1.0)

    short = dataclasses.replace(method, target_width=None).run(densities)
    longer = dataclasses.replace(method, target_width=None, num_steps=4).run(densities)
    better = torch.maximum(log_mean_exp(short.log_weights), log_mean_exp(longer.log_weights))
    assert rejects((better - case.exact).exp(), 1.0), "a wrong twin: keeping what looks better"


def test_blocks_of_units_change_nothing_but_the_noise(monkeypatch):
    case = linear_gaussian(num_units=400)
    densities = densities_of(case)
    monkeypatch.setattr(annealing, "_ROWS_AT_ONCE", 16 * 150)
    method = vh.AnnealedImportanceSampling(
        num_steps=5, start=vh.MatchedStart(refit=False), kernel=vh.HamiltonianKernel(2)
    )
    run = method.run(densities)
    assert run.log_weights.shape == (16, 400) and run.unconstrained.shape == (16, 400, 2)
    assert_mean((log_mean_exp(run.log_weights) - case.exact).exp(), 1.0)
    shuffled = linear_gaussian(num_units=400)
    shuffled.data[0].copy_(case.data[0].flip(0))
    flipped = method.run(densities_of(shuffled))
    found = log_mean_exp(flipped.log_weights)
    assert_mean((found - case.exact.flip(0)).exp(), 1.0)
    apart, misplaced = (found - case.exact.flip(0)).std(), (found - case.exact).std()
    assert float(apart) < 0.2 * float(misplaced), "units are put back where they belong"


def test_units_are_cut_only_where_that_changes_nothing():
    densities = densities_of(linear_gaussian(num_units=50))
    latents = densities.draw_latents(3)
    for units, block in unit_blocks(densities, 20):
        assert 15 < len(units) < 20 + 1 and block.num_units == len(units)
        assert torch.allclose(
            block.log_joint(latents[:, units]), densities.log_joint(latents)[:, units]
        )
    select = unit_selector(densities)
    some = torch.tensor([7, 3, 3, 49])
    assert torch.allclose(
        select(some).log_joint(latents[:, some]), densities.log_joint(latents)[:, some]
    )

    v = torch.linspace(-1, 1, 50)

    def by_size(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0 * v, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0 + 1.0 / len(v)), obs=v)

    def neighbours(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0 * v, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0 + v.roll(1).square()), obs=v)

    def closed_over(w):
        with pyro.plate("units", 50):
            h = pyro.sample("h", dist.Normal(0 * v, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    for model in (by_size, neighbours, closed_over):
        assert unit_selector(prepare(model, None, (v,)).densities[0]) is None
        blocks = list(unit_blocks(prepare(model, None, (v,)).densities[0], 20))
        assert len(blocks) == 1 and blocks[0][1].num_units == 50


def test_from_the_prior_no_guide_is_needed():
    case = two_modes()
    method = vh.AnnealedImportanceSampling(64, num_steps=40, start=vh.PriorStart())
    evidence = vh.log_evidence(
        case.model, case.data, guide=case.guide, method=method, progress=False
    )
    error = (evidence.per_unit.values - case.exact).abs()
    assert bool((error < 5 * evidence.per_unit.errors).all())
