"""docs/models.md, from the records of lasp/wrap/families and what the sweep over all models found."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from lasp.wrap.families import FAMILIES
from lasp.wrap.family import Family

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEADER = """# Models of transformers {version}

Every model type that `AutoModelForCausalLM` knows, in a tiny configuration with one layer of each kind (`lasp verify
TYPE` makes the same), on {ranks} ranks, zigzag, against one device in fp32: loss, every layer's output and every
parameter's gradient differ by less than 1e-3 of their largest number; most by 1e-6. What is not exact is refused.
Written by `make test-slow` (tests/distributed/test_model_sweep.py).

## Parallel and exact: {exact}

{names}

{stand_ins}
## Refused by `lasp.parallelize`: {refused}

| type | why |
|---|---|
{rows}
"""
STAND_INS = """## What `lasp` stands in for

Softmax attention goes through the registry of transformers in all of them. Besides, by the records in
`lasp/wrap/families/`:

| folders of transformers/models, fla/models | functions that their layers call | methods |
|---|---|---|
{rows}
"""


def page(ranks: int, accepted: list[str], refused: Mapping[str, str]) -> str:
    """refused: why, by model type."""
    return HEADER.format(
        version=version("transformers"),
        ranks=ranks,
        exact=len(accepted),
        names=", ".join(sorted(accepted)),
        stand_ins=stand_ins(),
        refused=len(refused),
        rows="\n".join(f"| {name} | {_shortened(reason)} |" for name, reason in sorted(refused.items())),
    )


def stand_ins() -> str:
    """The page's section on what the records name."""
    coded = sorted(record for record in map(_cells, FAMILIES.values()) if any(record[:2]))
    rows = [
        f"| {', '.join(folder for *_, folder in same)} | {functions} | {methods} |"
        for (functions, methods), same in groupby(coded, lambda cells: cells[:2])
    ]
    return STAND_INS.format(rows="\n".join(sorted(rows)))


def _cells(record: Family) -> tuple[str, str, str]:
    methods = [f"{cls}.{method}" for cls, methods in record.methods.items() for method in methods]
    return ", ".join(record.functions), ", ".join(methods), record.folder


def _shortened(reason: str) -> str:
    first = reason.split(". ")[0].split(": try lasp.verify")[0].replace("|", "/").replace("\n", " ")
    return first if len(first) < 200 else first[:200].rsplit(" ", 1)[0] + " ..."
