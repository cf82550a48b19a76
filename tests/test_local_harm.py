"""Local harm: scores, information, prediction and short ways up, against exact answers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, transform_to

import pyro_vharm as vh
from benchmarks.continuous_models import factor_analysis, sign_symmetric, two_causes
from benchmarks.discrete_models import collapsed_mixture, noisy_or
from pyro_vharm.diagnostics.crossing import cross_evidence_scores
from pyro_vharm.diagnostics.quadratic import analyse_curvature, predict_gain
from pyro_vharm.diagnostics.scores import coordinate_directions
from pyro_vharm.diagnostics.shifts import parameter_shifts
from pyro_vharm.inference.choice import choose_method
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED, assert_mean, rejects

HARMED = {
    "two causes": lambda: two_causes(20),
    "factor analysis": lambda: factor_analysis(20),
    "sign-symmetric": lambda: sign_symmetric(60),
    "noisy-OR": lambda: noisy_or(50),
}


def derivatives(harmed, theta):
    """∇ℓ and −∇²ℓ in unconstrained coordinates, from the closed form."""
    names = list(theta.named_trainable())
    leaves = [theta.leaves[name].detach() for name in names]

    def log_evidence(flat):
        parts = flat.split([leaf.numel() for leaf in leaves])
        return harmed.log_evidence(
            {
                name: transform_to(theta.constraints[name])(part.view_as(leaf))
                for name, part, leaf in zip(names, parts, leaves, strict=True)
            }
        )

    at = torch.cat([leaf.reshape(-1) for leaf in leaves])
    score = torch.autograd.functional.jacobian(log_evidence, at)
    return score, -torch.autograd.functional.hessian(log_evidence, at)


@pytest.mark.parametrize("name", HARMED)
def test_fisher_and_louis_against_derivatives_of_the_closed_form(name):
    harmed = HARMED[name]()
    harmed.install()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    directions = coordinate_directions(problem.model_parameters.trainable())
    choice = choose_method(problem.densities)
    scores = cross_evidence_scores(problem, choice, directions, progress=False)
    score, information = derivatives(harmed, problem.model_parameters)
    found = scores.first
    torch.testing.assert_close(found.total, score, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.observed_information, information, rtol=1e-4, atol=1e-4)
    prediction = predict_gain(found, found, analyse_curvature(found, found))
    exact = 0.5 * score @ torch.linalg.solve(information, score)
    assert prediction.value == pytest.approx(float(exact), rel=1e-4)


def factor_model(v, width=5):
    """Independent units of five latents, each seen once: posteriors are Gaussian."""
    loc = pyro.param("loc", v.new_zeros(width))
    scale = pyro.param("scale", v.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("units", len(v)):
        h = pyro.sample("h", dist.Normal(loc, scale).to_event(1))
        pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)


def factor_guide(v):
    with pyro.plate("units", len(v)):
        pyro.sample("h", dist.Normal(0.4 + 0.6 * v, 0.85).to_event(1))


def at_the_maximum(v):
    """θ where log evidence is highest, so that nothing is left to gain."""
    pyro.clear_param_store()
    prepare(factor_model, factor_guide, (v,))
    store = pyro.get_param_store()
    store["loc"] = v.mean(0)
    store["scale"] = (v.var(0, correction=0).mean() - 1).sqrt()


@pytest.fixture
def null():
    torch.manual_seed(SEED)
    v = 1.0 + 1.6 * torch.randn(12, 5, dtype=torch.float64)
    at_the_maximum(v)
    return prepare(factor_model, factor_guide, (v,))


def repeated(problem, count=60):
    directions = coordinate_directions(problem.model_parameters.trainable())
    choice = choose_method(problem.densities, vh.ImportanceSampling(200))
    return [
        cross_evidence_scores(problem, choice, directions, progress=False) for _ in range(count)
    ]


def test_noise_makes_no_harm_at_a_maximum(null):
    """The crossed prediction has mean 0 where the score is 0; uncrossed, it has not."""
    runs = repeated(null)
    values, uncrossed, squares = [], [], []
    for run in runs:
        curvature = analyse_curvature(run.first, run.second)
        found = predict_gain(run.first, run.second, curvature)
        values.append(found.value)
        squares.append((found.value / found.mc_error) ** 2)
        uncrossed.append(predict_gain(run.first, run.first, curvature).value)
    assert_mean(torch.tensor(values), 0.0)
    assert rejects(torch.tensor(uncrossed), 0.0)
    assert 0.4 < sum(squares) / len(squares) < 2.5, "the error is that of the prediction"


def test_noise_of_the_score_is_what_repetition_shows(null):
    runs = repeated(null)
    totals = torch.stack([part.total for run in runs for part in run[:2]])
    told = torch.stack([part.noise.diagonal() for run in runs for part in run[:2]]).mean(0)
    ratio = totals.var(0) / told
    limit = 5 * (2 / len(totals)) ** 0.5  # five standard errors of a variance, and the bias left
    assert bool(((ratio - 1).abs() < limit).all()), ratio


@pytest.mark.parametrize("name", ["sign-symmetric", "noisy-OR"])
def test_short_ways_up_recover_most_of_the_harm_and_never_more(name):
    harmed = HARMED[name]()
    harmed.install()
    harm = harmed.lost_at(harmed.learned)
    found = vh.local_harm(harmed.model, harmed.guide, harmed.data, progress=False)
    assert 0.5 * harm < found.along.gain.value <= found.after_em.gain.value < harm + 1e-6
    assert found.after_em.gain.value > 0.9 * harm
    assert found.best is found.after_em
    assert found.lower.value == pytest.approx(found.best.gain.value, abs=1e-5)
    lost = harmed.lost_at(found.best.parameters)
    assert lost == pytest.approx(harm - found.best.gain.value, abs=1e-5)


def test_a_guide_that_pulls_is_told_from_training_cut_short():
    harmed = sign_symmetric(30)
    harmed.install()
    arguments = harmed.model, harmed.guide, harmed.data
    pulled = vh.local_harm(*arguments, num_em_steps=1, progress=False)
    assert abs(pulled.unconverged.value) < 5 * pulled.unconverged.mc_error + 1e-6
    assert any("guide holds the model" in line for line in pulled.findings)
    force = pulled.adaptation_force
    for name, score in pulled.score.items():  # at a maximum of L the force is −∇ℓ
        assert float(force[name] + score) == pytest.approx(0.0, abs=1.0), name
    pyro.get_param_store()["b"] = harmed.learned["b"] - 0.5
    early = vh.local_harm(*arguments, num_em_steps=1, progress=False)
    assert early.unconverged.value > 2 * early.unconverged.mc_error
    assert any("not trained to convergence" in line for line in early.findings)


def test_a_boundary_is_named_where_the_score_says_nothing():
    harmed = collapsed_mixture()
    harmed.install()
    found = vh.local_harm(harmed.model, harmed.guide, harmed.data, progress=False)
    assert harmed.lost_at(harmed.learned) > 10
    assert found.predicted.value < 0.05
    assert "weights" in found.surroundings.at_boundary
    assert any("At a boundary: " in line for line in found.findings)


def twin_model(v):
    """Two classes that may differ; at equal locations log evidence has a saddle."""
    locs = pyro.param("locs", v.new_tensor([0.0, 0.0]))
    with pyro.plate("units", len(v)):
        z = pyro.sample("z", dist.Categorical(v.new_ones(2) / 2), infer={"enumerate": "parallel"})
        pyro.sample("v", dist.Normal(locs[z], 1.0), obs=v)


def no_guide(v):
    pass


def test_a_saddle_is_left_along_its_upward_direction():
    torch.manual_seed(SEED)
    v = torch.cat([torch.randn(30) - 2, torch.randn(20) + 2.5]).double()
    v = v - v.mean()
    found = vh.local_harm(twin_model, no_guide, (v,), progress=False)
    assert found.surroundings.num_upward == 1
    assert found.predicted.value < 1e-6
    assert "upward" in found.along.name
    assert found.along.gain.value > 5
    locs = found.after_em.parameters["locs"].sort().values
    density = torch.logsumexp(dist.Normal(locs, 1.0).log_prob(v[:, None]), 1).sum()
    before = dist.Normal(0.0, 1.0).log_prob(v).sum() + len(v) * torch.log(torch.tensor(2.0))
    assert found.after_em.gain.value == pytest.approx(float(density - before), abs=1e-4)


def test_rotations_are_flat_and_predict_nothing():
    """Loadings of two factors turn freely: one direction is flat."""
    torch.manual_seed(SEED)
    v = torch.randn(40, 2, dtype=torch.float64) @ torch.randn(2, 5, dtype=torch.float64)
    v = v + 0.7 * torch.randn(40, 5, dtype=torch.float64)

    def model(v):
        loadings = pyro.param("loadings", torch.linspace(-1, 1, 10).view(2, 5).double() ** 3)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(2), 1.0).to_event(1))
            pyro.sample("v", dist.Normal(h @ loadings, 0.7).to_event(1), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.new_zeros(len(v), 2), 1.0).to_event(1))

    problem = prepare(model, guide, (v,))
    directions = coordinate_directions(problem.model_parameters.trainable())
    choice = choose_method(problem.densities)
    scores = cross_evidence_scores(problem, choice, directions, progress=False)
    curvature = analyse_curvature(scores.first, scores.second)
    angle = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    turn = (angle @ problem.model_parameters.leaves["loadings"].detach()).reshape(-1)
    assert abs(float(scores.first.total @ turn)) < 1e-4
    assert int(curvature.flat.sum()) == 0, "away from a maximum a turn is a circle, not a line"
    assert float(predict_gain(scores.first, scores.second, curvature).step @ turn) < float(
        turn @ turn
    )


def test_many_parameters_are_looked_at_along_few_directions():
    torch.manual_seed(SEED)
    v = torch.randn(20, 120, dtype=torch.float64) * 0.5 + 0.3

    def model(v):
        loc = pyro.param("loc", v.new_zeros(120))
        scale = pyro.param("scale", v.new_tensor(0.5), constraint=constraints.positive)
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 0.1))
            pyro.sample("v", dist.Normal(loc + h[..., None], scale).to_event(1), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(v.new_zeros(len(v)), 0.1))

    found = vh.local_harm(model, guide, (v,), progress=False)
    around = found.surroundings
    assert (around.num_parameters, around.num_directions) == (121, 4)
    assert not found.shifts
    assert not found.score
    # two directions hold the whole step here: loc goes to the mean of v
    assert found.predicted.value == pytest.approx(found.best.gain.value, rel=0.3)
    assert "only 4 directions" in str(found)


def test_shifts_are_on_the_scale_of_the_user():
    pyro.clear_param_store()
    start = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def model(v):
        pyro.param("shares", start, constraint=constraints.simplex)
        pyro.param("scale", torch.tensor(2.0).double(), constraint=constraints.positive)

    theta = vh.capture_parameters(model, (torch.ones(1),))
    step = torch.tensor([1e-6, -2e-6, 4e-6, 3e-6], dtype=torch.float64)
    covariance = torch.diag(torch.tensor([4.0, 9.0, 1.0, 0.25])).double()
    shifts = parameter_shifts(theta, step, 0 * covariance, covariance)
    before = theta.constrained()
    theta.assign(
        {
            "shares": theta.leaves["shares"] + step[:3],
            "scale": theta.leaves["scale"] + step[3],
        }
    )
    after = theta.constrained()
    moved = torch.cat([(after[n] - before[n]).reshape(-1) for n in ("shares", "scale")])
    assert [s.label for s in shifts] == ["shares[0]", "shares[1]", "shares[2]", "scale"]
    torch.testing.assert_close(
        torch.tensor([s.shift for s in shifts]).double(), moved, rtol=1e-4, atol=1e-12
    )
    assert shifts[-1].standard_error == pytest.approx(2.0 * 0.5)


def test_one_joint_unit_of_many_latents():
    """Units are few, so information is Louis's; prediction and gain meet the closed form."""
    torch.manual_seed(SEED)
    v = 1.0 + 1.3 * torch.randn(8, dtype=torch.float64)

    def model(v):
        loc = pyro.param("loc", v.new_tensor(0.2))
        h = pyro.sample("h", dist.Normal(loc, 1.0).expand([8]).to_event(1))
        pyro.sample("v", dist.Normal(h, 1.0).to_event(1), obs=v)

    def guide(v):
        pyro.sample("h", dist.Normal(0.5 * v, 0.8).to_event(1))

    found = vh.local_harm(model, guide, (v,), progress=False)
    harm = float(8 * (v.mean() - 0.2) ** 2 / 4)
    assert found.predicted.num_units == 1
    error = max(found.predicted.mc_error, 0.02 * harm)  # the information has noise of its own
    assert abs(found.predicted.value - harm) < 5 * error
    assert found.lower.value < harm


def test_bad_input_is_refused_before_any_work():
    harmed = noisy_or(10)
    harmed.install()
    arguments = harmed.model, harmed.guide, harmed.data
    with pytest.raises(vh.InputError, match="num_em_steps must be at least 1"):
        vh.local_harm(*arguments, num_em_steps=0)
    with pytest.raises(vh.InputError, match="needs the guide"):
        vh.local_harm(harmed.model, None, harmed.data)

    def fixed(v):
        with pyro.plate("units", len(v)):
            h = pyro.sample("h", dist.Normal(v.new_zeros(()), 1.0))
            pyro.sample("v", dist.Normal(h, 1.0), obs=v)

    def guide(v):
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(0.0 * v, 1.0))

    with pytest.raises(vh.InputError, match="no parameters to learn"):
        vh.local_harm(fixed, guide, (torch.ones(3),))
