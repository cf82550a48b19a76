"""Parameters as values, in every regime: capture, set, restore, difference, gradient, files."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pyro_vharm as vh
from pyro_vharm.model.problem import prepare
from pyro_vharm.objectives.importance_weighted import importance_weighted_bound
from tests.learners import importance_weighted
from tests.statistics import assert_mean
from tests.zoo.parameters import MAKERS

QUICK = vh.Refit(num_steps=30, num_particles=100)
V = torch.tensor([0.5, -1.5, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_values_can_be_moved_and_restored_in_every_regime(make):
    case = make()
    problem = prepare(case.model, case.guide, case.data)
    theta, densities = problem.model_parameters, problem.densities[0]
    assert theta.leaves, "this case has parameters"
    with torch.no_grad():
        latents = densities.draw_latents(2)
    before, at_first = theta.values(), densities.log_joint(latents).detach()
    steps = {name: 0.1 * torch.randn_like(value) for name, value in before.items()}
    with theta.at({name: value + steps[name] for name, value in before.items()}):
        change = theta.change(before)
        assert all(torch.allclose(change[name], steps[name], atol=1e-6) for name in steps)
        assert not torch.allclose(densities.log_joint(latents), at_first)
    assert torch.equal(densities.log_joint(latents), at_first)
    natural = theta.constrained()
    with theta.at(theta.unconstrain(natural, "values")):
        again = theta.constrained()
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in natural.items())


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_files_hold_tensors_and_no_code(make, tmp_path):
    case = make()
    theta = prepare(case.model, case.guide, case.data).model_parameters
    before = theta.values()
    theta.save(tmp_path / "theta.pt")
    plain = torch.load(tmp_path / "theta.pt", weights_only=True)
    assert plain.keys() == before.keys()
    theta.assign({name: value + 1.0 for name, value in before.items()})
    theta.load(tmp_path / "theta.pt")
    assert all(torch.equal(value, before[name]) for name, value in theta.values().items())


def test_a_file_of_other_parameters_is_refused(tmp_path):
    def model(v, size=2):
        pyro.param("a", torch.zeros(size))

    theta = vh.capture_parameters(model, (V,))
    torch.save({"b": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(vh.InputError, match=r"missing \['a'\], unknown \['b'\]"):
        theta.load(tmp_path / "other.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "longer.pt")
    with pytest.raises(vh.InputError, match=r"'a' with shape \(3,\), the parameter has \(2,\)"):
        theta.load(tmp_path / "longer.pt")


class Scaled(PyroModule):
    """v ~ N(0, 1 + scale²) with a constrained scale and a plain slope that is not used."""

    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), self.scale + 0 * self.unused.sum()))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def exact(unconstrained, v):
    variance = 1 + (2 * unconstrained).exp()
    return dist.Normal(0.0, variance.sqrt()).log_prob(v).sum()


@pytest.mark.parametrize("local", [False, True], ids=["global params", "local params"])
def test_the_gradient_of_a_bound_is_one_named_structure(local):
    """With the exact posterior as guide, every draw of ∇L is centred on ∇ℓ by Fisher's identity."""
    with pyro.settings.context(module_local_params=local):
        model = Scaled()

        def guide(v):
            scale = model.scale.detach()
            precision = 1 + scale**-2
            with pyro.plate("units", len(v)):
                pyro.sample("h", dist.Normal(v / precision, precision**-0.5))

        problem = prepare(model, guide, (V,))
        theta = problem.model_parameters
        leaf = next(leaf for name, leaf in theta.leaves.items() if "scale" in name)
        wanted = torch.autograd.grad(exact(leaf, V), leaf)[0]

        def draw():
            bound = importance_weighted_bound(problem.densities[0], 1, 50)
            return theta.gradient(-bound.loss)

        gradients = [draw() for _ in range(50)]
    assert gradients[0].keys() == theta.leaves.keys()
    (name,) = (name for name in theta.leaves if "scale" in name)
    assert_mean(torch.stack([g[name] for g in gradients]), wanted)
    (other,) = (name for name in theta.leaves if "unused" in name)
    assert torch.equal(gradients[0][other], torch.zeros(2))


def test_the_gradient_of_exact_evidence():
    def model(v):
        weights = pyro.param(
            "weights", torch.tensor([0.3, 0.7]), constraint=dist.constraints.simplex
        )
        with pyro.plate("units", len(v)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("v", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=v)

    problem = prepare(model, None, (V,))
    theta, densities = problem.model_parameters, problem.densities[0]
    evidence = densities.log_joint(torch.empty(1, 3, 0)).sum()
    found = theta.gradient(evidence)["weights"]
    leaf = theta.leaves["weights"].detach().requires_grad_()
    weights = torch.distributions.transform_to(dist.constraints.simplex)(leaf)
    parts = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(V[:, None])
    (wanted,) = torch.autograd.grad((parts + weights.log()).logsumexp(-1).sum(), leaf)
    assert torch.allclose(found, wanted)
    with pytest.raises(vh.InputError, match="no parameter that requires a gradient"):
        theta.gradient(torch.zeros(()))


def leveled(v):
    """A global level with prior N(0, 2²) and local latents."""
    level = pyro.sample("level", dist.Normal(v.new_zeros(()), 2.0))
    noise = pyro.param("noise", torch.tensor(0.5), constraint=dist.constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(level, 1.0))
        pyro.sample("v", dist.Normal(h, noise), obs=v)


def level_guide(v):
    guide = AutoGuideList(leveled)
    guide.append(AutoDelta(poutine.block(leveled, expose=["level"])))
    guide.append(AutoNormal(poutine.block(leveled, expose=["h"])))
    guide(v)
    return guide


def leveled_evidence(v, level, noise):
    prior = dist.Normal(0.0, 2.0).log_prob(level)
    return float(dist.Normal(level, (1 + noise**2) ** 0.5).log_prob(v).sum() + prior)


def test_point_masses_may_be_declared_as_parameters():
    guide = level_guide(V)
    problem = prepare(leveled, guide, (V,), parameters=["level"])
    assert any("level" in name for name in problem.model_parameters.leaves)
    assert "noise" in problem.model_parameters.leaves
    assert not any("level" in name for name in problem.guide_parameters.leaves)
    (level,) = (leaf for name, leaf in problem.model_parameters.leaves.items() if "level" in name)
    whole = vh.log_evidence(leveled, (V,), guide=guide, parameters=["level"], progress=False)
    expected = leveled_evidence(V, level.detach(), 0.5)
    assert whole.per_unit.total().value == pytest.approx(expected, abs=1e-6)
    options = {"parameters": ["level"], "refit": QUICK, "progress": False}
    gap = vh.inference_gap(leveled, guide, (V,), **options)
    assert gap.gap.total().value > 0, "the density of the level cancels in the gap"


def test_a_reference_moves_declared_parameters_too():
    v = torch.tensor([2.0, 3.0, 4.5, 3.5])
    guide = level_guide(v)
    options = {"parameters": ["level"], "progress": False}
    learner = importance_weighted(num_steps=150, learning_rate=0.05, guide_steps=5)
    reference = vh.learn_reference(leveled, (v,), guide=guide, learner=learner, **options)
    harm = vh.learning_harm(leveled, guide, (v,), reference=reference, refit=QUICK, **options)
    (level,) = (value for name, value in reference.parameters.items() if "level" in name)
    reached = leveled_evidence(v, level, reference.parameters["noise"])
    assert harm.train.reference.per_unit.total().value == pytest.approx(reached, abs=1e-4)
    assert harm.harm.value > 1.0
    names = sorted(reference.parameters)
    assert len(names) == 2


def test_heldout_evidence_has_no_prior_of_parameters():
    guide = level_guide(V)
    problem = prepare(leveled, guide, (V,), parameters=["level"])
    held = prepare(problem.model, None, (V,), parameters=["level"], heldout=True)
    with torch.no_grad():
        h = torch.randn(2, 3, 1)
        train, test = (p.densities[0].log_joint(h) for p in (problem, held))
        (level,) = (x for name, x in problem.model_parameters.leaves.items() if "level" in name)
        share = dist.Normal(0.0, 2.0).log_prob(level) / 3
    assert torch.allclose(train - test, share.expand(2, 3))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("level", "must be a list of site names"),
        (["h"], r"\['h'\] are not"),
        (["nothing"], r"\['nothing'\] are not"),
    ],
)
def test_other_sites_are_no_parameters(names, message):
    guide = level_guide(V)
    with pytest.raises(vh.InputError, match=message):
        vh.log_evidence(leveled, (V,), guide=guide, parameters=names, progress=False)
    with pytest.raises(vh.InputError, match="needs the guide"):
        vh.log_evidence(leveled, (V,), parameters=["level"], progress=False)


def test_declared_sites_inside_the_unit_plate_count_with_their_own_units():
    """b of each unit is a point: log p(v | b) + log p(b), whatever the batches."""

    def model(v):
        with pyro.plate("units", len(v)):
            b = pyro.sample("b", dist.Normal(v.new_zeros(()), 2.0))
            h = pyro.sample("h", dist.Normal(b, 1.0))
            pyro.sample("v", dist.Normal(h, 0.5), obs=v)

    def guide(v):
        slope = pyro.param("slope", torch.tensor(0.6))
        with pyro.plate("units", len(v)):
            pyro.sample("b", dist.Delta(slope * v))
            pyro.sample("h", dist.Normal(v, 0.5))

    v = torch.tensor([0.5, -1.0, 2.0, 3.0, -0.3])
    b = 0.6 * v
    exact = dist.Normal(b, 1.25**0.5).log_prob(v) + dist.Normal(0.0, 2.0).log_prob(b)
    for data in ((v,), [(v[:3],), (v[3:],)]):
        units = vh.log_evidence(model, data, guide=guide, parameters=["b"], progress=False).per_unit
        assert torch.allclose(units.values, exact, atol=1e-6)
