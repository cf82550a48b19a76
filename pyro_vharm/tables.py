"""Plain-text and HTML tables: how every result prints."""

from __future__ import annotations

import html
from collections.abc import Sequence

from pyro_vharm.estimates import Estimate

__all__ = ["html_table", "nats", "shown", "text_table"]


def nats(value: float, digits: int = 3) -> str:
    """A number to fixed digits, without a negative zero.

    >>> nats(-0.0001), nats(-1.5, 1)
    ('0.000', '-1.5')
    """
    shown = f"{value:.{digits}f}"
    return shown.lstrip("-") if not shown.strip("-0.") else shown


def shown(estimate: Estimate, digits: int = 2) -> str:
    """A number with its Monte Carlo standard error, both to fixed digits."""
    return f"{nats(estimate.value, digits)} ± {nats(estimate.mc_error, digits)}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns for a terminal: the first to the left, the others to the right.

    >>> print(text_table(["", "nats"], [["elbo", "-1.5"]]))
            nats
    ────────────
    elbo    -1.5
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "    ".join([first, *others]).rstrip()

    rule = "─" * (sum(widths) + 4 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows)])


def html_table(text: str) -> str:
    """The same text for a notebook, aligned as printed."""
    return f"<pre>{html.escape(text)}</pre>"
