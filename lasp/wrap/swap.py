"""Replacing what one instance of a module calls; other instances of its class stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

_SWAPPED = "_lasp_swapped"
Function = Callable[..., Any]


def rebind(function: Any, others: Mapping[str, Function]) -> Function:
    """The same function, under the same decorators, with some of its module's globals replaced."""
    inner = getattr(function, "__wrapped__", None)
    cells, replaced = function.__closure__, function.__globals__ | others
    if inner is not None:
        swapped, replaced = rebind(inner, others), function.__globals__
        cells = tuple(CellType(swapped) if cell.cell_contents is inner else cell for cell in cells)
    twin = FunctionType(function.__code__, replaced, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin


def calls(module: nn.Module, names: Mapping[str, Any]) -> Iterator[tuple[str, Any, set[str]]]:
    """The methods of a module's class that call globals of these names: method, function, names."""
    seen: set[str] = set()
    for cls in type(module).__mro__:
        for method, function in vars(cls).items():
            if not isinstance(function, FunctionType) or method in seen:
                continue
            seen.add(method)
            innermost = _innermost(function)
            found = {n for n in innermost.__code__.co_names if n in names and n in innermost.__globals__}
            if found:
                yield method, function, found


def undecorated(function: Any, names: Iterable[str]) -> Any:
    """The same function, calling what the globals of these names decorate."""
    known = _innermost(function).__globals__
    return rebind(function, {n: known[n].__wrapped__ for n in names if hasattr(known[n], "__wrapped__")})


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def swap(module: nn.Module, method: str, replacement: Function) -> None:
    """Let this instance call `replacement(module, ...)` in the place of a method."""
    original = getattr(type(module), method)
    # A bound method, for a deep copy of the module binds it to the copy.
    module.__dict__[method] = MethodType(functools.wraps(original)(replacement), module)
    module.__dict__.setdefault(_SWAPPED, []).append(method)


def restore(module: nn.Module) -> None:
    """Undo every `swap` of a module."""
    for method in module.__dict__.pop(_SWAPPED, ()):
        module.__dict__.pop(method, None)
