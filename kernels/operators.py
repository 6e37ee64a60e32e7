"""Operators: what torch.compile, fake tensors and selective checkpointing take as one step.

Each is written once, as a generator. It yields the new tensors that it will return as soon as they are allocated, and
fills them when it goes on. What stands before the `yield` reads shapes and dtypes alone, and is the operator's fake.
None has a derivative: that lives in `lasp.parallel.linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from inspect import Parameter, Signature
from typing import Any, get_args, get_type_hints

import torch


def operator(function: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    """Make a generator the operator `lasp::<its name>`. In the place of a NamedTuple the operator has its fields."""
    hints = get_type_hints(function)
    (returned,) = get_args(hints.pop("return"))
    kinds = list(hints.values())
    laid_flat = [_is_record(kind) for kind in kinds]  # torch.compile asks no type, but reads a list

    def run(*flat: Any) -> Any:
        steps = function(*_packed(flat, kinds))
        results = next(steps)
        next(steps, None)
        return results

    def fake(*flat: Any) -> Any:
        return next(function(*_packed(flat, kinds)))

    run.__signature__ = Signature(_parameters(hints), return_annotation=returned)  # type: ignore[attr-defined]
    made = torch.library.custom_op(f"lasp::{function.__name__}", run, mutates_args=())
    made.register_fake(fake)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        flat: list[Any] = []
        for value, flatten in zip(arguments, laid_flat, strict=True):
            flat += list(value) if flatten else [value]
        return made(*flat)

    return call


def _parameters(hints: dict[str, Any]) -> list[Parameter]:
    """One for every field of a NamedTuple, and for every other argument."""
    flat: dict[str, Any] = {}
    for name, kind in hints.items():
        fields = get_type_hints(kind) if _is_record(kind) else {}
        flat |= {f"{name}_{field}": own for field, own in fields.items()} or {name: kind}
    return [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for name, kind in flat.items()]


def _packed(flat: Sequence[Any], kinds: list[Any]) -> list[Any]:
    """The inverse of laying NamedTuples flat."""
    values = iter(flat)
    return [kind(*(next(values) for _ in kind._fields)) if _is_record(kind) else next(values) for kind in kinds]


def _is_record(kind: Any) -> bool:
    return hasattr(kind, "_fields")
