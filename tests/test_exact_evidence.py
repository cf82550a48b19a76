"""Log evidence as an objective: values, gradients, minibatches, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyro_vharm import (
    ExactEvidence,
    InputError,
    Kind,
    Particles,
    Quadrature,
    UnresolvedIntegralError,
)
from pyro_vharm.objectives import exact
from pyro_vharm.particles import heaviest
from tests.zoo import beta_binomial, linear_gaussian, two_modes
from tests.zoo.discrete import class_in_guide, gaussian_mixture
from tests.zoo.sequences import hidden_markov

INITIAL = torch.tensor([[1.0, 0.4, -0.3], [0.2, -0.5, 0.8]], dtype=torch.float64)


def factor_model(dim):
    """h ~ N(0, I), v | h ~ N(Wᵀh, s²), with W and s learned."""

    def model(v):
        weight = pyro.param("weight", lambda: INITIAL[:dim].clone())
        noise = pyro.param("noise", lambda: v.new_tensor(0.7), constraint=constraints.positive)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(dim), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ weight, noise).to_event(1), obs=v)

    return model


def factor_evidence(v):
    """Log p(v_u) of `factor_model` at its parameters, by algebra."""
    weight, noise = pyro.param("weight"), pyro.param("noise")
    covariance = weight.T @ weight + noise**2 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), covariance).log_prob(v)


def leaves(*names):
    return [pyro.param(name).unconstrained() for name in names]


CASES = {
    beta_binomial: Kind.NUMERICAL,
    linear_gaussian: Kind.NUMERICAL,
    two_modes: Kind.NUMERICAL,
    gaussian_mixture: Kind.EXACT,
    hidden_markov: Kind.EXACT,
    class_in_guide: Kind.NUMERICAL,
}


@pytest.mark.parametrize(("make", "kind"), CASES.items())
def test_the_value_is_the_log_evidence_of_each_unit(make, kind):
    case = make()
    objective = ExactEvidence()
    loss = objective.loss(case.model, case.guide, *case.data)
    report = objective.latest
    assert report.side == "exact" and report.per_unit.kind == kind
    assert (report.per_unit.errors == 0).all() == (kind is Kind.EXACT)
    assert float(report.per_unit.errors.max()) < 1e-5
    torch.testing.assert_close(report.per_unit.values, case.exact, atol=1e-6, rtol=0)
    assert loss == pytest.approx(-float(case.exact.sum()), abs=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_the_gradient_is_that_of_the_closed_form(dim, kind):
    v, model = 2.0 * torch.randn(4, 3), factor_model(dim)
    guide = kind(model)
    ExactEvidence(unit_plate="units")(model, guide)(v).backward()
    found = [leaf.grad for leaf in leaves("weight", "noise")]
    expected = torch.autograd.grad(-factor_evidence(v).sum(), leaves("weight", "noise"))
    torch.testing.assert_close(found, list(expected), atol=1e-6, rtol=1e-6)
    assert all(p.grad is None for p in guide.parameters())


def test_passes_of_bounded_memory_change_nothing(monkeypatch):
    v, model = 2.0 * torch.randn(4, 3), factor_model(2)
    guide = AutoNormal(model)

    def gradients():
        pyro.set_rng_seed(1)
        loss = ExactEvidence()(model, guide)(v)
        return torch.autograd.grad(loss, leaves("weight", "noise"))

    guide(v)
    whole, sizes = gradients(), []
    monkeypatch.setattr(exact, "_ELEMENTS_PER_PASS", 2000)
    split = exact.checkpoint
    monkeypatch.setattr(exact, "checkpoint", lambda *a, **k: sizes.append(1) or split(*a, **k))
    torch.testing.assert_close(gradients(), whole)
    assert len(sizes) > 3


def test_nodes_that_weigh_nothing_are_left_out():
    """A unit that needs fewer nodes than others repeats its heaviest: log p may be −∞ elsewhere."""
    run = Particles(
        unconstrained=torch.arange(4.0)[:, None, None].expand(4, 2, 1),
        log_weights=torch.tensor([[0.0, -math.inf], [0.0, 1.0], [1.0, -1.0], [-40.0, -math.inf]]),
        kind=Kind.NUMERICAL,
    )
    nodes, shares = heaviest(run)
    assert nodes[:, 0, 0].tolist()[0] == 2.0 and set(nodes[1:, 0, 0].tolist()) == {0.0, 1.0}
    assert nodes[:, 1, 0].tolist() == [1.0, 2.0, 1.0]
    torch.testing.assert_close(shares.sum(0), torch.ones(2))
    assert float(shares[2, 1]) == 0.0


def test_minibatches_are_scaled_outside_the_logarithm():
    v = 2.0 * torch.randn(20, 3)

    def model(v):
        weight = pyro.param("weight", lambda: INITIAL[:1].clone())
        noise = pyro.param("noise", lambda: v.new_tensor(0.7), constraint=constraints.positive)
        with pyro.plate("units", 20, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(1), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ weight, noise).to_event(1), obs=v)

    def guide(v):
        with pyro.plate("units", 20, subsample_size=len(v)):
            pyro.sample("h", dist.Normal(v[:, :1], 1.0).to_event(1))

    objective = ExactEvidence()
    loss = objective.loss_and_grads(model, guide, v[:5])
    assert loss == pytest.approx(-4.0 * float(factor_evidence(v[:5]).detach().sum()), abs=1e-4)
    found = [leaf.grad for leaf in leaves("weight", "noise")]
    value = -4.0 * factor_evidence(v[:5]).sum()
    torch.testing.assert_close(found, list(torch.autograd.grad(value, leaves("weight", "noise"))))
    assert len(objective.latest.per_unit.values) == 5


def mixture_model(v):
    """z ~ Cat(π), v | z ~ N(m_z, 0.8²), with π and m learned."""
    weights = pyro.param("weights", lambda: torch.ones(2) / 2, constraint=constraints.simplex)
    means = pyro.param("means", lambda: torch.tensor([-0.5, 0.6]))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("v", dist.Normal(means[z], 0.8), obs=v)


def mixture_by_em(v, num_steps=300):
    """The log evidence that EM ends at."""
    weights, means = torch.ones(2) / 2, torch.tensor([-0.5, 0.6])
    for _ in range(num_steps):
        log_joint = weights.log() + dist.Normal(means, 0.8).log_prob(v[:, None])
        shares = log_joint.softmax(-1)
        weights, means = shares.mean(0), (shares * v[:, None]).sum(0) / shares.sum(0)
    log_joint = weights.log() + dist.Normal(means, 0.8).log_prob(v[:, None])
    return float(log_joint.logsumexp(-1).sum())


def no_guide(v):
    pass


def test_svi_and_a_torch_optimizer_reach_the_optimum_of_em():
    v = torch.cat([0.8 * torch.randn(60) - 1.5, 0.8 * torch.randn(30) + 2.0])
    best = mixture_by_em(v)
    svi = SVI(mixture_model, no_guide, pyro.optim.Adam({"lr": 0.1}), loss=ExactEvidence())
    losses = [svi.step(v) for _ in range(150)]
    assert -losses[-1] == pytest.approx(best, abs=1e-3)
    assert -losses[0] < best - 1.0

    pyro.clear_param_store()
    loss = ExactEvidence()(mixture_model, no_guide)
    loss(v)
    optimizer = torch.optim.LBFGS(leaves("weights", "means"), line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(v)
        value.backward()
        return value

    optimizer.step(closure)
    assert -float(loss(v).detach()) == pytest.approx(best, abs=1e-3)


def test_svi_trains_the_model_and_leaves_the_guide():
    v, model = 2.0 * torch.randn(50, 3), factor_model(1)

    def guide(v):
        slope = pyro.param("slope", v.new_tensor(0.3))
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(slope * v[:, :1], 0.8).to_event(1))

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=ExactEvidence())
    first = svi.step(v)
    assert max(svi.step(v) for _ in range(4)) < first
    assert float(pyro.param("slope").detach()) == 0.3
    assert pyro.param("slope").grad is None


def test_too_many_dimensions_are_refused_at_the_first_call():
    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(4), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    with pytest.raises(InputError, match=r"at most 3 .* not 4; train on a bound"):
        ExactEvidence().loss(model, AutoNormal(model), torch.randn(3))


def test_an_unresolved_unit_raises_an_error_that_names_it():
    v, pace, width = torch.tensor([0.0, 0.5]), torch.tensor([1.0, 50.0]), torch.tensor([1.0, 1e-7])

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal((pace * h).sin(), width), obs=v)

    objective = ExactEvidence(quadrature=Quadrature(max_nodes=512))
    with pytest.raises(UnresolvedIntegralError, match=r"1 of 2 units \(the first is unit 1"):
        objective.loss(model, AutoNormal(model), v)
    assert issubclass(UnresolvedIntegralError, ArithmeticError)
