"""Learners: where they arrive and how they end, from where, and that a kill loses little."""

import itertools
import os
import re
import signal
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, kl_divergence

import pyro_vharm as vh
from pyro_vharm.estimates import Estimate, Kind
from pyro_vharm.learning import gradient_learner, starts
from pyro_vharm.learning.journal import Journal, open_journal
from pyro_vharm.learning.learners import choose_learner
from pyro_vharm.learning.learning_run import Ending, LearningRun
from pyro_vharm.learning.quasi_newton import descend
from pyro_vharm.model import compilation
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED

V = torch.tensor([3.0, -2.0, 0.5, 2.5, -3.5, 1.0], dtype=torch.float64)
EXACT = float((V.square().mean() - 1).sqrt())
OPTIONS = {"guide_training": vh.GuideTraining(2, num_replicates=2), "max_rounds": 1}


def model(v):
    """v ~ N(0, 1 + s²) with h integrated out."""
    scale = pyro.param("scale", v.new_tensor(0.3), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(v.new_zeros(()), scale))
        pyro.sample("v", dist.Normal(h, 1.0), obs=v)


def guide(v):
    slope = pyro.param("slope", v.new_tensor(0.1))
    width = pyro.param("width", v.new_tensor(0.5), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(slope * v, width))


def log_evidence(scale, v=V):
    return float(dist.Normal(0.0, (1 + scale**2) ** 0.5).log_prob(v).sum())


def learn(learner, **options):
    options = {"guide": guide, "start": "current", "progress": False} | options
    return vh.learn_reference(model, (V,), learner=learner, **options)


LEARNERS = {
    "exact": vh.ExactLearner(guide_training=vh.GuideTraining(0)),
    "EM": vh.ExpectationMaximization(60, guide_training=vh.GuideTraining(0)),
    "importance weights": vh.GradientLearner(vh.ImportanceWeightedELBO(30), 150, 0.05, **OPTIONS),
    "annealed": vh.GradientLearner(vh.AnnealedELBO(8, num_steps=3), 80, 0.08, **OPTIONS),
    "Markov chain EM": vh.GradientLearner(
        vh.MarkovChainEM(8, num_transitions=2, chains=vh.PersistentChains()), 80, 0.08, **OPTIONS
    ),
    "gradient steps on the exact evidence": vh.GradientLearner(
        vh.ExactEvidence(), 80, 0.3, **OPTIONS
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_arrives(name):
    reference = learn(LEARNERS[name])
    lost = log_evidence(EXACT) - log_evidence(float(reference.parameters["scale"]))
    assert lost < (1e-3 if name in ("exact", "EM") else 0.05)
    assert log_evidence(EXACT) - log_evidence(0.3) > 4, "there was something to gain"
    learned, attempt = reference.attempts
    assert learned.name == "θ̂ itself" and attempt.name.endswith(", from θ̂")
    assert attempt.num_steps > 0 and attempt.ending in str(reference)
    assert reference.train.harm.total().value == pytest.approx(
        log_evidence(float(reference.parameters["scale"])) - log_evidence(0.3), abs=1e-4
    )


def test_endings():
    found = learn(LEARNERS["exact"])
    assert found.attempts[1].ending.startswith("converged: ")
    short = learn(vh.ExactLearner(1, guide_training=vh.GuideTraining(0)))
    assert short.attempts[1].ending.startswith("stopped by its budget: ")
    slow = vh.GradientLearner(vh.ImportanceWeightedELBO(30), 30, 0.02, **OPTIONS)
    assert "still rose in round 1" in learn(slow).attempts[1].ending
    rounds = OPTIONS | {"max_rounds": 4}
    done = vh.GradientLearner(vh.ImportanceWeightedELBO(30), 100, 0.05, **rounds)
    assert "rose no further in round" in learn(done).attempts[1].ending


def test_the_history_of_the_best_attempt_can_be_gone_through():
    model(V), guide(V)
    reference = learn(LEARNERS["importance weights"])
    history = reference.history
    assert history.steps[:3] == (0, 7, 14) and history.steps[-1] == 150 and len(history) == 23
    assert "bound" in history[3].scalars and "evidence" in history[-1].scalars
    first = log_evidence(0.3) / len(V)
    assert history[0].scalars["evidence"] == pytest.approx(first, abs=1e-5)
    assert history[-1].scalars["evidence"] > history[0].scalars["evidence"] + 0.5
    with history.at(10):
        assert 0.3 < float(pyro.param("scale").detach()) < 1.2 * EXACT
    assert float(pyro.param("scale").detach()) == pytest.approx(0.3)
    loss = learn(LEARNERS["Markov chain EM"]).history[3].scalars
    assert "loss" in loss and "bound" not in loss, "Markov chain EM's loss bounds nothing"


def test_heldout_evidence_stands_beside_that_of_the_training_data():
    heldout = torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64)
    reference = learn(LEARNERS["exact"], heldout=(heldout,))
    gain = reference.heldout.harm.heldout_total()
    scale = float(reference.parameters["scale"])
    assert gain.value == pytest.approx(
        log_evidence(scale, heldout) - log_evidence(0.3, heldout), abs=1e-4
    )
    assert gain.value < 0 < reference.train.harm.total().value, "it fits other data worse"
    assert f"held-out data: {gain.per_unit.value:.3f}" in str(reference)
    assert learn(LEARNERS["exact"]).heldout is None


class Killed(BaseException):
    pass


def kill_after(monkeypatch, num_steps):
    """Let the process die in the middle of a step."""
    count, step = itertools.count(1), gradient_learner._Keeper.step

    def dying(self, *arguments):
        if next(count) > num_steps:
            raise Killed
        step(self, *arguments)

    monkeypatch.setattr(gradient_learner._Keeper, "step", dying)


@pytest.mark.parametrize("name", ["importance weights", "annealed", "Markov chain EM"])
def test_work_that_was_cut_short_goes_on_and_ends_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_learner, "_STEPS_PER_FILE", 10)
    # a busy machine may trace in one run and not in another, and rounding decides acceptance
    monkeypatch.setattr(compilation, "_WORTH_TRACING", float("inf"))
    learner = LEARNERS[name]
    whole = learn(learner)
    pyro.clear_param_store()
    counted = []
    with monkeypatch.context() as patch:
        kill_after(patch, 37)
        with pytest.raises(Killed):
            learn(learner, checkpoint=tmp_path)
    step = gradient_learner._Keeper.step
    monkeypatch.setattr(gradient_learner._Keeper, "step", lambda *a: counted.append(1) or step(*a))
    again = learn(learner, checkpoint=tmp_path)
    assert len(counted) == learner.num_steps - 30, "the steps since the last file are lost"
    torch.testing.assert_close(again.model_values, whole.model_values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again.guide_values, whole.guide_values, rtol=1e-9, atol=1e-9)
    assert again.attempts == whole.attempts
    assert again.history.steps == whole.history.steps
    assert [c.scalars for c in again.history] == [
        pytest.approx(c.scalars, rel=1e-9) for c in whole.history
    ]
    counted.clear()
    once_more = learn(learner, checkpoint=tmp_path)
    assert not counted and once_more.attempts == whole.attempts, "nothing is done twice"


def test_a_journal_refuses_other_work(tmp_path):
    learn(LEARNERS["exact"], checkpoint=tmp_path)
    with pytest.raises(vh.InputError, match=r"checkpoint=.* holds work that was begun with other"):
        learn(LEARNERS["exact"], checkpoint=tmp_path, seed=1)
    model(V)
    with torch.no_grad():
        pyro.param("scale").unconstrained().fill_(1.0)
    with pytest.raises(vh.InputError, match="other settings, data or parameters"):
        learn(LEARNERS["exact"], checkpoint=tmp_path)


def test_half_a_file_is_no_file(tmp_path):
    journal = open_journal(tmp_path, "a")
    journal.write("piece", {"x": torch.ones(3)})
    (tmp_path / "other.partial").write_bytes(b"half")
    assert open_journal(tmp_path, "a").recall("other") is None
    assert open_journal(tmp_path, "a").recall("piece")["x"].tolist() == [1, 1, 1]
    assert journal.within("part").recall("piece") is None, "scopes keep names apart"
    assert Journal().recall("piece") is None


SCRIPT = """
import pyro, torch, sys
import pyro_vharm as vh
from tests.test_learners import guide, model, V
torch.set_default_dtype(torch.float64)
learner = vh.GradientLearner(vh.ImportanceWeightedELBO(20), 3000, 0.01, max_rounds=1)
reference = vh.learn_reference(
    model, (V,), guide=guide, learner=learner, start="current", checkpoint=sys.argv[1],
    progress=False,
)
print("scale", repr(float(reference.parameters["scale"])))
"""


@pytest.mark.slow
def test_kill_minus_nine(tmp_path):
    def run(directory):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "."},
        )

    for _ in range(2):
        process = run(tmp_path / "killed")
        assert process.stdout is not None
        for _ in range(600):
            if (tmp_path / "killed" / "attempt-0-round-0-partial.pt").exists():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    resumed, whole = (run(tmp_path / name).communicate()[0] for name in ("killed", "whole"))
    assert resumed == whole and resumed.startswith("scale")


LOCATIONS = torch.tensor([-4.0, 0.0, 5.0], dtype=torch.float64)
MIXED = torch.cat([LOCATIONS[i] + torch.linspace(-1, 1, 7, dtype=torch.float64) for i in range(3)])


def mixture(v):
    weights = pyro.param("weights", v.new_ones(3) / 3, constraint=constraints.simplex)
    locations = pyro.param("locations", v.new_tensor([-1.0, 0.0, 1.0]))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("v", dist.Normal(locations[z], 1.0), obs=v)


def nothing(v):
    pass


def collapse():
    mixture(MIXED)
    weights = torch.tensor([1e-12, 1 - 2e-12, 1e-12], dtype=torch.float64)
    locations = torch.stack([MIXED.mean() - 1, MIXED.mean(), MIXED.mean() + 1])
    theta = vh.capture_parameters(mixture, (MIXED,))
    theta.assign(theta.unconstrain({"weights": weights, "locations": locations}, "values"))


@pytest.mark.parametrize("learner", [vh.ExactLearner(), vh.ExpectationMaximization(100)])
def test_a_class_without_weight_is_a_saddle_that_a_start_leaves(learner):
    collapse()
    options = {"guide": nothing, "learner": learner, "progress": False}
    reference = vh.learn_reference(mixture, (MIXED,), **options)
    stuck, evened, fresh = reference.attempts[1:]
    assert "off its boundaries" in evened.name and "afresh" in fresh.name
    assert stuck.log_evidence.value < reference.attempts[0].log_evidence.value + 0.05
    assert evened.log_evidence.value > stuck.log_evidence.value + 10
    found = reference.parameters["locations"].sort().values
    torch.testing.assert_close(found, LOCATIONS, atol=0.2, rtol=0)
    only = vh.learn_reference(mixture, (MIXED,), **options, start="current")
    assert [a.name.split(", ")[-1] for a in only.attempts] == [
        "θ̂ itself",
        "from θ̂",
        "from θ̂ off its boundaries",
    ]


def test_starts():
    reference = learn(LEARNERS["exact"], start="both")
    assert [a.name.split(", ")[-1] for a in reference.attempts] == ["θ̂ itself", "from θ̂", "afresh"]
    alone = learn(LEARNERS["exact"], start="fresh")
    assert [a.name.split(", ")[-1] for a in alone.attempts] == ["θ̂ itself", "afresh"]
    with pytest.raises(vh.InputError, match="start must be 'current', 'fresh' or 'both'"):
        learn(LEARNERS["exact"], start="elsewhere")
    network = torch.nn.Linear(1, 1, bias=False).double()

    def held(v):
        pyro.module("network", network)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(1), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(network(h)[..., 0], 1.0), obs=v)

    def held_guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v[:, None], 1.0).to_event(1))

    options = {"guide": held_guide, "learner": LEARNERS["exact"], "progress": False}
    both = vh.learn_reference(held, (V,), **options)
    assert len(both.attempts) == 2 and "pass fresh=" in both.notes[0]
    with pytest.raises(vh.InputError, match="pass fresh="):
        vh.learn_reference(held, (V,), start="fresh", **options)


def bounded(v):
    """Parameters with boundaries of every kind."""
    pyro.param("weights", v.new_tensor([0.2, 0.8 - 1e-6, 1e-6]), constraint=constraints.simplex)
    pyro.param("chance", v.new_tensor(0.4), constraint=constraints.unit_interval)
    pyro.param("scales", v.new_tensor([[1.0, 2.0], [3.0, 1e-7]]), constraint=constraints.positive)
    pyro.param("share", v.new_tensor([1.999, 1.2]), constraint=constraints.interval(1.0, 2.0))
    pyro.param("location", v.new_tensor(5.0))
    model(v)


def test_a_start_off_the_boundaries_changes_what_is_near_them():
    theta = prepare(bounded, guide, (V,)).model_parameters
    moved = starts._off_boundaries(theta)
    found = Parameters(moved, theta.constraints).constrained()
    torch.testing.assert_close(
        found["weights"], torch.tensor([0.2 + 1 / 3, 0.8 + 1 / 3, 1 / 3]) / 2, atol=1e-5, rtol=0
    )
    assert float(found["chance"]) == pytest.approx(0.4), "far from its boundaries"
    torch.testing.assert_close(
        found["scales"], torch.tensor([[1.0, 2.0], [3.0, 1.0]]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(found["share"], torch.tensor([1.7495, 1.35]), atol=1e-5, rtol=0)
    for name, before in (("location", 5.0), ("scale", 0.3)):
        assert 0 < abs(float(found[name]) - before) < 1, "jittered, to break ties"
    assert starts._off_boundaries(prepare(model, guide, (V,)).model_parameters) is None


class Failing(vh.ExactLearner):
    """Fails from every start but the fresh one."""

    def learn(self, run):
        if float(pyro.param("scale").detach()) < 1.0:
            raise FloatingPointError("no finite gradient")
        return super().learn(run)


def test_an_attempt_that_fails_is_reported(monkeypatch):
    with pytest.raises(FloatingPointError, match="no finite gradient"):
        learn(Failing())
    learn(LEARNERS["exact"])

    def elsewhere():
        pyro.param("scale", torch.tensor(2.0, dtype=torch.float64), constraint=constraints.positive)
        return model, guide

    reference = learn(Failing(), start="both", fresh=elsewhere)
    assert "failed: no finite gradient" in str(reference)
    assert float(reference.parameters["scale"]) == pytest.approx(EXACT, rel=0.01)


class Harmful(vh.ExactLearner):
    """Leaves the scale where log evidence is far lower."""

    def learn(self, run):
        run.problem.model_parameters.assign({"scale": torch.tensor(-5.0, dtype=torch.float64)})
        return Ending(True, "did harm")


def test_climbing_tries_every_stage_and_undoes_one_that_lowers_log_evidence():
    start = vh.GradientLearner(vh.ExactEvidence(), 5, 0.05, **OPTIONS)
    for stages in ((start, Harmful(), LEARNERS["exact"]), (start, LEARNERS["exact"], Harmful())):
        reference = learn(vh.ClimbingLearner(stages, vh.GuideTraining(0)))
        assert float(reference.parameters["scale"]) == pytest.approx(EXACT, rel=0.01)
        attempt = reference.attempts[1]
        assert "ExactEvidence, then exact evidence" in attempt.name
        assert attempt.ending.startswith("converged: exact evidence: ")
        assert reference.history[-1].scalars["evidence"] == pytest.approx(
            log_evidence(EXACT) / len(V), abs=1e-3
        )
    assert attempt.ending.endswith("did harm")


@pytest.fixture
def rates(monkeypatch):
    """The step sizes of the rounds; at 100 they throw θ far off, at 10 gradients are not finite."""
    taken = []
    minimise = gradient_learner.minimise

    def watched(loss, leaves, schedule, **options):
        taken.append(schedule.learning_rate)
        if schedule.learning_rate == 100:
            with torch.no_grad():
                leaves[0].add_(10.0)
        elif schedule.learning_rate == pytest.approx(10):
            with torch.no_grad():
                leaves[0].add_(-10.0)
            raise FloatingPointError("no finite gradient")
        else:
            minimise(loss, leaves, schedule, **options)

    monkeypatch.setattr(gradient_learner, "minimise", watched)
    return taken


def test_a_round_that_lowers_log_evidence_is_undone_and_the_next_takes_smaller_steps(
    rates, tmp_path
):
    learner = vh.GradientLearner(vh.ExactEvidence(), 60, 100.0, **(OPTIONS | {"max_rounds": 5}))
    reference = learn(learner, checkpoint=tmp_path)
    assert rates == pytest.approx([100, 10, 1, 1]), "as large as the last one that paid"
    assert log_evidence(float(reference.parameters["scale"])) > log_evidence(EXACT) - 0.1
    rates.clear()
    assert learn(learner, checkpoint=tmp_path).attempts == reference.attempts
    assert rates == pytest.approx([10]), "only what left nothing behind is done again"


def test_a_learner_whose_last_round_does_harm_says_so(rates):
    (_, attempt) = learn(vh.GradientLearner(vh.ExactEvidence(), 60, 100.0, **OPTIONS)).attempts
    assert "fell in round 1, which was undone" in attempt.ending
    assert attempt.log_evidence.value == pytest.approx(log_evidence(0.3), abs=1e-4)
    two = vh.GradientLearner(vh.ExactEvidence(), 60, 100.0, **(OPTIONS | {"max_rounds": 2}))
    with pytest.raises(FloatingPointError, match="no finite gradient"):
        learn(two)


def test_a_rise_within_the_error_is_no_convergence(monkeypatch):
    def noisy(run, name):
        return Estimate(next(looks), 0.5, len(V), Kind.ESTIMATED)

    monkeypatch.setattr(LearningRun, "evidence", noisy)
    problem = prepare(model, guide, (V,))
    for most, reason in ((1, "rose within its error in round 1"), (3, "still rose in round 3")):
        looks = iter([-9.0, -8.0, -8.0, -7.0, -9.0, -5.5, -9.0])  # a doubling after each round
        options = OPTIONS | {"max_rounds": most}
        run = LearningRun(problem, Journal(), False)
        ending = vh.GradientLearner(vh.ExactEvidence(), 2, 0.01, **options).learn(run)
        assert not ending.converged and ending.reason.endswith(reason)
    looks = iter([-9.0, -9.1, -9.1])
    ending = vh.GradientLearner(vh.ExactEvidence(), 2, 0.01, **OPTIONS).learn(
        LearningRun(problem, Journal(), False)
    )
    assert ending.converged, "a fall within the error is"


def test_what_auto_takes(monkeypatch):
    problem = prepare(model, guide, (V,))
    assert isinstance(choose_learner(problem, "auto"), vh.ExactLearner)
    assert isinstance(choose_learner(problem, "auto", "quick"), vh.ExpectationMaximization)

    def wide(v):
        with pyro.plate("units", len(v)):
            scale = pyro.param("scale", v.new_tensor(0.3), constraint=constraints.positive)
            h = pyro.sample("h", dist.Normal(v.new_zeros(4), scale).to_event(1))
            pyro.sample("v", dist.Normal(h.sum(-1), 1.0), obs=v)

    def points(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Delta(pyro.param("at", v.new_zeros(len(v), 4))).to_event(1))

    def wide_guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.new_zeros(len(v), 4), 1.0).to_event(1))

    many = prepare(wide, wide_guide, (V,))
    assert isinstance(choose_learner(many, "auto"), vh.ClimbingLearner)

    def unresolved(*_):
        raise vh.UnresolvedIntegralError

    monkeypatch.setattr(vh.ExactEvidence, "evaluate", unresolved)
    assert isinstance(choose_learner(problem, "auto"), vh.ClimbingLearner)
    with pytest.raises(vh.InputError, match="point masses"):
        vh.learn_reference(wide, (V,), guide=points, progress=False)


def narrow(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(pyro.param("slope", v.new_tensor(0.1)) * v, 0.1))


def test_a_learner_whose_bound_stays_far_below_says_so():
    """By KL(q ‖ p), which a guide of fixed width cannot close; and not where it can."""
    learner = vh.GradientLearner(
        vh.ImportanceWeightedELBO(1), 60, 0.01, max_rounds=4, guide_training=vh.GuideTraining(0)
    )
    problem = prepare(model, narrow, (V,))
    run = LearningRun(problem, Journal(), progress=False)
    torch.manual_seed(SEED)
    ending = learner.learn(run)
    share = float(pyro.param("scale").detach()) ** 2
    share = share / (1 + share)
    q = dist.Normal(float(pyro.param("slope").detach()) * V, 0.1)
    gap = float(kl_divergence(q, dist.Normal(share * V, share**0.5)).sum())
    said = re.search(r"its bound is (\S+) nats below log evidence there \((\S+) per", str(ending))
    assert said is not None, ending
    assert gap > 1 and float(said[1]) == pytest.approx(gap, abs=1.0)
    assert float(said[2]) == pytest.approx(float(said[1]) / len(V), abs=1e-3)
    assert ending.converged and "another objective may find more" in ending.reason
    rounds = OPTIONS | {"max_rounds": 8}
    close = vh.GradientLearner(vh.ImportanceWeightedELBO(30), 100, 0.05, **rounds)
    assert "below" not in learn(close).attempts[1].ending
    text = str(learn(learner, guide=narrow))
    assert "another objective may find more" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("learner", ["exactly", vh.ExactLearner, 3])
def test_what_is_no_learner_is_refused(learner):
    with pytest.raises(vh.InputError, match="learner must be 'auto' or a learner"):
        learn(learner)


def test_wrong_effort_is_refused():
    with pytest.raises(vh.InputError, match="effort must be 'full' or 'quick', not 'none'"):
        learn("auto", effort="none")


def test_descent_says_what_it_leaves_and_turns_back_from_where_the_loss_cannot_be_had():
    leaf = torch.tensor([3.0, -2.0], requires_grad=True)
    curvature = torch.tensor([[4.0, 1.0], [1.0, 0.5]])
    refused = []

    def losses():
        if float(leaf.detach()[0]) < -1.0:
            refused.append(1)
            raise ArithmeticError
        value = 0.5 * leaf @ curvature @ leaf
        return float(value.detach()), torch.autograd.grad(value, [leaf])

    short = descend(losses, [leaf], tolerance=1e-9, max_iterations=1)
    assert short.left > 1e-3 and short.num_iterations == 1
    ended = descend(losses, [leaf], tolerance=1e-9, max_iterations=100)
    assert ended.left <= 1e-9 and float(leaf.detach().abs().max()) < 1e-4
