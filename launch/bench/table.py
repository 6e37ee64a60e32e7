"""Tables in Markdown, which a terminal shows as well as a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with a line per row; None is an empty cell."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
