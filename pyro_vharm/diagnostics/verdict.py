"""What an audit found, and what its numbers say in words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.estimates import Estimate
from pyro_vharm.learning.reference import Reference
from pyro_vharm.tables import html_table

__all__ = ["Audit", "Verdict", "judge"]

type Outcome = Literal["harm", "no harm found", "undecided"]


@dataclass(frozen=True)
class Verdict:
    """An answer with its grounds.

    Attributes:
        outcome: ``"harm"``, ``"no harm found"`` or ``"undecided"``.
        sentences: the answer in words with numbers, most important first.
    """

    outcome: Outcome
    sentences: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"VERDICT: {self.outcome.upper()}"]
        for sentence in self.sentences:
            lines += textwrap.wrap(sentence, 92, initial_indent="  • ", subsequent_indent="    ")
        return "\n".join(lines)


@dataclass(frozen=True)
class Audit:
    """Everything one audit found. Print it for the ledger and the verdict.

    Attributes:
        gap: the inference gap at the learned parameters, on the training data.
        harm: learning harm relative to the reference; ``None`` for a model without parameters.
        verdict: the answer in words.
        settings: the seed and the method's settings.
    """

    gap: InferenceGap
    harm: LearningHarm | None
    verdict: Verdict
    settings: Mapping[str, str]

    @property
    def reference(self) -> Reference:
        """The better parameters that were found; its ``apply()`` keeps them.

        Raises:
            AttributeError: for a model without parameters.
        """
        if self.harm is None:
            raise AttributeError("a model without parameters has no reference")
        return self.harm.reference

    def __str__(self) -> str:
        return f"{self.gap if self.harm is None else self.harm}\n\n{self.verdict}"

    def _repr_html_(self) -> str:
        return html_table(str(self))


def judge(harm: LearningHarm, material: float) -> Verdict:
    """Judge the training data's harm against the least total that matters.

    *Harm* if its 95 % lower bound exceeds `material`; *no harm found* if its upper bound, or its
    estimate plus two standard errors, stays below; otherwise *undecided*. No harm found is a
    statement about the learners and starts that were tried, never about θ*.
    """
    outcome, sentence = _outcome(harm, material)
    sentences = [sentence, _tried(harm)]
    if harm.heldout_harm is not None:
        sentences.append(_heldout(harm.heldout_harm))
    if outcome != "no harm found":
        sentences += [_cause(harm), _remedy(harm, outcome)]
    return Verdict(outcome, tuple(sentences))


def _outcome(harm: LearningHarm, material: float) -> tuple[Outcome, str]:
    estimate, lower, upper = harm.harm, harm.train.lower(), harm.train.upper()
    gap = harm.learned.gap.total()
    shown = f"{estimate.value:.2f} ± {estimate.mc_error:.2f} nats in total on the training data"
    if lower is not None and lower.value > material:
        certainty = "" if lower.confidence == 1 else f" ({lower.confidence:.0%} confidence)"
        return "harm", (
            f"Learning lost at least {lower.value:.2f} nats{certainty}, {lower.kind}; the estimate "
            f"is {shown}, {estimate.per_unit.value:.3f} per unit. The visible gap is "
            f"{gap.value:.2f} nats: {_hidden(estimate, gap)}."
        )
    limit = estimate.value + 2 * estimate.mc_error
    limit = limit if upper is None else min(limit, upper.value)
    if limit < material:
        return "no harm found", (
            f"The reference is better by {shown}; more than {max(limit, 0.0):.2f} nats would have "
            f"been seen. Less than {material:g} nats in total is not called harm: one fitted "
            f"parameter gains half a nat by chance. The visible gap is {gap.value:.2f} nats."
        )
    bound = "no bound is known" if lower is None else f"the lower bound is {lower.value:.2f}"
    return "undecided", (
        f"The reference is better by {shown}, but {bound}, so harm of {material:g} nats can be "
        "neither shown nor ruled out. More particles or temperatures would narrow it."
    )


def _hidden(harm: Estimate, gap: Estimate) -> str:
    if gap.value <= 0 or harm.value <= gap.value:
        return "the harm is no larger than what can be seen"
    return f"the harm is {harm.value / gap.value:.1f} times what can be seen"


def _tried(harm: LearningHarm) -> str:
    tried = "; ".join(
        f"{a.name} (log evidence {a.log_evidence.value:.1f} ± {a.log_evidence.mc_error:.1f})"
        for a in harm.reference.attempts
    )
    return f"Relative to the best of what was tried: {tried}."


def _heldout(heldout: Estimate) -> str:
    unit = heldout.per_unit
    error = (unit.mc_error**2 + (unit.sampling_error or 0.0) ** 2) ** 0.5
    shown = f"{unit.value:.3f} ± {error:.3f} nats per unit"
    if unit.value > 2 * error:
        return f"On held-out data the reference is better by {shown}."
    if unit.value < -2 * error:
        return (
            f"On held-out data the reference is worse ({shown}): what was lost in training may be "
            "overfitting that the approximation avoided."
        )
    return f"On held-out data the two cannot be told apart: {shown}."


def _positive(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.value > 2 * estimate.mc_error


def _cause(harm: LearningHarm) -> str:
    retrained, refitted, excess = harm.excess_retrained, harm.excess_refitted, harm.excess
    if _positive(retrained):
        return (
            f"The ELBO itself is higher at the reference with the same guide retrained there, by "
            f"{retrained.value:.2f} nats: it was not maximised, so the optimiser has a share."
        )
    if refitted is not None and _positive(refitted):
        return (
            f"With q free for every unit the ELBO prefers the reference, by {refitted.value:.2f} "
            "nats: the family alone does not explain the harm, the encoder has a share."
        )
    if excess is None or harm.reachability is None:
        return "The guide's family could not be freed per unit, so its share is unknown."
    reach, gap = harm.reachability.total(), harm.learned.gap.total()
    return (
        f"The ELBO is lower at the reference, by {-excess.value:.2f} nats: the family is "
        f"{reach.value:.2f} nats from the reference's posteriors and {gap.value:.2f} from the "
        "learned ones. That is what a family which bends the model looks like, but proves no more "
        "than that the ELBO would not have chosen the reference."
    )


def _remedy(harm: LearningHarm, outcome: Outcome) -> str:
    advice = ""
    if _positive(harm.excess_retrained):
        advice = "Train longer, or from several starts. "
    elif _positive(harm.excess_refitted):
        advice = "Give the encoder more capacity or more steps per step of the model. "
    elif harm.reachability is not None:
        advice = "Use a richer guide family, or an objective that bends the model less. "
    if outcome == "harm":
        advice += (
            "reference.apply() keeps the better parameters; ImportanceWeightedELBO in place of "
            "Trace_ELBO trains toward them."
        )
    return advice.strip() or "Try a better learner."
