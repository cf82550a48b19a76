"""The importance-weighted bound: its value, its gradients, and subsampling."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vharm import ImportanceWeightedELBO, InputError
from pyro_vharm.model.data import Batch
from pyro_vharm.model.guide_runs import run_guide
from pyro_vharm.model.model_runs import run_model
from pyro_vharm.model.problem import prepare
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
        bound = importance_weighted_bound(
            structured_model,
            structured_guide,
            Batch((v,)),
            problem.densities[0].structure,
            num_particles,
            500,
        )
        return gradient(bound.surrogate, leaves)

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
    structure = problem.densities[0].structure
    bound = importance_weighted_bound(normal_model, guide, Batch((v,)), structure, 8, 3)
    assert float(gradient(bound.surrogate, [slope]).abs()) < 1e-9
    assert float(gradient(pathwise(problem, 8, 3), [slope]).abs()) > 1e-3


@pytest.mark.parametrize("make", [make for make in BASICS if make is not two_modes])
def test_the_bound_is_below_the_evidence_and_rises_with_particles(make):
    case = make()
    problem = prepare(case.model, case.guide, case.data)

    def bounds(num_particles):
        draws = [
            importance_weighted_bound(
                case.model,
                case.guide,
                problem.batches[0],
                problem.densities[0].structure,
                num_particles,
                50,
            ).values.sum()
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

    def shared_model(v):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(slope * h, 1.0), obs=v)

    def shared_guide(v):
        slope = pyro.param("slope", torch.tensor(0.4))
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(slope * v, 1.0))

    with pytest.raises(InputError, match=r"shares the parameters \['slope'\]"):
        ImportanceWeightedELBO(2).loss_and_grads(shared_model, shared_guide, torch.ones(3))

    def unreparameterised(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", NoReparameterisation(0.0 * v, 1.0))

    class NoReparameterisation(dist.Normal):
        has_rsample = False

    with pytest.raises(InputError, match="cannot be reparameterised"):
        ImportanceWeightedELBO(2).loss_and_grads(shared_model, unreparameterised, torch.ones(3))
