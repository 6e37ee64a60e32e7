"""The records of foreign families: what they name is in transformers, and docs/models.md says what they say."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

import lasp
from lasp.launch.verify import configuration, tiny_model
from lasp.wrap import families
from lasp.wrap.families import FAMILIES, RECURRENCES
from lasp.wrap.family import Family
from lasp.wrap.shrink import shrink
from lasp.wrap.swap import calls

pytest.importorskip("transformers")

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.hf_models import has_stand_ins
from tests.models_page import PAGE, stand_ins

MODELS = Path(transformers.__file__).parent / "models"
RECORDS = {folder: record for folder, record in FAMILIES.items() if not folder.startswith("fla.")}
CODED = [record for record in RECORDS.values() if has_stand_ins(record)]


@pytest.mark.parametrize("record", CODED, ids=lambda record: record.folder)
def test_what_a_record_names_is_in_the_tiny_model(record: Family) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shrink(configuration(record.folder)))
    called = {
        name for module in model.modules() for *_, names in calls(module, dict.fromkeys(RECURRENCES)) for name in names
    }
    assert called == set(record.functions)
    modules = {type(module).__name__: module for module in model.modules()}
    for name, methods in record.methods.items():
        for path in methods:
            *child, method = path.split(".")
            assert callable(getattr(modules[name].get_submodule(".".join(child)), method))
    # One layer of each kind: a hybrid has its attention too.
    home = [x for x in vars(sys.modules[type(model).__module__]).values() if isinstance(x, type)]
    mixers = {x.__name__ for x in home if issubclass(x, torch.nn.Module) and x.__name__.endswith("Attention")}
    there = {cls.__name__ for module in model.modules() for cls in type(module).__mro__}
    assert {name for name in mixers if "Vision" not in name} <= there


def test_the_others_call_no_recurrence() -> None:
    called = re.compile(rf"\b({'|'.join(RECURRENCES)})\b")
    for folder, record in RECORDS.items():
        if not has_stand_ins(record):
            source = (MODELS / folder / f"modeling_{folder}.py").read_text(encoding="utf-8")
            assert called.search(source) is None, folder


def test_a_recurrence_that_its_record_does_not_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(configuration("bamba"))
    named = {name: f for name, f in FAMILIES["bamba"].functions.items() if name != "mamba2_chunk_scan"}
    monkeypatch.setitem(FAMILIES, "bamba", dataclasses.replace(FAMILIES["bamba"], functions=named))
    with pytest.raises(ValueError, match=r"layers\.0\.mamba \(BambaMixer\) calls mamba2_chunk_scan in .*'bamba'"):
        lasp.parallelize(model, None)


def test_a_file_that_joins_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "joined.py").write_text("from lasp.wrap.family import Family\n\nFAMILIES = (Family('bloom'),)\n")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "lasp.wrap.families.joined", None)  # put back as it was
    del sys.modules["lasp.wrap.families.joined"]
    assert families.by_folder().keys() == FAMILIES.keys() | {"bloom"}


def test_the_page_says_what_the_records_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert stand_ins() in text
    if f"# Models of transformers {transformers.__version__}\n" not in text:
        pytest.skip("the page is of another release, which knows other models")
    accepted = re.search(r"## Parallel and exact: (\d+)\n\n(.*)\n", text)
    assert accepted is not None
    names = accepted[2].split(", ")
    assert len(names) == int(accepted[1])
    assert {folder(name) for name in names} == RECORDS.keys()
    refused = re.findall(r"^\| (\S+) \| .* \|$", text.split("## Refused")[1], re.M)[1:]
    assert sorted([*names, *refused]) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def folder(name: str) -> str:
    """Of the causal language model that `lasp verify` makes of a type: its own, or of the text model within."""
    kind = name
    if _home(kind) not in RECORDS:
        kind = transformers.CONFIG_MAPPING[name]().get_text_config(decoder=True).model_type
    return _home(kind)


def _home(kind: str) -> str:
    module: str = transformers._class_to_module[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return module.split(".")[1]


def test_the_example_of_the_documentation_is_a_record() -> None:
    text = (PAGE.parent / "huggingface.md").read_text(encoding="utf-8")
    code = re.search(r"## Adding a family.*?```python\n(.*?)```", text, re.S)
    assert code is not None
    written: dict[str, object] = {}
    exec(code[1], written)
    assert written["FAMILIES"] == (FAMILIES["lfm2"],)
