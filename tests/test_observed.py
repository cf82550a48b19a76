"""The data of units by name: of all batches in order, and nothing that is not per unit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vharm.errors import JointUnitWarning
from pyro_vharm.model import observed
from pyro_vharm.model.observed import unit_data
from pyro_vharm.model.problem import prepare

IMAGES = torch.arange(30.0).reshape(5, 6) / 30
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


def draw(images, weights):
    with pyro.plate("units", len(images)):
        h = pyro.sample("h", dist.Normal(images.new_zeros(()), 1.0))
        loc = h[:, None] * weights.sum()
        pyro.sample("images", dist.Normal(loc, 1.0).to_event(1), obs=images)


def named(images, weights, scale=1.0):
    draw(images, weights)


class Module(nn.Module):
    def forward(self, images, *more, **named):
        draw(images, more[0])


def found(model, data):
    return unit_data(prepare(model, None, data))


def test_arguments_whose_first_dim_counts_units():
    for data in ((IMAGES, WEIGHTS, 2.0), {"images": IMAGES, "weights": WEIGHTS}):
        data_of_units = found(named, data)
        assert set(data_of_units) == {"images"} and torch.equal(data_of_units["images"], IMAGES)
    batches = [(IMAGES[:2], WEIGHTS), (IMAGES[2:], WEIGHTS)]
    assert torch.equal(found(named, batches)["images"], IMAGES), "3 weights beside 3 units"
    assert set(found(named, batches)) == {"images"}


def test_modules_and_callables_without_names():
    assert torch.equal(found(Module(), (IMAGES, WEIGHTS))["images"], IMAGES)
    assert torch.equal(found(lambda *args: draw(*args), (IMAGES, WEIGHTS))["args_0"], IMAGES)


def test_nothing_of_a_joint_unit_or_of_large_data(monkeypatch):
    def joint(v):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(v)):
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    problem = prepare(named, None, (IMAGES, WEIGHTS))
    monkeypatch.setattr(observed, "_MOST_ELEMENTS", 29)
    assert unit_data(problem) == {}
    monkeypatch.undo()
    assert set(unit_data(problem)) == {"images"}
    with pytest.warns(JointUnitWarning):
        assert found(joint, (torch.ones(1),)) == {}
