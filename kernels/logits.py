"""Logits: the output of a linear head, computed when somebody looks at it. A loss need not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._pytree import tree_flatten, tree_map_only

from lasp.kernels.head import Step, label_log_probs
from lasp.kernels.precision import compute_dtype, exact, product_dtype

# What is done to each number by itself, and what a tensor tells of itself without its numbers.
_STEPS = {"mul", "div", "tanh", "to", "float", "double", "bfloat16", "half", "contiguous"}
_FACTS = {"shape", "dtype", "layout", "ndim", "dim", "size", "numel", "is_floating_point", "is_nested"}
_OPERATORS = (
    "add", "radd", "sub", "rsub", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul",
    "rmatmul", "neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "contains", "iter",
    "repr", "format", "bool", "int", "float", "array",
)  # fmt: skip


class Logits:
    """head(hidden), [..., V]: as good as a tensor, differentiable, whose numbers are computed at their first use.

    Casts, scales and softcaps are no use yet: they are remembered, and `log_probs` of labels makes no [..., V] at all.
    It is no Tensor by class, so that libraries that hook on a module's outputs (DDP, FSDP2, DeepSpeed) let it be.
    """

    def __init__(self, head: nn.Linear, hidden: Tensor, product: torch.dtype, steps: tuple[Step, ...] = ()) -> None:
        sample = torch.empty(0, dtype=product, device=hidden.device)
        for step in steps:
            sample = step(sample)
        self.device = sample.device
        self._form = torch.empty(*hidden.shape[:-1], head.out_features, dtype=sample.dtype, device="meta")
        self._head, self._hidden, self._product, self._steps = head, hidden, product, steps
        self._recorded = torch.is_grad_enabled()
        self._numbers: Tensor | None = None

    @classmethod
    def of(cls, head: nn.Linear, hidden: Tensor) -> Logits:
        """What the head makes now, autocast included. The head's weight is read when it is needed."""
        return cls(head, hidden, product_dtype(hidden))

    def numbers(self) -> Tensor:
        """The logits as an ordinary tensor, the same one at every call."""
        if self._numbers is None:
            weight, bias = self._parameters()
            with exact(self._hidden), torch.set_grad_enabled(self._recorded):
                found = linear(
                    self._hidden.to(self._product),
                    weight.to(self._product),
                    None if bias is None else bias.to(self._product),
                )
                for step in self._steps:
                    found = step(found)
            self._numbers = found
        return self._numbers

    def log_probs(self, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """`label_log_probs` [...] of labels [...]; of the numbers, where there are some, for they may be others now."""
        if self._numbers is not None:
            return log_probs_of(self._numbers, labels, ignore_index)
        weight, bias = self._parameters()
        return label_log_probs(self._hidden, weight, bias, labels, ignore_index, self._product, self._steps)

    @property
    def requires_grad(self) -> bool:
        return self._recorded and (self._hidden.requires_grad or self._head.weight.requires_grad)

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Read late: a library that shards parameters gathers them at this."""
        weight = self._head.weight
        if hasattr(weight, "placements") or not weight.untyped_storage().size():
            raise ValueError(
                "the logits are computed where they are used, and the head's weight is sharded there: shard it together"
                ' with the model, as lasp.data_parallel(model, group, "fsdp2") does, and use them before the backward'
            )
        return weight, self._head.bias

    def _then(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of tensors that treats each number by itself."""
        others = any(isinstance(x, Tensor | Logits) for x in tree_flatten((args, kwargs))[0])
        if others or self._numbers is not None:
            return getattr(self.numbers(), name)(*_numbers(args), **_numbers(kwargs))
        steps = (*self._steps, lambda x: getattr(x, name)(*args, **kwargs))
        return Logits(self._head, self._hidden, self._product, steps)

    def __mul__(self, other: Any) -> Any:
        return self._then("mul", other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._then("div", other)

    def __len__(self) -> int:
        return len(self._form)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and not name.startswith("__"):
            raise AttributeError(name)
        if name in _FACTS:
            return getattr(self._form, name)
        if name in _STEPS:
            return lambda *args, **kwargs: self._then(name, *args, **kwargs)
        return getattr(self.numbers(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _STEPS and args and isinstance(args[0], Logits):
            return args[0]._then(name, *args[1:], **(kwargs or {}))
        return func(*_numbers(args), **_numbers(kwargs or {}))


def _numbers(arguments: Any) -> Any:
    return tree_map_only(Logits, Logits.numbers, arguments)


def _operator(name: str) -> Callable[..., Any]:
    def call(self: Logits, *args: Any) -> Any:
        return getattr(self.numbers(), name)(*_numbers(args))

    return call


for _name in _OPERATORS:  # which Python looks for in the class
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))


def log_probs_of(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """`label_log_probs` [...] where the logits [..., V] are there."""
    logits = logits.to(compute_dtype(logits))
    rows = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return -rows.view(labels.shape)
