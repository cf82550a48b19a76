"""Data from the model: exact joint draws, that reach the arguments of the guide too."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.model.problem import prepare
from tests.statistics import assert_mean, rejects
from tests.zoo import LOADINGS, NOISE, linear_gaussian, linear_gaussian_posterior


def test_simulated_latents_are_draws_from_the_posterior_of_simulated_data():
    """Given v, whitened by the exact posterior, h* has mean 0 and covariance I."""
    case = linear_gaussian(repeat=4000)
    drawn = vh.simulate(case.model, case.data, seed=1)
    (v,) = drawn.data
    assert not torch.equal(v, case.data[0])
    posterior = linear_gaussian_posterior(v)
    white = posterior.whiten(drawn.latents["h"][None])[0]
    moments = torch.cat([white, white.square() - 1, white.prod(-1, keepdim=True)], -1)
    assert_mean(moments, 0.0)
    stale = linear_gaussian_posterior(case.data[0]).whiten(drawn.latents["h"][None])[0]
    assert rejects(stale, 0.0), "the data that were observed are others"


def test_the_guide_sees_what_was_simulated():
    case = linear_gaussian(num_units=500)
    drawn = vh.simulate(case.model, case.data)
    densities = prepare(case.model, case.guide, drawn.data).densities[0]
    with torch.no_grad():
        draws = densities.draw_guide(1).latents[0]
    slope = torch.linalg.lstsq(drawn.data[0], draws).solution
    assert (slope - 0.4 * LOADINGS.T / (1.0 + NOISE**2)).abs().max() < 0.1


def keyword_model(*, v, scale):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), scale))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def test_keywords_and_seeds():
    data = {"v": torch.zeros(3), "scale": 2.0}
    first, again, other = (vh.simulate(keyword_model, data, seed=seed) for seed in (0, 0, 1))
    assert first.data.keys() == data.keys() and first.data["scale"] == 2.0
    assert torch.equal(first.data["v"], again.data["v"])
    assert not torch.equal(first.data["v"], other.data["v"])
    assert torch.equal(first.data["v"], first.observed["v"])


def test_what_is_computed_from_an_argument_needs_a_callable():
    def model(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("log v", dist.Normal(h, 1.0), obs=v.log())

    v = torch.tensor([1.0, 2.0])
    with pytest.raises(vh.InputError, match=r"'log v' observes is no argument .* rebuild="):
        vh.simulate(model, (v,))
    drawn = vh.simulate(model, (v,), rebuild=lambda sites, v: (sites["log v"].exp(),))
    assert torch.equal(drawn.data[0].log(), drawn.observed["log v"].exp().log())
    with pytest.raises(vh.InputError, match="rebuild must return a tuple or a Mapping"):
        vh.simulate(model, (v,), rebuild=lambda sites, v: sites["log v"])


def factored(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.factor("likelihood", dist.Normal(h, 1.0).log_prob(v))


def scaled(v):
    with pyro.poutine.scale(scale=0.5), pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def improper(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        flat = dist.ImproperUniform(dist.constraints.real, (), ())
        pyro.sample("w", flat, obs=v)
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def broadcast(v):
    with pyro.plate("units", 3):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def twice(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)
        pyro.sample("w", dist.Normal(h, 2.0), obs=v)


def unobserved(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))


@pytest.mark.parametrize(
    ("model", "v", "message"),
    [
        (factored, torch.ones(2), "the factor 'likelihood' gives a density and no draws"),
        (scaled, torch.ones(2), "'v' is scaled by 0.5"),
        (improper, torch.ones(2), "'w' is improper"),
        (broadcast, torch.ones(1), r"shape \(3,\) where the argument has \(1,\)"),
        (twice, torch.ones(2), "'w' observes is observed twice"),
        (unobserved, torch.ones(2), "no observed site"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_models_that_cannot_simulate_say_why(model, v, message):
    with pytest.raises(vh.InputError, match=message):
        vh.simulate(model, (v.double(),))


def test_one_call_at_a_time():
    with pytest.raises(vh.InputError, match="not 2 batches"):
        vh.simulate(factored, [torch.ones(2), torch.ones(2)])


def lagged(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        lag = torch.nn.functional.pad(v[:, :-1], (1, 0))
        pyro.sample("v", dist.Normal(h.unsqueeze(-1) + 0.8 * lag, 0.3).to_event(1), obs=v)


def test_a_model_that_looks_at_its_data_elsewhere_is_refused():
    """Draws given the old lags would be taken for posterior draws of the new data."""
    with pytest.raises(vh.InputError, match=r"densities of \['v'\] change with the data"):
        vh.simulate(lagged, (torch.full((3, 4), 10.0),))
