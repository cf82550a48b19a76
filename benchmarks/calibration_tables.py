"""What the lines of a calibration say: false alarms on nulls, accuracy and power on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from scipy.stats import binomtest, norm

from pyro_vharm.tables import nats

__all__ = [
    "Table",
    "excess_p_value",
    "hard",
    "is_within",
    "near",
    "nulls",
    "positives",
    "power",
]

type Line = dict[str, Any]
type Table = tuple[Sequence[str], list[list[str]]]

_TOLERANCE = 1e-4  # nats: how well scipy finds the exact optima, and quadrature an integral
_RATE = 0.05
_QUANTILE = float(norm.isf(_RATE))
_RELATIVE, _ABSOLUTE = 0.05, 0.05
_EDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, math.inf)


def excess_p_value(count: int, total: int, rate: float = _RATE) -> float:
    """P(at least so many of so many), were each to happen with the rate at most.

    >>> round(excess_p_value(3, 20), 3)
    0.075
    """
    return float(binomtest(count, total, rate, alternative="greater").pvalue)


def is_within(value: float, truth: float) -> bool:
    """Whether a number is within 5 % of the truth, or 0.05 nats."""
    return abs(value - truth) <= max(_RELATIVE * abs(truth), _ABSOLUTE)


def _has_false_bound(line: Line) -> bool:
    return line["lower"] is not None and line["lower"] > line["harm"] + _TOLERANCE


def _is_seen(line: Line) -> bool:
    return bool(line["predicted"] > 2 * line["predicted_error"] + _TOLERANCE)


def _has_false_near_bound(line: Line) -> bool:
    lower = line["near_lower"]
    return lower is not None and lower > line["harm"] + _TOLERANCE


def _is_overstated(line: Line) -> bool:
    """The estimate less 1.645 standard errors is above what the reference truly gained."""
    return bool(line["estimate"] - _QUANTILE * line["mc_error"] > line["reached"] + _TOLERANCE)


def _is_false_alarm(line: Line) -> bool:
    return bool(line["outcome"] == "harm" and line["harm"] < line["material"])


def _is_false_bill(line: Line) -> bool:
    return bool(line["outcome"] == "no harm found" and line["harm"] > line["material"])


def _groups(lines: Iterable[Line], role: str) -> dict[tuple[str, str], list[Line]]:
    found: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if line.get("role") == role:
            found.setdefault((line["control"], line["measurement"]), []).append(line)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def _tested(group: Sequence[Line], happened: Callable[[Line], bool]) -> str:
    """How often, with the p-value of a test against 5 %."""
    count = sum(map(happened, group))
    return f"{count} (p = {excess_p_value(count, len(group)):.2g})"


def nulls(lines: Iterable[Line]) -> Table:
    """False lower bounds, estimates above by 1.645 standard errors, and false verdicts."""
    groups = _groups(lines, "null")
    for measurement in sorted({name for _, name in groups}):
        parts = [group for (_, name), group in groups.items() if name == measurement]
        groups["**all**", measurement] = [line for part in parts for line in part]
    header = [
        "control", "measured", "data sets", "true harm, at most", "false lower bounds",
        "above by 1.645 s.e.", "verdict harm", "verdict undecided", "largest error", "s each",
    ]  # fmt: skip
    rows = [
        [
            control,
            measurement,
            str(len(group)),
            nats(max(line["harm"] for line in group), 4),
            _tested(group, _has_false_bound),
            _tested(group, _is_overstated),
            _tested(group, _is_false_alarm),
            str(sum(line["outcome"] == "undecided" for line in group)),
            nats(max(abs(line["estimate"] - line["harm"]) for line in group), 4),
            f"{median(line['seconds'] for line in group):.0f}",
        ]
        for (control, measurement), group in groups.items()
    ]
    return header, rows


def positives(lines: Iterable[Line]) -> Table:
    """How near estimates and learners come to the true harm, and the verdicts."""
    header = [
        "control", "measured", "data sets", "true harm", "median relative error",
        "estimate within", "learner within", "false lower bounds",
        "harm / undecided / none", "clean bill, harmed", "s each",
    ]  # fmt: skip
    rows = []
    for (control, measurement), group in _groups(lines, "positive").items():
        harms, count = [line["harm"] for line in group], len(group)
        errors = [abs(line["estimate"] / line["harm"] - 1) for line in group]
        outcomes = [line["outcome"] for line in group]
        shown = [str(outcomes.count(name)) for name in ("harm", "undecided", "no harm found")]
        rows.append([
            control,
            measurement,
            str(count),
            f"{nats(min(harms), 2)} to {nats(max(harms), 2)}",
            f"{median(errors):.1%}",
            f"{sum(is_within(line['estimate'], line['harm']) for line in group)} of {count}",
            f"{sum(is_within(line['reached'], line['harm']) for line in group)} of {count}",
            str(sum(map(_has_false_bound, group))),
            " / ".join(shown),
            str(sum(map(_is_false_bill, group))),
            f"{median(line['seconds'] for line in group):.0f}",
        ])  # fmt: skip
    return header, rows


def power(lines: Iterable[Line]) -> Table:
    """How often the verdict is harm, by true harm."""
    lines = [line for line in lines if line.get("role") == "positive"]
    header = [
        "true harm", "measured", "data sets", "verdict harm", "above the material limit",
        "of these, verdict harm",
    ]  # fmt: skip
    rows = []
    for measurement in sorted({line["measurement"] for line in lines}):
        of = [line for line in lines if line["measurement"] == measurement]
        for low, high in zip((0.0, *_EDGES), _EDGES, strict=False):
            group = [line for line in of if low <= line["harm"] < high]
            if not group:
                continue
            material = [line for line in group if line["harm"] > line["material"]]
            interval = f"above {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
            rows.append([
                interval,
                measurement,
                str(len(group)),
                str(sum(line["outcome"] == "harm" for line in group)),
                str(len(material)),
                str(sum(line["outcome"] == "harm" for line in material)),
            ])  # fmt: skip
    return header, rows


def near(lines: Iterable[Line]) -> Table:
    """What `local_harm` foretells and gains near θ̂, beside the true harm."""
    header = [
        "control", "measured", "data sets", "prediction within a factor of two",
        "median of gained over true", "seen, beyond 2 s.e.", "false lower bounds",
    ]  # fmt: skip
    lines = [line for line in lines if "near" in line]
    rows = []
    for role in ("null", "positive", "hard"):
        for (control, measurement), group in _groups(lines, role).items():
            harmed = [line for line in group if line["harm"] > _ABSOLUTE]
            good = sum(0.5 < line["predicted"] / line["harm"] < 2 for line in harmed)
            gained = [line["near"] / line["harm"] for line in harmed]
            seen = sum(map(_is_seen, group))
            rows.append([
                control,
                measurement,
                str(len(group)),
                f"{good} of {len(harmed)}" if harmed else "",
                f"{median(gained):.2f}" if harmed else "",
                str(seen),
                _tested(group, _has_false_near_bound),
            ])  # fmt: skip
    return header, rows


def hard(lines: Iterable[Line]) -> Table:
    """Each data set whose visible gap misleads, in a row."""
    header = [
        "control", "seed", "measured", "true gap", "gap", "true harm", "learner reached",
        "estimate", "lower bound", "verdict",
    ]  # fmt: skip
    rows = []
    for (control, measurement), group in _groups(lines, "hard").items():
        for line in sorted(group, key=lambda line: line["seed"]):
            rows.append([
                control,
                str(line["seed"]),
                measurement,
                nats(line["gap"], 2),
                "none" if line["gap_estimate"] is None else nats(line["gap_estimate"], 2),
                nats(line["harm"], 2),
                nats(line["reached"], 2),
                f"{nats(line['estimate'], 2)} ± {nats(line['mc_error'], 2)}",
                "none" if line["lower"] is None else nats(line["lower"], 2),
                line["outcome"],
            ])  # fmt: skip
    return header, rows
