"""Tables as the commands print them: Markdown, so that they can be pasted into a page."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["print_table"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text below their header, in columns of equal width.

    >>> print_table(["peer", "ms"], [["ours", "1.0"]])
    | peer | ms  |
    | ---- | --- |
    | ours | 1.0 |
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("| " + " | ".join(cells) + " |")
