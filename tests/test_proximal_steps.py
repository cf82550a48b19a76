"""Accelerated EM: its steps against exact evidence and divergence, and the particles it carries."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, kl_divergence

import pyro_vharm as vh
from benchmarks.harmed_models import HARMED_MODELS
from benchmarks.learners import AIM
from benchmarks.learning_time import learn_from_here
from pyro_vharm.inference.choice import Choice
from pyro_vharm.learning import expectation_maximization, proximal_steps
from pyro_vharm.learning.journal import Journal, open_journal
from pyro_vharm.learning.learning_run import LearningRun, quick_choice
from pyro_vharm.learning.particle_chains import ParticleChains
from pyro_vharm.learning.posterior_particles import draw_posteriors
from pyro_vharm.learning.proximal_steps import ProximalSteps
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED, assert_mean, rejects

V = torch.tensor([3.0, -2.0, 0.5, 2.5, -3.5, 1.0], dtype=torch.float64)


def located(v):
    """v ~ N(b, 1 + s²), with the posterior N((v − b) s² / (1 + s²), s² / (1 + s²))."""
    b = pyro.param("b", v.new_tensor(0.3))
    scale = pyro.param("scale", v.new_tensor(0.7), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), scale))
        pyro.sample("v", dist.Normal(b + h, 1.0), obs=v)


def located_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(torch.zeros_like(v), 1.0))


def located_posterior(b, scale):
    share = scale**2 / (1 + scale**2)
    return dist.Normal((V - b) * share, share**0.5)


def located_evidence(b, scale):
    return float(dist.Normal(b, (1 + scale**2) ** 0.5).log_prob(V).sum())


@pytest.mark.parametrize("penalty", [0.0, 0.3, 1.0, 4.0])
def test_a_step_raises_evidence_less_the_divergence(penalty):
    problem = prepare(located, located_guide, (V,))
    (particles,) = draw_posteriors(problem.densities, quick_choice(problem, 16))
    theta, moved = problem.model_parameters, (-0.4, 1.1)
    shares = particles.log_shares.exp()
    begun = float(particles.proximal_loss(shares, penalty).detach())
    values = {"b": torch.tensor(moved[0]).double(), "scale": torch.tensor(moved[1]).double()}
    theta.assign(theta.unconstrain(values, "values"))
    rise = located_evidence(*moved) - located_evidence(0.3, 0.7)
    old, new = located_posterior(0.3, 0.7), located_posterior(*moved)
    divergence = float(kl_divergence(old, new).sum())
    loss = particles.proximal_loss(shares, penalty)
    change = float(loss.detach()) - begun
    assert change == pytest.approx(-rise + penalty * divergence, abs=1e-3)
    other = float(kl_divergence(new, old).sum())
    assert abs(other - divergence) > 0.1, "the other way round is another number"
    if penalty == 1.0:  # an EM step
        leaves = theta.trainable()
        found = torch.autograd.grad(loss, leaves)
        expected = torch.autograd.grad(particles.loss(shares), leaves)
        torch.testing.assert_close(found, expected)


def learned(harmed, learner):
    harmed.install()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    found = learn_from_here(problem, learner, SEED)
    constraint = problem.model_parameters.constraints
    paths = [{name: c.values[name] for name in constraint} for c in found.checkpoints]
    path = [Parameters(values, constraint).constrained() for values in paths]
    return found, [harmed.lost_at(values) for values in path]


@pytest.mark.parametrize(
    "name, units", [("sign-symmetric", 40), ("mixture", 100), ("noisy-OR", 60)]
)
def test_no_step_lowers_the_exact_evidence_and_few_of_them_arrive(name, units, monkeypatch):
    harmed, learner = HARMED_MODELS[name](units), vh.ExpectationMaximization()
    found, missing = learned(harmed, learner)
    assert harmed.harm > 5 * AIM
    assert all(b < a + 1e-3 for a, b in zip([harmed.harm, *missing], missing, strict=False))
    assert missing[-1] < AIM and found.num_steps <= 15
    assert found.ending.converged
    if name == "sign-symmetric":
        monkeypatch.setattr(proximal_steps, "_LIGHTER", 1.0)
        plain = vh.ExpectationMaximization(found.num_steps)
        assert learned(harmed, plain)[1][-1] > AIM, "as many EM steps do not arrive"


SLOPES = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)


def three_causes(v):
    """v ~ N(0, 1 + a² |c|²), and three latents that the posterior ties together."""
    a = pyro.param("a", v.new_tensor(0.4), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(3), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(a * (h @ SLOPES), 1.0), obs=v)


def three_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(v.new_zeros(len(v), 3), 0.8).to_event(1))


def set_a(problem, value):
    theta = problem.model_parameters
    theta.assign(theta.unconstrain({"a": torch.tensor(value).double()}, "values"))


def test_particles_that_are_carried_on_are_those_of_the_posterior():
    v = torch.full((200,), 2.0, dtype=torch.float64)
    torch.manual_seed(SEED)
    problem = prepare(three_causes, three_guide, (v,))
    method = vh.AnnealedImportanceSampling(num_particles=16, num_steps=5)
    (drawn,) = draw_posteriors(problem.densities, Choice(method))
    chains = ParticleChains.of(drawn, 2)
    at_first = chains.carry_on(drawn)
    set_a(problem, 0.8)
    assert 0.3 < float(at_first.share_left().mean()) < 0.95, "far, and not worn"
    carried = chains.carry_on(at_first)
    size = float(SLOPES.square().sum())
    mean = 0.8 * SLOPES * 2.0 / (1 + 0.64 * size)
    along = SLOPES / size**0.5
    assert_mean(carried.latents.mean(0), mean)
    spread = (carried.latents @ along - mean @ along).square().mean(0)
    assert_mean(spread, 1 / (1 + 0.64 * size))
    stale = (at_first.latents @ along - mean @ along).square().mean(0)
    assert rejects(at_first.latents.mean(0), mean) and rejects(stale, 1 / (1 + 0.64 * size))
    assert carried.random and torch.allclose(carried.log_shares.exp().sum(0), v.new_ones(200))
    torch.testing.assert_close(carried.reweighted(), carried.log_shares)


def three_values():
    generator = torch.Generator().manual_seed(1)
    return 3.0 * torch.randn(20, generator=generator, dtype=torch.float64)


def three_evidence(a, v):
    return float(
        dist.Normal(0.0, (1 + a**2 * float(SLOPES.square().sum())) ** 0.5).log_prob(v).sum()
    )


def test_random_particles_arrive_and_go_on_after_a_kill(tmp_path, monkeypatch):
    v = three_values()
    problem = prepare(three_causes, three_guide, (v,))
    monkeypatch.setattr(expectation_maximization, "_STEPS_PER_DRAW", 8)

    def climb(journal):
        set_a(problem, 0.4)
        torch.manual_seed(SEED)
        run = LearningRun(problem, journal, progress=False)
        vh.ExpectationMaximization(12).learn(run)
        return float(pyro.param("a").detach()), run.num_steps

    reached, num_steps = climb(Journal())
    best = math.sqrt((float(v.square().mean()) - 1) / float(SLOPES.square().sum()))
    highest = three_evidence(best, v)
    assert highest - three_evidence(0.4, v) > 5 * AIM
    assert highest - three_evidence(reached, v) < AIM and num_steps == 12
    pieces, begin = [], ProximalSteps.begin

    def dying(*arguments, **settings):
        pieces.append(1)
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return begin(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ProximalSteps, "begin", dying)
        with pytest.raises(KeyboardInterrupt):
            climb(open_journal(tmp_path, "settings"))
        pieces.append(1)
        again = climb(open_journal(tmp_path, "settings"))
    assert len(pieces) == 4, "the first piece is not done again"
    assert again == (pytest.approx(reached, rel=1e-6), num_steps)


def test_a_step_that_wears_out_its_particles_is_undone_and_tried_shorter(monkeypatch):
    problem = prepare(three_causes, three_guide, (three_values(),))

    def first_step():
        set_a(problem, 0.4)
        torch.manual_seed(SEED)
        steps = ProximalSteps.begin(problem, penalty=1e-2, max_iterations=20, most_steps=1)
        assert steps.step() > 0
        return float(steps.sets[0][0].share_left().mean()), steps.penalty

    share, penalty = first_step()
    assert share >= 0.5 and penalty > 1e-2
    monkeypatch.setattr(proximal_steps, "_LEAST_SHARE", 0.0)
    share, penalty = first_step()
    assert share < 0.5 and penalty < 1e-2, "without the check they are worn out"
