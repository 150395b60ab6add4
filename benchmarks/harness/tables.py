"""Tables of text: Markdown for the pages, aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

Line = Sequence[str]


def markdown(header: Line, lines: Sequence[Line]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def aligned(header: Line, lines: Sequence[Line], *, left: int = 2) -> str:
    """Columns two spaces apart, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def one(line: Line) -> str:
        cells = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(one, (header, *lines)))
