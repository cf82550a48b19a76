"""Bound, evidence, gap and posterior shape along a training, now or later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import pyro
from torch import Tensor
from tqdm.auto import tqdm

from pyro_vharm.diagnostics.gap import InferenceGap, measure_gap
from pyro_vharm.diagnostics.shape import PosteriorShape
from pyro_vharm.diagnostics.shape_measurement import choose_for_shape, measure_shape
from pyro_vharm.errors import InputError
from pyro_vharm.estimates import UnitEstimates
from pyro_vharm.inference.choice import Choice, InferenceMethod, choose_method
from pyro_vharm.learning.history import Checkpoint, History
from pyro_vharm.learning.refit import Refit
from pyro_vharm.model.data import Data, fingerprint
from pyro_vharm.model.problem import Problem, prepare
from pyro_vharm.model.snapshots import assign_tensors, live_tensors
from pyro_vharm.model.state import untouched
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["DiagnosedHistory", "Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found at one checkpoint.

    Attributes:
        parameters: θ by name, on the user-facing scale.
        gap: log evidence, ELBO and the ELBO of a refitted guide, in nats.
        shape: of the true posteriors.
    """

    parameters: Mapping[str, Tensor]
    gap: InferenceGap
    shape: PosteriorShape


@dataclass(frozen=True)
class DiagnosedHistory:
    """A history, with what was found at some of its checkpoints.

    Attributes:
        history: the checkpoints.
        diagnoses: step → what was found there, in order of steps.
        settings: on which data and how; the same for every checkpoint.
    """

    history: History
    diagnoses: Mapping[int, Diagnosis] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that are diagnosed."""
        return tuple(self.diagnoses)

    def __str__(self) -> str:
        rows = [[str(step), *_row(found)] for step, found in self.diagnoses.items()]
        names = ["log evidence", "ELBO", "gap", "± mc", "approx.", "amort.", "non-Gauss.", "dep."]
        line = (
            f"{len(self.diagnoses)} of {len(self.history)} checkpoints, nats per unit:"
            "\napproximation and amortization gap; posteriors' non-Gaussianity and dependence"
        )
        return "\n".join([text_table(["step", *names], rows), line])

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _row(found: Diagnosis) -> list[str]:
    gap, shape = found.gap, found.shape.continuous
    entries = [gap.evidence.per_unit, gap.elbo, gap.gap, gap.approximation, gap.amortization]
    entries += [None, None] if shape is None else [shape.non_gaussianity, shape.total_correlation]
    cells = [_per_unit(entry) for entry in entries]
    error = "—" if gap.gap is None else nats(gap.gap.total().per_unit.mc_error, 4)
    return [*cells[:3], error, *cells[3:]]


def _per_unit(units: UnitEstimates | None) -> str:
    return "—" if units is None else nats(units.total().per_unit.value, 4)


def diagnose(
    history: History | DiagnosedHistory,
    data: Data,
    *,
    checkpoints: Sequence[int] | None = None,
    method: InferenceMethod | None = None,
    refit: Refit | None = None,
    shape_method: InferenceMethod | None = None,
    unit_plate: str | None = None,
    parameters: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> DiagnosedHistory:
    """Measure bound, evidence, gap and posterior shape at checkpoints; keep what is known.

    At each, `inference_gap` and `posterior_shape` are taken with the model and guide of that step.
    The random numbers of a checkpoint depend on `seed` and its step alone, so that numbers do not
    change with what else is diagnosed, and errors of different checkpoints are independent. Model
    and guide are left as they were.

    Args:
        history: of a `Recorder`, or one that was diagnosed in part: what is there stays, and only
            the rest of the chosen checkpoints is measured.
        data: a probe, the same at every checkpoint: positional arguments as a tuple, keyword
            arguments as a Mapping, or an iterable of batches.
        checkpoints: indices of the chosen checkpoints; all if left out.
        method: the inference method for ℓ; see `log_evidence`.
        refit: how to refit the guide per unit, and how finely to evaluate the ELBO.
        shape_method: where the particles of the shape come from; see `posterior_shape`.
        unit_plate: name of the plate of independent units; found if left out.
        parameters: sites that the guide holds as point masses (as AutoDelta does) and that count
            as θ: log evidence then includes their log prior.
        seed: of all random numbers used.
        progress: show bars on long work.

    Raises:
        InputError: where model, guide or data break a constraint; a checkpoint lacks a parameter
            that they have; an index is out of range; or data and settings are others than those
            of what is kept.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro_vharm import Recorder
    >>> def model(x):
    ...     loc = pyro.param("loc", torch.tensor(0.0))
    ...     with pyro.plate("data", len(x)):
    ...         h = pyro.sample("h", dist.Normal(loc, 1.0))
    ...         pyro.sample("x", dist.Normal(h, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("h", dist.Normal(x / 2, 0.7))
    >>> x = torch.ones(5)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    >>> recorder = Recorder(model, guide, every=4)
    >>> for step in range(9):
    ...     loss = svi.step(x)
    ...     recorder.record(step)
    >>> refit = Refit(num_steps=20, num_particles=50)
    >>> found = diagnose(recorder.history, (x,), checkpoints=[0, -1], refit=refit, progress=False)
    >>> found.steps
    (0, 8)
    >>> diagnose(found, (x,), refit=refit, progress=False).steps
    (0, 4, 8)
    """
    known = history if isinstance(history, DiagnosedHistory) else DiagnosedHistory(history)
    history, refit = known.history, refit or Refit()
    chosen = [history[index] for index in _indices(history, checkpoints)]
    due = [checkpoint for checkpoint in chosen if checkpoint.step not in known.diagnoses]
    with untouched(seed, history.model, history.guide):
        problem = prepare(
            history.model, history.guide, data, unit_plate=unit_plate, parameters=parameters
        )
        plan = _Plan(
            choose_method(problem.densities, method), refit, choose_for_shape(problem, shape_method)
        )
        settings = plan.settings(problem) | {
            "parameters": str(tuple(parameters)),
            "seed": str(seed),
        }
        _check_settings(known, settings)
        for checkpoint in due:
            _check_covered(problem, checkpoint)
        found = dict(known.diagnoses)
        single = len(due) == 1
        bar = tqdm(due, desc="checkpoints", disable=single or not progress or None, leave=False)
        for checkpoint in bar:
            _hold(problem, checkpoint)
            pyro.set_rng_seed(seed + checkpoint.step)
            found[checkpoint.step] = plan.measure(problem, progress=progress and single)
    return replace(known, diagnoses=dict(sorted(found.items())), settings=settings)


class _Plan(NamedTuple):
    """What is measured at every checkpoint, and how."""

    choice: Choice
    refit: Refit
    shape: Choice

    def settings(self, problem: Problem) -> dict[str, str]:
        """All that decides about the numbers."""
        return {
            "data": fingerprint(list(problem.batches)),
            "method": str(self.choice),
            "refit": str(self.refit),
            "shape_method": str(self.shape),
            "unit_plate": str(problem.layout.plate),
        }

    def measure(self, problem: Problem, *, progress: bool) -> Diagnosis:
        """At the parameters that the problem holds now."""
        return Diagnosis(
            problem.model_parameters.constrained(),
            measure_gap(problem, self.choice, self.refit, progress=progress),
            measure_shape(problem, self.shape, progress=progress),
        )


def _indices(history: History, checkpoints: Sequence[int] | None) -> Sequence[int]:
    chosen = range(len(history)) if checkpoints is None else checkpoints
    bad = [index for index in chosen if not -len(history) <= index < len(history)]
    if bad:
        raise InputError(f"checkpoints must be indices of {len(history)} checkpoints, got {bad}")
    return chosen


def _check_settings(known: DiagnosedHistory, settings: Mapping[str, str]) -> None:
    other = [
        name for name in settings if known.diagnoses and known.settings[name] != settings[name]
    ]
    if other:
        raise InputError(
            f"the history was diagnosed with other settings ({', '.join(other)}); diagnose its "
            "plain .history, or use the same data and settings for all checkpoints"
        )


def _check_covered(problem: Problem, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that would leave a parameter as it is now."""
    held = {
        id(tensor)
        for name, tensor in live_tensors(problem.model, problem.guide).items()
        if name in checkpoint.values
    }
    leaves = problem.model_parameters.joined(problem.guide_parameters).leaves
    missing = sorted(name for name, leaf in leaves.items() if id(leaf) not in held)
    if missing:
        raise InputError(
            f"the checkpoint of step {checkpoint.step} lacks the parameters {missing}: they were "
            "made later; leave its index out of checkpoints="
        )


def _hold(problem: Problem, checkpoint: Checkpoint) -> None:
    live = live_tensors(problem.model, problem.guide)
    values = {name: value for name, value in checkpoint.values.items() if name in live}
    assign_tensors(live, values, f"the checkpoint of step {checkpoint.step}")
