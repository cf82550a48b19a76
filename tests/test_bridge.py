"""Bridge sampling: exact cases, its standard error, wrong twins, and mass that chains miss."""

import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.inference.bridge import build_bridge
from tests.statistics import assert_mean, rejects
from tests.zoo import linear_gaussian
from tests.zoo.hard import correlated, eight_schools, far_modes, funnel, uniform_binomial

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
BRIDGE = vh.BridgeSampling(vh.HamiltonianMonteCarlo(num_draws=100, num_warmup=100))


def evidence_of(case, method=BRIDGE, **options):
    options = {"guide": case.guide, "method": method, "progress": False} | options
    return vh.log_evidence(case.model, case.data, **options)


@pytest.mark.parametrize(
    "make",
    [
        linear_gaussian,
        uniform_binomial,
        pytest.param(lambda: correlated(20, 0.9), marks=pytest.mark.slow),
        lambda: eight_schools(False),
    ],
    ids=["linear Gaussian", "beta-binomial", "correlated in 20", "eight schools"],
)
def test_exact_cases(make):
    case = make()
    evidence = evidence_of(case, confirmation=None)
    error = (evidence.per_unit.values - case.exact).abs()
    assert bool((error < 5 * evidence.per_unit.errors).all()), (error, evidence.per_unit.errors)
    assert float(evidence.per_unit.errors.max()) < 0.2
    assert evidence.lower().kind is vh.Kind.CONDITIONAL
    assert evidence.lower().value < evidence.per_unit.total().value < evidence.upper().value
    assert "R̂" in str(evidence)


def gaussian_ratios(num_units, shift=0.4, wide=1.3):
    """Log N(0, 1) e^2 / N(shift, wide²) at draws of either."""
    target, proposal = dist.Normal(0.0, 1.0), dist.Normal(shift, wide)
    posterior, drawn = torch.randn(4, 100, num_units), shift + wide * torch.randn(800, num_units)
    return [2.0 + target.log_prob(h) - proposal.log_prob(h) for h in (posterior, drawn)]


def test_the_standard_error_is_the_spread_over_repetitions():
    found = build_bridge(*gaussian_ratios(1000))
    assert_mean(found.log_evidence, 2.0)
    assert float(found.log_evidence.std()) == pytest.approx(float(found.error.mean()), rel=0.15)
    posterior, drawn = gaussian_ratios(1000)
    assert rejects(build_bridge(posterior + 0.05, drawn + 0.05).log_evidence, 2.0)
    assert rejects(build_bridge(posterior, drawn[:400] + 0.1).log_evidence, 2.0)


def test_proposals_without_density_lower_the_estimate_by_their_share():
    posterior, drawn = gaussian_ratios(1000, shift=0.0, wide=1.0)
    half = drawn.clone()
    half[::2] = -torch.inf
    found = build_bridge(posterior, half)
    # half of the proposals lie where the target is nothing: q is twice as wide in mass
    assert float(found.log_evidence.mean()) == pytest.approx(2.0 - 0.6931, abs=0.05)


@pytest.mark.parametrize(
    "make",
    [
        lambda: far_modes(2),
        pytest.param(lambda: far_modes(5), marks=pytest.mark.slow),
        pytest.param(lambda: far_modes(20), marks=pytest.mark.slow),
        pytest.param(funnel, marks=pytest.mark.slow),
    ],
    ids=["far modes in 2", "far modes in 5", "far modes in 20", "funnel"],
)
def test_mass_that_the_chains_miss_is_not_a_clean_bill(make):
    case = make()
    evidence = evidence_of(case)
    total = evidence.per_unit.total()
    off = abs(total.value - float(case.exact.sum())) > 5 * total.mc_error
    assert evidence.standing != "confirmed" or not off, str(evidence)


def test_what_bridge_sampling_refuses():
    for options, message in [
        ({"draws": 3}, "HamiltonianMonteCarlo"),
        ({"draws": vh.HamiltonianMonteCarlo(num_draws=10)}, "16 draws"),
        ({"num_proposals": 1}, "num_proposals"),
        ({"prior_share": 1.0}, "prior_share"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_iterations": 0}, "max_iterations"),
    ]:
        with pytest.raises(vh.InputError, match=message):
            vh.BridgeSampling(**options)
    draws = vh.HamiltonianMonteCarlo(num_draws=16, num_warmup=20)
    short = vh.BridgeSampling(draws, max_iterations=1, num_proposals=100)
    evidence = evidence_of(linear_gaussian(), short, confirmation=None)
    assert evidence.standing == "doubtful", "no root, no finite error"
