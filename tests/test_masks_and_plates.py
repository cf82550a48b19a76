"""Masks, subsampling, coupling and enumerated parents: where a wrong number would be silent."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

import pyro_vharm as vh
from pyro_vharm.model.problem import prepare
from pyro_vharm.model.vectorising import by_vmap
from tests.statistics import Z, assert_mean

LENGTHS = torch.tensor([3, 1, 2])
STEPS = torch.tensor([[0.4, -0.9, 1.3], [2.0, 9.0, 9.0], [-1.1, 0.2, 9.0]], dtype=torch.float64)


def chain_evidence(v, length):
    """v_t = x_t + noise, x_t = 0.8 x_{t−1} + N(0, 1), over the steps that are there."""
    covariance = torch.zeros(length, length)
    variance = 1.0
    for t in range(length):
        for s in range(t, length):
            covariance[t, s] = covariance[s, t] = variance * 0.8 ** (s - t)
        variance = 0.64 * variance + 1.0
    covariance = covariance + 0.25 * torch.eye(length)
    return dist.MultivariateNormal(torch.zeros(length), covariance).log_prob(v[:length])


def in_event(fn, present):
    return fn.mask(present).to_event(1)


def on_event(fn, present):
    return fn.to_event(1).mask(present.squeeze(-1))


@pytest.mark.parametrize("masked", [in_event, on_event])
def test_masks_on_the_distributions_of_a_ragged_chain(masked):
    """As Pyro's deep Markov model writes them, on latents and observations alike."""

    def model(v, lengths):
        x = v.new_zeros(1)
        with pyro.plate("units", len(v)):
            for t in range(3):
                present = (t < lengths).unsqueeze(-1)
                loc = (0.8 * x).expand((*x.shape[:-2], len(v), 1))
                x = pyro.sample(f"x_{t}", masked(dist.Normal(loc, v.new_ones(3, 1)), present))
                seen = masked(dist.Normal(x, 0.5), present)
                pyro.sample(f"v_{t}", seen, obs=v[:, t, None])

    def guide(v, lengths):
        with pyro.plate("units", len(v)):
            for t in range(3):
                present = (t < lengths).unsqueeze(-1)
                fn = dist.Normal(0.7 * v[:, t, None], 0.6)
                pyro.sample(f"x_{t}", masked(fn, present))

    exact = torch.stack([chain_evidence(v, n) for v, n in zip(STEPS, LENGTHS, strict=True)])
    options = {"confirmation": None, "progress": False}
    options["method"] = vh.AnnealedImportanceSampling(num_particles=64, num_steps=5)
    for with_guide in (None, guide):
        evidence = vh.log_evidence(model, (STEPS, LENGTHS), guide=with_guide, **options)
        units = evidence.per_unit
        assert bool(((units.values - exact).abs() < Z * units.errors + 0.02).all())
    problem = prepare(model, guide, (STEPS, LENGTHS))
    with torch.no_grad():
        ratio = (problem.densities[0].draw_guide(4000).log_weights - exact).exp()
    assert_mean(ratio, 1.0)
    losses = [Trace_ELBO().loss(model, guide, STEPS, LENGTHS) for _ in range(300)]
    theirs = -torch.tensor(losses)
    with torch.no_grad():
        ours = problem.densities[0].draw_guide(4000).log_weights.sum(1)
    error = torch.hypot(theirs.std() / 300**0.5, ours.std() / 4000**0.5)
    assert abs(float(theirs.mean() - ours.mean())) < Z * float(error)


@pytest.mark.parametrize("where", ["around", "on"])
def test_masked_enumerated_latents_add_nothing(where):
    """A padded class sums to one, however it is masked."""
    v, present = torch.tensor([0.3, 1.0]), torch.tensor([True, False])
    means, weights = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.2, 0.5, 0.3])

    def model(v, present):
        with pyro.plate("units", len(v)):
            if where == "around":
                with poutine.mask(mask=present):
                    z = pyro.sample("z", dist.Categorical(weights))
            else:
                z = pyro.sample("z", dist.Categorical(weights).mask(present))
            pyro.sample("v", dist.Normal(means[z], 1.0).mask(present), obs=v)

    units = vh.log_evidence(model, (v, present), progress=False).per_unit
    seen = (dist.Normal(means, 1.0).log_prob(v[0]) + weights.log()).logsumexp(-1)
    assert torch.allclose(units.values, torch.stack([seen, torch.zeros(())]))
    assert str(units.kind) == "exact"


def test_masks_on_parts_of_events_are_refused():
    def model(v):
        with pyro.plate("units", len(v)):
            part = torch.tensor([[True, False], [True, True]])
            fn = dist.Normal(v.new_zeros(2, 2), 1.0).mask(part).to_event(1)
            h = pyro.sample("h", fn)
            pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    with pytest.raises(vh.InputError, match="the mask on the distribution of 'h' keeps some"):
        vh.log_evidence(model, (torch.ones(2, 2),), progress=False)


def test_a_masked_out_latent_that_is_observed_is_refused():
    def model(v):
        with pyro.plate("units", len(v)):
            keep = torch.tensor([[True], [False]])
            h = pyro.sample("h", dist.Normal(v.new_zeros(2, 1), 1.0).mask(keep).to_event(1))
            pyro.sample("v", dist.Normal(h.squeeze(-1), 1.0), obs=v)

    with pytest.raises(vh.InputError, match="has a say in the density of other sites"):
        vh.log_evidence(model, (torch.ones(2),), progress=False)


@pytest.mark.parametrize("y", [[1.0, 0, 0, 1, 1, 0], [1.0, 1, 1, 1, 1, 1]])
def test_subsampled_plates_are_seen_whatever_the_data(y):
    """Rows that coincide do not hide that the plate picks them."""
    y = torch.tensor(y)

    def model(y):
        with pyro.plate("units", 6, subsample_size=2) as index:
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=h), obs=y[index])

    evidence = vh.log_evidence(model, (y,), progress=False)
    assert evidence.per_unit.num_units == 6
    assert torch.allclose(evidence.per_unit.values, torch.tensor(0.5).log(), atol=1e-6)


def subsampled(v):
    with pyro.plate("units", 8, subsample_size=2) as index:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("v", dist.Normal(b, 0.5), obs=v[index])


def looped_guide(v):
    with pyro.plate("units", 8, subsample_size=2) as index:
        a = pyro.sample("a", dist.Normal(0.4 * v[index], 0.8))
        pyro.sample("b", dist.Normal(0.7 * v[index] + 0.1 * a.reshape(2), 0.6))


@pytest.mark.filterwarnings("ignore::pyro_vharm.LoopedRunsWarning")
def test_objectives_run_guide_and_model_on_the_same_units():
    """Bounds rise with particles and stay below the evidence, also where the guide is looped."""
    v = torch.linspace(-3, 3, 8)
    exact = float(dist.Normal(0.0, 2.25**0.5).log_prob(v).sum())
    means, errors = [], []
    for count, repetitions in ((1, 400), (20, 80)):
        loss = vh.ImportanceWeightedELBO(num_particles=count)
        losses = [loss.loss(subsampled, looped_guide, v) for _ in range(repetitions)]
        draws = -torch.tensor(losses)
        means.append(float(draws.mean()))
        errors.append(float(draws.std()) / repetitions**0.5)
    assert means[1] < exact + Z * errors[1]
    assert means[1] > means[0] - Z * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    assert means[1] > exact - Z * errors[1] - 0.3


def test_units_that_look_at_their_neighbours_are_refused():
    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            following = torch.nn.functional.pad(h[..., 1:], (0, 1))
            pyro.sample("v", dist.Normal(h + 0.9 * following, 0.5), obs=v)

    with pytest.raises(vh.InputError, match="are not independent units"):
        vh.log_evidence(model, (torch.tensor([1.0, -2.0, 0.5, 2.0]),), progress=False)


def test_discrete_auxiliaries_in_the_guide_are_refused():
    """E_q[log p − log q(k, h)] exceeds the evidence by up to the entropy of k."""

    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            k = pyro.sample("k", dist.Bernoulli(0.5 + 0 * v), infer={"is_auxiliary": True})
            pyro.sample("h", dist.Normal(v / 2 + 0.2 * (2 * k - 1), 0.8))

    with pytest.raises(vh.InputError, match=r"discrete auxiliary variables \['k'\]"):
        vh.inference_gap(model, guide, (torch.ones(4),), progress=False)


def switching_ends(v):
    """z picks the end of the interval of h: a support that depends on an enumerated parent."""
    ends = torch.tensor([1.0, 3.0])
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        h = pyro.sample("h", dist.Uniform(0.0, ends[z]))
        pyro.sample("v", dist.Normal(h, 0.5), obs=v)


def test_supports_may_depend_on_enumerated_parents():
    v = torch.tensor([0.4, 2.5, -1.0])
    nodes = torch.linspace(0.0, 3.0, 60001)
    density = dist.Normal(nodes[:, None], 0.5).log_prob(v).exp()
    short = torch.trapezoid(density * (nodes <= 1.0)[:, None], nodes, dim=0)
    exact = (0.3 * short + 0.7 * torch.trapezoid(density, nodes, dim=0) / 3.0).log()
    units = vh.log_evidence(switching_ends, (v,), progress=False).per_unit
    assert (units.values - exact).abs().max() < 1e-3

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Beta(torch.tensor(2.0), 2.0).expand(v.shape))

    with pytest.raises(vh.InputError, match="support of 'h' depends on a discrete latent"):
        vh.inference_gap(switching_ends, guide, (v,), progress=False)


@pytest.mark.filterwarnings("ignore::pyro_vharm.JointUnitWarning")
def test_global_mixtures_that_index_by_class_are_vectorised():
    """locs[z] indexes from the left, so no plate of particles; vmap sums the classes out."""

    def model(v):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("rows", len(v)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("v", dist.Normal(locs[z], 1.0), obs=v)

    v = torch.tensor([1.0, -1.0, 2.0, 0.3])
    densities = prepare(model, None, (v,)).densities[0]
    assert densities.structure.model_runs is by_vmap
    latents = torch.randn(5, 1, 3, requires_grad=True)
    found = densities.log_joint(latents)
    values = densities.constrain(latents)
    weights, locs = values["weights"].reshape(5, 2), values["locs"].reshape(5, 2)
    prior = densities.terms(latents).log_prior[:, 0]
    parts = dist.Normal(locs[:, None], 1.0).log_prob(v[:, None]) + weights.log()[:, None]
    expected = prior + parts.logsumexp(-1).sum(-1)
    assert torch.allclose(found[:, 0], expected)
    ours, theirs = (
        torch.autograd.grad(x.sum(), latents, retain_graph=True)[0] for x in (found, expected)
    )
    assert torch.allclose(ours, theirs)


def test_the_sites_of_an_objective_may_differ_between_kinds_of_calls():
    """Semi-supervised: the class is observed in one call, summed out in the next."""
    means = torch.tensor([-1.0, 2.0])

    def model(v, y=None):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])), obs=y)
            pyro.sample("v", dist.Normal(means[z], 1.0), obs=v)

    def guide(v, y=None):
        pass

    v, y = torch.tensor([0.5, 1.0]), torch.tensor([0, 1])
    parts = dist.Normal(means, 1.0).log_prob(v[:, None]) + torch.tensor([0.4, 0.6]).log()
    loss = vh.ImportanceWeightedELBO(num_particles=2)
    with pytest.raises(vh.InputError, match="no latent"):
        loss.loss(model, guide, v, y)
    assert loss.loss(model, guide, v) == pytest.approx(-float(parts.logsumexp(-1).sum()))
    flag = {"y": None}

    def hidden(v):
        model(v, flag["y"])

    assert loss.loss(hidden, guide, v) == pytest.approx(-float(parts.logsumexp(-1).sum()))
    flag["y"] = y
    with pytest.raises(vh.InputError, match=r"has the latents \[\] in this call and had \['z'\]"):
        loss.loss(hidden, guide, v)


def test_scales_by_element_are_refused():
    def model(v):
        with pyro.plate("units", len(v)), poutine.scale(scale=torch.tensor([1.0, 2.0])):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    with pytest.raises(vh.InputError, match="another factor at each element"):
        vh.log_evidence(model, (torch.ones(2),), progress=False)


def test_a_guide_that_picks_by_indices_the_model_does_not_know_is_refused():
    """Its parameters belong to units of the whole data; the minibatch does not say to which."""

    def model(v):
        with pyro.plate("units", 20, subsample_size=len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        locs = pyro.param("locs", torch.linspace(-1, 1, 20))
        with pyro.plate("units", 20, subsample_size=len(v)) as index:
            pyro.sample("h", dist.Normal(locs[index], 1.0))

    v = torch.ones(4)
    with pytest.raises(vh.InputError, match="to which units the minibatch belongs"):
        vh.inference_gap(model, guide, (v,), progress=False)
    assert vh.log_evidence(model, (v,), progress=False).per_unit.num_units == 4


@pytest.mark.parametrize("seed", range(5))
def test_masked_out_classes_that_are_observed_are_refused_whatever_the_seed(seed):
    def model(v):
        with pyro.plate("units", len(v)):
            with poutine.mask(mask=torch.tensor([True, False])):
                z = pyro.sample("z", dist.Bernoulli(v.new_tensor(0.9)))
            pyro.sample("v", dist.Normal(2 * z, 1.0), obs=v)

    with pytest.raises(vh.InputError, match="has a say in the density of other sites"):
        vh.log_evidence(model, (torch.full((2,), 0.3),), seed=seed, progress=False)
