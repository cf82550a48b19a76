"""Log evidence of the same units at learned and at reference parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scipy.stats import norm

from pyro_vharm.estimates import Bound, Kind, UnitEstimates
from pyro_vharm.inference.evidence import Evidence
from pyro_vharm.tables import nats, text_table

__all__ = ["EvidencePair", "bounds_table"]


@dataclass(frozen=True)
class EvidencePair:
    """Log evidence of the same units at θ̂ and at θ_ref, in nats.

    Attributes:
        learned: ℓ(θ̂).
        reference: ℓ(θ_ref).
    """

    learned: Evidence
    reference: Evidence

    @property
    def harm(self) -> UnitEstimates:
        """ℓ(θ_ref) − ℓ(θ̂) per unit: a lower bound on ℓ(θ*) − ℓ(θ̂), up to the errors."""
        return self.reference.per_unit - self.learned.per_unit

    def lower(self, delta: float = 0.05) -> Bound | None:
        """A lower bound on the total harm that fails with probability at most delta.

        ℓ(θ_ref) from below minus ℓ(θ̂) from above, each at δ/2. As strong as the weaker of the
        two: certified only where ℓ(θ̂) is numerical. ``None`` where ℓ(θ̂) has no upper bound.
        """
        below, above = self.reference.lower(delta / 2), self.learned.upper(delta / 2)
        return None if above is None else _difference(below, above, "lower")

    def upper(self, delta: float = 0.05) -> Bound | None:
        """An upper bound on ℓ(θ_ref) − ℓ(θ̂): harm above it would have been seen."""
        above, below = self.reference.upper(delta / 2), self.learned.lower(delta / 2)
        return None if above is None else _difference(above, below, "upper")

    def by_error(self, side: Literal["lower", "upper"], delta: float = 0.05) -> Bound | None:
        """The estimate less or plus a normal quantile of its standard error: estimated, not proved.

        Far closer than the bounds above, which pay for holding without such an assumption.
        ``None`` unless both estimates are confirmed, see `Evidence.standing`.
        """
        if not all(e.standing == "confirmed" for e in (self.learned, self.reference)):
            return None
        total = self.harm.total()
        reach = float(norm.isf(delta)) * total.mc_error
        value = total.value + (reach if side == "upper" else -reach)
        return Bound(value, side, max(total.kind, Kind.ESTIMATED), 1 - delta)


def _difference(first: Bound, second: Bound, side: Literal["lower", "upper"]) -> Bound:
    confidence = first.confidence + second.confidence - 1
    return Bound(first.value - second.value, side, max(first.kind, second.kind), confidence)


def bounds_table(pair: EvidencePair) -> str:
    """Bounds on both totals and on their difference."""
    bounds = {
        "log evidence at reference": (pair.reference.lower(), pair.reference.upper()),
        "log evidence as learned": (pair.learned.lower(), pair.learned.upper()),
        "learning harm": (pair.lower(), pair.upper()),
    }
    rows = [
        [name, *(cell for bound in pair for cell in _bound_cells(bound))]
        for name, pair in bounds.items()
    ]
    return text_table(["bounds on totals, 95 %", "lower", "kind", "upper", "kind"], rows)


def _bound_cells(bound: Bound | None) -> tuple[str, str]:
    return ("none", "") if bound is None else (nats(bound.value), str(bound.kind))
