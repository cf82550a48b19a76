"""The annealed bound: its weights, gradients, parameters, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints, transforms
from pyro.infer import SVI
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_median,
)

from pyro_vharm import AnnealedELBO, GradientLearner, History, InputError
from pyro_vharm.learning.journal import Journal
from pyro_vharm.learning.learning_run import LearningRun
from pyro_vharm.model.data import Batch
from pyro_vharm.model.problem import checked_densities, prepare
from pyro_vharm.model.state import untouched
from pyro_vharm.objectives import annealed
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from pyro_vharm.particles import log_mean_exp
from tests.statistics import Z, assert_mean, rejects
from tests.zoo import beta_binomial, joint_unit, linear_gaussian, two_modes
from tests.zoo.case import Case
from tests.zoo.discrete import class_above_latent, class_in_guide, gaussian_mixture

PARTS = ("increments", "step_sizes", "damping")


def log_weights_of(case_densities, objective, count):
    """Many independent log weights of an objective's path."""
    many = AnnealedELBO(count, num_steps=objective.num_steps, name=objective.name)
    with torch.no_grad():
        path, run = many._path(case_densities), many._launch(case_densities)
        return annealed._anneal(case_densities, run, path)[0]


def set_rough_path(objective):
    """Uneven temperatures, and steps so long that energy is far from kept."""
    count = objective.num_steps
    increments = torch.arange(1.0, count + 2) / torch.arange(1.0, count + 2).sum()
    pyro.param(f"{objective.name}.increments", increments, constraint=constraints.simplex)
    sizes = torch.linspace(0.6, 0.3, count)
    pyro.param(f"{objective.name}.step_sizes", sizes, constraint=constraints.positive)
    pyro.param(f"{objective.name}.damping", torch.tensor(0.6), constraint=constraints.unit_interval)


WIDE = {"init_scale": 0.8, "init_loc_fn": init_to_median}
AUTO = {
    AutoNormal: WIDE,
    AutoMultivariateNormal: WIDE,
    AutoStructured: WIDE,
    AutoIAFNormal: {},
}


def leaves(*names):
    return [pyro.param(name).unconstrained() for name in names]


def positive_model(v):
    """h ~ LogNormal(0, 1), v | h ~ N(log h, 1)."""
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.LogNormal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h.log(), 1.0), obs=v)


def positive_case():
    v = torch.tensor([0.7, -0.4])
    return Case("positive", positive_model, None, (v,), dist.Normal(0.0, 2.0**0.5).log_prob(v))


OWN = [(make, None) for make in (linear_gaussian, beta_binomial, class_above_latent, joint_unit)]


@pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
@pytest.mark.parametrize(("make", "kind"), [*OWN, *((positive_case, kind) for kind in AUTO)])
def test_weights_are_unbiased_whatever_the_path(make, kind, monkeypatch):
    case = make()
    guide = case.guide if kind is None else kind(case.model, **AUTO[kind])
    guide(*case.data)
    densities = checked_densities(case.model, guide, Batch(case.data), case.unit_plate)
    objective = AnnealedELBO(num_steps=3)
    set_rough_path(objective)

    def relative():
        log_weights = log_weights_of(densities, objective, 10_000)
        joint = log_weights.shape[1] == 1
        return (log_weights - (case.exact.sum() if joint else case.exact)).exp()

    assert_mean(relative(), 1.0)
    kinetic = annealed._kinetic
    monkeypatch.setattr(annealed, "_kinetic", lambda r: 0.5 * kinetic(r))
    assert rejects(relative(), 1.0), "the test has no power with half of the momenta's part"


@pytest.mark.parametrize("num_steps", [0, 3])
def test_without_motion_the_weights_are_importance_weights(num_steps):
    """No steps, and steps of no length: the same bound from the same random numbers."""
    case = linear_gaussian()
    objective = AnnealedELBO(5, num_steps=num_steps, step_size=1e-12)
    densities = checked_densities(case.model, case.guide, Batch(case.data), None)
    pyro.set_rng_seed(2)
    ours = objective.evaluate(densities)
    pyro.set_rng_seed(2)
    theirs = importance_weighted_bound(densities, 5).per_unit
    torch.testing.assert_close(ours.per_unit.values, theirs.values)
    torch.testing.assert_close(ours.per_unit.mc_errors, theirs.mc_errors)
    svi = SVI(factor_model, amortised_guide, pyro.optim.Adam({"lr": 0.01}), loss=objective)
    assert math.isfinite(svi.step(*case.data))
    assert float(ours.loss.detach()) == pytest.approx(-float(theirs.values.sum()))


def factor_model(v):
    """h ~ N(0, I₂), v | h ~ N(Wᵀh, s²), with W and s learned."""
    init = torch.tensor([[1.0, 0.4, -0.3], [0.2, -0.5, 0.8]]).to(v)
    weight = pyro.param("weight", init)
    noise = pyro.param("noise", v.new_tensor(0.7), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h @ weight, noise).to_event(1), obs=v)


def amortised_guide(v):
    slope = pyro.param("slope", 0.3 * torch.eye(3, 2).to(v))
    scale = pyro.param("scale", v.new_tensor(0.6), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(v @ slope, scale).to_event(1))


@pytest.mark.parametrize("kind", [None, AutoMultivariateNormal, AutoStructured])
def test_the_gradient_is_that_of_the_value(kind):
    """By finite differences of the loss along random directions, with the same random numbers."""
    v = 1.5 * torch.randn(3, 3)
    guide = amortised_guide if kind is None else kind(factor_model, init_scale=0.4)
    objective = AnnealedELBO(2, num_steps=3, step_size=0.4)

    def loss():
        pyro.set_rng_seed(4)
        return objective.differentiable_loss(factor_model, guide, v)

    loss()
    theta = leaves("weight", "noise")
    phi = leaves("slope", "scale") if kind is None else list(guide.parameters())
    for group in (theta, phi, *([leaf] for leaf in objective.parameters())):
        gradients = torch.autograd.grad(loss(), group)
        directions = [torch.randn_like(leaf) for leaf in group]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        values = []
        for step in (1e-5, -2e-5, 1e-5):
            values.append(float(loss().detach()))
            with torch.no_grad():
                for leaf, direction in zip(group, directions, strict=True):
                    leaf += step * direction
        assert slope == pytest.approx((values[1] - values[2]) / 2e-5, rel=1e-5, abs=1e-8)
        assert abs(slope) > 1e-6


@pytest.mark.parametrize("make", [linear_gaussian, class_above_latent, two_modes])
def test_the_bound_is_below_the_evidence_and_rises_with_steps_and_particles(make):
    case = make()
    densities = checked_densities(case.model, case.guide, Batch(case.data), None)

    def bounds(num_particles, num_steps):
        objective = AnnealedELBO(num_steps=num_steps, name=f"with {num_steps}")
        log_weights = log_weights_of(densities, objective, 6000)
        return log_mean_exp(log_weights.unflatten(0, (-1, num_particles)), 1).sum(1)

    def error(*parts):
        return math.hypot(*(float(values.std()) / len(values) ** 0.5 for values in parts))

    plain, longer, more = bounds(1, 0), bounds(1, 8), bounds(10, 8)
    for values in (plain, longer, more):
        assert float(values.mean()) < float(case.exact.sum()) + Z * error(values)
    assert float(longer.mean()) > float(plain.mean()) + Z * error(longer, plain)
    assert float(more.mean()) > float(longer.mean()) + Z * error(longer, more)


def test_minibatches_are_scaled_outside_the_logarithm():
    v = 2.0**0.5 * torch.randn(40)
    exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(v).sum())

    def model(v):
        with pyro.plate("units", 40, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("units", 40, subsample_size=len(v)):
            pyro.sample("h", dist.Normal(0.3 * v, 0.9))

    objective = AnnealedELBO(8, num_steps=4)
    passes = [v[torch.randperm(40)].split(10) for _ in range(10)]
    values = -torch.tensor([[objective.loss(model, guide, x) for x in parts] for parts in passes])
    means = values.mean(1)
    error = float(means.std()) / len(means) ** 0.5
    assert exact - 1.0 < float(means.mean()) < exact + Z * error
    assert objective.latest.per_unit.values.shape == (10,)


def test_svi_steps_model_guide_and_path():
    v = 2.0 * torch.randn(50, 3)
    objective = AnnealedELBO(2, num_steps=4, step_size=0.1)
    svi = SVI(factor_model, amortised_guide, pyro.optim.Adam({"lr": 0.05}), loss=objective)
    svi.step(v)
    names = ["weight", "slope", *(f"annealed_elbo.{part}" for part in PARTS)]
    before = {name: pyro.param(name).detach().clone() for name in names}
    losses = [svi.step(v) for _ in range(25)]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(not torch.equal(pyro.param(name), before[name]) for name in names)
    increments = pyro.param("annealed_elbo.increments")
    assert increments.shape == (5,) and float(increments.detach().sum()) == pytest.approx(1.0)
    assert objective.latest.side == "lower" and objective.latest.acceptance is None


def test_a_torch_optimizer_learns_a_better_path():
    case = linear_gaussian(40)
    densities = checked_densities(case.model, case.guide, Batch(case.data), None)
    objective = AnnealedELBO(num_steps=3, step_size=0.1)
    loss = objective(case.model, case.guide)
    loss(*case.data)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
    first = log_weights_of(densities, objective, 1000).sum(1)
    for _ in range(50):
        optimizer.zero_grad()
        loss(*case.data).backward()
        optimizer.step()
    last = log_weights_of(densities, objective, 1000).sum(1)
    assert rejects(last - first, 0.0) and float((last - first).mean()) > 30.0
    assert float(last.mean()) < float(case.exact.sum())


def test_parameters_follow_the_latents_and_the_name():
    v = torch.randn(4, 3, dtype=torch.float32)
    objective = AnnealedELBO(num_steps=2, name="short")
    with pytest.raises(InputError, match=r"'short' are created when the loss is first evaluated"):
        objective.parameters()
    torch.set_default_dtype(torch.float32)
    loss = objective(factor_model, amortised_guide)(v)
    assert loss.dtype == torch.float32
    assert {leaf.dtype for leaf in objective.parameters()} == {torch.float32}
    assert [leaf.numel() for leaf in objective.parameters()] == [3, 2, 1]
    other = AnnealedELBO(num_steps=3, name="short")
    with pytest.raises(InputError, match=r"short.increments of shape \(3,\), and num_steps=3"):
        other.loss(factor_model, amortised_guide, v)


def test_a_diagnostic_changes_nothing():
    v = torch.randn(4, 3)
    densities = checked_densities(factor_model, amortised_guide, Batch((v,)), None)
    names, state = set(pyro.get_param_store().keys()), torch.get_rng_state()
    with untouched(0, factor_model, amortised_guide):
        AnnealedELBO(2, num_steps=2).evaluate(densities).loss.backward()
    assert set(pyro.get_param_store().keys()) == names == {"weight", "noise", "slope", "scale"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(leaf.grad is None for leaf in leaves(*names))


def exponential_model(v):
    """v | h ~ Poisson(e^h): a step that is too long ends where e^h overflows."""
    shift = pyro.param("shift", v.new_tensor(0.0))
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Poisson((h + shift).exp()), obs=v)


def test_a_particle_that_flies_off_weighs_nothing_and_leaves_the_gradient_clean():
    v, lost = torch.tensor([0.0, 2.0]), 0
    guide = AutoNormal(exponential_model, init_scale=1.5, init_loc_fn=init_to_median)
    objective = AnnealedELBO(60, num_steps=6, step_size=1.0)
    guide(v)
    densities = checked_densities(exponential_model, guide, Batch((v,)), None)
    for _ in range(5):
        loss = objective(exponential_model, guide)(v)
        lost += int((~torch.isfinite(log_weights_of(densities, objective, 60))).sum())
        learned = [pyro.param("shift"), *guide.parameters(), *objective.parameters()]
        gradients = torch.autograd.grad(loss, learned)
        assert bool(torch.isfinite(loss)) and all(bool(g.isfinite().all()) for g in gradients)
    assert lost > 10, "nothing flew off, so the test tests nothing"


def test_flows():
    v, flow = torch.tensor([0.8, -0.3]), transforms.spline(1).double()

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(1), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h[..., 0], 1.0), obs=v)

    def guide(v):
        pyro.module("flow", flow)
        with pyro.plate("units", len(v)):
            base = dist.Normal(v[:, None] / 2, 0.6).to_event(1)
            pyro.sample("h", dist.TransformedDistribution(base, [flow]))

    objective = AnnealedELBO(4, num_steps=2)
    values = -torch.tensor([objective.loss(model, guide, v) for _ in range(40)])
    exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(v).sum())
    assert float(values.mean()) < exact + Z * float(values.std()) / 40**0.5
    objective.differentiable_loss(model, guide, v).backward()
    assert all(p.grad is not None for p in flow.parameters())


class Scored(dist.Normal):
    """A normal that will not be reparameterised."""

    has_rsample = False


def test_what_it_cannot_move_is_refused():
    case = class_in_guide()
    with pytest.raises(InputError, match=r"draws \['z'\], which cannot be reparameterised"):
        AnnealedELBO().loss(case.model, case.guide, *case.data)
    case = gaussian_mixture()
    with pytest.raises(InputError, match="use ExactEvidence"):
        AnnealedELBO().loss(case.model, case.guide, *case.data)
    case = linear_gaussian()

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", Scored(v[:, :2], 1.0).to_event(1))

    with pytest.raises(InputError, match=r"draws \['h'\], which cannot be reparameterised"):
        AnnealedELBO().loss(case.model, guide, *case.data)
    with pytest.raises(InputError, match="point masses"):
        AnnealedELBO().loss(case.model, AutoDelta(case.model), *case.data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "num_steps must not be negative, got -1"),
        ({"step_size": 0.0}, "step_size must be positive, not 0.0"),
        ({"damping": 1.0}, r"damping must lie in \(0, 1\), not 1.0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(InputError, match=message):
        AnnealedELBO(**options)


def test_the_history_of_a_learner_leaves_its_parameters_out():
    """They are not in the user's param store, so a checkpoint that held them could not be set."""

    def model(v):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(0.0, scale))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    problem = prepare(model, AutoNormal(model), (torch.tensor([3.0, -2.0, 1.0]),))
    with untouched(0, model, problem.guide):
        run = LearningRun(problem, Journal(), False)
        objective = AnnealedELBO(2, num_steps=1)
        GradientLearner(objective, num_steps=2, max_rounds=1).learn(run)
        assert f"{objective.name}.damping" in pyro.get_param_store()
    with History(model, problem.guide, tuple(run.checkpoints)).at(0) as checkpoint:
        assert "scale" in checkpoint.values
