"""The audit as a chain: what each part adds, what it says first, and which change it advises."""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vharm as vh
from benchmarks.continuous_models import sign_symmetric
from benchmarks.discrete_models import collapsed_mixture, noisy_or
from pyro_vharm import auditing
from pyro_vharm.diagnostics.causes import foresee_changes
from pyro_vharm.diagnostics.verdict import judge
from pyro_vharm.learning.foresight import spoken
from pyro_vharm.learning.learners import ClimbingLearner
from pyro_vharm.model.problem import prepare

QUICK = vh.Refit(num_steps=20, num_particles=100)
EXACT = vh.ExactLearner(guide_training=vh.GuideTraining(100))


@pytest.fixture(scope="module")
def pulled():
    pyro.clear_param_store()
    harmed = sign_symmetric(20)
    harmed.install()
    audit = vh.audit(
        harmed.model,
        harmed.guide,
        harmed.data,
        learner=EXACT,
        start="current",
        objective=Trace_ELBO(),
        optimizer=pyro.optim.Adam({"lr": 0.02}),
        num_steps=100,
        material=0.3,
        refit=QUICK,
        progress=False,
    )
    return harmed, audit


def test_each_part_answers_its_question(pulled):
    harmed, audit = pulled
    harm = harmed.lost_at(harmed.learned)
    assert audit.verdict.outcome == "harm"
    assert audit.harm.harm.value == pytest.approx(harm, abs=0.01)
    assert audit.local.best.gain.value <= audit.harm.harm.value + 1e-6
    assert audit.reachability.harm.value == pytest.approx(audit.harm.harm.value, abs=1e-6)
    text = str(audit)
    for told in ("local harm, 20 units", "reachability, 20 units", "VERDICT: HARM", "most: "):
        assert told in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_tree_has_all_parts(pulled, tmp_path):
    tree = vh.to_datatree(pulled[1])
    assert {"ledger", "units", "local_harm", "shifts", "reachability", "trajectory"} <= set(
        tree.children
    )
    page = vh.report(pulled[1], tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "predicted by the score" in page
    assert "− pull" in page


def test_a_pull_advises_another_guide_or_objective(pulled):
    _, audit = pulled
    best = foresee_changes(audit.harm, audit.reachability)[0]
    assert "richer family" in best.advice
    assert best.gain == pytest.approx(audit.reachability.pull.value)


def test_training_cut_short_is_told_to_go_on():
    harmed = sign_symmetric(20)
    harmed.install()
    store = pyro.get_param_store()
    store["b"] = harmed.learned["b"] - 1.0
    audit = vh.audit(
        harmed.model,
        harmed.guide,
        harmed.data,
        optimizer=pyro.optim.Adam({"lr": 0.02}),
        reference=harmed.learned,
        learner=EXACT,
        num_steps=200,
        num_em_steps=0,
        material=0.3,
        refit=QUICK,
        progress=False,
    )
    assert audit.local is None
    assert "train on" in foresee_changes(audit.harm, audit.reachability)[0].advice
    assert "train on" in str(audit.verdict)
    without = foresee_changes(audit.harm, None)[0]
    assert "train longer" in without.advice


def test_the_reference_is_not_short_of_what_is_near():
    """A learner that cannot move leaves what was found near θ̂."""
    harmed = noisy_or(40)
    harmed.install()
    idle = vh.ExpectationMaximization(1, 1, guide_training=vh.GuideTraining(0))
    audit = vh.audit(
        harmed.model,
        harmed.guide,
        harmed.data,
        learner=idle,
        start="current",
        refit=QUICK,
        progress=False,
    )
    assert audit.harm.harm.value == pytest.approx(audit.local.best.gain.value, abs=1e-6)
    assert any(attempt.name.startswith("near θ̂:") for attempt in audit.reference.attempts)


def test_a_method_of_ones_own_is_that_of_the_particles_near_by():
    """As a finding advises where units rest on few of them; it was left at quadrature."""
    harmed = sign_symmetric(20)
    harmed.install()
    options = {"reference": harmed.learned, "learner": EXACT, "refit": QUICK, "num_em_steps": 1}

    def near(method):
        audit = vh.audit(
            harmed.model, harmed.guide, harmed.data, method=method, progress=False, **options
        )
        return audit.local

    assert near(None).predicted.kind is vh.Kind.NUMERICAL
    assert near(vh.ImportanceSampling(300)).predicted.kind is vh.Kind.ESTIMATED


def test_where_no_harm_is_found_the_blind_spots_are_named():
    harmed = collapsed_mixture()
    harmed.install()
    audit = vh.audit(
        harmed.model,
        harmed.guide,
        harmed.data,
        reference=harmed.learned,
        refit=QUICK,
        progress=False,
    )
    assert audit.verdict.outcome == "no harm found"
    assert "At a boundary: weights" in str(audit.verdict)


def test_it_says_first_how_long_and_that_changes_no_number(monkeypatch, capsys):
    harmed = noisy_or(20)
    harmed.install()

    learner = vh.ExpectationMaximization(guide_training=vh.GuideTraining(10))

    def run(progress):
        return vh.audit(
            harmed.model,
            harmed.guide,
            harmed.data,
            learner=learner,
            start="current",
            refit=QUICK,
            num_em_steps=1,
            progress=progress,
        )

    monkeypatch.setattr(auditing, "_WORTH_SAYING", 0.0)
    loud = run(True)
    said = capsys.readouterr().err
    assert "audit: about" in said
    assert "reference, each start at most" in said
    quiet = run(False)
    assert "audit:" not in capsys.readouterr().err
    assert loud.harm.ledger() == quiet.harm.ledger()


@pytest.mark.parametrize(
    "learner",
    [
        vh.ExactLearner(max_iterations=40),
        vh.ExpectationMaximization(num_steps=3),
        vh.GradientLearner(vh.ImportanceWeightedELBO(4), num_steps=30, max_rounds=1),
        ClimbingLearner((vh.GradientLearner(num_steps=20, max_rounds=1),)),
    ],
)
def test_every_learner_foresees_its_time(learner):
    harmed = sign_symmetric(20)
    harmed.install()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    before = problem.model_parameters.values()
    assert 0 < learner.most_seconds(problem) < 600
    torch.testing.assert_close(problem.model_parameters.values(), before)


def test_durations_are_spoken_roughly():
    assert spoken({"gap": 4.0, "reference": 300.0}) == "about 5 min (gap 4 s, reference 5 min)"


def test_bad_budgets_are_refused():
    harmed = noisy_or(10)
    harmed.install()
    with pytest.raises(vh.InputError, match="num_em_steps must not be negative"):
        vh.audit(harmed.model, harmed.guide, harmed.data, num_em_steps=-1)
    with pytest.raises(vh.InputError, match="num_steps must be at least 1"):
        vh.audit(harmed.model, harmed.guide, harmed.data, objective=Trace_ELBO(), num_steps=0)


def test_attempts_are_told_apart_on_held_out_data():
    """The reference is best in training; another that is better on held-out units is named."""
    harmed = noisy_or(40)
    harmed.install()
    learner = vh.ExpectationMaximization(guide_training=vh.GuideTraining(0))
    audit = vh.audit(
        harmed.model,
        harmed.guide,
        harmed.data,
        heldout=(harmed.data[0][:15],),
        learner=learner,
        material=0.1,
        refit=QUICK,
        progress=False,
    )
    attempts = audit.reference.attempts
    assert all(attempt.heldout.num_units == 15 for attempt in attempts)
    learned = float(attempts[0].heldout.values.sum())
    assert learned == pytest.approx(audit.harm.heldout.learned.per_unit.total().value, abs=1e-6)
    ahead = torch.linspace(0.5, 1.0, 15, dtype=torch.float64)
    best = max(attempts, key=lambda attempt: attempt.log_evidence.value)
    other = next(attempt for attempt in attempts if attempt is not best)
    better = dataclasses.replace(best.heldout, values=best.heldout.values + ahead)
    known = (best, dataclasses.replace(other, name="other", heldout=better))
    reference = dataclasses.replace(audit.reference, attempts=known)
    found, lead = reference.best_heldout
    assert found.name == "other"
    assert lead.value == pytest.approx(float(ahead.sum()))
    assert lead.sampling_error == pytest.approx(float(ahead.std()) * 15**0.5, rel=1e-6)
    told = judge(dataclasses.replace(audit.harm, reference=reference), 0.1)
    assert "There other is better than the reference, by 0.750" in str(told).replace("\n    ", " ")


class Once(torch.autograd.Function):
    """The identity, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 1.0 * gradient


def once_model(v):
    loc = pyro.param("loc", v.new_tensor(0.0))
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(Once.apply(loc), 1.0))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def once_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(0.5 * v, 0.7))


def test_a_model_without_second_derivatives_is_audited_all_the_same():
    v = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    with pytest.raises(vh.NotTwiceDifferentiableError, match="must be twice differentiable"):
        vh.local_harm(once_model, once_guide, (v,), progress=False)
    reference = {"loc": v.mean()}
    audit = vh.audit(once_model, once_guide, (v,), reference=reference, refit=QUICK, progress=False)
    assert audit.local is None
    assert "Nothing is known of what shows near" in str(audit)
    assert audit.harm.harm.value == pytest.approx(float(3 * v.mean() ** 2 / 4), abs=1e-4)
