"""Everything runs where the model is: float32 on a GPU, against exact values or the CPU's."""

import dataclasses
import math
import shutil
from collections.abc import Mapping
from contextlib import contextmanager

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

import pyro_vharm as vh
from pyro_vharm.estimates import Estimate
from pyro_vharm.model import compilation
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.state import reachable_modules
from tests import zoo
from tests.statistics import SEED, Z
from tests.zoo.discrete import class_above_latent, gaussian_mixture
from tests.zoo.networks import multilayer_decoder
from tests.zoo.parameters import module_parameters

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is false"
)

DEVICE = torch.device("cuda")
CPU = torch.device("cpu")
ROUNDING = 1e-3  # nats in total, of float32
QUICK = vh.Refit(num_steps=15, num_particles=200)
BRIEF = vh.GuideTraining(20)
CHAINS = vh.HamiltonianMonteCarlo(num_chains=4, num_draws=50, num_warmup=40)
METHODS = {
    "auto": None,
    "annealing": vh.AnnealedImportanceSampling(64),
    "annealing to a width": vh.AnnealedImportanceSampling(32, num_steps=5, target_width=0.1),
    "sequential": vh.SequentialMonteCarlo(64, num_groups=8),
    "importance": vh.ImportanceSampling(),
    "importance, guide": vh.ImportanceSampling(proposal=vh.GuideProposal()),
    "importance, Gaussian": vh.ImportanceSampling(proposal=vh.MatchedGaussian()),
    "bridge": vh.BridgeSampling(draws=CHAINS),
    "quadrature": vh.Quadrature(),
}
LEARNERS = {
    "exact": vh.ExactLearner(guide_training=BRIEF),
    "EM": vh.ExpectationMaximization(5, guide_training=BRIEF),
    "gradient": vh.GradientLearner(
        num_steps=80, learning_rate=0.05, max_rounds=1, guide_training=BRIEF
    ),
    "climbing": vh.ClimbingLearner(
        (
            vh.GradientLearner(
                vh.AnnealedELBO(4, num_steps=2), num_steps=40, learning_rate=0.05, max_rounds=1
            ),
            vh.GradientLearner(
                vh.MarkovChainEM(4, chains=vh.PersistentChains(), steps_ahead=1),
                num_steps=5,
                max_rounds=1,
            ),
        ),
        guide_training=BRIEF,
    ),
}
BOUNDS = {
    "pathwise": vh.ImportanceWeightedELBO(8, gradient=vh.Pathwise()),
    "doubly reparameterised": vh.ImportanceWeightedELBO(8, num_replicates=2),
    "sticking the landing": vh.ImportanceWeightedELBO(gradient=vh.StickingTheLanding()),
    "annealed": vh.AnnealedELBO(4, num_steps=3),
    "exact": vh.ExactEvidence(),
    "chains of the guide": vh.MarkovChainEM(4, steps_ahead=1),
    "persistent chains": vh.MarkovChainEM(4, chains=vh.PersistentChains(), steps_ahead=1),
}


@pytest.fixture(autouse=True)
def single_precision(clean_state):
    """Exact values are found in double precision, before a case is moved."""
    torch.set_default_dtype(torch.float32)


def moved(make, device=None):
    """A case with its data and its modules in single precision on a device."""
    torch.set_default_dtype(torch.float64)
    case = make()
    torch.set_default_dtype(torch.float32)
    device = DEVICE if device is None else device
    for root in (*reachable_modules(case.model), *reachable_modules(case.guide)):
        root.to(device, torch.float32)
    return dataclasses.replace(case, data=tuple(x.to(device, torch.float32) for x in case.data))


def two_causes(v):
    """v | h ~ N(a (h₁ + h₂), 1), whose posterior no mean field holds."""
    a = pyro.param("a", v.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(a * h.sum(-1), 1.0), obs=v)


def mean_field(v):
    """The best of its family at a = 1."""
    slopes = pyro.param("slopes", v.new_full((2,), 1 / 3))
    scales = pyro.param("scales", v.new_full((2,), 0.5**0.5), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(v[:, None] * slopes, scales).to_event(1))


GAP = 0.5 * math.log(4 / 3)  # of `mean_field` in `two_causes` at a = 1, per unit


def causes(device=None, num_units=20):
    """Data of `two_causes` with a = 1.5, which is learned if a is free."""
    noise = torch.randn(num_units, generator=torch.Generator().manual_seed(SEED))
    return (noise * 5.5**0.5).to(DEVICE if device is None else device)


def evidence_of_causes(v, a):
    """Log evidence in total."""
    return float(dist.Normal(0.0, math.sqrt(1 + 2 * a**2)).log_prob(v.cpu()).sum())


def harm_of_causes(v):
    """That of a = 1."""
    best = math.sqrt(max(float(v.square().mean()) - 1, 0.0) / 2)
    return evidence_of_causes(v, best) - evidence_of_causes(v, 1.0)


def is_near(found, expected, error=0.0):
    """An estimate, and a number or another estimate."""
    if isinstance(expected, Estimate):
        expected, error = expected.value, expected.mc_error
    return abs(found.value - expected) < Z * math.hypot(found.mc_error, error) + ROUNDING


def tensors_of(result, path=""):
    """Every tensor of a result, with its place."""
    if isinstance(result, torch.Tensor):
        yield path, result
        return
    if dataclasses.is_dataclass(result):
        parts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    elif isinstance(result, Mapping):
        parts = result
    elif isinstance(result, tuple | list):
        parts = dict(enumerate(result))
    else:
        return
    for name, part in parts.items():
        if not str(name).startswith("_"):
            yield from tensors_of(part, f"{path}/{name}")


def kind(device):
    return torch.device(device).type


def is_at_home(result):
    """Results stay on the device, and what a history keeps is on the CPU."""
    places = [(path, tensor.device) for path, tensor in tensors_of(result)]
    assert places
    for path, device in places:
        wanted = CPU if "/checkpoints/" in path else DEVICE
        assert kind(device) == kind(wanted), path
    return True


def state(*functions):
    """Random numbers of every device, parameters and buffers."""
    found = dict(enumerate([torch.get_rng_state(), *torch.cuda.get_rng_state_all()]))
    found |= dict(pyro.get_param_store().named_parameters())
    for function in functions:
        for i, root in enumerate(reachable_modules(function)):
            named = (*root.named_parameters(), *root.named_buffers())
            found |= {(function, i, name): tensor for name, tensor in named}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@contextmanager
def left_alone(*functions):
    """Law 9: nothing is changed, nothing moves to another device."""
    before = state(*functions)
    yield
    after = state(*functions)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].device == tensor.device, name
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("name", METHODS)
def test_log_evidence_is_the_exact_one(name):
    case = moved(module_parameters if name == "auto" else zoo.linear_gaussian)
    with left_alone(case.model, case.guide):
        found = vh.log_evidence(
            case.model,
            case.data,
            guide=case.guide,
            method=METHODS[name],
            confirmation=vh.Confirmation(4) if name == "annealing" else None,
            seed=SEED,
            progress=False,
        )
    assert is_near(found.per_unit.total(), float(case.exact.sum()))
    assert is_at_home(found) and str(found)


def far_apart(v):
    """Two modes per unit, at ±4 in the first of six dims: evidence e^v."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(6), 5.0).to_event(1))
        mode = v.new_tensor([4.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        modes = [dist.Normal(at, 1.0).to_event(1).log_prob(h) for at in (mode, -mode)]
        prior = dist.Normal(v.new_zeros(6), 5.0).to_event(1).log_prob(h)
        pyro.factor(
            "v", torch.logaddexp(modes[0] - math.log(2), modes[1] - math.log(2)) - prior + v
        )


@pytest.mark.parametrize("name", ["annealing", "annealing to a width"])
def test_several_modes_keep_their_shares(name):
    v = torch.linspace(-1, 1, 30, device=DEVICE)
    with left_alone(far_apart):
        found = vh.log_evidence(
            far_apart, (v,), method=METHODS[name], confirmation=None, seed=SEED, progress=False
        )
    assert is_near(found.per_unit.total(), float(v.sum())) and is_at_home(found)
    assert float(found.widths.mean()) < 0.1, "an annealed mode that is lost costs 0.7"


@pytest.mark.parametrize("method", ["annealing", "quadrature"])
def test_log_evidence_of_an_autoencoder_is_the_exact_one(method):
    case = moved(multilayer_decoder)
    with left_alone(case.model, case.guide):
        found = vh.log_evidence(
            case.model,
            case.data,
            guide=case.guide,
            method=METHODS[method],
            confirmation=None,
            progress=False,
        )
    assert is_near(found.per_unit.total(), float(case.exact.sum()))
    assert is_at_home(found)


@pytest.mark.parametrize("guided", [True, False])
def test_enumeration_is_exact(guided):
    case = moved(gaussian_mixture)
    found = vh.log_evidence(
        case.model,
        case.data,
        guide=case.guide if guided else None,
        method=vh.Enumeration(),
        progress=False,
    )
    assert torch.allclose(found.per_unit.values.cpu(), case.exact.float(), atol=1e-5)
    assert is_at_home(found)


def test_a_discrete_latent_is_summed_out_beside_a_continuous_one():
    case = moved(class_above_latent)
    found = vh.log_evidence(case.model, case.data, guide=case.guide, progress=False)
    assert is_near(found.per_unit.total(), float(case.exact.sum()))
    assert is_at_home(found)


def test_blocks_of_many_units():
    """More units than run at once, so that they are cut, and some batches."""
    case = moved(lambda: zoo.linear_gaussian(1100))
    method = vh.AnnealedImportanceSampling(16, num_steps=4)
    whole, parts = (
        vh.log_evidence(
            case.model, data, guide=case.guide, method=method, confirmation=None, progress=False
        )
        for data in (case.data, [*case.data[0].split(600)])
    )
    for found in (whole, parts):
        assert is_near(found.per_unit.total(), float(case.exact.sum()))
        assert is_at_home(found)


def test_a_guide_without_sites_in_many_units():
    """An empty product has no device of its own."""
    case = moved(gaussian_mixture)
    data = (case.data[0].repeat(300),)
    gap = vh.inference_gap(case.model, case.guide, data, refit=QUICK, progress=False)
    assert abs(gap.gap.total().value) < 0.1
    objective = vh.ImportanceWeightedELBO(gradient=vh.Pathwise())
    loss = objective.loss(case.model, case.guide, *data)
    assert loss == pytest.approx(-300 * float(case.exact.sum()), rel=1e-5)


def test_bidirectional_bounds():
    case = moved(multilayer_decoder)
    data = (case.data[0].repeat(25, 1),)
    with left_alone(case.model, case.guide):
        found = vh.bdmc(case.model, data, guide=case.guide, seed=SEED, progress=False)
    error = float(found.widths.std()) / len(found.widths) ** 0.5
    assert -Z * error < float(found.widths.mean()) < 0.5
    assert is_at_home(found) and str(found)


def test_simulated_data():
    case = moved(multilayer_decoder)
    with left_alone(case.model):
        found = vh.simulate(case.model, case.data)
    assert is_at_home(found)


def test_the_gap_and_its_parts():
    v = causes()
    two_causes(v), mean_field(v)
    with left_alone():
        found = vh.inference_gap(
            two_causes,
            mean_field,
            (v,),
            refit=QUICK,
            families=[vh.MeanField(), vh.FullRank(), vh.Flow(2, num_layers=1)],
            progress=False,
        )
    assert is_near(found.evidence.per_unit.total(), evidence_of_causes(v, 1.0))
    assert is_near(found.gap.total(), 20 * GAP)
    assert is_near(found.approximation.total(), 20 * GAP, 0.02)
    assert found.family_gap("full rank").total().value < 0.2
    assert is_at_home(found) and str(found)


def test_the_gap_of_an_encoder_is_that_of_the_cpu():
    def gap(device):
        case = moved(multilayer_decoder, device)
        with left_alone(case.model, case.guide):
            return vh.inference_gap(
                case.model, case.guide, case.data, refit=QUICK, seed=SEED, progress=False
            )

    here, there = gap(DEVICE), gap(CPU)
    for name in ("gap", "approximation"):
        assert is_near(getattr(here, name).total(), getattr(there, name).total()), name
    assert is_at_home(here) and here.active_units.labels == there.active_units.labels


def test_local_harm():
    def measured(device):
        pyro.clear_param_store()
        v = causes(device)
        two_causes(v), mean_field(v)
        with left_alone():
            return v, vh.local_harm(two_causes, mean_field, (v,), num_em_steps=3, progress=False)

    (v, here), (_, there) = measured(DEVICE), measured(CPU)
    assert is_near(here.predicted, there.predicted, 0.05 * there.predicted.value)
    known = harm_of_causes(v)
    assert 0.5 * known < here.best.gain.value < known + ROUNDING + Z * here.best.gain.mc_error
    assert is_at_home(here) and str(here)


@pytest.mark.parametrize("learner", LEARNERS.values(), ids=LEARNERS)
def test_references_are_learned_and_taken_up_again(learner, tmp_path):
    v = causes()
    two_causes(v), mean_field(v)
    known = harm_of_causes(v)

    def learn():
        with left_alone():
            return vh.learn_reference(
                two_causes,
                (v,),
                guide=mean_field,
                learner=learner,
                heldout=(causes()[:5],),
                checkpoint=tmp_path,
                progress=False,
            )

    found, again = learn(), learn()
    assert known > 1 and 0.5 * known < found.train.harm.total().value < known + 0.1
    assert is_at_home(found) and is_at_home(again) and found.history.values("a").device == CPU
    for name, value in found.parameters.items():
        assert torch.equal(value, again.parameters[name])
    for first, second in zip(found.attempts, again.attempts, strict=True):
        assert torch.equal(first.heldout.values, second.heldout.values)
    found.apply()
    assert kind(pyro.param("a").device) == kind(DEVICE)
    assert evidence_of_causes(v, float(pyro.param("a").detach())) > evidence_of_causes(v, 1.0)


def test_learning_harm_of_a_reference():
    v = causes()
    two_causes(v), mean_field(v)
    learner = dataclasses.replace(LEARNERS["exact"], guide_training=vh.GuideTraining(0))
    with left_alone():
        reference = vh.learn_reference(
            two_causes, (v,), guide=mean_field, learner=learner, start="current", progress=False
        )
        found = vh.learning_harm(
            two_causes,
            mean_field,
            (v,),
            reference=reference,
            heldout=(causes(num_units=8),),
            refit=QUICK,
            progress=False,
        )
    assert is_near(found.harm, harm_of_causes(v))
    assert is_at_home(found) and str(found)


def test_reachability_of_given_parameters(tmp_path):
    v = causes()
    two_causes(v), mean_field(v)
    best = math.sqrt((float(v.square().mean()) - 1) / 2)
    with left_alone():
        found = vh.reachability(
            two_causes,
            mean_field,
            (v,),
            reference={"a": best},
            optimizer=pyro.optim.Adam({"lr": 0.02}),
            num_steps=40,
            max_rounds=1,
            refit=QUICK,
            progress=False,
        )
    assert is_near(found.harm, harm_of_causes(v))
    assert is_at_home(found) and str(found)
    assert vh.report(found, tmp_path / "pull.html").stat().st_size > 1000


def test_guides_are_compared():
    v = causes()
    candidates = {
        "full rank": vh.AutoUnitNormal,
        "weighted": vh.Candidate(AutoNormal, vh.ImportanceWeightedELBO(4)),
        "exact": vh.Candidate(AutoNormal, vh.ExactEvidence()),
    }
    with left_alone():
        found = vh.compare_guides(
            two_causes,
            candidates,
            (v,),
            heldout=(causes(num_units=8),),
            num_seeds=1,
            num_steps=10,
            max_rounds=1,
            progress=False,
        )
    assert set(found.ranking) == set(candidates)
    assert is_at_home(found.runs) and str(found)
    assert len(vh.to_datatree(found).children) > 0


def test_a_ladder_of_guides_for_discrete_latents():
    case = moved(gaussian_mixture)
    ladder = vh.guide_ladder(case.model, case.data)
    assert list(ladder) == ["exact"]
    loss = ladder["exact"].objective.loss(case.model, ladder["exact"].guide(case.model), *case.data)
    assert loss == pytest.approx(-float(case.exact.sum()), rel=1e-5)


@pytest.mark.parametrize(
    "method", [None, METHODS["bridge"], METHODS["annealing"]], ids=lambda m: type(m).__name__
)
def test_shapes_of_posteriors(method):
    case = moved(zoo.linear_gaussian)
    with left_alone():
        found = vh.posterior_shape(
            case.model, case.data, guide=case.guide, method=method, progress=False
        )
    exact = zoo.linear_gaussian_posterior(case.data[0].cpu().double())
    mean = found.continuous.coordinates["mean"]
    errors = mean.errors.cpu().double() + ROUNDING
    assert bool(((mean.values.cpu() - exact.mean).abs() < Z * errors).all())
    assert kind(found.continuous.hdi().device) == kind(DEVICE)
    assert is_at_home(found) and str(found)


@pytest.mark.parametrize("make", [gaussian_mixture, class_above_latent], ids=lambda m: m.__name__)
def test_shapes_of_discrete_posteriors_are_those_of_the_cpu(make):
    def entropy(device):
        case = moved(make, device)
        found = vh.posterior_shape(case.model, case.data, guide=case.guide, progress=False)
        return found, found.discrete.entropy.total()

    (found, here), (_, there) = entropy(DEVICE), entropy(CPU)
    assert is_near(here, there)
    assert is_at_home(found) and str(found)


def test_a_recorded_training_is_diagnosed(tmp_path):
    v = causes()
    svi = SVI(two_causes, mean_field, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    recorder = vh.Recorder(two_causes, mean_field, every=10)
    on_disk = vh.Recorder(two_causes, mean_field, every=10, path=tmp_path)
    for step in range(11):
        svi.step(v)
        recorder.record(step)
        on_disk.record(step)
    with left_alone():
        history = vh.diagnose(
            recorder.history, (v,), refit=QUICK, shape_method=METHODS["annealing"], progress=False
        )
    told = vh.self_fulfilment(history)
    assert len(told.trained) == 2 and str(told) and str(history)
    assert is_at_home(history.diagnoses) and is_at_home(history.history)
    first = {name: value.clone() for name, value in on_disk.history[0].values.items()}
    on_disk.history.restore(0)
    for name, leaf in pyro.get_param_store().get_state()["params"].items():
        assert kind(leaf.device) == kind(DEVICE) and torch.equal(leaf.detach().cpu(), first[name])
    vh.plot_self_fulfilment(vh.to_datatree(history))


def test_an_audit_with_its_tree_figure_and_report(tmp_path):
    v = causes()
    two_causes(v), mean_field(v)
    with left_alone():
        found = vh.audit(
            two_causes,
            mean_field,
            (v,),
            heldout=(causes(num_units=8),),
            learner=LEARNERS["exact"],
            objective=Trace_ELBO(),
            optimizer=pyro.optim.Adam({"lr": 0.02}),
            num_steps=10,
            num_em_steps=2,
            start="current",
            refit=QUICK,
        )
    assert is_near(found.harm.harm, harm_of_causes(v))
    assert is_at_home(found) and str(found)
    tree = vh.to_datatree(found)
    assert np.isfinite(tree["ledger"]["total"].values).any()
    vh.plot_ledger(tree)
    assert vh.report(found, tmp_path / "audit.html").stat().st_size > 1000
    found.reference.apply()
    assert kind(pyro.param("a").device) == kind(DEVICE)


@pytest.mark.parametrize("objective", BOUNDS.values(), ids=BOUNDS)
def test_objectives_train_an_autoencoder(objective):
    case = moved(multilayer_decoder)
    objective = objective.renewed()
    svi = SVI(case.model, case.guide, pyro.optim.Adam({"lr": 0.02}), loss=objective)
    losses = [svi.step(*case.data) for _ in range(15)]
    assert all(map(math.isfinite, losses)) and sum(losses[-5:]) < sum(losses[:5]) + 1
    assert is_at_home(objective.latest) and str(objective.latest)
    assert {kind(leaf.device) for leaf in pyro.get_param_store().values()} == {kind(DEVICE)}


@pytest.mark.parametrize("name", ["doubly reparameterised", "annealed", "exact"])
def test_bounds_are_those_of_the_cpu(name):
    count = 2 if name == "exact" else 50

    def bound(device):
        case = moved(multilayer_decoder, device)
        objective = BOUNDS[name].renewed()
        losses = [-objective.loss(case.model, case.guide, *case.data) for _ in range(count)]
        found = torch.tensor(losses, dtype=torch.float64)
        pyro.clear_param_store()
        return Estimate(float(found.mean()), float(found.std()) / count**0.5, 4, vh.Kind.ESTIMATED)

    assert is_near(bound(DEVICE), bound(CPU))


def test_an_objective_goes_along_to_another_device():
    case = moved(multilayer_decoder, CPU)
    objectives = [objective.renewed() for objective in BOUNDS.values()]
    for objective in objectives:
        objective.loss(case.model, case.guide, *case.data)
    pyro.clear_param_store()
    case.model.__self__.to(DEVICE)
    data = [x.to(DEVICE) for x in case.data]
    for objective in objectives:
        assert math.isfinite(objective.loss(case.model, case.guide, *data))
        assert is_at_home(objective.latest)


def test_chains_that_were_written_down_go_on():
    case = moved(multilayer_decoder)
    first = BOUNDS["persistent chains"].renewed()
    first.loss(case.model, case.guide, *case.data)
    written = first.carried()
    latents, known, tensors = written["kept"]
    kept = [latents.cpu(), known.cpu(), tuple(part.cpu() for part in tensors)]
    again = first.renewed()
    again.carry({**written, "kept": kept})
    assert math.isfinite(again.loss(case.model, case.guide, *case.data))
    assert is_at_home(again.carried()["kept"][:2])


def test_graphs_give_what_eager_runs_give(monkeypatch):
    monkeypatch.setattr(compilation, "_FEW_CALLS", 0)
    monkeypatch.setattr(compilation, "_WORTH_TRACING", 0.0)
    monkeypatch.setattr(compilation, "_WORTH_COMPILING", math.inf)
    vh.forget_compiled()
    case = moved(multilayer_decoder)
    method = vh.AnnealedImportanceSampling(16, num_steps=6, start=vh.MatchedStart(refit=False))
    found = vh.log_evidence(
        case.model, case.data, guide=case.guide, method=method, confirmation=None, progress=False
    )
    assert {kept.form for kept in compilation._GRAPHS.values()} == {"graph"}
    assert is_near(found.per_unit.total(), float(case.exact.sum()))
    vh.forget_compiled()


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="needs a C compiler")
def test_compiled_densities_are_those_of_eager_runs():
    case = moved(multilayer_decoder)
    (densities,) = prepare(case.model, None, case.data).densities
    latents = torch.randn(8, 4, 2, device=DEVICE)

    def log_joint(densities, latents):
        return (densities.log_joint(latents),)

    (fast,) = compilation.compiled(log_joint, densities, (latents,))(latents)
    assert kind(fast.device) == kind(DEVICE)
    assert torch.allclose(fast, densities.log_joint(latents), atol=1e-4)


def test_masks_declared_parameters_and_subsampled_plates():
    def model(x):
        with pyro.plate("kinds", 2):
            loc = pyro.sample("loc", dist.Normal(x.new_zeros(2), 1.0).to_event(1).mask(True))
        with pyro.plate("units", len(x), subsample_size=4, device=x.device) as index:
            z = pyro.sample(
                "z", dist.Categorical(x.new_ones(2) / 2), infer={"enumerate": "parallel"}
            )
            pyro.sample("x", dist.Normal(loc[z], 1.0).to_event(1), obs=x[index])

    def guide(x):
        with pyro.plate("kinds", 2):
            at = pyro.param("at", x.new_tensor([[1.0, 0.0], [-1.0, 0.0]]))
            pyro.sample("loc", dist.Delta(at, event_dim=1))

    x = torch.tensor([[0.9, 0.2], [-1.2, 0.1], [1.1, -0.3], [0.4, 0.4], [-0.7, 0.0]]).to(DEVICE)
    model(x), guide(x)
    with left_alone():
        found = vh.log_evidence(model, (x,), guide=guide, parameters=["loc"], progress=False)
    at = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    likelihood = dist.Normal(at, 1.0).to_event(1).log_prob(x.cpu()[:, None])
    expected = (likelihood.logsumexp(1) - math.log(2)).sum() + dist.Normal(0, 1).log_prob(at).sum()
    assert found.per_unit.total().value == pytest.approx(float(expected), abs=1e-4)
    assert is_at_home(found)


def test_draws_for_arviz():
    case = moved(module_parameters)
    guide = AutoNormal(case.model)
    SVI(case.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*case.data)
    constant = {"weight": case.model.weight}
    tree = vh.from_svi(
        case.model, guide, case.data, num_draws=20, constant_data=constant, progress=False
    )
    assert tree["posterior"]["h"].shape == (1, 20, 3, 2)
    assert np.allclose(tree["constant_data"]["weight"], case.model.weight.detach().cpu())
    chains = MCMC(NUTS(case.model), num_samples=5, warmup_steps=5, disable_progbar=True)
    chains.run(*case.data)
    assert vh.from_mcmc(chains, progress=False)["posterior"]["h"].shape == (1, 5, 3, 2)


def test_data_elsewhere_than_parameters_are_refused():
    case = moved(multilayer_decoder)
    data = tuple(x.cpu() for x in case.data)
    with pytest.raises(vh.InputError, match="one dtype and one device"):
        vh.log_evidence(case.model, data, progress=False)
