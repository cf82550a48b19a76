"""Memory beside data and results does not grow with the units."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.inference import annealing, sequential
from pyro_vharm.model import checks
from pyro_vharm.model.problem import prepare
from pyro_vharm.particles import Particles, by_blocks, join_units, log_mean_exp, replicate_totals
from tests.live_tensors import most_bytes

DIM, PARTICLES, FEW, MANY, BLOCK = 3, 8, 1_000, 2_000, 250
START = vh.MatchedStart(refit=False)
KERNEL = vh.HamiltonianKernel(2)
ANNEALING = vh.AnnealedImportanceSampling(
    PARTICLES, num_steps=1, start=START, kernel=KERNEL, num_settling=1
)
SEQUENTIAL = vh.SequentialMonteCarlo(PARTICLES, num_groups=2, num_sweeps=1, kernel=KERNEL)
PER_UNIT = 8 * (PARTICLES * (DIM + 2) + 4)  # latents, weights each way, fields and an index


def model(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(DIM), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)


def amortised(v):
    """Draws that lie where the posterior is, by a function of each unit's data."""
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(pyro.param("slope", torch.tensor(0.5)) * v, 0.8).to_event(1))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (annealing, sequential):
        monkeypatch.setattr(module, "_ROWS_AT_ONCE", BLOCK * PARTICLES)
    monkeypatch.setattr(checks, "_UNITS_AT_ONCE", BLOCK)


def bytes_per_unit(function):
    """By how much the most bytes alive at once grow with each unit more."""
    data = [torch.randn(num_units, DIM) for num_units in (FEW, MANY)]
    few, many = (most_bytes(lambda: function(v)) for v in data)  # noqa: B023
    return (many - few) / (MANY - FEW)


def evidence_by(method, guide=None):
    options = {"guide": guide, "method": method, "confirmation": None, "progress": False}
    return lambda v: vh.log_evidence(model, (v,), **options)


@pytest.mark.parametrize("method", [ANNEALING, SEQUENTIAL], ids=["annealing", "sequential"])
def test_no_unit_more_takes_more_than_its_results(method):
    guide = amortised if method is ANNEALING else None
    assert bytes_per_unit(evidence_by(method, guide)) < 1.1 * PER_UNIT


def some_parts(num_units, size):
    for units in torch.arange(num_units).split(size):
        latents, log_weights = torch.zeros(PARTICLES, size, DIM), torch.zeros(PARTICLES, size)
        yield units, Particles(latents, log_weights, vh.Kind.ESTIMATED)


def test_parts_are_not_held_twice():
    num_units, size = 10_000, 100
    results = 8 * num_units * PARTICLES * (DIM + 1)
    join = lambda parts: join_units(parts, num_units)  # noqa: E731
    assert most_bytes(lambda: join(some_parts(num_units, size))) < 1.2 * results
    kept = most_bytes(lambda: join(list(some_parts(num_units, size))))
    assert kept > 1.9 * results, "a wrong twin: parts that are kept until they are joined"


def test_numbers_per_unit_are_made_of_some_units_at_a_time():
    """And are the same as of all at once."""
    log_weights = torch.randn(PARTICLES, 50_000)
    assert torch.equal(by_blocks(log_mean_exp, log_weights), log_mean_exp(log_weights))
    groups = log_mean_exp(log_weights.reshape(2, -1, 50_000), dim=1).sum(-1)
    assert torch.allclose(replicate_totals(log_weights, 2), groups)
    whole, apart = (
        most_bytes(lambda: f(log_weights))  # noqa: B023
        for f in (log_mean_exp, lambda weights: by_blocks(log_mean_exp, weights))
    )
    assert apart < 0.4 * whole


def test_all_units_at_once_take_many_times_as_much(monkeypatch):
    """A wrong twin."""
    monkeypatch.setattr(annealing, "_ROWS_AT_ONCE", 2**30)
    assert bytes_per_unit(evidence_by(ANNEALING)) > 4 * PER_UNIT


def test_checks_are_made_of_some_units_at_a_time(monkeypatch):
    def checked(v):
        return prepare(model, amortised, (v,))

    apart = bytes_per_unit(checked)
    monkeypatch.setattr(checks, "_UNITS_AT_ONCE", 2**30)
    assert apart < 0.4 * bytes_per_unit(checked), "a wrong twin: of all at once"
