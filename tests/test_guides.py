"""Pyro's own guides, easy guides and flows: their ELBO, their evidence, or why there is none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoDiscreteParallel,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)

import pyro_vharm as vh
from pyro_vharm.learning.refit import elbo_over_batches
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.sites import is_discrete, latent_sites
from pyro_vharm.model.structure import GuideDensity
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from tests.learners import importance_weighted
from tests.statistics import Z
from tests.zoo import ZOO, linear_gaussian

pytestmark = pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
QUICK = vh.Refit(num_steps=40, num_particles=100)


def low_rank(model):
    return AutoLowRankMultivariateNormal(model, rank=1)


def autoregressive(model):
    return AutoIAFNormal(model, hidden_dim=[16])


PER_UNIT = (AutoNormal,)
IN_TOTAL = (
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    low_rank,
    autoregressive,
    AutoStructured,
    AutoGaussian,
)


def sites(case):
    found = latent_sites(poutine.trace(case.model).get_trace(*case.data))
    return [s["name"] for s in found if not is_discrete(s)], [
        s["name"] for s in found if is_discrete(s)
    ]


def ready(make_guide, case, hide=()):
    guide = make_guide(poutine.block(case.model, hide=list(hide)) if hide else case.model)
    guide(*case.data)
    return guide


def assert_pyros_elbo(case, guide, kind=Trace_ELBO):
    problem = prepare(case.model, guide, case.data)
    ours = elbo_over_batches(problem, 1000).total()
    assert ours.num_units == problem.num_units
    pyros = kind(max_plate_nesting=problem.layout.max_plate_nesting)
    losses = [pyros.loss(case.model, guide, *case.data) for _ in range(200)]
    theirs = -torch.tensor(losses, dtype=torch.float64)
    error = torch.hypot(theirs.std() / len(theirs) ** 0.5, torch.tensor(ours.mc_error))
    assert float((theirs.mean() - ours.value).abs()) < Z * float(error) + 1e-9 * abs(ours.value)
    return problem


@pytest.mark.parametrize("make_guide", [*PER_UNIT, *IN_TOTAL])
def test_autoguides_have_pyros_elbo_and_lead_to_the_evidence(make_guide):
    case = linear_gaussian()
    problem = assert_pyros_elbo(case, guide := ready(make_guide, case))
    per_unit = make_guide in PER_UNIT
    assert problem.densities[0].structure.guide_density is (
        GuideDensity.PER_UNIT if per_unit else GuideDensity.TOTAL
    )
    gap = vh.inference_gap(case.model, guide, case.data, refit=QUICK, progress=False)
    assert (gap.evidence.per_unit.values - case.exact).abs().max() < 1e-6
    assert gap.elbo.units_each == (1 if per_unit else len(case.exact))
    assert gap.gap.total().num_units == len(case.exact)
    assert gap.gap.total().value > 0
    difference = gap.approximation.total().value + gap.amortization.total().value
    assert difference == pytest.approx(gap.gap.total().value, abs=1e-8)
    assert "5 units" in str(gap.evidence)


@pytest.mark.parametrize("make_guide", [*PER_UNIT, *IN_TOTAL])
def test_gradients_for_autoguides_are_those_of_pyros_elbo(make_guide):
    """Also where latents are computed from draws by a function with parameters of its own."""
    case = linear_gaussian(num_units=3)
    guide = ready(make_guide, case)
    problem = prepare(case.model, guide, case.data)
    phi = problem.guide_parameters
    leaves = phi.trainable()

    def flat(loss):
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)
        ]
        return torch.cat([g.reshape(-1) for g in filled])

    def ours():
        bound = importance_weighted_bound(problem.densities[0], 1, 100)
        return flat(-bound.loss)

    pyros = Trace_ELBO(num_particles=10)
    mine = torch.stack([ours() for _ in range(60)])
    theirs = torch.stack(
        [flat(-pyros.differentiable_loss(case.model, guide, *case.data)) for _ in range(40)]
    )
    error = torch.hypot(mine.std(0) / 60**0.5, theirs.std(0) / 40**0.5) + 1e-9
    assert float(((mine.mean(0) - theirs.mean(0)).abs() / error).max()) < Z


def test_a_guide_known_in_total_only_takes_all_units_in_one_call():
    case = linear_gaussian(num_units=6)
    (v,) = case.data
    guide = AutoMultivariateNormal(case.model)
    guide(v[:3])
    with pytest.raises(vh.InputError, match="draws the latents of all units as one"):
        vh.inference_gap(case.model, guide, [v[:3], v[3:]], progress=False)


def test_an_importance_weighted_bound_in_total_trains_a_joint_guide():
    case = linear_gaussian()
    guide = AutoMultivariateNormal(case.model)
    loss = vh.ImportanceWeightedELBO(num_particles=4)
    svi = SVI(case.model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    for _ in range(300):
        svi.step(*case.data)
    bounds = torch.tensor([-loss.loss(case.model, guide, *case.data) for _ in range(200)])
    exact = float(case.exact.sum())
    assert float(bounds.mean()) < exact + Z * float(bounds.std()) / len(bounds) ** 0.5
    assert float(bounds.mean()) > exact - 0.3


@pytest.mark.parametrize("make_guide", [AutoDelta, AutoLaplaceApproximation])
def test_point_masses_have_harm_and_no_gap(make_guide):
    """The harm is that of the parameters alone; the exact evidence of both ends is known."""
    v = torch.tensor([0.5, -1.5, 2.5, 3.0])

    def model(v):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), scale))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    guide = make_guide(model)
    guide(v)
    better = float((v.square().mean() - 1.0) ** 0.5)
    harm = vh.learning_harm(
        model, guide, (v,), reference={"scale": better}, refit=QUICK, progress=False
    )

    def evidence(scale):
        return float(dist.Normal(0.0, (1 + scale**2) ** 0.5).log_prob(v).sum())

    assert harm.harm.value == pytest.approx(evidence(better) - evidence(0.5), abs=1e-5)
    assert harm.learned.gap is None and harm.excess is None and harm.excess_retrained is None
    assert "unknown" in str(harm)
    assert "elbo" not in vh.to_datatree(harm)["units"]
    options = {"guide": guide, "start": "current", "progress": False}
    with pytest.raises(vh.InputError, match=r"point masses \(Delta\), so ImportanceWeightedELBO"):
        vh.learn_reference(model, (v,), learner=importance_weighted(), **options)
    exact = vh.learn_reference(model, (v,), **options)  # needs no density of the guide
    assert float(exact.parameters["scale"]) == pytest.approx(better, rel=0.01)
    density = AutoNormal(model)
    density(v)
    learner = importance_weighted(num_steps=20, guide_steps=5)
    reference = vh.learn_reference(model, (v,), guide=density, learner=learner, progress=False)
    again = vh.learning_harm(model, guide, (v,), reference=reference, refit=QUICK, progress=False)
    assert again.harm.value >= -1e-6


def test_after_laplace_there_is_a_density():
    case = linear_gaussian()
    laplace = AutoLaplaceApproximation(case.model)
    svi = SVI(case.model, laplace, pyro.optim.Adam({"lr": 0.05}), loss=Trace_ELBO())
    for _ in range(300):
        svi.step(*case.data)
    guide = laplace.laplace_approximation(*case.data)
    gap = vh.inference_gap(case.model, guide, case.data, refit=QUICK, progress=False)
    assert abs(gap.gap.total().value) < 0.05, "the posterior is Gaussian"
    assert gap.approximation is None, "this guide has no parameters to fit"


def mixture(v):
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Categorical(v.new_tensor([0.2, 0.5, 0.3])))
        h = pyro.sample("h", dist.Normal(v.new_tensor([-1.0, 0.5, 2.0])[z], 0.7))
        pyro.sample("v", dist.Normal(h, 0.5), obs=v)


def mixture_evidence(v):
    means, weights = v.new_tensor([-1.0, 0.5, 2.0]), v.new_tensor([0.2, 0.5, 0.3])
    parts = dist.Normal(means, (0.7**2 + 0.5**2) ** 0.5).log_prob(v[:, None])
    return (parts + weights.log()).logsumexp(-1)


@pytest.mark.parametrize("discrete", ["guided", "left out"])
def test_discrete_latents_with_and_without_a_guide_site(discrete):
    """Summed out in the evidence either way; in the ELBO only where the guide leaves them out."""
    v = torch.tensor([0.3, -1.2, 2.4])
    guide = AutoGuideList(mixture)
    guide.append(AutoNormal(poutine.block(mixture, expose=["h"])))
    if discrete == "guided":
        guide.append(AutoDiscreteParallel(poutine.block(mixture, expose=["z"])))
    guide(v)
    problem = prepare(mixture, guide, (v,))
    assert problem.densities[0].structure.guided == ({"z"} if discrete == "guided" else set())
    gap = vh.inference_gap(mixture, guide, (v,), refit=QUICK, progress=False)
    assert (gap.evidence.per_unit.values - mixture_evidence(v)).abs().max() < 1e-5
    marked = pyro.infer.config_enumerate(mixture, "parallel")
    pyros = TraceEnum_ELBO(max_plate_nesting=1)
    losses = torch.tensor([-pyros.loss(marked, guide, v) for _ in range(300)])
    ours = elbo_over_batches(problem, 4000).total()
    error = torch.hypot(losses.std() / 300**0.5, torch.tensor(ours.mc_error))
    assert float((losses.mean() - ours.value).abs()) < Z * float(error)
    assert (gap.approximation is None) == (discrete == "guided")


def test_easy_guides_are_evaluated_per_unit():
    case = linear_gaussian()

    @easy_guide(case.model)
    def guide(self, v):
        with self.plate("units", len(v)):
            group = self.group(match="h")
            loc = pyro.param("loc", 0.3 * v[:, :2])
            group.sample("joint", dist.Normal(loc, 0.7).to_event(1))

    guide(*case.data)
    problem = assert_pyros_elbo(case, guide)
    assert problem.densities[0].structure.guide_density is GuideDensity.PER_UNIT


def test_easy_guides_with_a_map_estimate_take_it_as_a_parameter():
    v = torch.tensor([0.5, -1.0, 2.0])

    def model(v):
        level = pyro.sample("level", dist.Normal(v.new_zeros(()), 2.0))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(level, 1.0))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    @easy_guide(model)
    def guide(self, v):
        self.map_estimate("level")
        with self.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v, 0.5))

    guide(v)
    evidence = vh.log_evidence(model, (v,), guide=guide, parameters=["level"], progress=False)
    (name,) = pyro.get_param_store().keys()
    level = pyro.param(name).detach()
    exact = dist.Normal(level, 1.25**0.5).log_prob(v).sum() + dist.Normal(0.0, 2.0).log_prob(level)
    assert evidence.per_unit.total().value == pytest.approx(float(exact), abs=1e-6)


def test_flows_through_zuko():
    zuko = pytest.importorskip("zuko")
    from pyro.contrib.zuko import ZukoToPyro  # noqa: PLC0415

    pyro.enable_validation(True)  # importing zuko takes it off
    case = linear_gaussian()
    torch.manual_seed(0)
    flow = zuko.flows.MAF(features=2, context=3, transforms=1, hidden_features=(8,)).double()

    def guide(v):
        pyro.module("flow", flow)
        with pyro.plate("units", len(v)):
            pyro.sample("h", ZukoToPyro(flow(v)))

    problem = assert_pyros_elbo(case, guide)
    assert problem.densities[0].structure.guide_density is GuideDensity.PER_UNIT
    gap = vh.inference_gap(case.model, guide, case.data, refit=QUICK, progress=False)
    assert gap.approximation is None, "a flow has no arguments to free"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make_guide", [*PER_UNIT, *IN_TOTAL])
@pytest.mark.parametrize("make", ZOO, ids=lambda make: make.__name__)
def test_every_autoguide_on_every_model(make, make_guide):
    case = make()
    continuous, discrete = sites(case)
    if not continuous:
        pytest.skip("there is nothing for the guide to do")
    try:
        guide = ready(make_guide, case, discrete)
    except RuntimeError as error:
        pytest.skip(f"Pyro cannot make this guide: {error}")
    marked = pyro.infer.config_enumerate(case.model, "parallel")
    case = type(case)(case.name, marked, guide, case.data, case.exact, case.unit_plate)
    if make.__name__ in ("missing_entries", "ragged_sequences"):
        pytest.skip("an unmasked guide of masked latents: Pyro's ELBO there is no bound")
    if make.__name__ == "dependent_interval":
        pytest.skip("Pyro's autoguides keep the support that they saw in their first run")
    if make.__name__ == "single_precision" and make_guide is autoregressive:
        pytest.skip("Pyro makes this guide's network in the default precision")
    if make.__name__ == "scaled":
        with pytest.raises(vh.InputError, match="scaled differently"):
            prepare(case.model, guide, case.data)
    elif make.__name__ == "minibatch" and make_guide is AutoNormal:
        with pytest.raises(vh.InputError, match="to which units the minibatch belongs"):
            prepare(case.model, guide, case.data)
    elif make.__name__ in ("minibatch", "subsampled_plate") and make_guide in IN_TOTAL:
        with pytest.raises(vh.InputError, match="but the plate is subsampled"):
            prepare(case.model, guide, case.data)
    else:
        assert_pyros_elbo(case, guide, TraceEnum_ELBO if discrete else Trace_ELBO)
