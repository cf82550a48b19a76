"""Law 7 for learners: on models whose optima are known exactly, they arrive at θ*.

The models are those of the benchmarks; `python -m benchmarks.learners` runs the wide grid.
"""

import pyro
import pytest
import torch

import pyro_vharm as vh
from benchmarks.discrete_models import collapsed_mixture
from benchmarks.harmed_models import HARMED_MODELS
from benchmarks.learners import AIM, LEARNERS, missing_after
from examples.nile import kalman
from pyro_vharm.learning.refit import estimate_elbo
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED, Z

UNITS = {"two causes": 20, "factor analysis": 20, "sign-symmetric": 40, "noisy-OR": 60}


def small(name):
    return HARMED_MODELS[name](UNITS[name]) if name in UNITS else HARMED_MODELS[name]()


@pytest.mark.parametrize("name", HARMED_MODELS)
def test_the_formulas_are_those_of_the_models(name):
    """Log evidence at θ̂ and θ*, and L(θ̂, q̂), against this package's."""
    harmed = small(name)
    harmed.install()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    elbo = estimate_elbo(problem.densities[0], 2000).total()
    assert abs(elbo.value - harmed.bound) < max(Z * elbo.mc_error, 1e-9)
    assert harmed.lost_at(harmed.learned) > 5 * AIM, "a learner that stays does not pass"
    store = pyro.get_param_store()
    for values in (harmed.learned, harmed.best):
        expected = float(harmed.log_evidence(values))
        if name == "Nile":
            theta = [float(value) for value in values.values()]
            assert float(kalman(*harmed.data).loglike(theta)) == pytest.approx(expected, abs=1e-6)
            continue
        for parameter, value in values.items():
            store[parameter] = value.clone()
        evidence = vh.log_evidence(harmed.model, harmed.data, guide=harmed.guide, progress=False)
        total = evidence.per_unit.total()
        assert total.kind <= vh.Kind.NUMERICAL
        assert total.value == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", [name for name in HARMED_MODELS if name != "Nile"])
def test_the_exact_learner_arrives(name):
    found = missing_after(small(name), LEARNERS["exact"], SEED)
    assert -1e-6 < found["missing"] < AIM
    assert found["ending"].startswith("converged")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, learner",
    [
        ("two causes", "importance"),
        ("sign-symmetric", "chains"),
        ("Nile", "chains"),
        ("Nile", "EM"),
    ],
)
def test_learners_by_random_numbers_arrive(name, learner):
    assert missing_after(HARMED_MODELS[name](), LEARNERS[learner], SEED)["missing"] < AIM


def test_a_collapsed_mixture_shows_nothing_and_is_repaired():
    """Gap 0 and score 0 with many nats of harm; only the start away from the boundary leaves."""
    harmed = collapsed_mixture()
    harmed.install()
    gap = vh.inference_gap(harmed.model, harmed.guide, harmed.data, progress=False).gap.total()
    assert abs(gap.value) < 1e-5
    harm, before = harmed.lost_at(harmed.learned), pyro.param("weights").detach().clone()
    assert harm > 100
    best = float(harmed.log_evidence(harmed.best))
    reference = vh.learn_reference(
        harmed.model, harmed.data, guide=harmed.guide, start="current", progress=False
    )
    _, stayed, left = reference.attempts
    assert best - stayed.log_evidence.value == pytest.approx(harm, abs=1e-5)
    assert left.name.endswith("off its boundaries")
    assert harmed.lost_at(reference.parameters) < AIM
    assert torch.equal(pyro.param("weights").detach(), before), "left alone"
