"""Guides compared by what the model learned, against exact values; errors paired by seed, unit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from scipy.stats import t as student

import pyro_vharm as vh
from benchmarks.continuous_models import sign_symmetric, two_causes
from pyro_vharm.diagnostics.guide_comparison import _difference
from pyro_vharm.estimates import Kind, UnitEstimates

MEAN_FIELD, FULL = "mean field", "full rank"


def adam(leaves):
    return torch.optim.Adam(leaves, lr=0.03)


def smooth():
    return TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)


@pytest.fixture(scope="module")
def causes():
    """Three trainings on two causes, where ℓ and the harm of mean field are known."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    case = two_causes(30)

    def exactly(model, guide, v):
        return -case.log_evidence({"a": pyro.param("a")})

    candidates = {
        MEAN_FIELD: AutoNormal,
        FULL: vh.AutoUnitNormal,
        "exact": vh.Candidate(AutoNormal, exactly),
    }
    heldout = 3.0 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    found = vh.compare_guides(
        case.model,
        candidates,
        case.data,
        heldout=(heldout,),
        num_seeds=2,
        objective=smooth(),
        optimizer=adam,
        num_steps=200,
        max_rounds=4,
        progress=False,
    )
    return case, found


def test_each_is_ranked_by_its_exact_log_evidence(causes):
    case, found = causes
    best = float(case.log_evidence(case.best))
    for name, runs in found.runs.items():
        for run in runs:
            exact = float(case.log_evidence(run.parameters))
            assert run.evidence.per_unit.total().value == pytest.approx(exact, abs=1e-4), name
            assert exact <= best + 1e-6
    assert found.ranking[-1] == MEAN_FIELD and found.ranking[0] == "exact"
    assert found.log_evidence("exact").value == pytest.approx(best, abs=1e-3)


def test_harm_of_the_mean_field_is_the_known_one_and_full_rank_has_none(causes):
    case, found = causes
    known = case.lost_at(case.learned)
    harm = found.harm(MEAN_FIELD)
    assert known > 1 and abs(harm.value - known) < 0.25 * known
    assert abs(found.harm(FULL).value) < 0.1 * known
    assert found.gap(FULL).value < found.gap(MEAN_FIELD).value
    a = case.learned["a"]
    gap = 15 * float(((1 + a**2) ** 2 / (1 + 2 * a**2)).log())
    assert found.gap(MEAN_FIELD).value == pytest.approx(gap, rel=0.2)


def test_the_table_can_be_read(causes):
    _, found = causes
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split("  ")[0] for line in text.splitlines()[2:5]]
    assert rows == list(found.ranking)
    assert "learned the highest log evidence" in text and "held-out" in text
    assert "objectives: mean field, TraceMeanField_ELBO" in text
    assert "the guide was left out on held-out data" in text, "its parameters are per datum"
    assert "<pre>" in found._repr_html_()
    assert all(found.seconds(name)[0] > 0 for name in found.ranking)


def test_held_out_log_evidence_is_exact_too(causes):
    _, found = causes
    heldout = 3.0 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    exact = {
        name: [
            dist.Normal(0.0, (1 + 2 * run.parameters["a"] ** 2).sqrt()).log_prob(heldout)
            for run in runs
        ]
        for name, runs in found.runs.items()
    }
    assert torch.allclose(found.runs[FULL][0].heldout.values, exact[FULL][0], atol=1e-5)
    paired = torch.stack(exact[FULL]).mean(0) - torch.stack(exact[MEAN_FIELD]).mean(0)
    totals = [float((a - b).sum()) for a, b in zip(exact[FULL], exact[MEAN_FIELD], strict=True)]
    lead = found.heldout_lead(FULL, MEAN_FIELD)
    assert lead.value == pytest.approx(float(paired.sum()), abs=1e-3)
    by_unit, by_seed = float(paired.std()) * 40**0.5, abs(totals[0] - totals[1]) / 2
    assert lead.error == pytest.approx(math.hypot(by_unit, by_seed), rel=1e-3)
    assert lead.error < 0.8 * found.heldout_log_evidence(FULL).sampling_error, "not paired"


def test_the_tree_of_a_comparison(causes):
    _, found = causes
    tree = vh.to_datatree(found)
    table = tree["comparison"].to_dataset()
    assert table.candidate.values.tolist() == list(found.ranking)
    assert float(table.harm.sel(candidate=MEAN_FIELD)) == found.harm(MEAN_FIELD).value
    assert table.objective.sel(candidate="exact").item() == "exactly"
    runs = tree["runs"].to_dataset()
    assert runs.log_evidence.shape == runs.heldout_log_evidence.shape == (3, 2)
    assert float(runs.cpu_seconds.min()) > 0


def test_more_weights_lose_less_where_posteriors_have_two_modes():
    case = sign_symmetric(25)
    pyro.clear_param_store()
    weighted = vh.Candidate(AutoNormal, vh.ImportanceWeightedELBO(16))
    found = vh.compare_guides(
        case.model,
        {MEAN_FIELD: AutoNormal, "weighted": weighted},
        case.data,
        num_seeds=1,
        objective=smooth(),
        optimizer=adam,
        num_steps=300,
        max_rounds=3,
        progress=False,
    )
    assert found.ranking == ("weighted", MEAN_FIELD)
    losses = {n: case.lost_at(found.runs[n][0].parameters) for n in found.ranking}
    harm = found.harm(MEAN_FIELD)
    assert harm.value == pytest.approx(losses[MEAN_FIELD] - losses["weighted"], abs=1e-3)
    assert harm.is_clear and losses["weighted"] < 0.3 * losses[MEAN_FIELD]
    assert "beats mean field by" in str(found) and "With one seed" in str(found)
    assert found.heldout_lead(MEAN_FIELD, "weighted") is None


def units(values, errors=0.0):
    values = torch.as_tensor(values, dtype=torch.float64)
    return UnitEstimates(values, torch.full_like(values, errors), Kind.ESTIMATED)


def test_errors_of_differences():
    by_seed = [units([1.0, 2.0]), units([1.5, 2.5]), units([0.0, 2.0])]
    found = _difference(by_seed, False)
    totals = torch.tensor([3.0, 4.0, 2.0])
    spread = float(totals.std()) / 3**0.5
    assert found.value == pytest.approx(3.0) and found.error == pytest.approx(spread)
    assert found.is_clear and float(student.ppf(0.975, 2)) * spread < 3.0
    assert not _difference([units([0.5 * x]) for x in (1.0, 2.0, 9.0)], False).is_clear
    alike = [units([1.0, 2.0], 1.0)] * 3
    assert _difference(alike, False).error == pytest.approx(math.sqrt(2 / 3))
    assert _difference([units([1.0, -0.9])], True).error == pytest.approx(
        float(torch.tensor([1.0, -0.9]).std()) * 2**0.5
    )
    assert not _difference([units([1.0, -0.9])], True).is_clear
    assert _difference([units([1.0, 0.9])], True).is_clear


def test_a_lead_found_by_chance_alone_is_seldom_clear():
    """Student's quantile: with a fixed factor of 2, one null in five would be called clear."""
    generator = torch.Generator().manual_seed(0)
    called, fixed = 0, 0
    for _ in range(400):
        found = _difference([units(x) for x in torch.randn(3, 1, generator=generator)], False)
        called += found.is_clear
        fixed += abs(found.value) > 2 * found.error
    assert called / 400 < 0.05 + 4.5 * (0.05 * 0.95 / 400) ** 0.5
    assert fixed / 400 > 0.1


class Shifted(PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.randn(()))

    def forward(self, v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(self.shift, 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def briefly(model, candidates, data, **settings):
    defaults = {"num_steps": 3, "max_rounds": 1, "num_seeds": 2, "progress": False}
    return vh.compare_guides(model, candidates, data, **defaults | settings)


def test_models_with_modules_start_afresh_or_say_that_they_do_not():
    v, model = torch.linspace(-1, 1, 4), Shifted()
    before = model.shift.detach().clone()
    pair = {"one": AutoNormal, "the same": AutoNormal}
    kept = briefly(model, pair, (v,), optimizer=adam)
    assert any("fresh= was left out" in note for note in kept.notes)
    assert torch.equal(model.shift, before)
    for name in pair:
        assert kept.runs[name][0].parameters["shift"] == pytest.approx(float(before), abs=0.2)
    lead = kept.lead("one", "the same")
    assert lead.value == 0.0 and not lead.is_clear, "equal seeds, equal trainings"
    again = briefly(model, pair, (v,), optimizer=adam, fresh=Shifted)
    starts = [float(run.parameters["shift"]) for run in again.runs["one"]]
    assert not again.notes and abs(starts[0] - starts[1]) > 0.2
    assert [float(run.parameters["shift"]) for run in again.runs["the same"]] == starts


def latents_of_two_kinds(v):
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        h = pyro.sample("h", dist.Normal(a * z, 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def one_joint_unit(v):
    a = pyro.param("a", torch.tensor(1.0))
    h = pyro.sample("h", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("v", dist.Normal(a * h.sum(), torch.ones(3)).to_event(1), obs=v)


def only_discrete(v):
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("v", dist.Normal(a * z, 1.0), obs=v)


LADDERS = {
    latents_of_two_kinds: ["point mass", "mean field", "importance-weighted", "exact"],
    one_joint_unit: [
        "point mass",
        "mean field",
        "full rank",
        "flow",
        "importance-weighted",
        "exact",
    ],
    only_discrete: ["exact"],
}


@pytest.mark.parametrize("model", LADDERS)
def test_every_rung_of_the_ladder_can_be_trained(model):
    v = torch.tensor([0.3, -1.0, 2.0])
    pyro.clear_param_store()
    ladder = vh.guide_ladder(model, (v,))
    assert list(ladder) == LADDERS[model] and not list(pyro.get_param_store())
    found = briefly(model, ladder, (v,), num_seeds=1)
    assert set(found.runs) == set(ladder)
    assert found.gap("exact") is None
    if "point mass" in ladder:
        assert found.gap("point mass") is None and found.gap("mean field").value > 0
    assert not list(pyro.get_param_store())


def test_a_candidate_that_fails_is_left_out():
    def broken(model, guide, v):
        return pyro.param("a") * math.nan

    v = torch.tensor([0.3, -1.0, 2.0])
    pair = {"broken": vh.Candidate(AutoNormal, broken), "sound": AutoNormal}
    found = briefly(one_joint_unit, pair, (v,), num_steps=12, num_seeds=1)
    assert found.ranking == ("sound",) and "broken: left out" in str(found)
    with pytest.raises(FloatingPointError):
        briefly(one_joint_unit, {"broken": pair["broken"]}, (v,), num_steps=12)


def test_bad_candidates_are_refused():
    v = torch.linspace(-1, 1, 4)
    model = Shifted()
    kept = AutoNormal(model)
    with pytest.raises(vh.InputError, match="make a new one"):
        briefly(model, {"kept": lambda model: kept}, (v,))
    with pytest.raises(vh.InputError, match="is no guide"):
        briefly(model, {"none": lambda model: None}, (v,))
    with pytest.raises(vh.InputError, match="guide must be a callable"):
        briefly(model, {"three": 3}, (v,))
    with pytest.raises(vh.InputError, match="must be a mapping"):
        briefly(model, [AutoNormal], (v,))
    with pytest.raises(vh.InputError, match="num_seeds"):
        briefly(model, {"one": AutoNormal}, (v,), num_seeds=0)
    with pytest.raises(vh.InputError, match="SVI takes as loss"):
        vh.Candidate(AutoNormal, 3)
    with pytest.raises(vh.InputError, match="no parameters to learn"):
        briefly(lambda v: pyro.sample("h", dist.Normal(v.sum(), 1.0)), {"one": AutoNormal}, (v,))
