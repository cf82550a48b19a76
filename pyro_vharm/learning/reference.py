"""Reference parameters θ_ref: what was tried, what it reached, and the better parameters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.learning.evidence_pair import EvidencePair, bounds_table
from pyro_vharm.learning.history import History
from pyro_vharm.model.observed import unit_data
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.model.problem import Problem, capture_pair
from pyro_vharm.tables import html_table, nats

__all__ = ["Attempt", "Reference"]

_MARGIN = "    "


@dataclass(frozen=True)
class Attempt:
    """One way to a reference that was tried.

    Attributes:
        name: learner and start.
        log_evidence: what it reached on the training data, by random numbers of its own; ``None``
            for parameters handed in, which nothing competes with, and where learning failed.
        ending: how it ended, in words.
        num_steps: gradient steps, iterations or EM steps.
        heldout: what it reached on each unit of held-out data, by a quick look; ``None`` without.
    """

    name: str
    log_evidence: Estimate | None
    ending: str = ""
    num_steps: int = 0
    heldout: UnitEstimates | None = None

    def __str__(self) -> str:
        if self.log_evidence is None:
            return f"{self.name} ({self.ending})" if self.ending else self.name
        held = ""
        if self.heldout is not None:
            held = f"; held out {self.heldout.total().per_unit.value:.4f} per unit"
        return f"{self.name} (log evidence {self.log_evidence}{held})"


@dataclass(frozen=True)
class Reference:
    """θ_ref, with the guide retrained there.

    Attributes:
        model_values: θ_ref, name → unconstrained value.
        guide_values: φ retrained on the ELBO at θ_ref.
        attempts: what was tried; the reference is the best of them by log evidence.
        notes: what was not tried, and why.
        history: θ and φ along the way of the best attempt, with the bound that was trained on and
            the evidence that steered it, per unit in nats.
        train: log evidence of the training data at θ̂ and at θ_ref, with bounds, by random numbers
            that chose nothing; ``None`` where it was left to a diagnostic.
        heldout: the same of held-out data.
    """

    model_values: Mapping[str, Tensor]
    guide_values: Mapping[str, Tensor]
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]
    history: History
    train: EvidencePair | None = None
    heldout: EvidencePair | None = None
    _problem: Problem = field(repr=False, kw_only=True)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """θ_ref by name, on the user-facing scale."""
        constraints = self._problem.model_parameters.constraints
        return Parameters(self.model_values, constraints).constrained()

    @property
    def unit_data(self) -> dict[str, Tensor]:
        """The training data of each unit by names of the model's arguments, if not too large."""
        return unit_data(self._problem)

    @property
    def best_heldout(self) -> tuple[Attempt, Estimate] | None:
        """The attempt that did best on held-out data, and its lead there on the reference.

        The lead is paired by unit; its errors are those of quick looks. ``None`` where nothing was
        held out, or the reference is the best there too.
        """
        looked = [a for a in self.attempts if a.heldout is not None and a.log_evidence is not None]
        if not looked:
            return None
        chosen = max(looked, key=lambda a: a.log_evidence.value if a.log_evidence else -math.inf)
        leads = {a.name: _lead(a, chosen) for a in looked}
        best = max(looked, key=lambda a: leads[a.name].value)
        return None if best is chosen else (best, leads[best.name])

    def apply(self) -> None:
        """Set the user's model to θ_ref and the guide to the one retrained there, in place."""
        problem = self._problem
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            theta, phi = capture_pair(problem.model, problem.guide, problem.batches[0])
        theta.assign(self.model_values)
        phi.assign(self.guide_values)

    def __str__(self) -> str:
        lines = ["reference parameters, the best of:"]
        for attempt in self.attempts:
            lines.append(f"  {attempt}")
            if attempt.log_evidence is not None and attempt.ending:
                ended = f"{attempt.ending}; {attempt.num_steps} steps"
                lines += textwrap.wrap(ended, 96, initial_indent=_MARGIN, subsequent_indent=_MARGIN)
        lines += self.notes
        if self.train is not None:
            lines += ["", bounds_table(self.train)]
        if self.heldout is not None:
            gain = self.heldout.harm.heldout_total().per_unit
            error = (gain.mc_error**2 + (gain.sampling_error or 0.0) ** 2) ** 0.5
            lines.append(
                f"held-out data: {nats(gain.value)} ± {nats(error)} nats per unit above what was "
                "learned"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _lead(first: Attempt, second: Attempt) -> Estimate:
    assert first.heldout is not None and second.heldout is not None, "both were looked at"
    return (first.heldout - second.heldout).heldout_total()
