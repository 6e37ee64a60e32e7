"""The families of foreign models that `lasp.parallelize` takes: a record each, beside the functions that it names.

Every file in this folder has FAMILIES, a tuple of records, and is found here by itself. A family is in one once the
causal language models in its folder were compared with one device, parameter by parameter (`make test-slow`).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from lasp.wrap.family import Family, folder_of


def by_folder() -> dict[str, Family]:
    files = [import_module(f"{__name__}.{file.name}") for file in iter_modules(__path__)]
    records = [record for file in files for record in file.FAMILIES]
    found = {record.folder: record for record in records}
    assert len(found) == len(records), "a folder has one record"
    return found


FAMILIES: Mapping[str, Family] = by_folder()
# What calls one of these mixes tokens.
RECURRENCES = frozenset(name for record in FAMILIES.values() for name in record.functions)


def family_of(thing: Any) -> Family | None:
    """The record of the family that a model, one of its modules, or its configuration is of."""
    return FAMILIES.get(folder_of(thing) or "")
