"""Law 9: a diagnostic changes nothing, also when it raises or is interrupted."""

import functools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

import pyro_vharm as vh
from pyro_vharm.model.state import untouched
from tests.learners import importance_weighted

QUICK = importance_weighted(num_particles=2, num_steps=3, guide_steps=2)
SHORT = vh.Refit(num_steps=2, num_particles=4)


class Model(PyroModule):
    """Parameters of every kind: nn.Parameter, PyroParam, pyro.param, pyro.module, a buffer."""

    def __init__(self, decoder):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.noise = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.decoder = decoder
        self.register_buffer("centre", torch.ones(3))

    def forward(self, v):
        slope = pyro.param("slope", torch.tensor(1.3), constraint=constraints.positive)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            loc = slope * self.decoder(h) + self.bias + self.centre
            pyro.sample("v", dist.Normal(loc, self.noise).to_event(1), obs=v)


class Encoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.network = PyroModule[nn.Linear](3, 4)

    def forward(self, v):
        with pyro.plate("units", len(v)):
            loc, log_scale = self.network(v).chunk(2, -1)
            pyro.sample("h", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.fixture
def trained():
    decoder = PyroModule[nn.Linear](2, 3)
    model, guide = Model(decoder), Encoder()
    v = torch.randn(12, 3)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    svi.step(v)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model, guide, v


def snapshot(model, guide):
    store = pyro.get_param_store()
    leaves = dict(store.named_parameters())
    modules = [*model.modules(), *guide.modules()]
    return {
        "names": list(store.keys()),
        "identities": {name: id(leaf) for name, leaf in leaves.items()},
        "values": {name: leaf.detach().clone() for name, leaf in leaves.items()},
        "grads": {name: None if p.grad is None else p.grad.clone() for name, p in leaves.items()},
        "buffers": [b.clone() for m in modules for b in m.buffers()],
        "modes": [m.training for m in modules],
        "random": (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()),
        "validation": (
            pyro.poutine.util.is_validation_enabled(),
            torch.distributions.Distribution._validate_args,
        ),
        "stack": len(pyro.poutine.runtime._PYRO_STACK),
    }


def assert_same(before, after):
    assert before["names"] == after["names"] and before["identities"] == after["identities"]
    for key in ("values", "grads"):
        for name, value in before[key].items():
            other = after[key][name]
            assert (value is None and other is None) or torch.equal(value, other), (key, name)
    assert all(torch.equal(a, b) for a, b in zip(before["buffers"], after["buffers"], strict=True))
    for key in ("modes", "validation", "stack"):
        assert before[key] == after[key], key
    assert before["random"][0] == after["random"][0]
    assert torch.equal(before["random"][1], after["random"][1])
    assert np.array_equal(before["random"][2], after["random"][2])


CALLS = {
    "log_evidence": lambda m, g, v: vh.log_evidence(m, (v,), guide=g, progress=False),
    "inference_gap": lambda m, g, v: vh.inference_gap(
        m, g, (v,), refit=SHORT, families=(vh.FullRank(), vh.Flow(2)), progress=False
    ),
    "learn_reference": lambda m, g, v: vh.learn_reference(
        m, (v,), guide=g, learner=QUICK, progress=False
    ),
    "audit": lambda m, g, v: vh.audit(
        m,
        g,
        (v,),
        heldout=(v[:5],),
        learner=QUICK,
        refit=SHORT,
        num_em_steps=1,
        progress=False,
    ),
    "reachability": lambda m, g, v: vh.reachability(
        m, g, (v,), reference=moved(m, v), num_steps=3, max_rounds=1, refit=SHORT, progress=False
    ),
    "compare_guides": lambda m, g, v: vh.compare_guides(
        m,
        {"mean field": AutoNormal, "full rank": vh.AutoUnitNormal},
        (v,),
        num_seeds=1,
        num_steps=2,
        max_rounds=1,
        progress=False,
    ),
    "posterior_shape": lambda m, g, v: vh.posterior_shape(m, (v,), guide=g, progress=False),
    "diagnose": lambda m, g, v: vh.diagnose(recorded(m, g), (v,), refit=SHORT, progress=False),
    "history": lambda m, g, v: held(recorded(m, g)),
    "from_svi": lambda m, g, v: vh.from_svi(m, g, (v,), num_draws=3, progress=False),
}


def moved(model, v):
    found = vh.capture_parameters(model, (v,)).constrained()
    return {name: value + 0.1 for name, value in found.items()}


def recorded(model, guide):
    recorder = vh.Recorder(model, guide, every=1)
    recorder.record(0)
    other = {name: value + 0.1 for name, value in recorder.history[0].values.items()}
    return recorder.history.appended(vh.Checkpoint(1, other))


def held(history):
    with history.at(1):
        pass


@pytest.mark.parametrize("call", CALLS)
def test_nothing_changes(trained, call):
    before = snapshot(*trained[:2])
    CALLS[call](*trained)
    assert_same(before, snapshot(*trained[:2]))


def test_learning_harm_changes_nothing_and_apply_changes_parameters_only(trained):
    model, guide, v = trained
    reference = CALLS["learn_reference"](model, guide, v)
    before = snapshot(model, guide)
    vh.learning_harm(model, guide, (v,), reference=reference, refit=SHORT, progress=False)
    assert_same(before, snapshot(model, guide))
    reference.apply()
    after = snapshot(model, guide)
    assert before["identities"] == after["identities"]
    assert not torch.equal(before["values"]["slope"], after["values"]["slope"])
    assert torch.allclose(pyro.param("slope").detach(), reference.parameters["slope"])
    assert torch.equal(before["random"][1], after["random"][1])


@pytest.mark.parametrize("after_calls", [3, 40, 90, 200])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_audit_leaves_everything(trained, after_calls, error):
    model, guide, v = trained
    calls = 0

    def interrupting(v):
        nonlocal calls
        calls += 1
        if calls > after_calls:
            raise error("stop")
        model(v)

    before = snapshot(model, guide)
    with pytest.raises((error, vh.InputError)):
        vh.audit(interrupting, guide, (v,), learner=QUICK, refit=SHORT, progress=False)
    assert_same(before, snapshot(model, guide))


def test_parameters_that_were_never_made_are_not_left_behind():
    def model(v):
        slope = pyro.param("slope", torch.tensor(1.0))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(slope * h, 1.0), obs=v)

    vh.log_evidence(model, (torch.ones(3),), progress=False)
    assert not pyro.get_param_store().keys()


def test_the_check_itself_can_fail(trained):
    model, guide, _ = trained
    before = snapshot(model, guide)
    with torch.no_grad():
        model.bias += 1.0
    with pytest.raises(AssertionError):
        assert_same(before, snapshot(model, guide))


def test_untouched_uses_its_seed():
    draws = []
    for _ in range(2):
        with untouched(7):
            draws.append(torch.randn(3))
    assert torch.equal(*draws)


def test_an_audit_is_the_same_for_the_same_seed_whatever_came_before(trained):
    first = CALLS["audit"](*trained)
    torch.randn(100)
    second = CALLS["audit"](*trained)
    assert str(first) == str(second)


def test_global_weights_with_priors_are_one_joint_unit():
    v, x = torch.randn(9), torch.randn(9, 2)

    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 1, bias=False)
            prior = dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2)
            self.linear.weight = PyroSample(prior)

        def forward(self, x, v=None):
            mean = (x * self.linear.weight[..., 0, :]).sum(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("v", dist.Normal(mean, 0.5), obs=v)

    model = Regression()
    guide = AutoNormal(model)
    guide(x, v)
    with pytest.warns(vh.JointUnitWarning, match=r"plate 'data' misses \['linear.weight'\]"):
        evidence = vh.log_evidence(model, {"x": x, "v": v}, guide=guide, progress=False)
    covariance = x @ x.T + 0.25 * torch.eye(9)
    exact = dist.MultivariateNormal(torch.zeros(9), covariance).log_prob(v)
    assert float((evidence.per_unit.values - exact).abs()) < 1e-6


def normal(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def test_a_guide_that_never_ran_is_left_as_it_was_made():
    guide = AutoNormal(normal)
    before = dict(guide.__dict__), set(guide._modules)
    vh.log_evidence(normal, (torch.ones(3),), guide=guide, progress=False)
    assert guide.prototype_trace is None
    assert (dict(guide.__dict__), set(guide._modules)) == before
    assert not pyro.get_param_store().keys()
    guide(torch.ones(5))
    assert guide.locs.h.shape == (5,), "it can still be set up for other data"


class Counting(nn.Module):
    """Counts its calls in an attribute and in a buffer, and remembers its last input."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, h):
        self.calls += 1
        self.count += 1
        self.last = h
        return h


@pytest.mark.parametrize("held_by", ["closure", "method", "partial", "handler"])
def test_modules_that_count_their_calls_do_not_count_ours(held_by):
    network = Counting()

    def model(v, network=network):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(network(h), 1.0), obs=v)

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def model(self, v):
            model(v, self.network)

    def closing(v):
        model(v, network)

    models = {
        "closure": closing,
        "method": Holder().model,
        "partial": functools.partial(model, network=network),
        "handler": pyro.poutine.block(closing, hide_types=["param"]),
    }
    network(torch.ones(2))
    vh.log_evidence(models[held_by], (torch.ones(3),), progress=False)
    assert network.calls == 1 and float(network.count) == 1.0
    assert torch.equal(network.last, torch.ones(2))


def test_graphs_that_the_user_holds_stay_valid(trained):
    model, guide, v = trained
    loss = pyro.infer.Trace_ELBO().differentiable_loss(model, guide, v)
    vh.log_evidence(model, (v,), guide=guide, progress=False)
    loss.backward()


@pytest.mark.parametrize("container", [dict, list])
def test_modules_in_containers_are_found(container):
    network = Counting()
    networks = {"net": network} if container is dict else [network]
    key = "net" if container is dict else 0

    class Plain:
        def __init__(self):
            self.networks = networks

        def model(self, v):
            with pyro.plate("units", len(v)):
                h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
                pyro.sample("v", dist.Normal(self.networks[key](h), 1.0), obs=v)

    vh.log_evidence(Plain().model, (torch.ones(3),), progress=False)
    assert network.calls == 0 and float(network.count) == 0.0


COUNTED = Counting()


class CallsByName:
    def __call__(self, v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(COUNTED(h), 1.0), obs=v)


def calls_in_a_lambda(v):
    network = lambda h: COUNTED(h)  # noqa: E731
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        pyro.sample("v", dist.Normal(network(h), 1.0), obs=v)


@pytest.mark.parametrize("model", [CallsByName(), calls_in_a_lambda])
def test_modules_named_in_inner_code_are_found(model):
    vh.log_evidence(model, (torch.ones(3),), progress=False)
    assert COUNTED.calls == 0 and float(COUNTED.count) == 0.0
