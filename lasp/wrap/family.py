"""The record of one family of foreign models: what `lasp` must know of it. The records are in lasp/wrap/families/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lasp.wrap.swap import Function

ENTRY = "lasp_linearize"
"""The entry of a configuration that says how `lasp.linearize` changed the model."""


def nothing_more(*_: Any) -> None:
    """Refuses nothing."""


def no_other(cls: type) -> bool:
    """Knows no class of another package."""
    return False


@dataclass(frozen=True)
class Family:
    """What stands in for which of a family's functions and methods, and what it needs and refuses besides.

    folder: of transformers/models, or "fla." and that of fla/models: where the classes of its models and layers are.
    functions: by the names that the methods of its modules call them by; each takes a `LayerCall`, and then what the
    function takes that it stands in for.
    methods: by class, and by `method` or `child.method`; each takes a `LayerCall`, the module whose method it is, and
    what the method takes.
    tiny: options without which its configuration cannot be made small by `shrink`, or would keep big layers.
    model: the class of its causal language model, where transformers' `AutoModelForCausalLM` does not know it.
    knows: whether a class from elsewhere treats every token by itself, or mixes them as the stand-ins know.
    check_options(model), check_inputs(keywords of a call): raise ValueError for what is not exact.
    """

    folder: str
    functions: Mapping[str, Function] = field(default_factory=dict)
    methods: Mapping[str, Mapping[str, Function]] = field(default_factory=dict)
    tiny: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    knows: Callable[[type], bool] = no_other
    check_options: Callable[[Any], None] = nothing_more
    check_inputs: Callable[[Mapping[str, Any]], None] = nothing_more


def folder_of(thing: Any) -> str | None:
    """The folder of transformers/models, or "fla." and that of fla/models, that an object's class comes from."""
    package, *parts = type(thing).__module__.split(".")
    if package not in ("transformers", "fla") or len(parts) < 2 or parts[0] != "models":
        return None
    return parts[1] if package == "transformers" else f"fla.{parts[1]}"
