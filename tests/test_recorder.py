"""Recording a training: what is kept is what was there, also when the process is killed."""

import os
import signal
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

import pyro_vharm as vh
from tests.test_diagnostics import set_tied, tied_guide, tied_model
from tests.zoo.parameters import MAKERS

V = torch.tensor([0.5, -1.5, 2.5], dtype=torch.float64)


def density(case):
    """Log p(v, h = 0) at the parameters of now."""
    at_zero = poutine.condition(case.model, {"h": case.data[0].new_zeros(len(case.data[0]), 2)})
    with torch.no_grad():
        return poutine.trace(at_zero).get_trace(*case.data).log_prob_sum()


@pytest.mark.parametrize(
    "make", [m for m in MAKERS if "simplex" not in m.__name__], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("local", [False, True], ids=["global params", "local params"])
def test_a_checkpoint_brings_back_the_density_in_every_regime(make, local, tmp_path):
    with pyro.settings.context(module_local_params=local):
        case = make()
        density(case)
        recorder = vh.Recorder(case.model, case.guide, every=1, path=tmp_path)
        wanted = []
        for step in range(3):
            for leaf in vh.capture_parameters(case.model, case.data).leaves.values():
                with torch.no_grad():
                    leaf += 0.1 * torch.randn_like(leaf)
            wanted.append(density(case))
            recorder.record(step)
        for index, expected in enumerate(wanted):
            with recorder.history.at(index) as checkpoint:
                assert checkpoint.step == index
                assert torch.equal(density(case), expected)
            assert torch.equal(density(case), wanted[-1]), "as before"
        recorder.history.restore(0)
        assert torch.equal(density(case), wanted[0])


def test_training_goes_as_without_a_recorder():
    def losses(record):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = SVI(tied_model, tied_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        recorder = vh.Recorder(tied_model, tied_guide, every=2)
        found = []
        for step in range(6):
            found.append(svi.step(V))
            if record:
                recorder.record(step, loss=found[-1], twice=torch.tensor(2 * found[-1]))
        return found, recorder.history

    found, history = losses(record=True)
    assert found == losses(record=False)[0]
    assert history.steps == (0, 2, 4) and history[1:].steps == (2, 4)
    assert [checkpoint.scalars["loss"] for checkpoint in history] == found[::2]
    assert history[2].scalars["twice"] == 2 * found[4]
    assert history.values("a").shape == (3,)
    assert "3 checkpoints" in str(history) and "<pre>" in history._repr_html_()


def test_buffers_are_part_of_a_checkpoint():
    norm = nn.BatchNorm1d(1)

    def model(v):
        pyro.module("norm", norm)
        with pyro.plate("units", len(v)):
            pyro.sample("h", dist.Normal(norm(v[:, None])[:, 0], 1.0))

    recorder = vh.Recorder(model, None, every=1)
    recorder.record(0)  # before the store knows of the module
    model(V)
    recorder.record(1)
    model(V + 5.0)
    later = norm.running_mean.clone()
    for index, mean in ((0, 0.0), (1, 0.1 * float(V.mean()))):
        with recorder.history.at(index):
            assert float(norm.running_mean) == pytest.approx(mean)
    assert torch.equal(norm.running_mean, later)


def test_a_recorder_continues_what_its_path_holds(tmp_path):
    set_tied(1.0)
    vh.Recorder(tied_model, tied_guide, every=5, path=tmp_path).record(0)
    set_tied(2.0)
    (tmp_path / "step-000000000005.partial").write_bytes(b"killed while writing")
    again = vh.Recorder(tied_model, tied_guide, every=5, path=tmp_path)
    assert again.history.steps == (0,), "what is not whole is not there"
    with pytest.raises(vh.InputError, match="later than 0"):
        again.record(0)
    again.record(5)
    again.record(6)
    again.checkpoint(7)
    assert torch.equal(again.history.values("a").exp(), torch.tensor([1.0, 2.0, 2.0]))
    again.history.save(tmp_path / "copy")
    copy = vh.History.load(tmp_path / "copy", tied_model, tied_guide)
    assert copy.steps == (0, 5, 7)
    assert torch.equal(copy.values("a"), again.history.values("a"))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_what_was_whole_survives_a_kill(tmp_path):
    set_tied(1.0)
    pyro.param("large", torch.zeros(200_000))
    child = os.fork()
    if child == 0:
        recorder = vh.Recorder(tied_model, tied_guide, every=1, path=tmp_path)
        for step in range(10**6):
            recorder.record(step)
    while not (tmp_path / "step-000000000003.pt").exists():
        vh.History.load(tmp_path, tied_model, tied_guide)  # while it is written to
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = vh.Recorder(tied_model, tied_guide, every=1, path=tmp_path)
    assert found.history.steps == tuple(range(len(found.history)))
    assert all(bool((values == 0).all()) for values in found.history.values("large"))
    found.record(len(found.history))


def test_what_cannot_be_restored_is_refused_and_changes_nothing(tmp_path):
    with pytest.raises(vh.InputError, match="hold no parameter yet"):
        vh.Recorder(tied_model, tied_guide).record(0)
    with pytest.raises(vh.InputError, match="must be a directory of checkpoints"):
        vh.History.load(tmp_path / "nowhere", tied_model, tied_guide)
    with pytest.raises(vh.InputError, match="every must be at least 1, not 0"):
        vh.Recorder(tied_model, tied_guide, every=0)
    set_tied(1.0)
    plain = vh.History(tied_model, tied_guide, (vh.Checkpoint(3, {"a": torch.zeros(2)}),))
    with pytest.raises(vh.InputError, match=r"step 3 holds 'a' with shape \(2,\)"):
        plain.restore(0)
    other = vh.Checkpoint(4, {"a": torch.zeros(()), "b": torch.zeros(())})
    with pytest.raises(vh.InputError, match=r"step 4 holds \['b'\]"), plain.appended(other).at(1):
        pass
    assert float(pyro.param("a").detach()) == 1.0
    with pytest.raises(vh.InputError, match="rising steps"):
        plain.appended(vh.Checkpoint(3, {}))
    with pytest.raises(vh.InputError, match="not be negative"):
        vh.Checkpoint(-1, {})
    with pytest.raises(vh.InputError, match="step 3 has"):
        plain.values("slope")
