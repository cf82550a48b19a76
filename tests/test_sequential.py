"""Sequential Monte Carlo: resampling, groups, and the evidence when nothing is resampled."""

import dataclasses

import pytest
import torch
from scipy.stats import t as student

import pyro_vharm as vh
from pyro_vharm.inference.sequential import run_sequence
from pyro_vharm.inference.start import match_start
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import log_mean_exp, systematic_resample
from tests.statistics import NUM_COMPARISONS, SUITE_FAILURE_RATE, assert_mean, rejects
from tests.zoo import linear_gaussian

SMC = vh.SequentialMonteCarlo(16, num_groups=2, num_sweeps=1, kernel=vh.HamiltonianKernel(2))


@pytest.fixture
def replicated():
    case = linear_gaussian(repeat=2000)
    return prepare(case.model, case.guide, case.data).densities[0], case.exact


@pytest.mark.parametrize("least_share", [0.0, 0.5, 1.0], ids=["never", "at times", "always"])
def test_the_evidence_is_right_however_often_it_resamples(replicated, least_share):
    densities, exact = replicated
    run = dataclasses.replace(SMC, least_share=least_share).run(densities)
    assert_mean((log_mean_exp(run.log_weights) - exact).exp(), 1.0)
    groups = run.independent_log_weights
    assert groups.shape == (2, 2000)
    assert torch.allclose(log_mean_exp(groups), log_mean_exp(run.log_weights))
    if least_share == 1.0:
        assert float(run.log_weights.unflatten(0, (2, 8)).var(1).max()) < 1e-20, "equal weights"


def test_wrong_twins_are_rejected(replicated):
    """Evidence lost at resampling, as when the largest weight is subtracted and forgotten."""
    densities, exact = replicated
    plan = SMC.pilot(densities, match_start(densities, 1.0))
    latents = plan.moves.start.sample(densities, 16)
    ended = run_sequence(plan, latents, 8, 0.5, 1)
    forgotten = ended.log_weights - ended.log_weights.amax(0)
    assert rejects((log_mean_exp(forgotten) - exact).exp(), 1.0)
    elsewhere = match_start(densities, 0.05).sample(densities, 16)
    assert rejects(
        (log_mean_exp(run_sequence(plan, elsewhere, 8, 0.5, 1).log_weights) - exact).exp(), 1.0
    )


def test_groups_do_not_mix(replicated):
    """A group that starts in a place of no mass stays of no weight."""
    densities, _ = replicated
    plan = SMC.pilot(densities, match_start(densities, 1.0))
    latents = plan.moves.start.sample(densities, 16)
    latents[:8] = 1e3
    stuck = plan._replace(step_sizes=0 * plan.step_sizes)
    ended = run_sequence(stuck, latents, 8, 0.5, 1)
    assert torch.allclose(ended.latents[:8], torch.tensor(1e3), rtol=1e-12)
    assert bool((ended.latents[8:] < 999.0).all())


def test_systematic_resampling_is_unbiased_and_even():
    torch.manual_seed(0)
    log_weights = torch.tensor([0.13, 0.45, 0.2, 0.22]).log()[:, None].expand(4, 50000)
    index = systematic_resample(log_weights)
    counts = torch.stack([(index == p).sum(0).double() for p in range(4)], 1)
    assert_mean(counts / 4, torch.tensor([0.13, 0.45, 0.2, 0.22]))
    expected = 4 * torch.tensor([0.13, 0.45, 0.2, 0.22])
    assert bool(((counts - expected).abs() < 1).all())


def test_without_finite_weights_every_particle_stays():
    index = systematic_resample(torch.full((5, 2), -torch.inf))
    assert torch.equal(index, torch.arange(5)[:, None].expand(5, 2))


def test_from_a_matched_start():
    case = linear_gaussian()
    method = vh.SequentialMonteCarlo(num_groups=16, start=vh.MatchedStart())
    evidence = vh.log_evidence(
        case.model, case.data, guide=case.guide, method=method, progress=False
    )
    off = (evidence.per_unit.values - case.exact).abs() / evidence.per_unit.errors
    assert float(off.max()) < student.isf(SUITE_FAILURE_RATE / NUM_COMPARISONS / len(off) / 2, 15)
    assert "temperatures" in str(evidence) and evidence.upper() is None
