"""Each table can be made, with next to no budget and without JAX; what judges is right."""

import argparse
import functools
import json

import pytest
import torch

import pyro_vharm as vh
from benchmarks import digits_shapes, gradients, recording, scaling, throughput, widths
from benchmarks.figures import draw, load
from benchmarks.timing import time_interleaved
from benchmarks.widths import CLASSICAL, GUIDED, OURS, PUBLISHED, Point, time_to_width


@pytest.fixture(autouse=True)
def single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def test_times_are_read_off_between_two_runs():
    line = [Point("", OURS, 1, 1.0 / t, 0.1, t, 0.0) for t in (1.0, 4.0, 100.0)]
    assert time_to_width(line, 0.1) == pytest.approx(10.0)
    assert time_to_width(line, 2.0) == 1.0 and time_to_width(line, 1e-3) == float("inf")


def test_estimates_that_differ_are_refused():
    torch.manual_seed(0)
    first, second = torch.randn(4, 200), torch.randn(4, 200)
    throughput.check(first, second, "same")
    with pytest.raises(ValueError, match="other: log evidence differs"):
        throughput.check(first, second + 1.0, "other")


def test_gradients_that_differ_are_refused():
    right = torch.ones(3), torch.ones(3, 2)
    wrong = torch.ones(3), 1.1 * torch.ones(3, 2)
    gradients.compare({gradients.REFERENCE: lambda: right, "ours": lambda: right})
    with pytest.raises(ValueError, match="ours: gradient is off by up to"):
        gradients.compare({gradients.REFERENCE: lambda: right, "ours": lambda: wrong})


@pytest.fixture
def cheap(monkeypatch):
    """Without JAX, and without compiling, which takes seconds."""
    for table in (gradients, throughput, widths):
        monkeypatch.setattr(table, "find_spec", lambda _name: None)
    monkeypatch.setattr(gradients, "compiled", gradients.traced)
    monkeypatch.delitem(throughput._FORMS, "ours, compiled")


def options_of(table, *arguments):
    parser = argparse.ArgumentParser()
    table.add_options(parser)
    return parser.parse_args(arguments)


def test_tables_of_gradients_and_throughput(cheap, monkeypatch, capsys):
    briefly = functools.partial(time_interleaved, num_rounds=2, block_seconds=0.0)
    for table in (gradients, throughput):
        monkeypatch.setattr(table, "time_interleaved", lambda peers, **_: briefly(peers))
    gradients.run(options_of(gradients, "--problems", "toy-10"))
    throughput.run(options_of(throughput, "--problems", "toy-10", "--temperatures", "2"))
    shown = capsys.readouterr().out
    assert "hand-written torch" in shown and "ours, graph" in shown and "JAX, jit" not in shown


def test_table_and_figure_of_widths(cheap, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "widths.json"
    budget = "--vaes 64-64-4 --images 3 --epochs 1 --steps 1 2 --first-steps 1 --most-steps 4"
    widths.run(options_of(widths, *budget.split(), "--width", "1e-9", "--save", str(saved)))
    assert "times ours" in capsys.readouterr().out
    points = load([saved])
    assert {point.recipe for point in points} == {OURS, GUIDED, CLASSICAL, PUBLISHED}
    assert len(json.loads(saved.read_text())) == len(points)
    figure = draw(points, 0.1)
    assert figure.axes[0].get_xlabel() == "CPU seconds"


def test_cost_of_a_few_units():
    method = vh.AnnealedImportanceSampling(
        2, 1, start=vh.MatchedStart(refit=False), kernel=vh.HamiltonianKernel(1), num_settling=0
    )
    cost = scaling.measure(20, method)
    assert cost.seconds > 0 and cost.results > 20 * 2 * 3 * 4 and cost.peak >= 0


def test_what_a_recorder_costs(capsys):
    recording.run(options_of(recording, "--rounds", "2", "--every", "5"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[3].split("|")[3].strip() == "1.000", "itself, over itself"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["in memory", "on disk"]


@pytest.mark.slow
def test_shapes_after_three_ways_of_learning(capsys):
    digits_shapes.main(["--epochs", "1", "--images", "3", "--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[2].startswith("| ELBO ")
