"""Evidence of exact cases, its bounds, and what it says of itself."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vharm import (
    AnnealedImportanceSampling,
    DefensiveMixture,
    HamiltonianKernel,
    ImportanceSampling,
    Kind,
    MatchedGaussian,
    MatchedStart,
    log_evidence,
)
from pyro_vharm.inference.gaussians import UnitGaussian, match_gaussian
from tests.statistics import Z
from tests.zoo import BASICS, LOADINGS, linear_gaussian, two_modes

ANNEALED = AnnealedImportanceSampling(
    num_particles=8, num_steps=3, kernel=HamiltonianKernel(num_leapfrog=2), num_settling=2
)


@pytest.mark.parametrize("make", BASICS)
def test_evidence_is_met_by_the_default_method(make):
    case = make()
    evidence = log_evidence(case.model, case.data, guide=case.guide, progress=False)
    error = (evidence.per_unit.values - case.exact).abs()
    if evidence.per_unit.kind is Kind.NUMERICAL:
        assert bool((error < evidence.per_unit.errors + 1e-9).all()), error
        assert float(error.max()) < 1e-5
    else:
        assert bool((error < Z * evidence.per_unit.errors).all())


@pytest.mark.parametrize("make", BASICS)
def test_the_sandwich_holds(make):
    case = make()
    options = {"guide": case.guide, "confirmation": None, "progress": False}
    options["method"] = AnnealedImportanceSampling(num_particles=32, num_steps=10)
    evidence = log_evidence(case.model, case.data, **options)
    lower, upper, exact = evidence.lower(), evidence.upper(), float(case.exact.sum())
    assert lower.kind is Kind.CERTIFIED and upper.kind is Kind.CONDITIONAL
    assert lower.value < exact
    if make.__name__ != "two_modes":  # there the chains need not have reached both modes
        assert exact < upper.value


def test_same_seed_same_numbers_and_batches_add_up():
    case = linear_gaussian()
    (v,) = case.data
    options = {"guide": case.guide, "method": ANNEALED, "confirmation": None, "progress": False}
    runs = [log_evidence(case.model, (v,), seed=s, **options) for s in (1, 1, 2)]
    values = [run.per_unit.values for run in runs]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    batched = log_evidence(case.model, list(v.split(2)), guide=case.guide, progress=False)
    whole = log_evidence(case.model, (v,), guide=case.guide, progress=False)
    assert torch.allclose(batched.per_unit.values, whole.per_unit.values)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_nonfinite_weight_counts_as_zero_and_is_reported():
    v = torch.tensor([0.3])

    def model(v):
        with pyro.plate("units", 1):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            loc = torch.where(h > 1.5, h * torch.nan, h)
            pyro.sample("v", dist.Normal(loc, 1.0, validate_args=False), obs=v)

    method = ImportanceSampling(num_particles=500, proposal=DefensiveMixture(0.5))
    evidence = log_evidence(model, (v,), method=method, progress=False)
    assert evidence.num_nonfinite > 0
    assert "not finite" in str(evidence)
    total = evidence.per_unit.total()
    assert total.value < float(dist.Normal(0.0, 2**0.5).log_prob(v)) + Z * total.mc_error


def test_matched_gaussians_keep_true_correlations_and_drop_noise():
    covariance = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    tril = torch.linalg.cholesky(covariance).expand(1, 2, 2)
    correlated = match_gaussian(UnitGaussian(torch.ones(1, 2), tril).sample(400))
    found = correlated.scale_tril @ correlated.scale_tril.mT
    assert abs(float(found[0, 0, 1] / found[0].diagonal().prod().sqrt()) - 0.95) < 0.03
    wide = UnitGaussian(torch.zeros(1, 60), torch.eye(60).expand(1, 60, 60))
    independent = match_gaussian(wide.sample(200))
    off = independent.scale_tril[0] - torch.diag(independent.scale_tril[0].diagonal())
    assert float(off.abs().max()) < 0.05


def test_no_finite_weight_at_all_is_a_bound_of_minus_infinity():
    v = torch.tensor([0.0, 50.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            wall = torch.where((h - v).abs() < 2.0, 0.0 * h, -torch.inf)
            pyro.factor("wall", wall)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v, 4.0))

    method = AnnealedImportanceSampling(2, num_steps=1, start=MatchedStart(0.0, refit=False))
    quick = {"confirmation": None, "progress": False}
    bounds = [
        log_evidence(model, (v,), guide=guide, method=method, seed=seed, **quick).lower()
        for seed in range(6)
    ]
    assert any(bound.value == -torch.inf for bound in bounds)


def test_single_precision_is_as_good_as_it_can_be():
    case = linear_gaussian()
    (v,) = case.data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.zoo.basics.LOADINGS", LOADINGS.float())
        evidence = log_evidence(case.model, (v.float(),), guide=case.guide, progress=False)
    assert evidence.per_unit.values.dtype == torch.float32
    error = (evidence.per_unit.values.double() - case.exact).abs()
    assert bool((error < evidence.per_unit.errors + 1e-5).all())
    assert evidence.num_particles <= 128**2, "rounding does not drive the grid to its limit"


@pytest.mark.slow
@pytest.mark.parametrize("make", BASICS)
@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_over_many_seeds(make, seed):
    case = make()
    method = AnnealedImportanceSampling(num_particles=16, num_steps=10)
    evidence = log_evidence(
        case.model, case.data, guide=case.guide, method=method, seed=seed, progress=False
    )
    exact = float(case.exact.sum())
    assert evidence.lower(1e-4).value < exact
    if make is not two_modes:
        assert exact < evidence.upper(1e-4).value


def test_law_5_centred_and_not_centred_models_have_the_same_evidence():
    v = torch.tensor([0.5, 3.0, -2.0])

    def centred(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_tensor(1.0), 2.0))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    def not_centred(v):
        with pyro.plate("units", len(v)):
            e = pyro.sample("e", dist.Normal(v.new_tensor(0.0), 1.0))
            pyro.sample("v", dist.Normal(1.0 + 2.0 * e, 0.5), obs=v)

    values = [log_evidence(m, (v,), progress=False).per_unit.values for m in (centred, not_centred)]
    assert torch.allclose(*values, atol=1e-9)
    scaled = log_evidence(pyro.poutine.scale(centred, scale=0.1), (v,), progress=False)
    assert torch.allclose(scaled.per_unit.values, values[0], atol=1e-9)


def test_importance_sampling_says_where_its_weights_are_too_heavy():
    """A start much narrower than the posterior: a wrong number, and not a clean bill."""
    case = linear_gaussian()
    method = ImportanceSampling(num_particles=2000)
    good = log_evidence(case.model, case.data, guide=case.guide, method=method, progress=False)
    assert float(good.pareto_shapes.max()) < 0.7 and good.standing == "confirmed"

    def narrow(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.new_zeros(2), 0.1).to_event(1))

    bare = ImportanceSampling(num_particles=2000, proposal=MatchedGaussian())
    quick = {"confirmation": None, "progress": False}
    bad = log_evidence(case.model, case.data, guide=narrow, method=bare, **quick)
    off = (bad.per_unit.values - case.exact).abs() > 4 * bad.per_unit.errors
    assert bool(off.any()), "the case is hard"
    assert bool((bad.pareto_shapes[off] > 0.7).all()) and "NOT TO BE TRUSTED" in str(bad)
