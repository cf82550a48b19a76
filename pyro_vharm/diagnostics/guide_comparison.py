"""Several guides for one model: what each learned, ranked by log evidence with paired errors."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.inference.evidence import Evidence
from pyro_vharm.learning.learning_run import Ending
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["CandidateRun", "Difference", "GuideComparison"]

_LEVEL = 0.975
_LONGEST_NAME = 24


class CandidateRun(NamedTuple):
    """One training of a model with one candidate, in nats.

    Attributes:
        evidence: ℓ(θ̂) on the training data.
        elbo: L(θ̂, q̂) per unit; ``None`` where the guide has no density, or was not trained.
        heldout: ℓ(θ̂) of held-out units; ``None`` without any.
        parameters: θ̂ by name, on the user-facing scale.
        ending: whether training settled.
        num_steps: gradient steps.
        seconds: wall clock of the steps.
        cpu_seconds: of this process, for the same.
    """

    evidence: Evidence
    elbo: UnitEstimates | None
    heldout: UnitEstimates | None
    parameters: Mapping[str, Tensor]
    ending: Ending
    num_steps: int
    seconds: float
    cpu_seconds: float

    @property
    def gap(self) -> Estimate | None:
        """The visible gap ℓ(θ̂) − L(θ̂, q̂)."""
        return None if self.elbo is None else (self.evidence.per_unit - self.elbo).total()


class Difference(NamedTuple):
    """A difference in log evidence with its error, in nats.

    Attributes:
        value: in total over units, the mean over seeds.
        error: standard error: over seeds, of our random numbers, and from which units were held
            out.
        is_clear: whether it exceeds its error: by a factor that is 2 or, where seeds are few and
            their spread is what counts, Student's.
    """

    value: float
    error: float
    is_clear: bool

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


@dataclass(frozen=True)
class GuideComparison:
    """What a model learned with each of several guides and objectives.

    Attributes:
        runs: candidate → its trainings, one per seed; those of equal seeds start alike.
        objectives: candidate → what it was trained on.
        notes: what could not be done, and why.
        settings: how, in words.
    """

    runs: Mapping[str, Sequence[CandidateRun]]
    objectives: Mapping[str, str]
    notes: tuple[str, ...]
    settings: Mapping[str, str]

    @property
    def ranking(self) -> tuple[str, ...]:
        """The candidates by log evidence of the training data, best first; means over seeds."""
        return tuple(sorted(self.runs, key=lambda name: -self.log_evidence(name).value))

    def log_evidence(self, name: str) -> Estimate:
        """ℓ(θ̂) of one candidate: the mean over seeds, with the error of our random numbers."""
        return _mean([run.evidence.per_unit for run in self.runs[name]]).total()

    def heldout_log_evidence(self, name: str) -> Estimate | None:
        """The same on held-out data, with the error from which units were held out."""
        units = self._heldout(name)
        return None if units is None else _mean(units).heldout_total()

    def gap(self, name: str) -> Estimate | None:
        """The visible gap: the mean over seeds."""
        gaps = [run.gap for run in self.runs[name]]
        known = [gap for gap in gaps if gap is not None]
        if len(known) < len(gaps):
            return None
        error = math.hypot(*(gap.mc_error for gap in known)) / len(known)
        value = sum(gap.value for gap in known) / len(known)
        return Estimate(value, error, known[0].num_units, max(gap.kind for gap in known))

    def lead(self, first: str, second: str) -> Difference:
        """ℓ of the first less that of the second on the training data, paired by seed."""
        pairs = zip(self.runs[first], self.runs[second], strict=True)
        return _difference([a.evidence.per_unit - b.evidence.per_unit for a, b in pairs], False)

    def heldout_lead(self, first: str, second: str) -> Difference | None:
        """The same on held-out data, paired by seed and by unit."""
        one, other = self._heldout(first), self._heldout(second)
        if one is None or other is None:
            return None
        return _difference([a - b for a, b in zip(one, other, strict=True)], True)

    def harm(self, name: str) -> Difference:
        """What the candidate lost beside the best of all: a lower bound on its learning harm.

        The best was chosen by the same numbers, so where several are alike it flatters them all.
        """
        return self.lead(self.ranking[0], name)

    def seconds(self, name: str) -> tuple[float, float]:
        """Wall clock and CPU of a training: means over seeds."""
        runs = self.runs[name]
        wall, cpu = (sum(map(attrgetter(f), runs)) for f in ("seconds", "cpu_seconds"))
        return wall / len(runs), cpu / len(runs)

    def _heldout(self, name: str) -> list[UnitEstimates] | None:
        found = [run.heldout for run in self.runs[name] if run.heldout is not None]
        return found if len(found) == len(self.runs[name]) else None

    @property
    def num_seeds(self) -> int:
        """Trainings of each candidate."""
        return len(next(iter(self.runs.values())))

    def sentences(self) -> tuple[str, ...]:
        """What the differences say, in words."""
        best, *others = self.ranking
        found = [_leads(best, others, self.harm, "learned the highest log evidence")]
        if self.heldout_log_evidence(best) is not None:
            found.append(self._about_heldout())
        found += self._about_gaps(best, others)
        moving = [
            name for name, runs in self.runs.items() if not all(r.ending.converged for r in runs)
        ]
        if moving:
            found.append(
                f"Training had not settled within its budget with {_listed(moving)}: raise "
                "num_steps or max_rounds before judging them."
            )
        if self.num_seeds == 1:
            found.append("With one seed the noise of training is not in any error.")
        return tuple(found)

    def _about_heldout(self) -> str:
        def value(name: str) -> float:
            known = self.heldout_log_evidence(name)
            return -math.inf if known is None else known.value

        def lead(name: str) -> Difference:
            known = self.heldout_lead(best, name)
            return Difference(math.nan, math.nan, False) if known is None else known

        best, *others = sorted(self.runs, key=value, reverse=True)
        return _leads(best, others, lead, "has the highest log evidence of held-out data")

    def _about_gaps(self, best: str, others: Sequence[str]) -> list[str]:
        known = {name: gap for name in others if (gap := self.gap(name)) is not None}
        if not known:
            return []
        tight = min(known, key=lambda name: known[name].value)
        harm, gap, top = self.harm(tight), known[tight], self.gap(best)
        if not harm.is_clear or harm.value < gap.value or (top and top.value < gap.value):
            return []
        return [
            f"A small gap does not tell: {tight} shows one of {gap.value:.3f} nats, and lost "
            f"{harm} nats."
        ]

    def __str__(self) -> str:
        held = self.heldout_log_evidence(self.ranking[0]) is not None
        count = self.log_evidence(self.ranking[0]).num_units
        units = "one joint unit" if count == 1 else f"{count} units"
        header = [f"nats, {units}", "log evidence", "harm", "± error", "gap"]
        header += ["lost held out", "± error"] if held else []
        rows = [self._row(name, held) for name in self.ranking]
        parts = [text_table([*header, "cpu s"], rows), ""]
        for sentence in (*self.sentences(), *self.notes):
            parts += textwrap.wrap(sentence, 92, initial_indent="  • ", subsequent_indent="    ")
        lines = [f"{name}: {value}" for name, value in self.settings.items()]
        return "\n".join([*parts, "", *lines])

    def _row(self, name: str, held: bool) -> list[str]:
        harm, gap = self.harm(name), self.gap(name)
        short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
        cells = [short, nats(self.log_evidence(name).value, 2), nats(harm.value, 2)]
        cells += [nats(harm.error, 2), "—" if gap is None else nats(gap.value, 2)]
        if held:
            lead = self.heldout_lead(self.ranking[0], name)
            cells += ["—"] * 2 if lead is None else [nats(lead.value, 2), nats(lead.error, 2)]
        return [*cells, f"{self.seconds(name)[1]:.1f}"]

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _mean(units: Sequence[UnitEstimates]) -> UnitEstimates:
    """The mean of independent estimates of the same units."""
    count = len(units)
    systematic = [u.systematic for u in units if u.systematic is not None]
    return UnitEstimates(
        values=torch.stack([u.values for u in units]).mean(0),
        mc_errors=torch.stack([u.mc_errors for u in units]).square().sum(0).sqrt() / count,
        kind=max(u.kind for u in units),
        systematic=reduce(torch.add, systematic) / count if systematic else None,
        units_each=units[0].units_each,
    )


def _difference(by_seed: Sequence[UnitEstimates], heldout: bool) -> Difference:
    """Mean over seeds of a difference in totals; its spread holds our random numbers' error too."""
    count, mean = len(by_seed), _mean(by_seed)
    found = mean.heldout_total() if heldout else mean.total()
    totals = torch.tensor([units.total().value for units in by_seed], dtype=torch.float64)
    spread = float(totals.std()) / math.sqrt(count) if count > 1 else 0.0
    quantile = max(float(student.ppf(_LEVEL, count - 1)), 2.0) if count > 1 else 2.0
    sampled, measured = found.sampling_error or 0.0, found.mc_error
    error = math.hypot(max(spread, measured), sampled)
    reach = math.hypot(quantile * spread, 2 * sampled, 2 * measured)
    return Difference(found.value, error, abs(found.value) > reach)


def _leads(best: str, others: Sequence[str], lead: Callable[[str], Difference], what: str) -> str:
    leads = {name: lead(name) for name in others}
    clear = [f"{name} by {found}" for name, found in leads.items() if found.is_clear]
    alike = [name for name, found in leads.items() if not found.is_clear]
    parts = []
    if clear:
        parts.append(f"it beats {'; '.join(clear)}")
    if alike:
        parts.append(f"beside {_listed(alike)} its lead is within its error")
    return f"{best} {what}" + (f": {', and '.join(parts)}." if parts else ".")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
