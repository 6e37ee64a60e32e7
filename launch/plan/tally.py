"""Tally: memory and work of whatever runs inside it, told apart by what it is for. Tensors need not have values."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lasp.launch.plan.moments import Items, Kind
from lasp.parallel.work import Work, work

_EXCHANGES = ("exchange.py", "keys.py", "heads.py", "halo.py", "collectives.py")
_DEPTH = 12  # frames between an allocation and the file that asked for it
_VIEWS = (
    "view",
    "_unsafe_view",
    "reshape",
    "transpose",
    "t",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "detach",
)


@dataclass
class Effort:
    """flops: of matrix products; bytes: that all else reads and writes; calls: how many there are of both."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0


@dataclass
class Tally(TorchDispatchMode):
    """moments: what was held after each operation, by item. effort: by place and direction."""

    moments: list[tuple[Kind, Items]] = field(default_factory=list)
    effort: dict[tuple[str, str], Effort] = field(default_factory=lambda: defaultdict(Effort))
    mixing: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # flops of mixers, forward, by kind
    softmax: set[str] = field(default_factory=set)  # the kinds that are softmax attention

    def __post_init__(self) -> None:
        super().__init__()
        self._live: Items = defaultdict(int)
        self._items: dict[int, tuple[str, int]] = {}  # of storages, by their ids
        self._places = ["rest"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        place, direction = self._place()
        outputs = _tensors(result)
        for tensor in outputs:
            self._hold(tensor, place)
        self._work(func, args, kwargs or {}, result, outputs, self.effort[place, direction])
        self._look(f"{direction} {place}", str(func))
        return result

    def know(self, model: nn.Module) -> None:
        """Count what a model holds as nobody's: it is not the tally's."""
        self.leave_out((*model.parameters(), *model.buffers()))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._name_gradient)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count these as nobody's."""
        for tensor in tensors:
            self._items[id(tensor.untyped_storage())] = ("", 0)

    @contextmanager
    def within(self, place: str) -> Iterator[None]:
        """Call what is done here by this name."""
        self._places.append(place)
        with self:
            yield
        self._places.pop()

    def _name_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._rename(parameter.grad, "gradients")

    def _rename(self, tensor: Tensor, item: str) -> None:
        key = id(tensor.untyped_storage())
        before, size = self._items.get(key, ("", 0))
        self._items[key] = item, size
        self._live[before] -= size
        self._live[item] += size

    @contextmanager
    def places(self, named: dict[nn.Module, str]) -> Iterator[None]:
        """Tell apart what these modules do, by the innermost one's name."""
        with ExitStack() as stack:
            for module, place in named.items():
                enter, leave = partial(self._enter, place), self._leave
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _enter(self, place: str, *_: Any) -> None:
        counted = ExitStack()
        found: Work = counted.enter_context(work())
        self._places.append(place)
        self._counts.append((counted, found))

    def _leave(self, *_: Any) -> None:
        counted, found = self._counts.pop()
        counted.close()
        place = self._places.pop()
        self.mixing[place] += found.flops
        if found.attention:
            self.softmax.add(place)

    @property
    def _counts(self) -> list[tuple[ExitStack, Work]]:
        return self.__dict__.setdefault("_open_counts", [])

    def _place(self) -> tuple[str, str]:
        node = torch._C._current_autograd_node()
        if node is None or self._places[-1] != "rest":
            return self._places[-1], "forward" if node is None else "again"
        return node.name(), "backward"

    def _hold(self, tensor: Tensor, place: str) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._items or tensor.device.type == "meta":  # which is a shape, and has no memory
            return
        item, size = _asked_by() or place, storage.nbytes()
        self._items[id(storage)] = item, size
        self._live[item] += size
        weakref.finalize(storage, self._release, id(storage))

    def _release(self, key: int) -> None:
        item, size = self._items.pop(key, ("", 0))
        self._live[item] -= size

    def _look(self, place: str, operation: str) -> None:
        held = {item: size for item, size in self._live.items() if size and item}
        self.moments.append(((place, operation), held))

    def _work(self, func: Any, args: Any, kwargs: Any, result: Any, outputs: list[Tensor], effort: Effort) -> None:
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            effort.flops += count(*args, **kwargs, out_val=result)
        elif func._overloadpacket.__name__ in _VIEWS:
            return
        else:
            effort.bytes += sum(t.numel() * t.itemsize for t in (*_tensors(args), *(outputs or _written(func, args))))
        effort.calls += 1


def _written(func: Any, args: Any) -> list[Tensor]:
    """What an operation changes in place: of many tensors at a time it returns nothing."""
    told = zip(func._schema.arguments, args, strict=False)
    return [tensor for own, value in told if own.is_write for tensor in _tensors(value)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _asked_by() -> str | None:
    """ "exchange" where one asked for memory, by the files that the call came through."""
    frame: Any = sys._getframe(3)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        name = frame.f_code.co_filename
        if "parallel/" in name and name.endswith(_EXCHANGES):
            return "exchange"
        frame = frame.f_back
    return None
