"""Law 7: what is measured holds on controls with exact answers; a small part of the calibration.

`make calibration` measures all data sets. Here every control is built and its formulas are held
against the package, and a few data sets are measured.
"""

import json

import pyro
import pytest
import torch
from torch.distributions import constraints, transform_to

import pyro_vharm as vh
from benchmarks import calibration, calibration_runs
from benchmarks.calibration_runs import Run, measure, measure_all, read_lines
from benchmarks.calibration_tables import (
    excess_p_value,
    hard,
    is_within,
    near,
    nulls,
    positives,
    power,
)
from benchmarks.controls import CONTROLS
from benchmarks.exact_optima import highest, tensor
from benchmarks.learners import AIM, missing_after
from pyro_vharm.learning.refit import estimate_elbo
from pyro_vharm.model.problem import prepare
from tests.statistics import SEED, Z

# a variance that vanished and classes that died lie at a boundary, where L rises on
INTERIOR = [name for name in CONTROLS if name != "factor analysis, a variance gone"]
ONE_UNIT = [name for name in CONTROLS if "chains" in name or "AR(1)" in name]
FEW_DIMS = [name for name in CONTROLS if name not in ONE_UNIT]


@pytest.fixture(scope="module")
def simulated():
    """The smallest data set of each control."""
    torch.set_default_dtype(torch.float64)
    return {name: control.simulate(control.seeds[0]) for name, control in CONTROLS.items()}


def gradient_norm(function, values, moved=0.0):
    """Of a function of parameters, on their unconstrained scale, at random steps from there."""
    store = pyro.get_param_store()
    kinds = {name: store._constraints.get(name, constraints.real) for name in values}
    begun = {name: transform_to(kinds[name]).inv(value) for name, value in values.items()}
    leaves = {n: (v + moved * torch.randn_like(v)).requires_grad_() for n, v in begun.items()}
    total = function({name: transform_to(kinds[name])(leaf) for name, leaf in leaves.items()})
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return float(torch.cat([g.flatten() for g in found if g is not None]).norm())


@pytest.mark.parametrize("name", CONTROLS)
def test_optima(simulated, name):
    """L ≤ ℓ; θ̂ is stationary for L, θ* for ℓ; and θ̂ is where it is for the role it plays."""
    harmed, role = simulated[name], CONTROLS[name].role
    harmed.install()
    values = harmed.learned | harmed.guide_values
    height = float(harmed.bound_at(values))
    assert height == pytest.approx(harmed.bound, abs=1e-9)
    assert harmed.gap > -1e-9 and harmed.harm > -1e-9
    if name in INTERIOR:
        assert gradient_norm(harmed.bound_at, values) < 1e-3
        assert gradient_norm(harmed.bound_at, values, moved=0.1) > 1e-2, "elsewhere it is not"
    assert gradient_norm(harmed.log_evidence, harmed.best) < 1e-2
    if role == "null":
        assert harmed.harm < 0.005
    if role == "positive":
        assert 0.05 < harmed.harm < 50


@pytest.mark.parametrize("name", CONTROLS)
def test_formulas(simulated, name):
    """The package's evidence and ELBO of the Pyro model agree with the formulas by hand."""
    harmed = simulated[name]
    harmed.install()
    problem = prepare(harmed.model, harmed.guide, harmed.data)
    elbo = estimate_elbo(problem.densities[0], 2000).total()
    assert abs(elbo.value - harmed.bound) < max(Z * elbo.mc_error, 1e-9)
    if name in ONE_UNIT:  # no evidence without error: the joint density at a point is exact
        check_gaussian(harmed, problem.densities[0])
        return
    evidence = vh.log_evidence(harmed.model, harmed.data, guide=harmed.guide, progress=False)
    total = evidence.per_unit.total()
    assert total.kind <= vh.Kind.NUMERICAL
    expected = float(harmed.log_evidence(harmed.learned))
    assert total.value == pytest.approx(expected, abs=max(Z * total.mc_error, 1e-5))


def check_gaussian(harmed, densities):
    """Evidence of a Gaussian model from its log joint: ℓ = f(mode) + ½ d log 2π − ½ log|P|."""
    start = torch.zeros(densities.dim)

    def log_joint(h):
        return densities.log_joint(h[None, None])[0, 0]

    gradient = torch.autograd.functional.jacobian(log_joint, start)
    hessian = torch.autograd.functional.hessian(log_joint, start)
    mode = start - torch.linalg.solve(hessian, gradient)
    log_norm = 0.5 * len(mode) * torch.log(torch.tensor(2 * torch.pi))
    evidence = log_joint(mode) + log_norm - 0.5 * (-hessian).logdet()
    expected = float(harmed.log_evidence(harmed.learned))
    assert float(evidence.detach()) == pytest.approx(expected, abs=1e-6)


def test_a_variance_that_vanishes(simulated):
    """L rises as it falls, and has a score of next to nothing there."""
    harmed = simulated["factor analysis, a variance gone"]
    harmed.install()
    factors = torch.tensor([0.1, 1, 1, 1, 1])
    further = harmed.learned | {"unique": harmed.learned["unique"] * factors}
    assert float(harmed.bound_at(further)) > harmed.bound
    assert gradient_norm(harmed.bound_at, harmed.learned) < 0.02


def test_a_better_elbo_with_worse_evidence(simulated):
    """Two chains: where L is highest the gap is 0, and nine nats more are lost than nearby."""
    best = simulated["two chains, global maximum of L"]
    near = simulated["two chains, local maximum of L"]
    assert best.bound > near.bound + 0.3
    assert best.gap == pytest.approx(0.0, abs=1e-6) and near.gap > 5
    assert best.harm > near.harm + 5


def test_gaps_that_mislead(simulated):
    for name in ("mixture, collapsed", "factor analysis, a variance gone"):
        assert simulated[name].gap < 0.02 and simulated[name].harm > 5
    known = simulated["two causes, weight known"]
    assert known.gap > 20 and known.harm == 0


def test_the_highest_of_several_maxima():
    """−(x² − 1)² + x/2 has a lower maximum on the left."""

    def function(values):
        x = values["x"]
        return -(x.square() - 1).square() + 0.5 * x

    found = highest(function, [{"x": tensor(-1.0)}, {"x": tensor(1.0)}])
    assert float(found["x"]) > 1
    assert float(highest(function, [{"x": tensor(-1.0)}])["x"]) < 0


@pytest.mark.parametrize(
    "name, seed",
    [
        ("two causes, free", 0),
        ("mixture, hard assignment", 0),
        ("mixture, collapsed", 0),
    ],
)
def test_measured(name, seed):
    line = measure(Run(name, seed, "exact"))
    assert is_within(line["estimate"], line["harm"])
    assert line["lower"] <= line["harm"] + 1e-4
    assert is_within(line["reached"], line["harm"])
    assert line["outcome"] == ("harm" if line["harm"] > line["material"] else "no harm found")
    assert line["predicted"] is None or line["predicted"] == pytest.approx(line["predicted"])


def line(role="null", **changes):
    known = {
        "control": "c", "seed": 0, "measurement": "exact", "role": role, "size": 3, "harm": 0.0,
        "gap": 0.0, "reached": 0.0, "estimate": 0.0, "mc_error": 0.1, "lower": -0.2, "upper": 0.2,
        "kind": "estimated", "outcome": "no harm found", "material": 1.0, "gap_estimate": None,
        "gap_error": None, "attempts": [], "predicted": None, "seconds": 1.0,
    }  # fmt: skip
    return known | changes


def test_the_binomial_test_rejects_an_optimistic_twin():
    """Honest one-sided bounds at 95 % pass; the same, shifted by one standard error, do not."""
    draws = torch.randn(300)
    honest = [line(lower=float(draw) - 1.645, mc_error=1.0, estimate=float(draw)) for draw in draws]
    twin = [one | {"lower": one["lower"] + 1, "estimate": one["estimate"] + 1} for one in honest]
    for lines, passes in ((honest, True), (twin, False)):
        _, rows = nulls(lines)
        for cell in (rows[0][4], rows[0][5]):
            assert (float(cell.partition("p = ")[2].rstrip(")")) > 1e-3) == passes, cell
    assert excess_p_value(0, 300) == 1 and excess_p_value(16, 300) > 0.3
    assert excess_p_value(40, 300) < 1e-5


def test_tables_count_what_is_wrong():
    right = line("positive", harm=4.0, reached=4.0, estimate=4.1, lower=3.8, outcome="harm")
    wrong = right | {"reached": 1.0, "estimate": 1.0, "lower": 5.0, "outcome": "no harm found"}
    row = positives([right, wrong])[1][0]
    assert row[5:10] == ["1 of 2", "1 of 2", "1", "1 / 0 / 1", "1"]
    assert power([right, wrong])[1][0] == ["3 to 10", "exact", "2", "1", "2", "1"]
    assert hard([line("hard", harm=2.0)])[1][0][5] == "2.00"
    alarm = line(outcome="harm", lower=0.5)
    row = nulls([line(), alarm])[1][0]
    assert row[4].startswith("1 ") and row[6].startswith("1 ")


def test_a_torn_line_is_cut_and_measured_again(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    whole = {"control": "a", "seed": 0, "measurement": "exact"}
    path.write_text(json.dumps(whole) + "\n" + '{"control": "a", "se')
    assert read_lines(path) == [whole]
    assert path.read_text() == json.dumps(whole) + "\n"
    asked = []
    monkeypatch.setattr(calibration_runs, "get_context", lambda _: FakeContext(asked))
    runs = [Run("a", 0, "exact"), Run("a", 1, "exact")]
    assert len(list(measure_all(runs, path, 1))) == 1
    assert asked == runs[1:] and len(read_lines(path)) == 2
    assert next(measure_all(runs, path, 1))["error"], "a failure is tried again"


class FakeContext:
    """Processes that fail at once."""

    def __init__(self, asked):
        self.asked = asked

    def Pool(self, *_args, **_options):  # noqa: N802
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def imap_unordered(self, _function, runs):
        self.asked[:] = runs
        return ({**run._asdict(), "error": "as asked"} for run in runs)


def test_the_command(tmp_path, capsys):
    """One data set in a process of its own; the second call has nothing left to do."""
    saved = tmp_path / "tables.json"
    arguments = ["--controls", "mixture, hard assignment", "--seeds", "1", "--workers", "1"]
    page = tmp_path / "page.md"
    marks = "% calibration: tables begin\n{}\n% calibration: tables end"
    page.write_text(f"before\n{marks.format('old')}\nafter\n")
    arguments += ["--out", str(tmp_path), "--save", str(saved), "--page", str(page)]
    calibration.main(arguments)
    first = capsys.readouterr().out
    calibration.main([*arguments, "--tables-only"])
    assert "### Power" in capsys.readouterr().out
    calibration.main(arguments)
    assert "# | mixture" in first and "# | mixture" not in capsys.readouterr().out
    shown = page.read_text()
    assert shown.startswith("before\n%") and shown.endswith("end\nafter\n")
    assert "| mixture" in shown and "old" not in shown
    with pytest.raises(ValueError, match="lacks the line"):
        calibration.put_between_marks(saved, "")
    assert json.loads(saved.read_text())["positives"][0]["harm / undecided / none"] == "1 / 0 / 0"


def test_what_shows_near_is_kept_beside():
    line = measure(Run("mixture, hard assignment", 0, "exact"))
    assert 0 < line["predicted"] < 2 * line["harm"]
    assert 0.5 * line["harm"] < line["near_lower"] <= line["harm"] + 1e-6
    assert line["near"] <= line["harm"] + 1e-6


def test_the_table_of_what_shows_near_counts_false_bounds():
    line = measure(Run("mixture, hard assignment", 0, "exact"))
    line["predicted"] = 1.5 * line["harm"]
    shifted = {**line, "near_lower": line["harm"] + 1.0, "predicted": 5 * line["harm"]}
    header, rows = near([line, shifted])
    (row,) = rows
    told = dict(zip(header, row, strict=True))
    assert told["false lower bounds"].startswith("1 ")
    assert told["prediction within a factor of two"] == "1 of 2"


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_quick_learning_of_one_joint_unit(seed):
    """With a few particles of one unit their noise had looked like arrival, at θ̂ itself."""
    harmed = CONTROLS["AR(1), mean field over time"].simulate(seed)
    learner = vh.ExpectationMaximization(guide_training=vh.GuideTraining(0))
    assert harmed.harm > 0.15
    assert missing_after(harmed, learner, SEED)["missing"] < AIM
