"""Who is to blame for harm, as far as it can be told, and the change that promises most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pyro_vharm.diagnostics.harm import LearningHarm
from pyro_vharm.diagnostics.pull import Reachability
from pyro_vharm.estimates import Estimate
from pyro_vharm.tables import nats, shown

__all__ = ["Change", "find_causes", "foresee_changes"]


class Change(NamedTuple):
    """Something that could be done about harm.

    Attributes:
        advice: what, as an instruction.
        gain: nats of log evidence that it may gain, of the training data.
    """

    advice: str
    gain: float


def find_causes(harm: LearningHarm) -> list[str]:
    """What the excess says of the optimiser, the encoder and the family, in sentences."""
    causes = []
    retrained, refitted = harm.excess_retrained, harm.excess_refitted
    if retrained is not None and retrained.is_seen:
        causes.append(
            "The optimiser has a share: the ELBO itself is higher at the reference with the same "
            f"guide retrained there, by {shown(retrained)} nats, so it was not maximised."
        )
    if refitted is not None and refitted.is_seen:
        causes.append(
            "The family alone does not explain the harm: with q refitted to each unit at both "
            f"ends the ELBO prefers the reference, by {shown(refitted)} nats.{_encoder(harm)}"
        )
    return causes or [_family(harm)]


def _encoder(harm: LearningHarm) -> str:
    amortization = harm.learned.amortization
    if amortization is None or not _is_seen(amortization.total()):
        return ""
    return f" The encoder costs {shown(amortization.total())} nats as trained."


def _family(harm: LearningHarm) -> str:
    retrained, visible = harm.excess_retrained, harm.learned.gap
    if retrained is None or visible is None:
        return (
            "A guide that holds latents as points trains the model on a joint density in place of "
            "the evidence."
        )
    if harm.excess is None or harm.reachability is None:
        return (
            "The guide's family could not be freed for each unit, so its share is unknown; the "
            f"ELBO at the reference is {nats(-retrained.value, 2)} nats lower."
        )
    reach, gap = harm.reachability.total(), visible.total()
    return (
        f"The family is {shown(reach)} nats from the reference's posteriors and {shown(gap)} "
        f"from the learned ones, so the ELBO is lower at the reference, by "
        f"{nats(-harm.excess.value, 2)} nats. A family that bends the model looks like this; it is "
        "no proof, as other maxima of the ELBO were not searched for."
    )


def foresee_changes(harm: LearningHarm, reachability: Reachability | None) -> list[Change]:
    """Changes to how the model is trained, the one that promises most nats first.

    With `reachability` each has its own part of the harm: what training on gains; what the same
    training gains from another start, if its objective prefers that end; and the pull. Without, the
    harm is put down in proportion to what the excess shows: to the optimiser as far as the ELBO is
    higher at the reference with the guide retrained, to the encoder as far as q free per unit adds
    to that, and to the family where it is no higher.
    """
    changes = _apart(harm, reachability) if reachability is not None else _by_excess(harm)
    return sorted(changes, key=lambda change: -change.gain)


def _apart(harm: LearningHarm, found: Reachability) -> Iterator[Change]:
    rest, preference = found.rest, found.preference
    if _is_seen(found.unconverged):
        yield Change("train on, as you do", found.unconverged.value)
    if _is_seen(rest) and _is_seen(preference):
        yield Change("train from other starts, or with other step sizes", rest.value)
    elif _is_seen(rest):
        yield Change(_guide_advice(harm), rest.value)
    if _is_seen(found.pull):
        yield Change(_guide_advice(harm), found.pull.value)


def _by_excess(harm: LearningHarm) -> Iterator[Change]:
    """The harm, put down to optimiser and encoder as the excess is; else to the family."""
    total, retrained = harm.harm.value, _beyond_error(harm.excess_retrained)
    most = max(_beyond_error(harm.excess_refitted), retrained)
    if most == 0:
        yield Change(_guide_advice(harm), total)
        return
    if retrained > 0:
        yield Change("train longer, or from several starts", total * retrained / most)
    if most > retrained:
        yield Change(_guide_advice(harm), total * (1 - retrained / most))


def _beyond_error(estimate: Estimate | None) -> float:
    return estimate.value if estimate is not None and _is_seen(estimate) else 0.0


def _guide_advice(harm: LearningHarm) -> str:
    if harm.learned.elbo is None:
        return "use a guide with a density, such as AutoNormal"
    if _is_seen(harm.excess_refitted):
        return "give the encoder more capacity, or more steps for each step of the model"
    return (
        "take a richer family for the guide, or an objective that bends the model less, such as "
        "ImportanceWeightedELBO"
    )


def _is_seen(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.is_seen
