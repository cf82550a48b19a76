"""The user's objective and optimiser: the same steps as SVI's own, none of the state."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
)

import pyro_vharm as vh
from pyro_vharm.estimates import Estimate, Kind
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learning_run import LearningRun
from pyro_vharm.learning.objective_value import default_objective, evaluate_objective
from pyro_vharm.learning.refit import elbo_over_batches
from pyro_vharm.learning.svi_training import SVITraining, _drifts
from pyro_vharm.learning.training import shuffled_passes
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED, Z


def model(v, size=None):
    a = pyro.param("a", torch.tensor(0.7), constraint=dist.constraints.positive)
    b = pyro.param("b", torch.tensor([0.2, -0.3]))
    with pyro.plate("units", size or len(v), subsample=torch.arange(len(v)) if size else None):
        h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(a * h.sum(-1) + b.sum(), 0.8), obs=v)


def guide(v, size=None):
    slope = pyro.param("slope", torch.tensor([0.3, 0.1]))
    with pyro.plate("units", size or len(v), subsample=torch.arange(len(v)) if size else None):
        pyro.sample("h", dist.Normal(slope * v[:, None], 0.7).to_event(1))


def unit_data(count=6):
    generator = torch.Generator().manual_seed(3)
    return 1.5 * torch.randn(count, generator=generator) + 0.5


def begun(data):
    pyro.clear_param_store()
    return prepare(model, guide, data)


def after_round(optimizer, data, objective=None, **settings):
    problem = begun(data)
    training = SVITraining(objective or Trace_ELBO(), optimizer, num_steps=6, **settings)
    pyro.set_rng_seed(SEED)
    training.go_on(LearningRun(problem, Journal(), False), 1)
    return {**problem.model_parameters.values(), **problem.guide_parameters.values()}


def after_svi(optimizer, batches, end_pass, objective=None):
    """The user's own loop."""
    problem = begun([*batches])
    pyro.set_rng_seed(SEED)
    svi = SVI(model, guide, optimizer, loss=objective or Trace_ELBO())
    for done, which in enumerate(shuffled_passes(len(batches), 6), 1):
        loss = svi.step(batches[which])
        if done % len(batches) == 0:
            end_pass(loss)
    return {**problem.model_parameters.values(), **problem.guide_parameters.values()}


def by_name(name):
    return {"lr": 0.3 if name == "a" else 0.02}


def falling():
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "gamma": 0.3}
    return pyro.optim.ExponentialLR(settings)


def on_plateau():
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "patience": 0}
    return pyro.optim.ReduceLROnPlateau(settings)


OPTIMIZERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.05}),
    "by parameter": lambda: pyro.optim.Adam(by_name),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 0.5, "lrd": 0.8}),
    "clip arguments": lambda: pyro.optim.SGD({"lr": 0.01}, {"clip_norm": 0.1}),
    "exponential": falling,
    "plateau": on_plateau,
}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=1e-12), name


def state_of(optimizer):
    """All that it holds, as text: by parameter, in order of first use."""
    return [(id(p), str(made.state_dict())) for p, made in optimizer.optim_objs.items()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_round_takes_the_steps_of_svi_and_leaves_the_optimiser_alone(name):
    batches = list(unit_data().split(3))
    used = OPTIMIZERS[name]()
    end = (lambda _: None) if not hasattr(used, "step") else None
    plateau = name == "plateau"
    expected = after_svi(
        used, batches, end or (lambda loss: used.step(loss) if plateau else used.step())
    )
    before = state_of(used)
    assert_same(after_round(used, batches), expected)
    assert state_of(used) == before
    other = after_svi(pyro.optim.Adam({"lr": 0.051}), batches, lambda _: None)
    with pytest.raises(AssertionError):
        assert_same(after_round(used, batches), other)


def test_a_torch_optimiser_for_all_leaves_at_once():
    made = []

    def make(leaves):
        made.append(len(leaves))
        return torch.optim.Adam(leaves, lr=0.05)

    batches = list(unit_data().split(3))
    expected = after_svi(pyro.optim.Adam({"lr": 0.05}), batches, lambda _: None)
    assert_same(after_round(make, batches), expected)
    assert made == [3]
    with pytest.raises(vh.InputError, match="must return a torch optimiser"):
        after_round(lambda leaves: None, batches)


def test_without_an_optimiser_the_step_size_falls_to_a_hundredth():
    one = SVITraining(Trace_ELBO(), num_steps=40, learning_rate=0.1)
    problem = begun((unit_data(),))
    sizes = []
    before = problem.model_parameters.values()["b"]
    for _ in one._round(LearningRun(problem, Journal(), False), "training"):
        now = problem.model_parameters.values()["b"]
        sizes.append(float((now - before).abs().max()))
        before = now
    assert len(sizes) == 4 and sizes[-1] < max(sizes) / 4


def test_frozen_parameters_stay(monkeypatch):
    problem = begun((unit_data(),))
    theta, phi = problem.model_parameters.values(), problem.guide_parameters.values()
    training = SVITraining(Trace_ELBO(), OPTIMIZERS["Adam"](), num_steps=40, max_rounds=2)
    training.fit_guide(LearningRun(problem, Journal(), False))
    assert_same(problem.model_parameters.values(), theta)
    assert not torch.equal(problem.guide_parameters.values()["slope"], phi["slope"])


def test_gradients_that_are_not_finite_end_the_training():
    problem = begun((unit_data(),))
    theta = problem.model_parameters.values()

    def loss(model, guide, v):
        return pyro.param("b").sum() * math.nan

    training = SVITraining(loss, OPTIMIZERS["Adam"](), num_steps=12)
    with pytest.raises(FloatingPointError, match="smaller steps"):
        training.go_on(LearningRun(problem, Journal(), False), 1)
    assert_same(problem.model_parameters.values(), theta)


def minus_elbo(model, guide, *args):
    """The same as Trace_ELBO, but of a kind that is not known."""
    return Trace_ELBO(num_particles=10).differentiable_loss(model, guide, *args)


@pytest.mark.parametrize("size", [None, 24])
def test_value_of_an_objective_sums_over_the_units_given(size):
    """An ELBO evaluated per unit, and a loss evaluated again and again, agree on batches."""
    v = unit_data(12)
    problem = begun([(part, size) if size else (part,) for part in v.split(4)])
    found = [
        evaluate_objective(problem, objective, 2000)
        for objective in (TraceMeanField_ELBO(), minus_elbo)
    ]
    error = math.hypot(*(each.mc_error for each in found))
    assert 0 < error < 1.0
    assert abs(found[0].value - found[1].value) < Z * error
    assert found[0].value == pytest.approx(elbo_over_batches(problem, 4000).total().value, abs=1.0)
    assert abs(found[0].value * (2 if size else 1) - found[1].value) > Z * error or not size


def test_value_of_objectives_of_other_kinds():
    problem = begun((unit_data(),))
    bounds = {}
    for name, objective in (
        ("ELBO", Trace_ELBO()),
        ("Renyi", RenyiELBO(alpha=0.0, num_particles=50, vectorize_particles=True)),
        ("wake-sleep", ReweightedWakeSleep(num_particles=50, vectorize_particles=True)),
        ("weighted", vh.ImportanceWeightedELBO(50)),
        ("exact", vh.ExactEvidence()),
    ):
        bounds[name] = evaluate_objective(problem, objective, 4000)
    exact = vh.log_evidence(model, (unit_data(),), progress=False).per_unit.total().value
    assert bounds["exact"].value == pytest.approx(exact, abs=1e-5)
    assert bounds["exact"].mc_error < 1e-5
    assert bounds["ELBO"].value < bounds["Renyi"].value < exact
    assert bounds["weighted"].value < exact + Z * bounds["weighted"].mc_error
    assert bounds["wake-sleep"].value == pytest.approx(bounds["Renyi"].value, abs=1.0)


def test_the_default_sums_out_discrete_latents_without_a_guide_site():
    def mixture(v):
        locs = pyro.param("locs", torch.tensor([-1.0, 2.0]))
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("v", dist.Normal(locs[z.long()], 1.0), obs=v)

    v = unit_data()
    problem = prepare(mixture, lambda v: None, (v,))
    objective = default_objective(problem)
    assert isinstance(objective, TraceEnum_ELBO)
    exact = dist.Normal(torch.tensor([-1.0, 2.0]), 1.0).log_prob(v[:, None])
    exact = (exact + torch.tensor([0.7, 0.3]).log()).logsumexp(1).sum()
    assert evaluate_objective(problem, objective, 2).value == pytest.approx(float(exact))
    training = SVITraining(objective, OPTIMIZERS["Adam"](), num_steps=30, max_rounds=2)
    trained = training.settle(LearningRun(problem, Journal(), False))
    assert trained.points[-1].log_evidence.value > float(exact) + 0.5
    for point in trained.points:
        assert point.objective.value == pytest.approx(point.log_evidence.value, abs=1e-9)


def estimates(*values, error=0.0):
    return [Estimate(value, error, 5, Kind.ESTIMATED) for value in values]


def test_what_counts_as_a_move():
    assert _drifts(estimates(0.0, 1.0)) and _drifts(estimates(0.0, 1.0, 2.0))
    assert _drifts(estimates(0.0, -1.0, -2.0)), "down too"
    assert not _drifts(estimates(0.0, 0.04)), "next to nothing"
    assert not _drifts(estimates(0.0, 1.0, error=0.5)), "within error"
    assert not _drifts(estimates(0.0, 2.0, 1.0)), "to and fro"


def test_settling_keeps_a_history_and_says_when_the_budget_ended():
    problem = begun((unit_data(),))
    run = LearningRun(problem, Journal(), False)
    trained = SVITraining(Trace_ELBO(), OPTIMIZERS["Adam"](), num_steps=8, max_rounds=1).settle(run)
    assert (
        [point.step for point in trained.points] == [0, 2, 4, 6, 8] == list(trained.history.steps)
    )
    assert not trained.ending.converged and "1 rounds" in str(trained.ending)
    scalars = trained.history[-1].scalars
    assert scalars["evidence"] == trained.points[-1].log_evidence.per_unit.value
    assert scalars["objective"] == trained.points[-1].objective.per_unit.value
    moved = trained.points[-1].log_evidence.value - trained.points[0].log_evidence.value
    assert trained.last_move == pytest.approx(abs(moved) / 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": Trace_ELBO}, "what SVI takes as loss"),
        ({"objective": Trace_ELBO()(model, guide)}, "what SVI takes as loss"),
        ({"objective": 3}, "what SVI takes as loss"),
        ({"optimizer": torch.optim.Adam([torch.ones(1)])}, "pyro.optim"),
        ({"optimizer": torch.optim.Adam}, "pyro.optim"),
        ({"optimizer": "adam"}, "pyro.optim"),
        ({"num_steps": 0}, "num_steps"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"looks": 0}, "looks"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(vh.InputError, match=message):
        SVITraining(**{"objective": Trace_ELBO()} | settings)
