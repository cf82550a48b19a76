"""Whether learning could have reached the reference: pull, path and what they say in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pyro_vharm.diagnostics.gap import InferenceGap
from pyro_vharm.estimates import Estimate, UnitEstimates
from pyro_vharm.inference.evidence import Evidence
from pyro_vharm.learning.reference import Reference
from pyro_vharm.learning.svi_training import Trained
from pyro_vharm.tables import html_table, nats, text_table

__all__ = ["Endpoint", "Reachability"]


class Endpoint(NamedTuple):
    """One of the points that are compared, in nats.

    Attributes:
        evidence: ℓ(θ) of the training data, by random numbers that chose nothing.
        objective: the user's objective there, over all units; the ELBO where it is one.
        parameters: θ by name, on the user-facing scale.
    """

    evidence: Evidence
    objective: Estimate
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reachability:
    """Where the user's own training goes from the reference, in nats.

    Attributes:
        at_reference: θ_ref, with the guide retrained there.
        pulled: θ_pull, where training from there settles.
        learned: θ̂, as the user has it.
        continued: θ_cont, where as many steps lead from θ̂.
        gap: the inference gap at θ_ref; its `approximation` is R.
        training: what was found on the way from θ_ref to θ_pull, with a history.
        reference: θ_ref and where it came from.
        material: the least total that is worth the name, in nats: what fitting gains by chance.
        settings: objective, optimiser and numbers of steps, in words.
        notes: what could not be done, and why.
    """

    at_reference: Endpoint
    pulled: Endpoint
    learned: Endpoint
    continued: Endpoint
    gap: InferenceGap
    training: Trained
    reference: Reference
    material: float
    settings: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def reachability(self) -> UnitEstimates | None:
        """R = A(θ_ref) per unit: how far the family is from its posteriors; an upper bound."""
        return self.gap.approximation

    @property
    def harm(self) -> Estimate:
        """ℓ(θ_ref) − ℓ(θ̂) = pull + path."""
        return _lost(self.at_reference, self.learned)

    @property
    def pull(self) -> Estimate:
        """ℓ(θ_ref) − ℓ(θ_pull): what the objective gives away from there."""
        return _lost(self.at_reference, self.pulled)

    @property
    def path(self) -> Estimate:
        """ℓ(θ_pull) − ℓ(θ̂); shares its first term with `pull`, so their errors are not apart."""
        return _lost(self.pulled, self.learned)

    @property
    def unconverged(self) -> Estimate:
        """ℓ(θ_cont) − ℓ(θ̂), of path: what going on from θ̂ gains."""
        return _lost(self.continued, self.learned)

    @property
    def rest(self) -> Estimate:
        """Path − unconverged = ℓ(θ_pull) − ℓ(θ_cont): two ends of one training, from two starts."""
        return _lost(self.pulled, self.continued)

    @property
    def training_noise(self) -> float:
        """By how much the last round from the reference moved log evidence, in total."""
        return self.training.last_move * self.harm.num_units

    @property
    def preference(self) -> Estimate:
        """The objective at θ_pull less that at θ_cont.

        If positive, the rest of path is the optimiser's, which did not find the better end; if
        negative, the objective itself prefers the neighbourhood of θ̂.
        """
        return _risen(self.continued, self.pulled)

    @property
    def rise(self) -> Estimate:
        """The objective at θ_pull less that at θ_ref: what training from there gained by it."""
        return _risen(self.at_reference, self.pulled)

    def ledger(self) -> dict[str, Estimate | None]:
        """From ℓ(θ_ref) down to ℓ(θ̂): each "=" line is the one above less the "−" between."""
        gap = self.reachability
        return {
            "log evidence at reference": self.at_reference.evidence.per_unit.total(),
            "− pull": self.pull,
            "= trained on from reference": self.pulled.evidence.per_unit.total(),
            "− path": self.path,
            "    of it, unconverged": self.unconverged,
            "    of it, the rest": self.rest,
            "= log evidence as learned": self.learned.evidence.per_unit.total(),
            "learning harm, pull + path": self.harm,
            "reachability gap": None if gap is None else gap.total(),
            "rise of the objective by pull": self.rise,
            "objective's preference for pulled": self.preference,
        }

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """The four points by name."""
        return {
            "reference": self.at_reference,
            "pulled": self.pulled,
            "learned": self.learned,
            "continued": self.continued,
        }

    def sentences(self) -> tuple[str, ...]:
        """What the parts say, in words: those beyond two errors and `material`."""
        found = [*self._about_pull(), *self._about_rest(), *self._about_unconverged()]
        if not found:
            found.append(
                f"Nothing beyond error: no part exceeds both twice its error and the "
                f"{nats(self.material, 2)} nats that fitting gains by chance."
            )
        if not self.training.ending.converged:
            found.append(
                f"Training from the reference had not settled ({self.training.ending.reason}): the "
                f"pull is that of its {self.training.num_steps} steps. Raise num_steps or "
                "max_rounds."
            )
        return tuple(found)

    def _about_pull(self) -> Iterator[str]:
        steps = self.training.num_steps
        if self._counts(self.pull):
            yield (
                f"The objective drives the model away from the reference: {steps} steps from there "
                f"lose {self.pull} nats of log evidence, while the objective changes by "
                f"{_signed(self.rise)}. A training that had found the reference would not stay."
            )
        if self._counts(self.pull, -1):
            yield (
                f"Training from the reference raises log evidence by {_negated(self.pull)} nats in "
                f"{steps} steps: the reference is not the best that can be reached."
            )

    def _about_rest(self) -> Iterator[str]:
        preference = self.preference
        told = f"there the objective is {_signed(preference)} nats against where θ̂ leads"
        if self._counts(self.rest):
            if preference.is_seen:
                settled = self.training.ending.converged
                remedy = "Other starts or other step sizes" if settled else "More steps"
                yield (
                    f"The optimiser never got there: from the reference, the same training ends at "
                    f"{self.rest} nats more log evidence than from θ̂, and {told}. {remedy} may "
                    "help."
                )
            elif preference.value < -2 * preference.mc_error:
                yield (
                    f"The objective itself prefers what was learned: from the reference, training "
                    f"ends at {self.rest} nats more log evidence, and {told}. A better optimiser "
                    "alone would not help."
                )
            else:
                yield (
                    f"From the reference, training ends at {self.rest} nats more log evidence than "
                    f"from θ̂, and {told}: whether the optimiser or the objective is to blame "
                    "cannot be told."
                )
        if self._counts(self.rest, -1):
            yield (
                f"From the reference, training ends at {_negated(self.rest)} nats less log "
                f"evidence than from θ̂, and {told}."
            )

    def _about_unconverged(self) -> Iterator[str]:
        steps = self.training.num_steps
        if self._counts(self.unconverged):
            yield (
                f"Training was not converged: {steps} steps more, from θ̂, gain {self.unconverged} "
                "nats of log evidence."
            )
        if self._counts(self.unconverged, -1):
            yield (
                f"Log evidence still falls along training: {steps} steps more, from θ̂, lose "
                f"{_negated(self.unconverged)} nats."
            )

    def _counts(self, part: Estimate, sign: int = 1) -> bool:
        error = math.hypot(part.mc_error, self.training_noise)
        return sign * part.value > max(2 * error, self.material)

    def __str__(self) -> str:
        count = self.harm.num_units
        title = "reachability, " + ("one joint unit" if count == 1 else f"{count} units")
        rows = [_row(name, line) for name, line in self.ledger().items()]
        parts = [text_table([title, "total", "mc error", "per unit", "kind"], rows), ""]
        parts += [self._endpoint_table(), ""]
        for sentence in (*self.sentences(), *self.notes):
            parts += textwrap.wrap(sentence, 92, initial_indent="  • ", subsequent_indent="    ")
        noise = f"log evidence moved in training's last round: {nats(self.training_noise)} nats"
        lines = [f"{name}: {value}" for name, value in self.settings.items()]
        return "\n".join([*parts, "", noise, *lines])

    def _endpoint_table(self) -> str:
        rows = []
        for name, point in self.endpoints.items():
            evidence, value = point.evidence.per_unit.total(), point.objective
            distance = evidence.value - value.value
            cells = evidence.value, evidence.mc_error, value.value, value.mc_error, distance
            rows.append([name, *map(nats, cells)])
        header = ["endpoint, nats", "log evidence", "± mc", "objective", "± mc", "difference"]
        return text_table(header, rows)

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _lost(first: Endpoint, second: Endpoint) -> Estimate:
    """Of log evidence, from the first to the second: random numbers of both are their own."""
    return (first.evidence.per_unit - second.evidence.per_unit).total()


def _risen(first: Endpoint, second: Endpoint) -> Estimate:
    before, after = first.objective, second.objective
    error = math.hypot(before.mc_error, after.mc_error)
    return Estimate(
        after.value - before.value, error, after.num_units, max(before.kind, after.kind)
    )


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ± {estimate.mc_error:.3f}"


def _negated(estimate: Estimate) -> str:
    return f"{-estimate.value:.3f} ± {estimate.mc_error:.3f}"


def _row(name: str, total: Estimate | None) -> list[str]:
    if total is None:
        return [name, "unknown", "", "", ""]
    numbers = nats(total.value), nats(total.mc_error), nats(total.per_unit.value, 4)
    return [name, *numbers, str(total.kind)]
