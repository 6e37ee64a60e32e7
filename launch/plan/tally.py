"""Tally: memory and work of whatever runs inside it, told apart by what it is for. Tensors need not have values."""

from __future__ import annotations

import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
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
_MAPPED = 32 << 20  # bytes of a tensor that glibc has mapped anew each time (mallopt(3), M_MMAP_THRESHOLD)

Where = tuple[str, str]  # a place in the model, and a direction


@dataclass(frozen=True)
class Effort:
    """flops: of matrix products; half: those of them whose operands are 16 bits wide; bytes: that all else reads and
    writes; calls: how many there are of both; fresh: bytes of what is made in tensors so large that a CPU's allocator
    has them from the system each time."""

    flops: float = 0.0
    half: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0
    fresh: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        return Effort(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass
class Tally(TorchDispatchMode):
    """moments: what was held after each operation, by item. effort: by place and direction, backward by the place
    whose forward pass made the node, or, of a pass within a pass, whose backward did."""

    moments: list[tuple[Kind, Items]] = field(default_factory=list)
    effort: dict[Where, Effort] = field(default_factory=lambda: defaultdict(Effort))
    made: dict[Where, list[int]] = field(default_factory=lambda: defaultdict(list))  # bytes of each new tensor
    mixing: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # flops of mixers, forward, by kind
    softmax: set[str] = field(default_factory=set)  # the kinds that are softmax attention

    def __post_init__(self) -> None:
        super().__init__()
        self._live: Items = defaultdict(int)
        self._items: dict[int, tuple[str, int]] = {}  # of storages, by their ids
        self._places = ["rest"]
        self._makers: dict[int, str] = {}  # places, by the sequence numbers of the nodes that they made
        self._made = torch.autograd._get_sequence_nr()  # the number of the next one, when an operation was last seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - begun
        node, place, direction = torch._C._current_autograd_node(), self._places[-1], "forward"
        if node is not None and place == "rest":
            place, direction = self._makers.get(node._sequence_nr(), place), "backward"
        elif node is not None:
            direction = "again"
        if node is not None:  # a recurrence that is computed again makes nodes of its own, within one of its place
            self._name_nodes(self._made, place)
        self._made = torch.autograd._get_sequence_nr()
        item = node.name() if direction == "backward" else place
        sizes = []
        for tensor in _tensors(result):
            sizes.append(self._hold(tensor, item))  # no comprehension, which is a frame that `_asked_by` counts
        self.made[place, direction] += sizes
        effort = replace(effort_of(func, args, kwargs or {}, result), fresh=mapped(sizes))
        self.effort[place, direction] += effort
        self._timed((place, direction), func, effort, seconds)
        self._look(f"{direction} {item}", str(func))
        return result

    def _timed(self, where: Where, operation: Any, effort: Effort, seconds: float) -> None:
        """What an operation took: nothing that a plan can use where tensors have no values."""

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
        self._counts.append((counted, found, torch.autograd._get_sequence_nr()))

    def _leave(self, *_: Any) -> None:
        counted, found, begun = self._counts.pop()
        counted.close()
        place = self._places.pop()
        self._name_nodes(begun, place)
        self.mixing[place] += found.flops
        if found.attention:
            self.softmax.add(place)

    def _name_nodes(self, begun: int, place: str) -> None:
        """From one on, those that have no name: what is within another has named its own."""
        for number in range(begun, torch.autograd._get_sequence_nr()):
            self._makers.setdefault(number, place)

    @property
    def _counts(self) -> list[tuple[ExitStack, Work, int]]:
        return self.__dict__.setdefault("_open_counts", [])

    def _hold(self, tensor: Tensor, place: str) -> int:
        """Bytes of it, if they are new."""
        storage = tensor.untyped_storage()
        if id(storage) in self._items or tensor.device.type == "meta":  # which is a shape, and has no memory
            return 0
        item, size = _asked_by() or place, storage.nbytes()
        self._items[id(storage)] = item, size
        self._live[item] += size
        weakref.finalize(storage, self._release, id(storage))
        return size

    def _release(self, key: int) -> None:
        item, size = self._items.pop(key, ("", 0))
        self._live[item] -= size

    def _look(self, place: str, operation: str) -> None:
        held = {item: size for item, size in self._live.items() if size and item}
        self.moments.append(((place, operation), held))


def effort_of(func: Any, args: Any, kwargs: Any, result: Any) -> Effort:
    """What an operation takes: a matrix product its flops, everything else but views its passes over memory."""
    packet = _out_of_place(func._overloadpacket)
    count = None if "convolution" in packet.__name__ else flop_registry.get(packet)  # of few taps, those are passes
    if count is not None:
        flops = float(count(*args, **kwargs, out_val=result))
        return Effort(flops, flops if _tensors(args)[0].itemsize == 2 else 0.0, calls=1)
    outputs = _tensors(result) or _written(func, args)
    if _is_view(func) or not outputs:  # tensors without values are asked for their device before each operation
        return Effort()
    return Effort(bytes=float(sum(t.numel() * t.itemsize for t in (*_tensors(args), *outputs))), calls=1)


def mapped(sizes: Iterable[float]) -> float:
    """Bytes of those tensors that are mapped anew each time."""
    return float(sum(size for size in sizes if size >= _MAPPED))


def _is_view(func: Any) -> bool:
    """Whether what it returns is what it was given, in another shape."""
    told = [own.alias_info for own in func._schema.returns]
    return func._overloadpacket.__name__ == "_unsafe_view" or any(a is not None and not a.is_write for a in told)


def _out_of_place(packet: Any) -> Any:
    """`addmm` for `addmm_`: the registry of operations counts the former alone."""
    return getattr(torch.ops.aten, packet.__name__.removesuffix("_"), packet)


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
