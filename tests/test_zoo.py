"""The laws of densities and ELBOs over every model of the zoo, with its own guide."""

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

import pyro_vharm as vh
from pyro_vharm.learning.refit import elbo_over_batches
from pyro_vharm.model.compilation import compiled, eager, traced
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.vectorising import by_loop, by_plate, by_vmap
from tests.statistics import Z, assert_mean, rejects
from tests.zoo import ONE_DRAW_AT_A_TIME, ZOO, two_modes

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
ANNEALED = vh.AnnealedImportanceSampling(num_particles=32, num_steps=20)


@pytest.fixture(params=ZOO, ids=lambda make: make.__name__)
def make(request):
    return request.param


def prepared(make):
    case = make()
    return case, prepare(case.model, case.guide, case.data)


def value_and_gradient(densities, latents):
    if densities.dim == 0:
        return densities.log_joint(latents), latents
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_()
        value = densities.log_joint(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def test_units_are_those_of_the_plate(make):
    case, problem = prepared(make)
    assert problem.layout.plate == case.unit_plate
    assert problem.num_units == len(case.exact)
    structure = problem.densities[0].structure
    assert structure.model_runs is (by_vmap if make in ONE_DRAW_AT_A_TIME else by_plate)


def test_weights_of_guide_draws_have_the_evidence_as_their_mean(make):
    if make is two_modes:
        pytest.skip("its guide knows one of two modes")
    case, problem = prepared(make)
    count = 300 if make in ONE_DRAW_AT_A_TIME else 4000
    with torch.no_grad():
        draws = [densities.draw_guide(count).log_weights for densities in problem.densities]
    ratio = (torch.cat(draws, 1) - case.exact).exp()
    if problem.densities[0].dim == 0 and not problem.densities[0].structure.guided:
        assert torch.allclose(ratio, torch.ones(()), rtol=1e-9)
    else:
        assert_mean(ratio, 1.0)
        assert rejects(2 * ratio, 1.0), "the test has no power"


def test_the_sum_over_units_is_pyros_elbo(make):
    """In expectation, and up to the scale that Pyro's objective puts on it."""
    case, problem = prepared(make)
    structure = problem.densities[0].structure
    ours = elbo_over_batches(problem, 1000).total()
    kind = TraceEnum_ELBO if structure.unguided else Trace_ELBO
    pyros = kind(max_plate_nesting=structure.layout.max_plate_nesting)
    count = 20 if problem.densities[0].dim == 0 else 200
    losses = [pyros.loss(case.model, case.guide, *case.data) for _ in range(count)]
    scale = {"minibatch": 5.0, "scaled": 0.4}.get(make.__name__, 1.0)
    theirs = -torch.tensor(losses, dtype=torch.float64) / scale
    error = torch.hypot(theirs.std() / count**0.5, torch.tensor(ours.mc_error))
    assert float((theirs.mean() - ours.value).abs()) < Z * float(error) + 1e-9 * abs(ours.value)


def test_law_5_looped_vectorised_and_traced_densities_are_the_same(make):
    _, problem = prepared(make)
    densities = problem.densities[-1]
    with torch.no_grad():
        latents = densities.draw_latents(3)
        expected = densities.plain_log_joint(latents)
    found = traced(value_and_gradient, densities, (latents,))(latents)
    value, gradient = eager(value_and_gradient, densities)(latents)
    tolerance = 1e3 * torch.finfo(densities.dtype).eps
    assert torch.allclose(value, expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(found[0], value, rtol=tolerance, atol=tolerance)
    assert torch.allclose(found[1], gradient, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_law_5_compiled_densities_are_the_same(make):
    _, problem = prepared(make)
    densities = problem.densities[-1]
    with torch.no_grad():
        latents = densities.draw_latents(3)
    expected = eager(value_and_gradient, densities)(latents)
    found = compiled(value_and_gradient, densities, (latents,))(latents)
    tolerance = 1e4 * torch.finfo(densities.dtype).eps
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def small(make):
    case, problem = prepared(make)
    return case, problem.densities[0].dim <= 2


def test_evidence_by_the_method_of_choice_is_exact(make):
    case, is_small = small(make)
    if not is_small:
        pytest.skip("by annealing, in the slow sweep")
    evidence = vh.log_evidence(case.model, case.data, guide=case.guide, progress=False)
    units = evidence.per_unit
    slack = 1e-4 if units.values.dtype == torch.float32 else 1e-8
    assert bool(((units.values - case.exact).abs() <= units.errors + slack).all())


@pytest.mark.slow
def test_evidence_by_annealing_is_exact(make):
    case, problem = prepared(make)
    if problem.densities[0].dim == 0:
        pytest.skip("exact by enumeration")
    evidence = vh.log_evidence(
        case.model, case.data, guide=case.guide, method=ANNEALED, progress=False
    )
    exact = float(case.exact.sum())
    assert evidence.lower(1e-4).value < exact < evidence.upper(1e-4).value
    total = evidence.per_unit.total()
    assert abs(total.value - exact) < Z * total.mc_error + 1e-4


def test_looping_is_right_where_vmap_fails():
    """A decoder that looks at values: no plate, no vmap, so a loop, and it says so."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", pyro.distributions.Normal(v.new_zeros(()), 1.0))
            scale = 1.0 if float(h.detach().sum()) < 1e9 else 2.0
            flat = torch.stack([h[i] for i in range(len(v))])
            pyro.sample("v", pyro.distributions.Normal(flat, scale), obs=v)

    v = torch.tensor([0.5, -1.0, 2.0])
    with pytest.warns(vh.LoopedRunsWarning, match="the model runs one particle at a time"):
        problem = prepare(model, None, (v,))
    densities = problem.densities[0]
    assert densities.structure.model_runs is by_loop
    h = torch.randn(4, 3, 1)
    normal = pyro.distributions.Normal
    expected = normal(0.0, 1.0).log_prob(h[..., 0]) + normal(h[..., 0], 1.0).log_prob(v)
    assert torch.allclose(densities.log_joint(h), expected)
