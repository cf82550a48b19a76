"""Tables as the commands print them: Markdown, so that they can be pasted into a page."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["markdown_table", "print_table"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text below their header, in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a `markdown_table`.

    >>> print_table(["peer", "ms"], [["ours", "1.0"]])
    | peer | ms  |
    | ---- | --- |
    | ours | 1.0 |
    """
    print(markdown_table(header, rows))
