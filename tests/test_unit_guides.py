"""A full-rank Gaussian for each unit: its density, nested plates, what it refuses."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_vharm as vh
from benchmarks.continuous_models import two_causes
from pyro_vharm.learning.refit import elbo_over_batches
from pyro_vharm.model.problem import prepare
from tests.statistics import Z


def nested(units_dim):
    """Latents of every shape: in the unit plate alone, with a simplex, and in a plate inside."""
    inner_dim = -3 - units_dim

    def model(x):
        units = pyro.plate("units", x.shape[units_dim], dim=units_dim)
        inner = pyro.plate("inner", x.shape[inner_dim], dim=inner_dim)
        with units:
            h = pyro.sample("h", dist.Normal(0.5, 1.0))
            p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5])))
            with inner:
                s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(h + p[..., 0], s.sum(-1)), obs=x)

    return model


@pytest.mark.parametrize("units_dim", [-1, -2])
def test_without_correlations_it_is_the_mean_field(units_dim):
    """Both at the same locations and scales have the same ELBO, for every unit."""
    x = torch.randn(3, 5) if units_dim == -1 else torch.randn(5, 3)
    model, bounds = nested(units_dim), []
    pyro.clear_param_store()
    plain, full = AutoNormal(model), vh.AutoUnitNormal(model, unit_plate="units")
    problems = [prepare(model, guide, (x,), unit_plate="units") for guide in (plain, full)]
    assert problems[1].densities[0].structure.per_unit
    assert full.loc.shape == (5, 1 + 2 + 3 * 2)
    values = torch.linspace(-0.6, 0.8, 5 * 9).reshape(5, 9)
    order = {"h": values[:, :1], "p": values[:, 1:3], "s": values[:, 3:].reshape(5, 3, 2)}
    with torch.no_grad():
        full.loc = values
        full.scale_tril = torch.diag_embed(0.2 + 0.1 * values.abs())
        for name, part in order.items():
            held = getattr(plain.locs, name)
            if name == "s":
                part = part.movedim(0, 1) if units_dim == -1 else part
            setattr(plain.locs, name, part.reshape(held.shape))
            setattr(plain.scales, name, 0.2 + 0.1 * part.reshape(held.shape).abs())
    for guide in (plain, full):
        problem = prepare(model, guide, (x,), unit_plate="units")
        bounds.append(elbo_over_batches(problem, 4000))
    difference = bounds[1] - bounds[0]
    assert bool((difference.values.abs() < Z * difference.mc_errors).all())
    with torch.no_grad():
        full.loc = values.flip(0)
    other = elbo_over_batches(prepare(model, full, (x,), unit_plate="units"), 4000) - bounds[0]
    assert not bool((other.values.abs() < Z * other.mc_errors).all())


def test_at_the_posterior_every_weight_is_the_evidence():
    case = two_causes(7)
    case.install()
    v, a = case.data[0], case.learned["a"]
    guide = vh.AutoUnitNormal(case.model)
    guide(v)
    precision = torch.eye(2) + a.square()
    with torch.no_grad():
        guide.loc = (v[:, None] * a) @ torch.ones(1, 2) @ precision.inverse()
        guide.scale_tril = torch.linalg.cholesky(precision.inverse()).expand(7, 2, 2).clone()
    densities = prepare(case.model, guide, (v,)).densities[0]
    weights = densities.draw_guide(5).log_weights
    exact = dist.Normal(0.0, (1 + 2 * a.square()).sqrt()).log_prob(v)
    assert torch.allclose(weights, exact.expand(5, 7), atol=1e-9)


def test_its_family_can_be_refitted_to_each_unit():
    case = two_causes(5)
    case.install()
    guide = vh.AutoUnitNormal(case.model, init_scale=0.5)
    refit = vh.Refit(num_steps=100, num_particles=1000)
    gap = vh.inference_gap(case.model, guide, case.data, refit=refit, progress=False)
    approximation = gap.approximation.total()
    assert abs(approximation.value) < Z * approximation.mc_error + 0.05
    assert gap.gap.total().value > 1


def test_without_a_plate_all_latents_are_one_unit():
    def model(x):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(level, torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(h.sum(-1), 1.0), obs=x)

    x = torch.randn(3)
    guide = vh.AutoUnitNormal(model)
    drawn = guide(x)
    assert guide.loc.shape == (7,) and drawn["level"].shape == () and drawn["h"].shape == (3, 2)
    with pytest.warns(vh.JointUnitWarning):
        densities = prepare(model, guide, (x,)).densities[0]
    assert densities.structure.per_unit and densities.draw_guide(4).log_weights.shape == (4, 1)


def test_what_it_refuses():
    x = torch.randn(4)

    def part(x):
        with pyro.plate("units", 10, subsample_size=4):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    with pytest.raises(vh.InputError, match="is subsampled"):
        vh.AutoUnitNormal(part)(x)
    with pytest.raises(vh.InputError, match="does not hold every latent"):
        vh.AutoUnitNormal(two_causes(4).model, unit_plate="other")(x)
    with pytest.raises(vh.InputError, match="must have a latent"):
        vh.AutoUnitNormal(lambda x: None)(x)
    with pytest.raises(vh.InputError, match="init_scale"):
        vh.AutoUnitNormal(part, init_scale=0.0)
