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

from benchmarks.calibration_runs import Run, measure_all, read_lines
from benchmarks.calibration_tables import Table, hard, is_within, nulls, positives, power
from benchmarks.controls import CONTROLS
from benchmarks.tables import print_table

__all__ = ["main"]

_LINES = "lines.jsonl"
_TITLES = {
    "nulls": "Null controls: nothing may be found",
    "positives": "Positive controls, within 5 % or 0.05 nats",
    "power": "Power",
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
    made = {"nulls": nulls, "positives": positives, "power": power, "hard": hard}
    return {name: function(lines) for name, function in made.items()}


def _show(lines: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]) -> None:
    for name, (header, rows) in _tables(lines).items():
        if rows:
            print(f"\n{_TITLES[name]}\n")
            print_table(header, rows)
    deviations = [
        line
        for line in lines
        if line["measurement"] == "exact" and not is_within(line["estimate"], line["harm"])
    ]
    for line in deviations:
        shown = (line[name] for name in ("harm", "reached", "estimate"))
        print("off:", line["control"], line["seed"], *(f"{x:.3f}" for x in shown), sep=" | ")
    for line in failed:
        print("failed:", line["control"], line["seed"], line["measurement"], line["error"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--controls", nargs="+", choices=CONTROLS, default=list(CONTROLS))
    parser.add_argument("--seeds", type=int, help="only the first so many of each control")
    parser.add_argument("--measured", choices=("exact", "sampled"), help="only so")
    parser.add_argument("--workers", type=int, default=2, choices=(1, 2))
    parser.add_argument("--out", type=Path, default=Path("out/calibration"))
    parser.add_argument("--save", type=Path, help="where to write the tables, as JSON")
    options = parser.parse_args(arguments)
    path = options.out / _LINES
    runs = _runs(options.controls, options.seeds, options.measured)
    failed = []
    for line in measure_all(runs, path, options.workers):
        failed += [line] if "error" in line else []
        print("#", *(line[name] for name in Run._fields), _told(line), sep=" | ", flush=True)
    asked = set(runs)
    lines = [
        line
        for line in read_lines(path)
        if "error" not in line and Run(*(line[name] for name in Run._fields)) in asked
    ]
    _show(lines, failed)
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
