"""The fall of the gap, split into what the model gave and what inference gained."""

import math

import pyro
import pytest
import torch

import pyro_vharm as vh
from tests.statistics import Z
from tests.test_diagnostics import closed, set_tied, tied_guide, tied_model

V = torch.tensor([0.5, -2.0, 3.0, 1.1, -4.0], dtype=torch.float64)
OPTIONS = {"refit": vh.Refit(num_steps=60, num_particles=1000), "progress": False}


def recorded(weights):
    recorder = vh.Recorder(tied_model, tied_guide, every=1)
    for step, (a, slope) in enumerate(weights):
        set_tied(a)
        with torch.no_grad():
            pyro.param("slope").mul_(slope)
        recorder.record(step)
    return vh.diagnose(recorder.history, (V,), **OPTIONS)


def approximation(a):
    """KL of the best mean field to the Gaussian posterior of two causes with one weight a."""
    return len(V) * (math.log(1 + a**2) - 0.5 * math.log(1 + 2 * a**2))


def test_the_parts_are_those_of_the_closed_form():
    trained = recorded([(1.5, 0.6), (1.0, 0.8), (0.5, 1.0)])
    reference = recorded([(1.5, 0.6), (1.6, 1.0)])
    found = vh.self_fulfilment(trained, reference)
    assert list(found.trained) == [0, 1, 2] and list(found.reference) == [0, 1]
    for step, a in enumerate((1.5, 1.0, 0.5)):
        parts = found.trained[step]
        assert parts.log_evidence.value == pytest.approx(closed(V, a)[0], abs=1e-4)
        error = max(parts.approximation.mc_error, 1e-3)
        assert abs(parts.approximation.value - approximation(a)) < Z * error
    change, other = found.change, found.reference_change
    wanted = approximation(0.5) - approximation(1.5)
    assert abs(change.approximation.value - wanted) < Z * change.approximation.mc_error
    assert change.gap.value == pytest.approx(
        change.approximation.value + change.amortization.value, abs=1e-9
    )
    assert change.amortization.value < -5 * change.amortization.mc_error, "inference improved too"
    assert other.approximation.value > 0, "exact learning does not bend the model to the family"
    assert change.approximation.mc_error > 0
    text = str(found)
    assert "as trained" in text and "reference" in text and "as inference improved" in text
    assert "From step 0 to 2" in text and "<pre>" in found._repr_html_()


def test_what_cannot_be_split_is_refused():
    trained = recorded([(1.5, 1.0), (1.0, 1.0)])
    alone = vh.self_fulfilment(trained)
    assert alone.reference_change is None and "Under the reference" not in str(alone)
    with pytest.raises(vh.InputError, match="history must have at least two diagnosed"):
        vh.self_fulfilment(recorded([(1.5, 1.0)]))
    with pytest.raises(vh.InputError, match="history must come from diagnose"):
        vh.self_fulfilment(trained.history)
    elsewhere = vh.diagnose(trained.history, (V + 1,), **OPTIONS)
    with pytest.raises(vh.InputError, match="reference must be diagnosed on the same probe"):
        vh.self_fulfilment(trained, elsewhere)
    points = vh.Recorder(tied_model, None, every=1)
    for step in range(2):
        points.record(step)
    without = vh.diagnose(points.history, (V,), **OPTIONS)
    with pytest.raises(vh.InputError, match=r"unknown at the steps \[0, 1\]"):
        vh.self_fulfilment(without)
