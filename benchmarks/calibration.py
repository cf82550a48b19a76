"""Does the measured harm hold on models with exact answers? ``python -m benchmarks.calibration``.

Simulates the data sets of every control, sets the model at the exact optimum of L, measures, and
prints false alarms on nulls, accuracy and power where there is harm, and the cases whose visible
gap misleads. What was measured is kept line by line, and the next call goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration_runs import MEASUREMENTS, Run, measure_all, read_lines
from benchmarks.calibration_tables import (
    Table,
    hard,
    is_within,
    near,
    nulls,
    positives,
    power,
)
from benchmarks.controls import CONTROLS
from benchmarks.tables import markdown_table

__all__ = ["main", "put_between_marks"]

_LINES = "lines.jsonl"
_BEGIN, _END = "% calibration: tables begin", "% calibration: tables end"
_TITLES = {
    "nulls": "Null controls: nothing may be found",
    "positives": "Positive controls, within 5 % or 0.05 nats",
    "power": "Power",
    "near": "What shows near θ̂, without learning anew",
    "hard": "The visible gap misleads",
}


def _runs(controls: Sequence[str], seeds: int | None, only: str | None) -> list[Run]:
    """All that is asked for, seed by seed, so that every control is begun early."""
    runs = [
        (position, Run(name, seed, measurement))
        for name in controls
        for position, seed in enumerate(CONTROLS[name].seeds[:seeds])
        for measurement in CONTROLS[name].measurements
        if only in (None, measurement)
    ]
    return [run for _, run in sorted(runs, key=lambda pair: pair[0])]


def _tables(lines: Sequence[dict[str, Any]]) -> dict[str, Table]:
    made = {"nulls": nulls, "positives": positives, "power": power, "near": near, "hard": hard}
    return {name: function(lines) for name, function in made.items()}


def _text(lines: Sequence[dict[str, Any]]) -> str:
    """All tables, and what is farther off than it should be."""
    parts = [f"{len(lines)} measurements of {_count_data_sets(lines)} simulated data sets."]
    for name, (header, rows) in _tables(lines).items():
        if rows:
            parts += [f"### {_TITLES[name]}", markdown_table(header, rows)]
    off = [
        f"- {line['control']}, seed {line['seed']}, {line['measurement']}: true harm "
        f"{line['harm']:.3f}, learner reached {line['reached']:.3f}, estimate "
        f"{line['estimate']:.3f} ± {line['mc_error']:.3f}"
        for line in lines
        if line["measurement"] != "sampled" and not is_within(line["estimate"], line["harm"])
    ]
    if off:
        parts += ["Estimates farther off than 5 % and 0.05 nats, by enough work:", "\n".join(off)]
    return "\n\n".join(parts)


def _count_data_sets(lines: Sequence[dict[str, Any]]) -> int:
    return len({(line["control"], line["seed"]) for line in lines})


def put_between_marks(page: Path, text: str) -> None:
    """Replace what stands between the two marks of a page.

    Raises:
        ValueError: if the page lacks a mark.
    """
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{page} lacks the line {_BEGIN!r} or {_END!r}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--seeds", type=int, help="only the first so many of each control")
    parser.add_argument("--measured", choices=MEASUREMENTS, help="only so")
    parser.add_argument("--tables-only", action="store_true", help="of what has been measured")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2))
    parser.add_argument("--out", type=Path, default=Path("out/calibration"))
    parser.add_argument("--save", type=Path, help="where to write the tables, as JSON")
    parser.add_argument("--page", type=Path, help="a page with marks to put the tables between")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the tables, and write them where it was asked."""
    options = _options(arguments)
    path = options.out / _LINES
    runs = _runs(options.controls, options.seeds, options.measured)
    failed = []
    for line in () if options.tables_only else measure_all(runs, path, options.workers):
        failed += [line] if "error" in line else []
        print("#", *(line[name] for name in Run._fields), _told(line), sep=" | ", flush=True)
    asked = set(runs)
    lines = [
        line
        for line in read_lines(path)
        if "error" not in line and Run(*(line[name] for name in Run._fields)) in asked
    ]
    print("\n" + _text(lines))
    for line in failed:
        print("failed:", *(line[name] for name in Run._fields), line["error"])
    if options.page is not None:
        put_between_marks(options.page, _text(lines))
    if options.save is not None:
        content = {
            name: [dict(zip(header, row, strict=True)) for row in rows]
            for name, (header, rows) in _tables(lines).items()
        }
        options.save.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _told(line: dict[str, Any]) -> str:
    if "error" in line:
        return str(line["error"])
    return "true {harm:.3f} | {estimate:.3f} ± {mc_error:.3f} | {outcome}".format_map(line)


if __name__ == "__main__":
    main()
