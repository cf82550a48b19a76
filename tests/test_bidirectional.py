"""Bidirectional Monte Carlo: sides, widths, and that the exact draws are those of the data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal

import pyro_vharm as vh
from pyro_vharm.inference import bidirectional
from tests.statistics import Z
from tests.zoo import linear_gaussian, linear_gaussian_evidence

METHOD = vh.AnnealedImportanceSampling(num_particles=8, num_steps=5, kernel=vh.HamiltonianKernel(3))


def test_bounds_lie_on_their_sides_and_close_in():
    case = linear_gaussian(num_units=400)
    wide, narrow = (
        vh.bdmc(case.model, case.data, guide=case.guide, method=method, progress=False)
        for method in (
            vh.AnnealedImportanceSampling(
                2, 1, kernel=vh.HamiltonianKernel(1), start=vh.MatchedStart(refit=False)
            ),
            METHOD,
        )
    )
    for sandwich in (wide, narrow):
        error = float(sandwich.widths.std()) / 20.0
        assert float(sandwich.widths.mean()) > -Z * error
        assert sandwich.total_lower().value < sandwich.total_upper().value
    assert 0 < float(narrow.widths.mean()) < 0.1 < float(wide.widths.mean())
    assert "400 simulated units" in str(narrow) and "no guarantee" in str(narrow)
    assert str(narrow.total_upper().kind) == "certified"
    assert "; acceptance" in str(narrow) and bool((narrow.acceptance > 0.5).all())
    assert "; acceptance" not in str(wide), "with one temperature nothing moves"


def test_bounds_enclose_the_exact_evidence_of_the_simulated_data():
    case = linear_gaussian(num_units=400)
    options = {"guide": case.guide, "method": METHOD, "progress": False, "seed": 3}
    sandwich = vh.bdmc(case.model, case.data, **options)
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        simulate = bidirectional.simulate_batch

        def remember(*args):
            drawn.append(simulate(*args))
            return drawn[-1]

        patch.setattr(bidirectional, "simulate_batch", remember)
        again = vh.bdmc(case.model, case.data, **options)
    assert torch.equal(again.lower, sandwich.lower) and torch.equal(again.upper, sandwich.upper)
    ((batch, _),) = drawn
    exact = linear_gaussian_evidence(*batch.args)
    for side, bound in ((1.0, exact - sandwich.lower), (1.0, sandwich.upper - exact)):
        assert side * float(bound.mean()) > -Z * float(bound.std()) / 20.0
        assert float(bound.mean()) < 0.05


def test_draws_of_other_units_are_seen(monkeypatch):
    """A wrong twin, latents that did not make these data: the upper bound falls below the lower."""
    case = linear_gaussian(num_units=400)
    simulate = bidirectional.simulate_batch

    def mixed_up(*args):
        batch, simulation = simulate(*args)
        simulation.latents["h"].copy_(simulation.latents["h"].roll(1, 0).clone())
        return batch, simulation

    monkeypatch.setattr(bidirectional, "simulate_batch", mixed_up)
    short = vh.AnnealedImportanceSampling(8, 1, kernel=vh.HamiltonianKernel(1))
    sandwich = vh.bdmc(case.model, case.data, guide=case.guide, method=short, progress=False)
    assert float(sandwich.widths.mean()) < -Z * float(sandwich.widths.std()) / 20.0


def test_batches_and_declared_parameters():
    def model(v):
        level = pyro.sample("level", dist.Normal(v.new_zeros(()), 5.0))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(level, 1.0))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    v = torch.full((30,), 20.0)
    guide = AutoGuideList(model)
    guide.append(AutoDelta(poutine.block(model, expose=["level"])))
    guide.append(AutoNormal(poutine.block(model, expose=["h"])))
    guide(v)
    with torch.no_grad():
        next(p for n, p in guide.named_parameters() if "level" in n).fill_(20.0)
    options = {"method": METHOD, "parameters": ["level"], "progress": False}
    sandwich = vh.bdmc(model, (v,), guide=guide, **options)
    likely = float(dist.Normal(0.0, 1.25**0.5).entropy())
    assert abs(float(sandwich.lower.mean()) + likely) < 1.0, "data are drawn around the level"
    case = linear_gaussian(num_units=6)
    parts = vh.bdmc(case.model, list(case.data[0].split(4)), method=METHOD, progress=False)
    assert parts.lower.shape == (6,)


def test_what_bdmc_cannot_do():
    case = linear_gaussian()
    with pytest.raises(vh.InputError, match="AnnealedImportanceSampling back from exact draws"):
        vh.bdmc(case.model, case.data, method=vh.Quadrature(), progress=False)

    def discrete(v):
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Bernoulli(v.new_tensor(0.5)))
            pyro.sample("v", dist.Normal(z, 1.0), obs=v)

    with pytest.raises(vh.InputError, match="all latents are discrete"):
        vh.bdmc(discrete, (torch.ones(3),), progress=False)
