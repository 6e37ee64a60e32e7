"""Replacing what one instance of a module calls; other instances of its class stay as they are."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_SWAPPED = "_lasp_swapped"
Function = Callable[..., Any]


def rebind(function: Any, others: Mapping[str, Any], wrap: Callable[[Function], Function] | None = None) -> Function:
    """The same function, under the same decorators, with some of its module's globals replaced.

    wrap: one more decorator, the innermost. To be made once and kept: the compiler leaves the rest of a function that
    it has broken off in these globals, and finds it by the function's code, which is a copy too.
    """
    inner = getattr(function, "__wrapped__", None)
    cells, replaced = function.__closure__, function.__globals__ | others
    if inner is not None:
        swapped, replaced = rebind(inner, others, wrap), function.__globals__
        cells = tuple(CellType(swapped) if cell.cell_contents is inner else cell for cell in cells)
    code = function.__code__.replace()
    twin = FunctionType(code, replaced, function.__name__, function.__defaults__, cells)
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin if inner is not None or wrap is None else wrap(twin)


def rebind_telling(
    function: Any, others: Mapping[str, Function], tell: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
) -> Function:
    """`rebind` a method; its replacements take first what `tell(module, args, kwargs)` says of the call they are in.

    A replaced global may lie within a module ("nn.functional.dropout"). The compiler leaves the replacements alone, and
    compiles the method.
    """
    under_way = _Calls()

    def told(replacement: Function) -> Function:
        return torch.compiler.disable(lambda *args, **kwargs: replacement(under_way.calls[-1], *args, **kwargs))

    def wrap(method: Function) -> Function:
        @functools.wraps(method)
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            under_way.calls.append(tell(self, args, kwargs))
            try:
                return method(self, *args, **kwargs)
            finally:
                under_way.calls.pop()

        return torch.compiler.disable(run, recursive=False)

    known, grafted = undecorated(function).__globals__, {}
    for name, other in others.items():
        root, *path = name.split(".")
        grafted[root] = _graft(known.get(root), path, told(other))
    return rebind(function, grafted, wrap)


class _Calls(threading.local):
    """What is known of a method's calls that are under way in a thread, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


def _graft(module: Any, path: list[str], value: Any) -> Any:
    """A copy of a module in which the name at the end of `path` has another value."""
    if not path:
        return value
    twin = ModuleType(module.__name__)
    vars(twin).update(vars(module))
    setattr(twin, path[0], _graft(getattr(module, path[0]), path[1:], value))
    return twin


def calls(module: nn.Module, names: Mapping[str, Any]) -> Iterator[tuple[str, Any, set[str]]]:
    """The methods of a module's class that call globals of these names: method, function, names."""
    seen: set[str] = set()
    for cls in type(module).__mro__:
        for method, function in vars(cls).items():
            if not isinstance(function, FunctionType) or method in seen:
                continue
            seen.add(method)
            innermost = undecorated(function)
            found = {n for n in innermost.__code__.co_names if n in names and n in innermost.__globals__}
            if found:
                yield method, function, found


def calling_undecorated(function: Any, names: Iterable[str]) -> Any:
    """The same function, calling what the globals of these names decorate."""
    known = undecorated(function).__globals__
    return rebind(function, {n: known[n].__wrapped__ for n in names if hasattr(known[n], "__wrapped__")})


def undecorated(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def swap(module: nn.Module, method: str, replacement: Function) -> None:
    """Let this instance call `replacement(module, ...)` in the place of a method."""
    original = getattr(type(module), method)
    # A bound method, for a deep copy of the module binds it to the copy.
    module.__dict__[method] = MethodType(functools.wraps(original)(replacement), module)
    module.__dict__.setdefault(_SWAPPED, {})[method] = replacement


def surround(module: nn.Module, method: str, around: Function) -> None:
    """Let this instance call `around(function, module, ...)`, where `function(module, ...)` is what it calls now.

    The compiler leaves `around` alone, and compiles the function.
    """
    present = module.__dict__.get(method)
    function = getattr(type(module), method) if present is None else getattr(present, "__func__", None)
    if function is None:
        raise ValueError(f"the {method} of {type(module).__name__} was replaced by another library")
    swap(module, method, torch.compiler.disable(functools.partial(around, function), recursive=False))


def replaced(module: nn.Module) -> list[str]:
    """The methods that were swapped and are others now. A decorator around ours (autocast) leaves it ours."""
    swapped = module.__dict__.get(_SWAPPED, {})
    return [name for name, ours in swapped.items() if not _reaches(module.__dict__.get(name), ours)]


def _reaches(function: Any, ours: Function) -> bool:
    while function is not None and function is not ours:
        function = getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)
    return function is ours


def is_swapped(module: nn.Module, method: str) -> bool:
    return method in module.__dict__.get(_SWAPPED, ())


def restore(module: nn.Module) -> None:
    """Undo every `swap` of a module."""
    for method in module.__dict__.pop(_SWAPPED, ()):
        module.__dict__.pop(method, None)
