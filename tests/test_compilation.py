"""Graphs and compiled functions: when they are made, kept, dropped, and what else is done."""

import functools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vharm as vh
from pyro_vharm.model import compilation
from pyro_vharm.model.compilation import accelerate, compiled, eager, traced
from pyro_vharm.model.problem import prepare
from tests.zoo import BASICS

MANY = 10**9
V = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """And few calls count, so that short runs can show what long ones do."""
    monkeypatch.setattr(compilation, "_FEW_CALLS", 0)
    vh.forget_compiled()
    yield
    vh.forget_compiled()


@pytest.fixture
def to_graphs(monkeypatch):
    """Long work is traced and never compiled, which takes seconds."""
    monkeypatch.setattr(compilation, "_WORTH_COMPILING", float("inf"))


OFFSET = {"value": torch.tensor(0.0, dtype=torch.float64)}


def model(v):
    noise = pyro.param("noise", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(OFFSET["value"], 1.0))
        pyro.sample("v", dist.Normal(h.sin(), noise), obs=v)


def log_joint(densities, latents):
    return (densities.log_joint(latents),)


def densities_of(model, v=V):
    return prepare(model, None, (v,)).densities[0]


LATENTS = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(4, 3, 1)


def same(first, second):
    return torch.allclose(first(LATENTS)[0], second(LATENTS)[0])


def test_little_work_runs_eager_and_nothing_is_kept():
    assert accelerate(log_joint, densities_of(model), (LATENTS,), 1).form == "eager"
    assert not compilation._GRAPHS


def test_few_calls_are_not_even_timed(monkeypatch):
    """However dear each is: tracing takes longer than they could save."""
    monkeypatch.undo()
    monkeypatch.setattr(compilation, "_WORTH_TRACING", 0.0)
    monkeypatch.setattr(compilation, "_WORTH_COMPILING", float("inf"))
    calls, few = [], compilation._FEW_CALLS

    def counted(densities, latents):
        calls.append(1)
        return log_joint(densities, latents)

    densities = densities_of(model)
    assert accelerate(counted, densities, (LATENTS,), few - 1).form == "eager" and not calls
    assert accelerate(counted, densities, (LATENTS,), few).form == "graph"


def test_long_work_is_traced_and_the_graph_kept_for_batches_of_one_shape(to_graphs):
    densities = densities_of(model)
    first = accelerate(log_joint, densities, (LATENTS,), MANY)
    assert first.form == "graph" and same(first, eager(log_joint, densities))
    other = densities_of(model, V + 1.0)
    again = accelerate(log_joint, other, (LATENTS,), 1)
    assert again.call is first.call, "little work, but the graph is there"
    assert same(again, eager(log_joint, other)) and not same(again, first)
    assert same(first, eager(log_joint, densities)), "the first still has its own data"
    longer = densities_of(model, torch.ones(4))
    latents = torch.zeros(4, 4, 1)
    assert accelerate(log_joint, longer, (latents,), 1).form == "eager", "another shape"


def test_parameters_may_change_in_place_or_be_replaced(to_graphs):
    densities = densities_of(model)
    first = accelerate(log_joint, densities, (LATENTS,), MANY)
    with torch.no_grad():
        pyro.param("noise").unconstrained().add_(1.0)
    assert same(first, eager(log_joint, densities)), "a step in place is seen"
    pyro.get_param_store()["noise"] = torch.tensor(0.2)
    again = accelerate(log_joint, densities, (LATENTS,), MANY)
    assert again.call is not first.call and same(again, eager(log_joint, densities))


def test_what_a_model_closes_over_may_be_replaced(to_graphs):
    densities = densities_of(model)
    first = accelerate(log_joint, densities, (LATENTS,), MANY)
    try:
        OFFSET["value"] = torch.tensor(3.0)
        again = accelerate(log_joint, densities, (LATENTS,), MANY)
        assert again.call is not first.call and same(again, eager(log_joint, densities))
    finally:
        OFFSET["value"] = torch.tensor(0.0, dtype=torch.float64)


def test_few_graphs_are_kept(to_graphs, monkeypatch):
    monkeypatch.setattr(compilation, "_MOST_KEPT", 2)
    densities = densities_of(model)
    for count in range(1, 5):
        accelerate(log_joint, densities, (torch.zeros(count, 3, 1),), MANY)
    assert len(compilation._GRAPHS) == 2
    vh.forget_compiled()
    assert not compilation._GRAPHS


def value_dependent(v):
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
        scale = 1.0 if float(h.detach().sum()) < 1e9 else 2.0
        pyro.sample("v", dist.Normal(h, scale), obs=v)


def test_control_flow_on_values_runs_eager_with_one_warning(to_graphs):
    densities = densities_of(value_dependent)
    with pytest.raises(RuntimeError, match="data-dependent"):
        traced(log_joint, densities, (LATENTS,))
    with pytest.warns(vh.UncompiledWarning, match="runs eager, as traced fails"):
        found = accelerate(log_joint, densities, (LATENTS,), MANY)
    assert found.form == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(log_joint, densities, (LATENTS,), MANY).form == "eager"


def test_without_a_compiler_the_graph_runs_with_one_warning(monkeypatch):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    densities = densities_of(model)
    with pytest.warns(vh.UncompiledWarning, match="runs graph, as compiled fails.*no working"):
        found = accelerate(log_joint, densities, (LATENTS,), MANY)
    assert found.form == "graph" and same(found, eager(log_joint, densities))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(log_joint, densities, (LATENTS,), MANY).form == "graph"


def test_a_tensor_given_twice_is_two_inputs():
    def difference(densities, first, second):
        return (densities.log_joint(first) - densities.log_joint(second),)

    densities = densities_of(model)
    graph = traced(difference, densities, (LATENTS, LATENTS))
    plain = eager(difference, densities)
    other = LATENTS + 1.0
    assert torch.allclose(graph(LATENTS, other)[0], plain(LATENTS, other)[0])
    assert not torch.allclose(graph(LATENTS, other)[0], torch.zeros(()))


def test_random_operations_are_no_graph():
    def noisy(densities, latents):
        return (densities.log_joint(latents) + torch.randn_like(latents[..., 0]),)

    with pytest.raises(RuntimeError, match="is random"):
        traced(noisy, densities_of(model), (LATENTS,))


def test_models_without_a_hash_are_not_kept(to_graphs):
    class Unhashable:
        __hash__ = None

        def __call__(self, v):
            model(v)

    found = accelerate(log_joint, densities_of(Unhashable()), (LATENTS,), MANY)
    assert found.form == "graph" and not compilation._GRAPHS


def test_bound_methods_and_partials_are_models(to_graphs):
    class Holder:
        def model(self, v):
            model(v)

    holder = Holder()
    first = accelerate(log_joint, densities_of(holder.model), (LATENTS,), MANY)
    again = accelerate(log_joint, densities_of(holder.model), (LATENTS,), 1)
    assert again.call is first.call
    partial = functools.partial(model)
    assert accelerate(log_joint, densities_of(partial), (LATENTS,), MANY).form == "graph"


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_compiled_annealing_gives_the_numbers_of_eager_annealing(monkeypatch):
    """Fed the same random numbers, as those stay outside of what is compiled.

    The run is short: along a long one, differences of rounding grow until a proposal is accepted
    in one and not in the other.
    """

    def linear(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(1.5 * h, 0.8), obs=v)

    method = vh.AnnealedImportanceSampling(
        num_particles=4,
        num_steps=2,
        kernel=vh.HamiltonianKernel(2),
        num_settling=1,
        start=vh.MatchedStart(refit=False),
    )
    runs = {}
    for form, limits in {"eager": (MANY, MANY), "compiled": (0.0, 0.0)}.items():
        monkeypatch.setattr(compilation, "_WORTH_TRACING", limits[0])
        monkeypatch.setattr(compilation, "_WORTH_COMPILING", limits[1])
        runs[form] = vh.log_evidence(linear, (V,), method=method, confirmation=None, progress=False)
    assert {kept.form for kept in compilation._GRAPHS.values()} == {"compiled"}
    values = [run.per_unit.values for run in runs.values()]
    assert torch.allclose(*values, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_compiled_functions_see_steps_in_place():
    densities = densities_of(model)
    fast = compiled(log_joint, densities, (LATENTS,))
    assert fast.form == "compiled" and same(fast, eager(log_joint, densities))
    with torch.no_grad():
        pyro.param("noise").unconstrained().add_(0.5)
    assert same(fast, eager(log_joint, densities))


@pytest.mark.parametrize("form", [traced, compiled])
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_inputs_and_data_may_have_any_strides(form):
    """A graph holds for the strides it was traced with, so it is given one kind of them."""

    def pairs(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ v.new_ones(2, 3), 1.0).to_event(1), obs=v)

    v = torch.randn(3, 5).T
    densities = densities_of(pairs, v)
    latents = torch.randn(4, 5, 2)
    fast = form(log_joint, densities, (latents,))
    strided = torch.randn(2, 5, 4).permute(2, 1, 0)
    for at in (latents, strided, latents.flip(0)):
        assert torch.allclose(fast(at)[0], eager(log_joint, densities)(at)[0])


@pytest.mark.parametrize("make", BASICS, ids=lambda make: make.__name__)
def test_annealing_on_graphs_gives_the_numbers_of_eager_annealing(monkeypatch, make):
    """A graph runs the same operations, whatever the strides of the draws.

    Without a pilot that chooses by comparing numbers, where rounding may decide otherwise.
    """
    case = make()
    method = vh.AnnealedImportanceSampling(
        num_particles=4,
        num_steps=2,
        kernel=vh.HamiltonianKernel(2),
        start=vh.MatchedStart(refit=False),
        schedule=vh.LinearSchedule(),
    )
    runs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vh.JointUnitWarning)
        for limit in (MANY, 0.0):
            monkeypatch.setattr(compilation, "_WORTH_TRACING", limit)
            monkeypatch.setattr(compilation, "_WORTH_COMPILING", float("inf"))
            sandwich = vh.bdmc(
                case.model, case.data, guide=case.guide, method=method, progress=False
            )
            runs.append((sandwich.lower, sandwich.upper))
    assert any(kept.form == "graph" for kept in compilation._GRAPHS.values())
    for eager_side, graph_side in zip(*runs, strict=True):
        assert torch.allclose(eager_side, graph_side, rtol=1e-6)


def test_graphs_do_not_outlive_a_call_in_which_what_they_rest_on_may_change(monkeypatch):
    """In single precision a small change is less than any tolerance sees."""
    monkeypatch.setattr(compilation, "_WORTH_TRACING", 0.0)
    monkeypatch.setattr(compilation, "_WORTH_COMPILING", float("inf"))
    held = {"bonus": 0.0}

    def closing(v):
        pyro.factor("bonus", v.new_tensor(held["bonus"]))
        h = pyro.sample("h", dist.Normal(v.new_zeros(3), 1.0).to_event(1))
        pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    v = torch.tensor([50.0, -30.0, 20.0], dtype=torch.float32)
    method = vh.AnnealedImportanceSampling(
        4, num_steps=2, start=vh.MatchedStart(refit=False), schedule=vh.LinearSchedule()
    )
    values = []
    for bonus in (0.0, 0.5):
        held["bonus"] = bonus
        evidence = vh.log_evidence(closing, (v,), method=method, confirmation=None, progress=False)
        values.append(float(evidence.per_unit.values[0]))
    assert values[1] - values[0] == pytest.approx(0.5, abs=1e-2)


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_compiled_code_outlives_a_call_where_the_graph_is_the_same(monkeypatch):
    monkeypatch.setattr(compilation, "_WORTH_COMPILING", 0.0)
    densities = densities_of(model)
    first = accelerate(log_joint, densities, (LATENTS,), MANY)
    monkeypatch.setattr(compilation, "current_call", lambda: 10**6)
    assert accelerate(log_joint, densities, (LATENTS,), 1).form == "eager", "not worth a trace"
    again = accelerate(log_joint, densities, (LATENTS,), MANY)
    assert again.call is first.call and again.form == "compiled"
    monkeypatch.setattr(compilation, "current_call", lambda: 10**6 + 1)
    monkeypatch.setitem(OFFSET, "value", torch.tensor(1e-9, dtype=torch.float64))
    other = accelerate(log_joint, densities, (LATENTS,), MANY)
    assert other.call is not first.call, "another constant, however near"
