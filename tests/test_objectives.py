"""The importance-weighted bound: its value, its gradients, and subsampling."""

import functools
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoNormal

import pyro_vharm as vh
from pyro_vharm import ImportanceWeightedELBO, InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.model_runs import run_model
from pyro_vharm.model.problem import checked_densities, prepare
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from tests.statistics import Z, assert_mean, rejects
from tests.zoo import BASICS, linear_gaussian, normal_model, two_modes


def structured_model(v):
    """Two latents per unit, the second with the first as its parent; loadings are learned."""
    weight = pyro.param("weight", v.new_tensor([[1.0, 0.4, -0.3], [0.2, -0.5, 0.8]]))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.3 * z.sum(-1), 0.5))
        pyro.sample("v", dist.Normal(z @ weight, s.unsqueeze(-1)).to_event(1), obs=v)


def structured_guide(v):
    slope = pyro.param("slope", v.new_tensor([[0.3, 0.1], [0.2, -0.2], [0.0, 0.3]]))
    parent = pyro.param("parent", v.new_tensor(0.5))
    scale = pyro.param("scale", v.new_tensor(0.6), constraint=dist.constraints.positive)
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Normal(v @ slope, scale).to_event(1))
        pyro.sample("s", dist.LogNormal(parent * z.sum(-1) + 0.1, 0.4))


def gradient(function, parameters):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(function, parameters)])


def pathwise(problem, num_particles, num_replicates):
    """The bound differentiated by plain automatic differentiation."""
    batch, structure = problem.batches[0], problem.densities[0].structure
    count = num_particles * num_replicates
    drawn = run_guide(problem.guide, batch, structure, count)
    at = run_model(problem.model, batch, structure, count, values=drawn.values)
    log_weights = (at.log_joint - drawn.log_guide).reshape(num_replicates, num_particles, -1)
    return log_weights.logsumexp(1).mean(0).sum() - math.log(num_particles) * log_weights.shape[-1]


@pytest.mark.parametrize("num_particles", [1, 5])
def test_gradients_have_the_mean_of_pathwise_ones(num_particles):
    v = torch.randn(4, 3)
    problem = prepare(structured_model, structured_guide, (v,))
    leaves = [
        *problem.model_parameters.leaves.values(),
        *problem.guide_parameters.leaves.values(),
    ]

    def doubly():
        bound = importance_weighted_bound(problem.densities[0], num_particles, 500)
        return gradient(-bound.loss, leaves)

    ours = torch.stack([doubly() for _ in range(40)])
    theirs = torch.stack(
        [gradient(pathwise(problem, num_particles, 500), leaves) for _ in range(40)]
    )
    assert_mean(ours - theirs, 0.0)
    wrong = ours.clone()
    wrong[:, 6:] *= 1.2
    assert rejects(wrong - theirs, 0.0), "the test has no power"


def test_gradient_for_the_guide_vanishes_at_the_posterior():
    """At the exact posterior the doubly reparameterised gradient has no noise at all."""
    v = torch.randn(6)

    def guide(v):
        slope = pyro.param("slope", v.new_tensor(0.5))
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(slope * v, 0.5**0.5))

    problem = prepare(normal_model, guide, (v,))
    slope = problem.guide_parameters.leaves["slope"]
    bound = importance_weighted_bound(problem.densities[0], 8, 3)
    assert float(gradient(-bound.loss, [slope]).abs()) < 1e-9
    assert float(gradient(pathwise(problem, 8, 3), [slope]).abs()) > 1e-3


@pytest.mark.parametrize("make", [make for make in BASICS if make is not two_modes])
def test_the_bound_is_below_the_evidence_and_rises_with_particles(make):
    case = make()
    problem = prepare(case.model, case.guide, case.data)

    def bounds(num_particles):
        draws = [
            importance_weighted_bound(problem.densities[0], num_particles, 50).per_unit.values.sum()
            for _ in range(30)
        ]
        return torch.stack(draws)

    few, many = bounds(1), bounds(20)
    exact = float(case.exact.sum())
    for values in (few, many):
        assert float(values.mean()) < exact + Z * float(values.std()) / 30**0.5
    error = (few.var() + many.var()).sqrt() / 30**0.5
    assert float(many.mean()) > float(few.mean()) - Z * float(error)
    assert abs(float(many.mean()) - exact) < abs(float(few.mean()) - exact)


def conjugate(num_total):
    """A guide worth ~0.1 nats per unit, in a plate of which a part may be passed."""

    def model(v):
        with pyro.plate("units", num_total, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("units", num_total, subsample_size=len(v)):
            pyro.sample("h", dist.Normal(0.3 * v, 0.9))

    return model, guide


def test_subsampling_scales_the_sum_of_bounds_and_not_the_weights():
    v = 2.0**0.5 * torch.randn(50)
    exact = float(dist.Normal(0.0, 2.0**0.5).log_prob(v).sum())
    model, guide = conjugate(50)
    ours, pyros = ImportanceWeightedELBO(16), RenyiELBO(0.0, num_particles=16)
    losses = {ours: [], pyros: []}
    for _ in range(60):
        part = v[torch.randperm(50)[:10]]
        for loss, values in losses.items():
            values.append(-loss.loss(model, guide, part))
    ours_mean, pyros_mean = (torch.tensor(values).mean() for values in losses.values())
    error = float(torch.tensor(losses[ours]).std()) / 60**0.5
    assert float(ours_mean) < exact + Z * error
    assert abs(float(ours_mean) - exact) < Z * error + 1.0
    pyros_error = float(torch.tensor(losses[pyros]).std()) / 60**0.5
    assert float(pyros_mean) > exact + Z * pyros_error, "the host's is above the evidence"


def test_svi_and_loss_module_both_learn():
    v = 3.0 * torch.randn(200)

    def model(v):
        scale = pyro.param("scale", v.new_tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), scale))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=ImportanceWeightedELBO(8))
    losses = [svi.step(v) for _ in range(300)]
    learned = float(pyro.param("scale").detach())
    exact = float((v.square().mean() - 1).sqrt())
    assert abs(learned - exact) < 0.1 * exact
    assert sum(losses[-20:]) < sum(losses[:20])

    loss = ImportanceWeightedELBO(4)(model, guide)(v)
    loss.backward()
    assert loss.dim() == 0
    assert all(p.grad is not None for p in guide.parameters())


def test_loss_agrees_with_loss_and_grads():
    case = linear_gaussian()
    objective = ImportanceWeightedELBO(50, num_replicates=200, unit_plate="units")
    loss = objective.loss(case.model, case.guide, *case.data)
    again = objective.loss(case.model, case.guide, *case.data)
    assert abs(loss - again) < 0.5
    assert loss >= -float(case.exact.sum()) - 0.5


def test_wrong_arguments():
    case = linear_gaussian()
    with pytest.raises(InputError, match="num_particles must be at least 1"):
        ImportanceWeightedELBO(0)
    with pytest.raises(InputError, match="num_replicates"):
        ImportanceWeightedELBO(2, num_replicates=0)
    with pytest.raises(InputError, match="'elsewhere' does not hold"):
        ImportanceWeightedELBO(2, unit_plate="elsewhere").loss(case.model, case.guide, *case.data)


class Scored(dist.Normal):
    """A normal that will not be reparameterised."""

    has_rsample = False


def coin_model(v):
    """z ~ Bernoulli(r), h | z ~ N(2z − 1, 1), v | h ~ N(h, s²)."""
    chance = pyro.param("chance", v.new_tensor(0.4), constraint=dist.constraints.unit_interval)
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Bernoulli(chance))
        h = pyro.sample("h", dist.Normal(2 * z - 1, 1.0))
        pyro.sample("v", dist.Normal(h, 0.7), obs=v)


def coin_guide(v, family=Scored):
    slope, shift = pyro.param("slope", v.new_tensor(0.8)), pyro.param("shift", v.new_tensor(0.2))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Bernoulli(logits=slope * v))
        pyro.sample("h", family(0.5 * v + shift * (2 * z - 1), 0.8))


def coin_bound(v, slope, shift, num_particles, num_draws=100_000):
    """The same bound with every combination of the K values of z summed over, by autograd."""
    total = 0.0
    for signs in itertools.product((-1.0, 1.0), repeat=num_particles):
        z = torch.tensor(signs)[:, None]
        log_chance = torch.nn.functional.logsigmoid(z * slope * v)
        center = 0.5 * v + shift * z
        h = center + 0.8 * torch.randn(num_draws, num_particles, len(v))
        log_joint = torch.where(z > 0, 0.4, 0.6).log() + dist.Normal(z, 1.0).log_prob(h)
        log_joint = log_joint + dist.Normal(h, 0.7).log_prob(v)
        log_weights = log_joint - log_chance - dist.Normal(center, 0.8).log_prob(h)
        bound = log_weights.logsumexp(1).mean(0) - math.log(num_particles)
        total = total + (log_chance.sum(0).exp() * bound).sum()
    return total


@pytest.mark.parametrize("family", [Scored, dist.Normal])
@pytest.mark.parametrize(("num_particles", "num_replicates"), [(1, 1), (1, 20), (3, 20)])
def test_score_terms_of_sites_that_cannot_be_reparameterised(family, num_particles, num_replicates):
    v = torch.tensor([0.6, -1.2])
    problem = prepare(coin_model, functools.partial(coin_guide, family=family), (v,))
    leaves = [problem.guide_parameters.leaves[name] for name in ("slope", "shift")]
    repetitions = 800 if num_replicates == 1 else 150

    def draw():
        bound = importance_weighted_bound(problem.densities[0], num_particles, num_replicates)
        return gradient(-bound.loss, leaves)

    ours = torch.stack([draw() for _ in range(repetitions)])
    exact = gradient(coin_bound(v, *leaves, num_particles), leaves)
    assert_mean(ours, exact)
    lost = gradient(coin_bound(v, leaves[0], leaves[1].detach(), num_particles), leaves[:1])
    assert_mean(ours[:, :1], lost)
    assert rejects(ours * torch.tensor([1.0, 0.0]), exact), "the test has no power"


@pytest.mark.parametrize(
    ("estimator", "num_particles"),
    [
        (vh.Pathwise(), 4),
        (vh.DoublyReparameterized(), 4),
        (vh.StickingTheLanding(), 1),
    ],
)
def test_gradients_are_right_for_a_parameter_that_model_and_guide_share(estimator, num_particles):
    """Each way in which log w depends on it has its own weight, so nothing is lost."""
    v = torch.tensor([1.0, -0.5, 2.0])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(pyro.param("slope", v.new_tensor(0.4)) * h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(pyro.param("slope", v.new_tensor(0.4)) * v, 1.0))

    objective = ImportanceWeightedELBO(num_particles, num_replicates=200, gradient=estimator)
    assert objective.loss_and_grads(model, guide, v) > 0
    densities = checked_densities(model, guide, Batch((v,)), None)

    def draw(estimator):
        bound = importance_weighted_bound(densities, num_particles, 200, estimator)
        return -gradient(bound.loss, [pyro.param("slope")])

    slope, noise = torch.tensor(0.4, requires_grad=True), torch.randn(100_000, num_particles, 3)
    h = slope * v + noise
    log_weights = 0.5 * (noise.square() - h.square() - (v - slope * h).square())
    exact = gradient(log_weights.logsumexp(1).mean(0).sum(), [slope])
    assert_mean(torch.stack([draw(estimator) for _ in range(60)]), exact)
    direct = gradient(-0.5 * (v - slope * h.detach()).square().mean((0, 1)).sum(), [slope])
    assert rejects(torch.stack([draw(estimator) for _ in range(60)]), direct)


def test_sticking_the_landing_is_for_one_particle():
    v = torch.randn(4, 3)
    problem = prepare(structured_model, structured_guide, (v,))
    leaves = [*problem.model_parameters.trainable(), *problem.guide_parameters.trainable()]

    def draw(estimator):
        bound = importance_weighted_bound(problem.densities[0], 1, 300, estimator)
        return gradient(-bound.loss, leaves)

    apart = [draw(vh.StickingTheLanding()) - draw(vh.Pathwise()) for _ in range(40)]
    assert_mean(torch.stack(apart), 0.0)
    with pytest.raises(InputError, match=r"biased for num_particles=2"):
        ImportanceWeightedELBO(2, gradient=vh.StickingTheLanding())


def test_an_objective_reports_each_units_bound_with_its_error():
    case = linear_gaussian()
    objective = ImportanceWeightedELBO(10, num_replicates=100)
    loss = objective.loss(case.model, case.guide, *case.data)
    report = objective.latest
    assert report.side == "lower" and report.acceptance is None
    assert float(report.per_unit.values.sum()) == pytest.approx(-loss)
    z = (report.per_unit.values - case.exact) / report.per_unit.mc_errors
    assert float(z.max()) < Z and "lower bound" in str(report)
    one = ImportanceWeightedELBO(200)
    one.loss(case.model, case.guide, *case.data)
    assert bool(torch.isfinite(one.latest.per_unit.mc_errors).all())
    alone = ImportanceWeightedELBO(1)
    alone.loss(case.model, case.guide, *case.data)
    assert bool(torch.isinf(alone.latest.per_unit.mc_errors).all()), "one weight has no error"
