"""Every causal language model of transformers: parallel and exact, or refused. Writes docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

import lasp
from lasp.launch.verify import configuration, probe, tiny_model
from lasp.wrap.refusal import VERIFIED, family

pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

GroupOf = Callable[..., lasp.SequenceGroup | None]
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEADER = """# Models of transformers {version}

Every model type that `AutoModelForCausalLM` knows, in a tiny configuration with one layer of each kind (`lasp verify
TYPE` makes the same), on {ranks} ranks, zigzag, against one device in fp32: loss, every layer's output and every
parameter's gradient differ by less than 1e-3 of their largest number; most by 1e-6. What is not exact is refused.
Written by `make test-slow` (tests/distributed/test_model_sweep.py).

## Parallel and exact: {exact}

{names}

## Refused by `lasp.parallelize`: {refused}

| type | why |
|---|---|
{rows}
"""


class Outcome(NamedTuple):
    """What became of a model type: refused, and why; or not, and how far it is from one device."""

    folder: str | None
    refusal: str | None
    exact: bool
    told: str


def outcome(name: str, group: lasp.SequenceGroup) -> Outcome:
    try:
        folder = family(tiny_model(configuration(name)))
    except ValueError as error:
        return Outcome(None, f"never compared: {error}", False, "")
    try:
        report = probe(name, group, 64)
    except ValueError as error:
        return Outcome(folder, str(error), False, "")
    return Outcome(folder, None, report.exact, str(report))


def shortened(reason: str) -> str:
    first = reason.split(". ")[0].split(": try lasp.verify")[0].replace("|", "/").replace("\n", " ")
    return first if len(first) < 200 else first[:200].rsplit(" ", 1)[0] + " ..."


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_is_silently_wrong(group_of: GroupOf) -> None:
    group = group_of(2, "zigzag")
    if group is None:
        return
    found = {name: outcome(name, group) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    accepted = {name: one for name, one in found.items() if one.refusal is None}
    assert {name: one.told for name, one in accepted.items() if not one.exact} == {}
    assert set(VERIFIED) == {one.folder for one in accepted.values()}
    refused = {name: one.refusal for name, one in found.items() if one.refusal is not None}
    if group.rank == 0:
        rows = "\n".join(f"| {name} | {shortened(reason)} |" for name, reason in sorted(refused.items()))
        page = HEADER.format(
            version=version("transformers"),
            ranks=group.size,
            exact=len(accepted),
            names=", ".join(sorted(accepted)),
            refused=len(refused),
            rows=rows,
        )
        PAGE.write_text(page, encoding="utf-8")
