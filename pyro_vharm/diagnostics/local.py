"""Harm near θ̂: what its score predicts, what short ways up gain, and what they do not tell."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pyro_vharm.diagnostics.shifts import Shift
from pyro_vharm.estimates import Bound, Estimate
from pyro_vharm.learning.evidence_pair import EvidencePair
from pyro_vharm.tables import html_table, nats, shown, text_table

__all__ = ["LocalHarm", "LocalPoint", "Surroundings"]

_MOST_SHIFTS = 12
_SMALL_SHARE = 0.1
_FEW_PARTICLES = 10
_PER_UNIT = 0.02  # nats up to which a quadratic prediction was within a factor of two


@dataclass(frozen=True)
class LocalPoint:
    """Better parameters near θ̂, with log evidence at both, by random numbers that chose nothing.

    Attributes:
        name: how they were found.
        parameters: on the user-facing scale.
        pair: log evidence at θ̂ and here.
    """

    name: str
    parameters: Mapping[str, Tensor]
    pair: EvidencePair

    @property
    def gain(self) -> Estimate:
        """ℓ(θ) − ℓ(θ̂) here: a lower bound on the harm, up to its error."""
        return self.pair.harm.total()


@dataclass(frozen=True)
class Surroundings:
    """What log evidence looks like around θ̂, besides its score.

    Attributes:
        num_parameters: elements of θ.
        num_directions: along how many directions it was looked at.
        num_flat: directions among them in which ℓ does not curve.
        num_upward: directions in which ℓ curves upward.
        least_size: effective number of particles of the unit that has fewest.
        at_boundary: parameters at a boundary of what they may be.
        undetermined: elements that log evidence hardly depends on near θ̂, by label.
    """

    num_parameters: int
    num_directions: int
    num_flat: int
    num_upward: int
    least_size: float
    at_boundary: tuple[str, ...]
    undetermined: tuple[str, ...]


@dataclass(frozen=True)
class LocalHarm:
    """What can be said about learning harm without learning anew, in nats.

    Attributes:
        predicted: ½ sᵀ I⁻¹ s, what a Newton step of ℓ from θ̂ would gain.
        slope: ½ sᵀ C⁻¹ s, with C the complete data's information, along the directions in which ℓ
            does not curve beyond noise, so that I⁻¹ cannot be had: at the least.
        unconverged: ½ gᵀ I⁻¹ g with g = ∇_θ L at fixed q, what the ELBO's own gradient still
            points to; ``None`` for a guide without density.
        shifts: I⁻¹ s for each parameter; empty where only a few directions were looked at.
        score: ∇ℓ by parameter, unconstrained; empty like `shifts`.
        elbo_gradient: ∇_θ L at fixed q, likewise.
        along: the best point along the direction.
        after_em: where a few EM steps lead from there.
        surroundings: where a score of 0 does not mean a harm of 0.
    """

    predicted: Estimate
    slope: Estimate
    unconverged: Estimate | None
    shifts: tuple[Shift, ...]
    score: Mapping[str, Tensor]
    elbo_gradient: Mapping[str, Tensor]
    along: LocalPoint
    after_em: LocalPoint
    surroundings: Surroundings

    @property
    def adaptation_force(self) -> Mapping[str, Tensor]:
        """−∇_θ G = ∇L − ∇ℓ at fixed q: where the guide pushes the model."""
        return {name: g - self.score[name] for name, g in self.elbo_gradient.items()}

    @property
    def best(self) -> LocalPoint:
        """The better of the two points; hand its parameters in as a reference."""
        return max((self.along, self.after_em), key=lambda point: point.gain.value)

    @property
    def lower(self) -> Bound | None:
        """A 95 % lower bound on the harm, from the better point.

        Both points are looked at, so each bound may fail with half of 5 %.
        """
        bounds = [point.pair.lower(0.025) for point in (self.along, self.after_em)]
        known = [bound for bound in bounds if bound is not None]
        if not known:
            return None
        best = max(known, key=lambda bound: bound.value)
        return best if best.confidence == 1 else replace(best, confidence=0.95)

    @property
    def is_seen(self) -> bool:
        """Whether the score is beyond its noise."""
        return self.predicted.is_seen or self.slope.is_seen

    @property
    def findings(self) -> tuple[str, ...]:
        """What the numbers say, in words, most important first."""
        return (*_gained(self), *_predicted(self), *_pulled(self), *self.blind_spots)

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """Where a score of 0 does not mean a harm of 0, in words."""
        return tuple(_blind(self))

    def __str__(self) -> str:
        count = self.predicted.num_units
        title = "local harm, " + ("one joint unit" if count == 1 else f"{count} units")
        rows = [_row("predicted by the score", self.predicted)]
        if self.slope.is_seen:
            rows.append(_row("more where ℓ hardly curves, at least", self.slope))
        if self.unconverged is not None:
            rows.append(_row("same, by the ELBO's own gradient", self.unconverged))
        rows += [_row(f"gained {p.name}", p.gain) for p in (self.along, self.after_em)]
        lower = self.lower
        if lower is not None:
            rows.append(["lower bound, 95 %", nats(lower.value), "", "", str(lower.kind)])
        parts = [text_table([title, "nats", "mc error", "per unit", "kind"], rows)]
        if self.shifts:
            parts += ["", _shift_table(self.shifts)]
        lines = [
            textwrap.fill(f, 96, initial_indent="• ", subsequent_indent="  ") for f in self.findings
        ]
        return "\n".join([*parts, "", *lines])

    def _repr_html_(self) -> str:
        return html_table(str(self))


def _row(name: str, estimate: Estimate) -> list[str]:
    unit = nats(estimate.per_unit.value, 4)
    return [name, nats(estimate.value), nats(estimate.mc_error), unit, str(estimate.kind)]


def _shift_table(shifts: tuple[Shift, ...]) -> str:
    """The parameters that move most, in standard errors."""
    order = sorted(shifts, key=lambda s: -abs(s.in_standard_errors) if s.standard_error else 0.0)
    rows = [
        [
            shift.label,
            f"{shift.value:.4g}",
            f"{shift.shift:+.4g}",
            f"{shift.mc_error:.2g}",
            f"{shift.in_standard_errors:+.1f}" if shift.standard_error else "unknown",
        ]
        for shift in order[:_MOST_SHIFTS]
    ]
    left = len(shifts) - len(rows)
    table = text_table(["parameter", "learned", "shift", "mc error", "standard errors"], rows)
    return f"{table}\n… and {left} more that move less" if left else table


def _gained(harm: LocalHarm) -> list[str]:
    lower, best = harm.lower, harm.best
    if lower is not None and lower.value > 0:
        sure = "" if lower.confidence == 1 else f" with {lower.confidence:.0%} confidence"
        return [
            f"Learning lost at least {nats(lower.value, 2)} nats{sure} ({lower.kind}): log "
            f"evidence is higher by {shown(best.gain)} nats {best.name}. How much more there is, "
            "learn_reference tells."
        ]
    if best.gain.is_seen:
        return [
            f"Log evidence is higher by {shown(best.gain)} nats {best.name}, but no bound shows "
            "it; more particles would."
        ]
    return [f"Nothing better than θ̂ was found near it ({shown(best.gain)} nats)."]


def _predicted(harm: LocalHarm) -> list[str]:
    predicted, best = harm.predicted, harm.best.gain
    if not harm.is_seen:
        limit = max(predicted.value, 0.0) + 2 * predicted.mc_error
        return [
            f"The score lies within its noise and predicts nothing: at most {nats(limit, 2)} nats "
            "of harm show in it."
        ]
    if harm.slope.is_seen:
        return [
            "The prediction is incomplete: ℓ rises in a direction in which its curvature cannot be "
            f"told from 0, by {shown(harm.slope)} nats at the least."
        ]
    if best.value <= 0 or not 0.5 < best.value / predicted.value < 2.0:
        return [
            f"The prediction of {shown(predicted)} nats is not borne out by the {shown(best)} "
            "that were gained: ℓ is no parabola as far as that. It was right to a factor of two "
            f"where harm per unit was under {_PER_UNIT} nats."
        ]
    return []


def _pulled(harm: LocalHarm) -> list[str]:
    left = harm.unconverged
    if left is None or not harm.is_seen:
        return []
    if left.is_seen and left.value > _SMALL_SHARE * (harm.predicted.value + harm.slope.value):
        return [
            f"The ELBO's own gradient is not 0: it points to {shown(left)} nats. The model was "
            "not trained to convergence; train on before the rest is called harm."
        ]
    return [
        f"The guide holds the model where it is: the ELBO's own gradient points to {shown(left)} "
        f"nats, that of the log evidence to {shown(harm.predicted)}."
    ]


def _blind(harm: LocalHarm) -> list[str]:
    around, found = harm.surroundings, []
    if around.least_size < _FEW_PARTICLES:
        found.append(
            f"A unit rests on {around.least_size:.1f} effective particles, so the score has more "
            "noise than it shows. Pass method= with more particles or temperatures."
        )
    if around.num_directions < around.num_parameters:
        found.append(
            f"θ has {around.num_parameters} elements; only {around.num_directions} directions were "
            "looked at, so more may be had than was predicted."
        )
    if around.at_boundary:
        found.append(
            f"At a boundary: {', '.join(around.at_boundary)}. A score of 0 there does not mean a "
            "harm of 0; learn_reference starts off the boundary too."
        )
    elif around.undetermined:
        some = ", ".join(around.undetermined[:_MOST_SHIFTS])
        found.append(
            f"Log evidence hardly depends on {some} near θ̂, as it does at a boundary: a score of "
            "0 there does not mean a harm of 0."
        )
    if around.num_upward:
        found.append(
            f"Log evidence curves upward in {_directions(around.num_upward)}: θ̂ lies near a "
            "saddle, or far from a maximum. Nothing was predicted along them; they were searched."
        )
    if around.num_flat:
        found.append(
            f"Log evidence does not curve, beyond noise, in {_directions(around.num_flat)} "
            "(symmetries, what the data leave open, or too few particles): nothing was predicted "
            "along them."
        )
    return found


def _directions(count: int) -> str:
    return "one direction" if count == 1 else f"{count} directions"
