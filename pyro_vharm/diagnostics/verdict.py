"""The verdict of an audit: what its numbers say in words."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from typing import Literal

from scipy.stats import chi2

from pyro_vharm.diagnostics.causes import find_causes, foresee_changes
from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.diagnostics.local import LocalHarm
from pyro_vharm.diagnostics.pull import Reachability
from pyro_vharm.estimates import Bound, Estimate
from pyro_vharm.model.parameters import Parameters
from pyro_vharm.tables import nats, shown

__all__ = ["Verdict", "judge", "material_harm"]

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


def material_harm(parameters: Parameters, num_units: int) -> float:
    """The least total harm worth the name, in nats: what fitting gains by chance.

    At the maximum, log likelihood exceeds that of the true parameters by ½ χ² with as many degrees
    of freedom as parameters (Wilks, 1938); the 95 % point of it is taken. With many parameters for
    the units, where that no longer holds, it is a hundredth of a nat per unit, but half a nat at
    the least.
    """
    count = sum(leaf.numel() for leaf in parameters.trainable())
    return min(float(chi2.ppf(0.95, count)) / 2, max(0.01 * num_units, 0.5))


def judge(
    harm: LearningHarm,
    material: float,
    local: LocalHarm | None = None,
    reachability: Reachability | None = None,
) -> Verdict:
    """Judge the training data's harm against the least total that matters.

    *Harm* if a 95 % lower bound exceeds `material`; *no harm found* if an upper bound stays below;
    otherwise, and where the reference is worse than what was learned, *undecided*. A bound is one
    that holds by itself; or, where a second method confirms both log evidences, the estimate less
    or plus 1.645 standard errors, which is closer. Without either, the estimate plus two standard
    errors stands in above, if every unit's effective sample size is at least half its particles. No
    harm found is a statement about the learners and starts that were tried, never about θ*.
    """
    outcome, sentence = _outcome(harm, material)
    sentences = [sentence, _tried(harm)]
    if harm.heldout_harm is not None:
        sentences.append(_heldout(harm.heldout_harm))
        sentences += _better_heldout(harm)
    if outcome == "harm":
        sentences += find_causes(harm)
        sentences += [] if reachability is None else reachability.sentences()
        sentences += [*_changes(harm, reachability), _keep(harm)]
    elif local is not None:
        sentences += local.blind_spots
    return Verdict(outcome, tuple(sentences))


def _changes(harm: LearningHarm, reachability: Reachability | None) -> list[str]:
    """The change that promises most, with what it may gain."""
    changes = foresee_changes(harm, reachability)
    if not changes:
        return []
    best = changes[0]
    gain = nats(min(best.gain, harm.harm.value), 1)
    return [f"The change that promises most: {best.advice} (up to {gain} nats)."]


def _keep(harm: LearningHarm) -> str:
    worse = harm.heldout_harm is not None and _heldout_is_worse(harm.heldout_harm)
    caution = ", but look at the held-out data first" if worse else ""
    return (
        "audit.reference.apply() keeps the better parameters, with the guide retrained there"
        f"{caution}."
    )


def _outcome(harm: LearningHarm, material: float) -> tuple[Outcome, str]:
    estimate, upper, lower = harm.harm, harm.train.upper(), _highest_lower(harm)
    better = f"{shown(estimate)} nats in total on the training data"
    contradicted = _contradicted(harm)
    if contradicted:
        return "undecided", contradicted
    if lower is not None and lower.value > material:
        certainty = "" if lower.confidence == 1 else f" with {lower.confidence:.0%} confidence"
        return "harm", (
            f"Learning lost at least {nats(lower.value, 2)} nats{certainty} ({lower.kind}); the "
            f"estimate is {better}{_per_unit(estimate)}. {_visible(harm)}"
        )
    if estimate.value < -max(2 * estimate.mc_error, material):
        return "undecided", (
            f"The reference is worse than what was learned, by {shown(_negated(estimate))} nats "
            "in total on the training data, so it cannot show harm. Hand in better parameters, or "
            "let a learner look for them."
        )
    limit = _limit(harm)
    if limit is not None and limit < material:
        return "no harm found", (
            f"The best of what was tried is better by {better}, by {nats(max(limit, 0.0), 2)} at "
            f"most, where {nats(material, 2)} nats would be called harm. A learner that goes "
            f"farther might still find some. {_visible(harm)}"
        )
    if lower is None or upper is None:
        grounds = "the method has no upper bound on the log evidence as learned"
        mend = "Use AnnealedImportanceSampling, or Quadrature."
    else:
        most = "" if limit is None else f" and at most {nats(limit, 2)}"
        grounds = f"only by at least {nats(lower.value, 2)}{most} at 95 %"
        mend = "More particles, temperatures or nodes would narrow it."
    return "undecided", (
        f"The reference is better by {better}, but {grounds}, so harm of {material:g} nats can be "
        f"neither better nor ruled out. {mend}"
    )


def _highest_lower(harm: LearningHarm) -> Bound | None:
    """The bound that holds by itself, or by the standard error of confirmed estimates."""
    found = (harm.train.lower(), harm.train.by_error("lower"))
    known = [bound for bound in found if bound is not None]
    return max(known, key=lambda bound: bound.value) if known else None


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
    """The most that the reference can be better by."""
    found = (harm.train.upper(), harm.train.by_error("upper"))
    known = [bound.value for bound in found if bound is not None]
    if known:
        return min(known)
    pair = (harm.train.learned, harm.train.reference)
    if any(float(e.effective_sizes.min()) < e.num_particles / 2 for e in pair):
        return None
    return harm.harm.value + 2 * harm.harm.mc_error


def _negated(estimate: Estimate) -> Estimate:
    return replace(estimate, value=-estimate.value)


def _per_unit(estimate: Estimate) -> str:
    return f", {nats(estimate.per_unit.value)} per unit" if estimate.num_units > 1 else ""


def _visible(harm: LearningHarm) -> str:
    """What the inference gap shows, beside the harm where there is any."""
    if harm.learned.gap is None:
        return "The guide holds latents as points, so there is no gap."
    gap, lost = harm.learned.gap.total(), harm.harm
    told = f"The visible gap is {nats(gap.value, 2)} nats"
    if not lost.is_seen:
        return f"{told}."
    if not gap.is_seen:
        return f"{told}: nothing of the harm can be seen in it."
    return f"{told}: the harm is {lost.value / gap.value:.1f} times what can be seen."


def _tried(harm: LearningHarm) -> str:
    tried = "; ".join(map(str, harm.reference.attempts))
    return f"Relative to the best of what was tried: {tried}."


def _better_heldout(harm: LearningHarm) -> list[str]:
    """Another attempt that generalises better, beyond its errors."""
    found = harm.reference.best_heldout
    if found is None:
        return []
    attempt, lead = found[0], found[1].per_unit
    error = math.hypot(lead.mc_error, lead.sampling_error or 0.0)
    if lead.value <= 2 * error:
        return []
    return [
        f"There {attempt.name} is better than the reference, by {nats(lead.value)} ± "
        f"{nats(error)} nats per unit (by quick looks). learn_reference with that learner keeps it."
    ]


def _heldout_is_worse(heldout: Estimate) -> bool:
    error = math.hypot(heldout.mc_error, heldout.sampling_error or 0.0)
    return heldout.value < -2 * error


def _heldout(heldout: Estimate) -> str:
    unit = heldout.per_unit
    error = (unit.mc_error**2 + (unit.sampling_error or 0.0) ** 2) ** 0.5
    told = f"{nats(unit.value)} ± {nats(error)} nats per unit"
    if unit.value > 2 * error:
        return f"On held-out data the reference is better by {told}."
    if _heldout_is_worse(heldout):
        return (
            f"On held-out data the reference is worse ({told}): what was lost in training may be "
            "overfitting that the approximation avoided."
        )
    return f"On held-out data the two cannot be told apart: {told}."
