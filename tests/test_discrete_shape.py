"""Posteriors of discrete latents: exact by counting, and from weighted particles of the others."""

from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_vharm as vh
from pyro_vharm.diagnostics.discrete_shape import measure_discrete
from pyro_vharm.model.configurations import list_configurations
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import Particles
from tests.statistics import Z, assert_mean, rejects
from tests.zoo.discrete import (
    class_above_latent,
    classes_in_inner_plate,
    gaussian_mixture,
    mixture_of_priors,
    noisy_or,
    some_labels,
)
from tests.zoo.sequences import hidden_markov

QUIET = {"progress": False}


def shape_of(case, **options):
    found = vh.posterior_shape(case.model, case.data, guide=case.guide, **options, **QUIET)
    return found.discrete


def entropy(probabilities, dim=-1):
    return torch.special.entr(probabilities).sum(dim)


def test_classes_of_a_mixture():
    case = gaussian_mixture()
    (v,) = case.data
    components = dist.Normal(torch.tensor([-1.5, 0.3, 2.2]), torch.tensor([0.6, 0.3, 1.1]))
    exact = (torch.tensor([0.5, 0.2, 0.3]).log() + components.log_prob(v[:, None])).softmax(-1)
    shape = shape_of(case)
    assert torch.allclose(shape.entropy.values, entropy(exact))
    assert torch.allclose(shape.total_correlation.values, torch.zeros(4), atol=1e-12)
    assert torch.allclose(shape.probabilities.values, exact.sort(-1, descending=True).values)
    assert torch.equal(shape.configurations[..., 0], exact.argsort(-1, descending=True))
    assert shape.entropy.kind is vh.Kind.EXACT and float(shape.entropy.errors.max()) == 0.0


def test_explaining_away_makes_causes_depend_on_each_other():
    """All eight configurations of three causes, by hand."""
    case = noisy_or()
    (v,) = case.data
    causes = list(product([0.0, 1.0], repeat=3))

    def log_joint(values):
        names = dict(zip(("c_1", "c_2", "c_3"), values, strict=True))
        fixed = {name: torch.full((len(v),), value) for name, value in names.items()}
        trace = pyro.poutine.trace(pyro.condition(case.model, fixed)).get_trace(v)
        trace.compute_log_prob()
        return sum(trace.nodes[name]["log_prob"] for name in (*names, "v"))

    exact = torch.stack([log_joint(values) for values in causes], -1).softmax(-1)
    marginals = [
        torch.stack([exact[:, [c[k] == x for c in causes]].sum(-1) for x in (0.0, 1.0)], -1)
        for k in range(3)
    ]
    shape = shape_of(case)
    assert shape.labels == ("c_1", "c_2", "c_3")
    assert torch.allclose(shape.entropy.values, entropy(exact))
    dependence = sum(entropy(marginal) for marginal in marginals) - entropy(exact)
    assert torch.allclose(shape.total_correlation.values, dependence)
    assert float(dependence.min()) > 0.001
    top = torch.tensor(causes)[exact.argmax(-1)]
    assert torch.equal(shape.configurations[:, 0].double(), top)
    assert "most probable configuration" in str(shape)


@pytest.mark.parametrize("make", [classes_in_inner_plate, hidden_markov, some_labels])
def test_configurations_sum_to_the_evidence(make):
    case = make()
    problem = prepare(case.model, case.guide, case.data)
    densities = problem.densities[0]
    listed = list_configurations(densities)
    with torch.no_grad():
        log_joint = listed.log_joint(densities, torch.empty(1, densities.num_units, 0))
    assert torch.allclose(log_joint[0].logsumexp(0), case.exact)
    assert shape_of(case).probabilities.values.shape[0] == densities.num_units


def exact_classes():
    """P(z = 1 | v) of `class_above_latent`, its continuous latent integrated out."""
    v, probs, loc, scale, _ = mixture_of_priors()
    marginal = dist.Normal(loc, (scale**2 + 0.8**2).sqrt()).log_prob(v.unsqueeze(-1))
    return (probs.log() + marginal).softmax(-1)


@pytest.mark.parametrize(
    "method", [None, vh.ImportanceSampling(1024)], ids=["quadrature", "importance"]
)
def test_continuous_latents_are_integrated_out(method):
    """In units where both classes are seen: a rare one rests on few particles."""
    exact = exact_classes()
    seen = exact.amin(-1) > 0.02
    assert int(seen.sum()) == 3
    shape = shape_of(class_above_latent(), method=method)
    off = (shape.entropy.values - entropy(exact)).abs()
    assert bool((off < Z * shape.entropy.errors + 1e-6)[seen].all())
    values, errors = shape.probabilities
    off = (values - exact.sort(-1, descending=True).values).abs()
    assert bool((off < Z * errors + 1e-6)[seen].all())


def test_weights_count_and_errors_are_right():
    """Many repetitions as units: particles of h from a proposal that is too wide."""
    v, _, _, _, _ = mixture_of_priors()
    case, count, repeats = class_above_latent(), 32, 400
    data = v[1:2].repeat(repeats)
    densities = prepare(case.model, None, (data,)).densities[0]
    proposal = dist.Normal(0.0, 2.5)
    latents = proposal.sample((count, repeats, 1))
    with torch.no_grad():
        log_weights = densities.log_joint(latents) - proposal.log_prob(latents)[..., 0]
    listed = list_configurations(densities)

    def found(weights):
        run = Particles(latents, weights, vh.Kind.ESTIMATED)
        return measure_discrete(densities, run, listed)

    exact = exact_classes()[1]
    right, flat = found(log_weights), found(torch.zeros_like(log_weights))
    assert_mean(right.probabilities.values[:, 0], exact.max())
    assert rejects(flat.probabilities.values[:, 0], exact.max()), "without weights"
    ratio = right.probabilities.errors[:, 0].square().mean().sqrt()
    assert 0.7 < float(ratio / right.probabilities.values[:, 0].std()) < 1.5


def test_too_many_configurations_are_not_listed():
    def model(v, level):
        with pyro.plate("units", len(v), dim=-2):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0)) if level else 0.0
            with pyro.plate("items", 13, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.4))
                pyro.sample("v", dist.Normal(z + h, 1.0), obs=v)

    v = torch.randn(2, 13)
    with pytest.raises(vh.InputError, match="more than 4096 configurations"):
        vh.posterior_shape(model, (v, False), **QUIET)
    found = vh.posterior_shape(model, (v, True), **QUIET)
    assert found.discrete is None and found.continuous is not None

    def endless(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            z = pyro.sample("z", dist.Binomial(torch.tensor([1.0, 2.0]), 0.5))
            pyro.sample("v", dist.Normal(z + h, 1.0), obs=v)

    with pytest.raises(vh.InputError, match="'z'"):
        vh.posterior_shape(endless, (torch.ones(2),), **QUIET)


def test_discrete_shapes_in_a_tree(tmp_path):
    case = noisy_or()
    found = vh.posterior_shape(case.model, case.data, guide=case.guide, **QUIET)
    tree = vh.to_datatree(found)
    assert tree["discrete_shape"]["configuration"].dims == ("unit", "rank", "element")
    assert tree["discrete_shape"]["element"].values.tolist() == ["c_1", "c_2", "c_3"]
    tree.to_zarr(tmp_path / "shape.zarr", mode="w", consolidated=False)
    with xr.open_datatree(tmp_path / "shape.zarr", engine="zarr", consolidated=False) as read:
        xr.testing.assert_identical(
            read["discrete_shape"].to_dataset(), tree["discrete_shape"].to_dataset()
        )
