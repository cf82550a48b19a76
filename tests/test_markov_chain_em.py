"""Markov chain EM: its gradients against the exact score, its chains, and what it reports."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal, AutoStructured

import pyro_vharm as vh
from pyro_vharm.model import compilation
from pyro_vharm.model.data import Batch
from pyro_vharm.model.problem import checked_densities, prepare
from tests.statistics import Z, assert_mean, rejects
from tests.zoo import linear_gaussian

V = torch.tensor([0.5, -1.5, 2.5, 3.0], dtype=torch.float64)
LONG = 12
SHORT_ORBITS = vh.HamiltonianKernel(num_leapfrog=3)


def model(v):
    """h ~ N(0, s²), v | h ~ N(h, 1), so v ~ N(0, 1 + s²)."""
    scale = pyro.param("scale", v.new_tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), scale))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def guide(v):
    """A shift of more than a posterior standard deviation, and too narrow."""
    slope = pyro.param("slope", v.new_tensor(0.1))
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(slope * v + 0.5, 0.5))


def gradients(objective, densities, leaves, count):
    def draw():
        return torch.stack(torch.autograd.grad(-objective.evaluate(densities).loss, leaves))

    return torch.stack([draw() for _ in range(count)])


def exact_gradients(log_scale):
    """The score for log s, and that of Σ E_{p(h|v)}[log q] for the guide's slope."""
    variance = (2 * log_scale).exp()
    evidence = dist.Normal(0.0, (1 + variance).sqrt()).log_prob(V).sum()
    (score,) = torch.autograd.grad(evidence, log_scale)
    mean = (variance / (1 + variance) * V).detach()
    return torch.stack([score, (V * (mean - 0.1 * V - 0.5) / 0.25).sum()])


def test_gradients_come_near_the_exact_ones_as_transitions_are_added():
    problem = prepare(model, guide, (V,))
    leaves = [problem.model_parameters.leaves["scale"], problem.guide_parameters.leaves["slope"]]
    exact = exact_gradients(leaves[0].detach().clone().requires_grad_())
    found = {}
    for count in (1, 3, LONG):
        objective = vh.MarkovChainEM(200, num_transitions=count, kernel=SHORT_ORBITS)
        objective.evaluate(problem.densities[0])
        found[count] = gradients(objective, problem.densities[0], leaves, 15)
    assert_mean(found[LONG], exact)
    assert rejects(found[1], exact), "one transition from a poor guide is not enough"
    errors = [(found[count].mean(0) - exact).abs() for count in (1, 3, LONG)]
    assert bool((errors[0] > errors[1]).all() and (errors[1] > errors[2]).all()), errors


def test_what_it_reports_is_above_the_evidence_by_the_inclusive_kl():
    case = linear_gaussian()
    objective = vh.MarkovChainEM(400, num_transitions=LONG)
    loss = objective.loss(case.model, case.guide, *case.data)
    report = objective.latest
    assert report.side == "upper" and report.per_unit.kind is vh.Kind.CONDITIONAL
    above = (report.per_unit.values - case.exact) / report.per_unit.mc_errors
    assert float(above.min()) > -Z and float(above.max()) > Z, "the guide is no posterior"
    assert report.acceptance.shape == case.exact.shape and float(report.acceptance.min()) > 0.5
    assert isinstance(loss, float) and "upper bound" in str(report)


def test_persistent_chains_need_few_transitions():
    problem = prepare(model, guide, (V,))
    leaves = [problem.model_parameters.leaves["scale"], problem.guide_parameters.leaves["slope"]]
    exact = exact_gradients(leaves[0].detach().clone().requires_grad_())
    objective = vh.MarkovChainEM(50, num_transitions=1, chains=vh.PersistentChains())
    for _ in range(LONG):
        objective.evaluate(problem.densities[0])
    found = gradients(objective, problem.densities[0], leaves, 200)
    blocks = found.reshape(20, 10, 2).mean(1)  # neighbours in a chain are correlated
    assert_mean(blocks, exact)
    anew = vh.MarkovChainEM(50, num_transitions=1)
    anew.evaluate(problem.densities[0])
    assert rejects(
        gradients(anew, problem.densities[0], leaves, 200).reshape(20, 10, 2).mean(1), exact
    )


def indexed_model(v, index):
    model(v)


def indexed_guide(v, index):
    guide(v)


def test_persistent_chains_follow_their_units_through_minibatches():
    chains, kept = vh.PersistentChains(index="index"), None

    def densities(units):
        batch = Batch((V[units],), {"index": units})
        return checked_densities(indexed_model, indexed_guide, batch, None)

    for units in (torch.tensor([2, 0]), torch.tensor([3, 0])):
        part, new = densities(units), torch.full((3, 2, 1), -1.0)
        begun = chains.begin(part, new, kept)
        kept = chains.keep(part, units[:, None] + torch.arange(3.0)[:, None, None], kept)
    assert begun[:, 0].eq(-1).all(), "unit 3 is new"
    assert begun[:, 1, 0].tolist() == [0.0, 1.0, 2.0], "unit 0 goes on"
    assert kept.known.tolist() == [True, False, True, True]
    assert chains.begin(densities(torch.tensor([2])), new[:, :1], kept).flatten().tolist() == [
        2,
        3,
        4,
    ]


def subsampled_model(v):
    with pyro.plate("units", len(v), subsample_size=2) as index:
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), pyro.param("scale", v.new_tensor(1.5))))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v[index])


def subsampled_guide(v):
    with pyro.plate("units", len(v), subsample_size=2) as index:
        pyro.sample("h", dist.Normal(0.4 * v[index], pyro.param("width", v.new_tensor(0.8))))


def test_a_plate_that_subsamples_scales_the_gradient_and_names_the_units():
    objective = vh.MarkovChainEM(20, num_transitions=10, chains=vh.PersistentChains(index="units"))
    draws = []
    for _ in range(300):
        objective.loss_and_grads(subsampled_model, subsampled_guide, V)
        draws.append(-pyro.param("scale").grad.clone())
        pyro.param("scale").grad.zero_()
    log_scale = torch.tensor(1.5).log().requires_grad_()
    exact = exact_gradients(log_scale)[0] / 1.5
    blocks = torch.stack(draws[20:]).reshape(20, 14).mean(1)
    assert_mean(blocks, exact)
    assert rejects(blocks / 2, exact), "the plate's scale is 2"
    (carried,) = objective._carried.values()
    assert carried.kept.known.all() and carried.kept.latents.shape == (20, 4, 1)


def test_without_an_index_other_data_are_refused():
    objective = vh.MarkovChainEM(2, num_transitions=1, chains=vh.PersistentChains())
    objective.loss(model, guide, V)
    objective.loss(model, guide, V)
    with pytest.raises(vh.InputError, match="this call has other data; pass index="):
        objective.loss(model, guide, V + 1)
    for index, message in (
        ("nowhere", "must name an argument or subsampled plate that holds integers; known are"),
        (0, "must name an argument or subsampled plate that holds integers"),
    ):
        chains = vh.PersistentChains(index=index)
        objective = vh.MarkovChainEM(2, num_transitions=1, chains=chains)
        with pytest.raises(vh.InputError, match=message):
            for _ in range(2):
                objective.loss(model, guide, V)


@pytest.mark.parametrize("kind", [AutoNormal, pytest.param(AutoStructured, marks=pytest.mark.slow)])
def test_svi_and_a_torch_optimizer_reach_the_maximum(kind):
    v = 2.0 * torch.randn(300)
    exact = float((v.square().mean() - 1).sqrt())
    auto = kind(model)
    objective = vh.MarkovChainEM(4, num_transitions=3)
    svi = SVI(model, auto, pyro.optim.Adam({"lr": 0.05}), objective)
    reached = []
    for _ in range(250):
        svi.step(v)
        reached.append(float(pyro.param("scale").detach()))
    average = sum(reached[100:]) / 150  # single steps of a fixed size wander
    assert abs(average - exact) < 0.08 * exact
    assert pyro.get_param_store()["scale"].requires_grad
    samples = Predictive(model, guide=auto, num_samples=400)(v)["h"]
    wanted = v * exact**2 / (1 + exact**2)
    slack = 1.0 if kind is AutoStructured else 0.5
    assert float((samples.mean(0) - wanted).abs().mean()) < slack, "the guide follows"

    loss = objective(model, auto)(v)
    loss.backward()
    assert all(p.grad is not None for p in auto.parameters())


def test_a_graph_is_dropped_when_what_the_model_closes_over_changes(monkeypatch):
    monkeypatch.setattr(compilation, "_WORTH_TRACING", 0.0)
    monkeypatch.setattr(compilation, "_FEW_CALLS", 0)
    noise = {"scale": 1.0}

    def closing(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 2.0))
            pyro.sample("v", dist.Normal(h, noise["scale"]), obs=v)

    objective = vh.MarkovChainEM(200, num_transitions=LONG, steps_ahead=2)
    objective.loss(closing, guide, V)
    (carried,) = objective._carried.values()
    assert [moves.trajectory.form for moves in carried.moves.values()] == ["graph"]
    noise["scale"] = 0.1
    objective.loss(closing, guide, V)
    exact = dist.Normal(0.0, (4 + 0.01) ** 0.5).log_prob(V)
    posterior = dist.Normal(V * 4 / 4.01, (4 * 0.01 / 4.01) ** 0.5)
    kl = torch.distributions.kl_divergence(posterior, dist.Normal(0.1 * V + 0.5, 0.5))
    report = objective.latest.per_unit
    assert float(((report.values - exact - kl) / report.mc_errors).abs().max()) < Z


def test_wrong_arguments():
    with pytest.raises(vh.InputError, match="num_transitions must be at least 1, not 0"):
        vh.MarkovChainEM(num_transitions=0)
    with pytest.raises(vh.InputError, match="num_particles must be at least 1, not 0"):
        vh.MarkovChainEM(0)

    def coin(v):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Bernoulli(v.new_tensor(0.3)))
            pyro.sample("v", dist.Normal(z, 1.0), obs=v)

    def nothing(v):
        pass

    for _ in range(2):  # also at the second call
        with pytest.raises(vh.InputError, match="use ExactEvidence"):
            vh.MarkovChainEM().loss(coin, nothing, V)

    def sharing(v):
        width = pyro.param("scale", v.new_tensor(1.5), constraint=dist.constraints.positive)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v, width))

    objective = vh.MarkovChainEM()
    for _ in range(2):
        with pytest.raises(vh.InputError, match=r"shares the parameters \['scale'\]"):
            objective.loss(model, sharing, V)


def test_one_particle_has_no_error():
    objective = vh.MarkovChainEM(1, num_transitions=1)
    objective.loss(model, guide, V)
    assert bool(torch.isinf(objective.latest.per_unit.mc_errors).all())
