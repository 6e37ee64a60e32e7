"""docs/benchmarks.md from the figures that benchmarks have written: tables, and plots where there are any.

<!-- lasp bench report: figures/scaling.json -->
what `lasp bench scaling` prints of these figures stands here
<!-- end -->
"""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

SECTION = re.compile(r"(<!-- lasp bench report: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def written(document: Path, benchmarks: dict[str, ModuleType]) -> str:
    """The text of a document whose sections say what their files do. ValueError for a file that is not there, or of
    no benchmark."""

    def section(found: re.Match[str]) -> str:
        path = document.parent / found[2]
        return f"{found[1]}{_section(_read(path, benchmarks), path, benchmarks)}{found[3]}"

    return SECTION.sub(section, document.read_text(encoding="utf-8"))


def report(document: Path, benchmarks: dict[str, ModuleType]) -> list[Path]:
    """Write a document anew, and the plots beside its figures; the files of its sections."""
    text = written(document, benchmarks)
    if text != document.read_text(encoding="utf-8"):
        document.write_text(text, encoding="utf-8")
    paths = [document.parent / found[2] for found in SECTION.finditer(text)]
    for path in paths:
        figures = _read(path, benchmarks)
        draw = getattr(benchmarks[figures["benchmark"]], "plot", None)
        if draw is not None:
            draw(figures, path.with_suffix(".png"))
    return paths


def _read(path: Path, benchmarks: dict[str, ModuleType]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: there are no such figures")
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(figures, dict) or figures.get("benchmark") not in benchmarks:
        raise ValueError(f"{path}: no figures of a benchmark, which `lasp bench ... --json` writes")
    return figures


def _section(figures: dict[str, Any], path: Path, benchmarks: dict[str, ModuleType]) -> str:
    """The command, the plot, and what the benchmark shows."""
    benchmark = benchmarks[figures["benchmark"]]
    shown = io.StringIO()
    with redirect_stdout(shown):
        benchmark.show(figures)
    plot = f"![{path.stem}](figures/{path.stem}.png)\n\n" if hasattr(benchmark, "plot") else ""
    return f"\n    {figures['command']}\n\n{plot}{shown.getvalue().strip()}\n\n"
