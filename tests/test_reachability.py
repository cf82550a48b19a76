"""Pull, path and what was not converged, against exact values and where nothing is lost."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints

import pyro_vharm as vh
from benchmarks.continuous_models import factor_analysis, sign_symmetric, two_causes
from benchmarks.discrete_models import mixture
from benchmarks.exact_optima import maximise
from tests.learners import importance_weighted
from tests.statistics import SEED, Z

SHORT = vh.Refit(num_steps=60, num_particles=400)
PARTS = ("harm", "pull", "path", "unconverged", "rest")


def exact_elbo(model, guide, v):
    """Minus L of `two_causes` in closed form, so that its training has no noise."""
    a, slopes, scales = (pyro.param(name) for name in ("a", "slopes", "scales"))
    mean = v[:, None] * slopes
    squares = (v - a * mean.sum(-1)).square() + a.square() * scales.square().sum()
    fit = -0.5 * (math.log(2 * math.pi) + squares)
    divergence = 0.5 * (mean.square() + scales.square() - 1 - 2 * scales.log()).sum(-1)
    return (divergence - fit).sum()


def quickly(model, guide, data, **settings):
    defaults = {"refit": SHORT, "seed": SEED, "progress": False}
    return vh.reachability(model, guide, data, **defaults | settings)


def adam(rate):
    return pyro.optim.Adam({"lr": rate})


@pytest.fixture(scope="module")
def causes():
    torch.set_default_dtype(torch.float64)
    return two_causes(60)


@pytest.fixture(scope="module")
def few():
    """For what does not depend on numbers."""
    torch.set_default_dtype(torch.float64)
    return two_causes(10)


def without_noise(causes, **settings):
    defaults = {"objective": exact_elbo, "num_steps": 250, "optimizer": adam(0.02)}
    reference = {"reference": causes.best}
    return quickly(causes.model, causes.guide, causes.data, **reference | defaults | settings)


def test_from_the_best_parameters_pull_is_the_known_harm(causes):
    causes.install()
    found = without_noise(causes)
    known = causes.lost_at(causes.learned)
    assert known > 3
    assert found.harm.value == pytest.approx(known, abs=1e-5)
    assert found.pull.value == pytest.approx(known, abs=0.02)
    assert abs(found.path.value) < 0.02 and abs(found.unconverged.value) < 0.02
    assert found.pulled.objective.value == pytest.approx(causes.bound, abs=1e-3)
    assert float(found.pulled.parameters["a"]) == pytest.approx(
        float(causes.learned["a"]), abs=1e-3
    )
    assert found.rise.value > 1 and found.training.ending.converged
    told = found.sentences()
    assert len(told) == 1 and told[0].startswith("The objective drives the model away")


def test_the_gap_at_the_reference_is_the_known_one(causes):
    causes.install()
    found = without_noise(causes, num_steps=100, max_rounds=1)
    a = float(causes.best["a"])
    known = 0.5 * 60 * math.log((1 + a**2) ** 2 / (1 + 2 * a**2))
    gap = found.reachability.total()
    assert abs(gap.value - known) < Z * gap.mc_error + 0.05
    assert gap.mc_error < 1


def test_what_was_not_converged_is_told_from_pull(causes):
    """θ̂ from a training that was stopped early: a is far below even the bound's optimum."""
    causes.install()
    pyro.get_param_store()["a"] = torch.tensor(0.5)
    found = without_noise(causes)
    early = causes.lost_at({"a": torch.tensor(0.5)})
    known = causes.lost_at(causes.learned)
    assert found.harm.value == pytest.approx(early, abs=1e-5) and early > 2 * known
    assert found.pull.value == pytest.approx(known, abs=0.02)
    assert found.unconverged.value == pytest.approx(early - known, abs=0.02)
    assert found.path.value == pytest.approx(found.unconverged.value, abs=0.02)
    told = " ".join(found.sentences())
    assert "Training was not converged" in told and "drives the model away" in told
    assert "never got there" not in told


@pytest.mark.parametrize(
    "make", [pytest.param(factor_analysis, marks=pytest.mark.slow), sign_symmetric]
)
def test_pull_of_harmed_models_by_stochastic_training(make):
    case = make(80)
    case.install()
    known = case.lost_at(case.learned)
    objective = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    found = quickly(
        case.model,
        case.guide,
        case.data,
        reference=case.best,
        objective=objective,
        num_steps=150,
        optimizer=lambda leaves: torch.optim.Adam(leaves, lr=0.01),
        max_rounds=3,
    )
    assert found.harm.value == pytest.approx(known, abs=1e-3 + 3 * found.harm.mc_error)
    slack = 0.25 * known + 2 * found.training_noise
    assert abs(found.pull.value - known) < slack < abs(known)
    assert abs(found.path.value) < slack
    assert not abs(found.path.value - known) < slack, "pull and path swapped"


def test_pull_of_a_mixture_whose_units_stay_assigned_is_exact():
    """Training has no noise: the guide's assignments are fixed, and evidence is enumerated."""
    case = mixture(40)
    case.install()
    known = case.lost_at(case.learned)
    found = quickly(
        case.model,
        case.guide,
        case.data,
        reference=case.best,
        num_steps=150,
        max_rounds=4,
        optimizer=adam(0.015),
    )
    assert found.harm.value == pytest.approx(known, abs=1e-6) and known > 2
    assert found.pull.value == pytest.approx(known, abs=0.02)
    assert found.pull.kind is vh.Kind.EXACT and found.pull.mc_error == 0.0
    assert abs(found.path.value) < 0.02 and found.reachability is None


def exact_family(v):
    """The posterior of `two_causes`: its family holds it at every a, and it starts near."""
    slopes = pyro.param("slopes", v.new_tensor([0.28, 0.25]))
    start = torch.tensor([[0.75, 0.0], [-0.58, 0.5]])
    root = pyro.param("root", start, constraint=constraints.lower_cholesky)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.MultivariateNormal(v[:, None] * slopes, scale_tril=root))


def test_a_family_that_holds_the_posterior_does_not_pull(causes):
    pyro.clear_param_store()
    pyro.param("a", torch.tensor(0.8), constraint=constraints.positive)
    found = quickly(
        causes.model,
        exact_family,
        causes.data,
        reference=causes.best,
        objective=Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        num_steps=100,
        max_rounds=2,
    )
    gap = found.reachability.total()
    assert abs(gap.value) < Z * gap.mc_error + 0.05
    assert abs(found.pull.value) < max(2 * found.training_noise, 0.3)
    assert found.unconverged.value > 1 and "drives the model away" not in str(found)


def three_classes(v):
    locs = pyro.param("locs", torch.zeros(3))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
        pyro.sample("v", dist.Normal(locs[z], scale), obs=v)


def no_guide(v):
    pass


def three_clusters():
    generator = torch.Generator().manual_seed(1)
    centres = torch.tensor([-3.0, 0.5, 4.0]).repeat_interleave(torch.tensor([10, 6, 4]))
    return centres + 0.5 * torch.randn(20, generator=generator)


def test_a_saddle_that_only_the_optimiser_cannot_leave():
    """All classes at one place: the score of each is in proportion to its weight, so they stay."""
    v = three_clusters()
    pyro.clear_param_store()
    pyro.param("locs", v.mean().repeat(3))
    pyro.param("scale", v.std(correction=0), constraint=constraints.positive)
    log_weights = torch.tensor([0.5, 0.3, 0.2]).log()

    def log_evidence(values):
        classes = dist.Normal(values["locs"], values["scale"]).log_prob(v[:, None])
        return (classes + log_weights).logsumexp(1).sum()

    apart = {"locs": torch.tensor([-3.0, 0.5, 4.0]), "scale": torch.tensor(0.5)}
    best = maximise(log_evidence, apart, {"scale": constraints.positive})
    known = float(log_evidence(best)) - float(
        dist.Normal(v.mean(), v.std(correction=0)).log_prob(v).sum()
    )
    found = quickly(
        three_classes,
        no_guide,
        (v,),
        reference=best,
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.002),
        num_steps=80,
        max_rounds=3,
    )
    assert known > 8 and found.harm.value == pytest.approx(known, abs=1e-6)
    assert abs(found.pull.value) < 1e-3 and abs(found.unconverged.value) < 1e-6
    assert found.rest.value == pytest.approx(known, abs=1e-3)
    assert found.preference.value == pytest.approx(found.rest.value, abs=1e-6), "L is ℓ here"
    told = found.sentences()
    assert len(told) == 1 and told[0].startswith("The optimiser never got there")


def shifted(v):
    loc = pyro.param("loc", torch.tensor(-1.0))
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(loc, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def shifted_guide(v):
    slope = pyro.param("slope", torch.tensor(0.5))
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(slope * v, 0.7))


@pytest.mark.parametrize(("tilt", "told"), [(0.3, "The objective itself prefers"), (-0.3, "never")])
def test_who_is_to_blame_for_the_rest_of_path(tilt, told):
    """An objective with a well at each side: which is lower decides."""

    def two_wells(model, guide, v):
        loc = pyro.param("loc")
        return 5 * (loc.square() - 1).square() + tilt * loc + pyro.param("slope").square()

    v = torch.linspace(0.0, 2.2, 40)
    pyro.clear_param_store()
    found = quickly(
        shifted,
        shifted_guide,
        (v,),
        reference={"loc": 1.1},
        objective=two_wells,
        optimizer=adam(0.02),
        num_steps=100,
    )
    high, low = found.pulled.parameters["loc"], found.continued.parameters["loc"]
    assert high > 0.9 and low < -0.9

    def evidence(loc):
        return float(dist.Normal(loc, 2**0.5).log_prob(v).sum())

    assert found.rest.value == pytest.approx(evidence(high) - evidence(low), abs=1e-4)
    assert found.rest.value > 10
    assert found.preference.value * tilt < 0
    assert any(told in sentence for sentence in found.sentences())
    assert len([s for s in found.sentences() if "never" in s or "prefers" in s]) == 1


def test_parts_add_up_and_the_table_can_be_read(few):
    few.install()
    found = without_noise(few, num_steps=5, max_rounds=1, objective=Trace_ELBO())
    ledger = {name: line.value for name, line in found.ledger().items()}
    assert found.pull.value + found.path.value == pytest.approx(found.harm.value, abs=1e-9)
    assert found.unconverged.value + found.rest.value == pytest.approx(found.path.value, abs=1e-9)
    down = ledger["log evidence at reference"] - ledger["− pull"]
    assert down == pytest.approx(ledger["= trained on from reference"], abs=1e-9)
    down -= ledger["− path"]
    assert down == pytest.approx(ledger["= log evidence as learned"], abs=1e-9)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    assert "had not settled" in text and "Trace_ELBO" in text and "Adam {'lr': 0.02}" in text
    assert "<pre>" in found._repr_html_() and found.reachability is not None
    again = without_noise(few, num_steps=5, max_rounds=1, objective=Trace_ELBO())
    assert str(again) == text


def test_errors_of_parts_are_those_of_two_evidences(few):
    few.install()
    found = without_noise(
        few, num_steps=5, max_rounds=1, method=vh.ImportanceSampling(num_particles=50)
    )
    errors = {name: p.evidence.per_unit.total().mc_error for name, p in found.endpoints.items()}
    assert all(error > 0 for error in errors.values())
    pairs = {
        "harm": ("reference", "learned"),
        "pull": ("reference", "pulled"),
        "path": ("pulled", "learned"),
        "unconverged": ("continued", "learned"),
        "rest": ("pulled", "continued"),
    }
    for name in PARTS:
        expected = math.hypot(*(errors[point] for point in pairs[name]))
        assert getattr(found, name).mc_error == pytest.approx(expected, rel=1e-6), name
    assert found.harm.mc_error < math.hypot(found.pull.mc_error, found.path.mc_error)


def test_training_leaves_optimiser_objective_and_parameters_alone(few):
    few.install()
    optimizer, objective = adam(0.01), Trace_ELBO()
    svi = SVI(few.model, few.guide, optimizer, loss=objective)
    svi.step(*few.data)
    before, held = str(optimizer.get_state()), dict(vars(objective))
    values = {name: float(p.detach().sum()) for name, p in pyro.get_param_store().items()}
    random = torch.get_rng_state()
    without_noise(few, num_steps=4, max_rounds=1, objective=objective, optimizer=optimizer)
    taken = []

    def breaks(leaves):
        taken.append(leaves)
        if len(taken) == 2:
            raise RuntimeError("in the middle")
        return torch.optim.Adam(leaves, lr=0.1)

    with pytest.raises(RuntimeError, match="in the middle"):
        without_noise(few, num_steps=4, max_rounds=1, optimizer=breaks)
    assert str(optimizer.get_state()) == before and vars(objective) == held
    assert {n: float(p.detach().sum()) for n, p in pyro.get_param_store().items()} == values
    assert torch.equal(torch.get_rng_state(), random)
    svi.step(*few.data)


def test_batches_declared_parameters_and_references_are_taken(few):
    v = few.data[0]
    pyro.clear_param_store()

    def model(v):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(a * h.sum(-1), 1.0), obs=v)

    def guide(v):
        point = pyro.param("point", torch.tensor(1.1), constraint=constraints.positive)
        pyro.sample("a", dist.Delta(point))
        few.guide(v)

    found = quickly(
        model,
        guide,
        (v,),
        reference={"point": 1.5},
        parameters=["a"],
        num_steps=20,
        max_rounds=1,
        optimizer=adam(0.02),
    )
    assert float(found.pulled.parameters["point"]) < 1.45
    few.install()
    reference = vh.learn_reference(
        few.model,
        list(v.split(5)),
        guide=few.guide,
        learner=importance_weighted(
            num_particles=8, num_steps=60, learning_rate=0.03, guide_steps=5
        ),
        start="current",
        progress=False,
    )
    split = vh.reachability(
        few.model,
        few.guide,
        list(v.split(5)),
        reference=reference,
        num_steps=60,
        max_rounds=1,
        optimizer=adam(0.02),
        refit=SHORT,
        progress=True,
    )
    assert split.harm.value == pytest.approx(few.lost_at(few.learned), abs=0.2)
    assert split.pull.value > 0.1 and split.reference is reference


def test_a_guide_of_points_has_no_reachability_gap(few):
    pyro.clear_param_store()

    def points(v):
        slopes = pyro.param("slopes", torch.tensor([0.3, 0.2]))
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Delta(v[:, None] * slopes, event_dim=1))

    found = quickly(
        few.model,
        points,
        few.data,
        reference=few.best,
        num_steps=50,
        max_rounds=1,
        optimizer=adam(0.05),
    )
    assert found.reachability is None and "unknown" in str(found)
    assert found.pull.value > 1, "the joint density of points is highest for large weights"


def test_bad_input_is_refused_before_any_work(few):
    few.install()
    with pytest.raises(vh.InputError, match="needs the guide"):
        quickly(few.model, None, few.data, reference=few.best)
    with pytest.raises(vh.InputError, match="reference must name exactly"):
        without_noise(few, reference={"b": 1.0})
    with pytest.raises(vh.InputError, match="optimizer must be one of"):
        without_noise(few, optimizer=3)
    with pytest.raises(vh.InputError, match="no parameters to learn"):
        quickly(
            lambda v: pyro.sample("h", dist.Normal(v.sum(), 1.0)),
            lambda v: pyro.sample("h", dist.Normal(pyro.param("m", v.sum()), 1.0)),
            few.data,
            reference={},
        )


def test_the_tree_has_ledger_trajectory_and_endpoints(few):
    few.install()
    found = without_noise(few, num_steps=8, max_rounds=1)
    tree = vh.to_datatree(found)
    ledger = tree["reachability"].to_dataset().total
    assert float(ledger.sel(quantity="− pull")) == found.pull.value
    path = tree["trajectory"].to_dataset()
    assert path.checkpoint.values.tolist() == [0, 2, 4, 6, 8]
    assert float(path.log_evidence[0]) == pytest.approx(
        found.at_reference.evidence.per_unit.total().value, abs=1e-4
    )
    assert path.objective.shape == path.objective_mc_error.shape == (5,)
    units = tree["units"].to_dataset()
    assert units.parameters.values.tolist() == ["reference", "pulled", "learned", "continued"]
    assert units.log_evidence.shape == (4, 10)
    assert tree.attrs["setting_objective"] == "exact_elbo"


def test_the_history_of_the_pull_can_be_diagnosed(few):
    few.install()
    found = without_noise(few, num_steps=8, max_rounds=1)
    told = vh.diagnose(found.training.history, few.data, checkpoints=[0, -1], refit=SHORT)
    assert told.steps == (0, 8)
    first = told.diagnoses[0].parameters["a"]
    assert float(first) == pytest.approx(float(few.best["a"]))
