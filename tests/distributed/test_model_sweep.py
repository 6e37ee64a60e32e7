"""Every causal language model of transformers: parallel and exact, or refused. Writes docs/models.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

import lasp
from lasp.launch.verify import configuration, probe, tiny_model
from lasp.wrap.families import FAMILIES
from lasp.wrap.family import folder_of

pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models_page import PAGE, page

GroupOf = Callable[..., lasp.SequenceGroup | None]


class Outcome(NamedTuple):
    """What became of a model type: refused, and why; or not, and how far it is from one device."""

    folder: str | None
    refusal: str | None
    exact: bool
    told: str


def outcome(name: str, group: lasp.SequenceGroup) -> Outcome:
    try:
        folder = folder_of(tiny_model(configuration(name)))
    except ValueError as error:
        return Outcome(None, f"never compared: {error}", False, "")
    try:
        report = probe(name, group, 64)
    except ValueError as error:
        return Outcome(folder, str(error), False, "")
    return Outcome(folder, None, report.exact, str(report))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_is_silently_wrong(group_of: GroupOf) -> None:
    group = group_of(2, "zigzag")
    if group is None:
        return
    found = {name: outcome(name, group) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    accepted = {name: one for name, one in found.items() if one.refusal is None}
    assert {name: one.told for name, one in accepted.items() if not one.exact} == {}
    recorded = {folder for folder in FAMILIES if not folder.startswith("fla.")}
    assert recorded == {one.folder for one in accepted.values()}
    refused = {name: one.refusal for name, one in found.items() if one.refusal is not None}
    if group.rank == 0:
        PAGE.write_text(page(group.size, list(accepted), refused), encoding="utf-8")
