"""What an audit found, and what its numbers say in words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from scipy.stats import chi2

from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.estimates import Estimate
from pyro_vharm.learning.reference import Reference
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.tables import html_table, nats

__all__ = ["Audit", "Verdict", "judge", "material_harm"]

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


def material_harm(parameters: Parameters, num_units: int) -> float:
    """The least total harm worth the name, in nats: what fitting gains by chance.

    At the maximum, log likelihood exceeds that of the true parameters by ½ χ² with as many degrees
    of freedom as parameters (Wilks, 1938); the 95 % point of it is taken. With many parameters for
    the units, where that no longer holds, it is a hundredth of a nat per unit, but half a nat at
    the least.
    """
    count = sum(leaf.numel() for leaf in parameters.trainable())
    return min(float(chi2.ppf(0.95, count)) / 2, max(0.01 * num_units, 0.5))


def judge(harm: LearningHarm, material: float) -> Verdict:
    """Judge the training data's harm against the least total that matters.

    *Harm* if its 95 % lower bound exceeds `material`; *no harm found* if its upper bound stays
    below; otherwise, and where the reference is worse than what was learned, *undecided*. Without
    an upper bound the estimate plus two standard errors stands in, if every unit's effective
    sample size is at least half its particles. No harm found is a statement about the learners
    and starts that were tried, never about θ*.
    """
    outcome, sentence = _outcome(harm, material)
    sentences = [sentence, _tried(harm)]
    if harm.heldout_harm is not None:
        sentences.append(_heldout(harm.heldout_harm))
    if outcome == "harm":
        sentences += [*_causes(harm), _remedy(harm)]
    return Verdict(outcome, tuple(sentences))


def _outcome(harm: LearningHarm, material: float) -> tuple[Outcome, str]:
    estimate, lower, upper = harm.harm, harm.train.lower(), harm.train.upper()
    shown = f"{_shown(estimate)} nats in total on the training data"
    contradicted = _contradicted(harm)
    if contradicted:
        return "undecided", contradicted
    if lower is not None and lower.value > material:
        certainty = "" if lower.confidence == 1 else f" with {lower.confidence:.0%} confidence"
        return "harm", (
            f"Learning lost at least {nats(lower.value, 2)} nats{certainty} ({lower.kind}); the "
            f"estimate is {shown}{_per_unit(estimate)}. {_visible(harm)}"
        )
    if estimate.value < -max(2 * estimate.mc_error, material):
        return "undecided", (
            f"The reference is worse than what was learned, by {_shown(_negated(estimate))} nats "
            "in total on the training data, so it cannot show harm. Hand in better parameters, or "
            "let a learner look for them."
        )
    limit = _limit(harm)
    if limit is not None and limit < material:
        return "no harm found", (
            f"The best of what was tried is better by {shown}, by {nats(max(limit, 0.0), 2)} at "
            f"most, where {nats(material, 2)} nats would be called harm. A learner that goes "
            f"farther might still find some. {_visible(harm)}"
        )
    if lower is None or upper is None:
        grounds = "the method has no upper bound on the log evidence as learned"
        mend = "Use AnnealedImportanceSampling, or Quadrature."
    else:
        grounds = f"the lower bound is {nats(lower.value, 2)}"
        mend = "More particles, temperatures or nodes would narrow it."
    return "undecided", (
        f"The reference is better by {shown}, but {grounds}, so harm of {material:g} nats can be "
        f"neither shown nor ruled out. {mend}"
    )


def _contradicted(harm: LearningHarm) -> str:
    """What a second method found that speaks against one of the two evidences."""
    pair = {"as learned": harm.train.learned, "at the reference": harm.train.reference}
    found = [
        f"The log evidence {where} is not to be trusted: a method that starts elsewhere finds more "
        f"({evidence.agreement})."
        for where, evidence in pair.items()
        if evidence.agreement is not None and evidence.agreement.outcome == "contradicts"
    ]
    return " ".join([*found, "Pass a method= that finds every mode."]) if found else ""


def _limit(harm: LearningHarm) -> float | None:
    upper = harm.train.upper()
    if upper is not None:
        return upper.value
    pair = (harm.train.learned, harm.train.reference)
    if any(float(e.effective_sizes.min()) < e.num_particles / 2 for e in pair):
        return None
    return harm.harm.value + 2 * harm.harm.mc_error


def _negated(estimate: Estimate) -> Estimate:
    return replace(estimate, value=-estimate.value)


def _shown(estimate: Estimate) -> str:
    return f"{nats(estimate.value, 2)} ± {nats(estimate.mc_error, 2)}"


def _per_unit(estimate: Estimate) -> str:
    return f", {nats(estimate.per_unit.value)} per unit" if estimate.num_units > 1 else ""


def _visible(harm: LearningHarm) -> str:
    """What the inference gap shows, beside the harm where there is any."""
    if harm.learned.gap is None:
        return "The guide holds latents as points, so there is no gap."
    gap, lost = harm.learned.gap.total(), harm.harm
    shown = f"The visible gap is {nats(gap.value, 2)} nats"
    if not _positive(lost):
        return f"{shown}."
    if gap.value <= 2 * gap.mc_error:
        return f"{shown}: nothing of the harm can be seen in it."
    return f"{shown}: the harm is {lost.value / gap.value:.1f} times what can be seen."


def _tried(harm: LearningHarm) -> str:
    tried = "; ".join(map(str, harm.reference.attempts))
    return f"Relative to the best of what was tried: {tried}."


def _heldout(heldout: Estimate) -> str:
    unit = heldout.per_unit
    error = (unit.mc_error**2 + (unit.sampling_error or 0.0) ** 2) ** 0.5
    shown = f"{nats(unit.value)} ± {nats(error)} nats per unit"
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


def _causes(harm: LearningHarm) -> list[str]:
    causes = []
    retrained = harm.excess_retrained
    if retrained is not None and _positive(retrained):
        causes.append(
            "The optimiser has a share: the ELBO itself is higher at the reference with the same "
            f"guide retrained there, by {_shown(retrained)} nats, so it was not "
            "maximised. Train longer, or from several starts."
        )
    refitted = harm.excess_refitted
    if refitted is not None and _positive(refitted):
        causes.append(
            "The family alone does not explain the harm: with q refitted to each unit at both "
            f"ends the ELBO prefers the reference, by {_shown(refitted)} nats.{_encoder(harm)}"
        )
    return causes or [_family(harm)]


def _encoder(harm: LearningHarm) -> str:
    amortization = harm.learned.amortization
    if amortization is None or not _positive(amortization.total()):
        return ""
    return (
        f" The encoder costs {_shown(amortization.total())} nats as trained: more capacity, or "
        "more of its steps per step of the model, may help."
    )


def _family(harm: LearningHarm) -> str:
    retrained, visible = harm.excess_retrained, harm.learned.gap
    if retrained is None or visible is None:
        return (
            "A guide that holds latents as points trains the model on a joint density in place of "
            "the evidence. A guide with a density would help."
        )
    if harm.excess is None or harm.reachability is None:
        return (
            "The guide's family could not be freed for each unit, so its share is unknown; the "
            f"ELBO at the reference is {nats(-retrained.value, 2)} nats lower."
        )
    reach, gap = harm.reachability.total(), visible.total()
    return (
        f"The family is {_shown(reach)} nats from the reference's posteriors and {_shown(gap)} "
        f"from the learned ones, so the ELBO is lower at the reference, by "
        f"{nats(-harm.excess.value, 2)} nats. A family that bends the model looks like this; it is "
        "no proof, as other maxima of the ELBO were not searched for. A richer family, or an "
        "objective that bends the model less, would help."
    )


def _remedy(harm: LearningHarm) -> str:
    keep = "audit.reference.apply() keeps the better parameters, with the guide retrained there"
    if harm.learned.gap is None or not _positive(harm.learned.gap.total()):
        return f"{keep}."
    return f"{keep}; training with ImportanceWeightedELBO in place of Trace_ELBO leads toward them."
