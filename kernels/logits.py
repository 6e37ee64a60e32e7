"""Logits: the output of a linear head, computed when somebody looks at it. A loss need not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils._pytree import tree_flatten, tree_map_only

from lasp.kernels.head import Step, label_log_probs
from lasp.kernels.precision import compute_dtype, exact, product_dtype

# What is done to each number by itself, and what a tensor tells of itself without its numbers. requires_grad is False
# among these: DDP and FSDP2 hook on what does, and so would compute it.
_STEPS = {"mul", "div", "tanh", "to", "float", "double", "bfloat16", "half", "contiguous"}
_FACTS = {getattr(Tensor, name) for name in ("size", "dim", "numel", "is_floating_point", "__len__")} | {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_nested", "is_cuda", "grad_fn")
}


class Logits(Tensor):
    """head(hidden), [..., V]: a tensor like any other, differentiable, whose numbers are computed at their first use.

    Casts, scales and softcaps are no use yet: they are remembered, and `log_probs` of labels makes no [..., V] at all.
    """

    _head: nn.Linear
    _hidden: Tensor
    _product: torch.dtype
    _steps: tuple[Step, ...]
    _recorded: bool
    _numbers: Tensor | None

    @classmethod
    def of(cls, head: nn.Linear, hidden: Tensor) -> Logits:
        """What the head makes now, autocast included. The head's weight is read when it is needed."""
        return cls._made(head, hidden, product_dtype(hidden), ())

    @classmethod
    def _made(cls, head: nn.Linear, hidden: Tensor, product: torch.dtype, steps: tuple[Step, ...]) -> Logits:
        sample = torch.empty(0, dtype=product, device=hidden.device)
        for step in steps:
            sample = step(sample)
        shape = (*hidden.shape[:-1], head.out_features)
        made: Logits = Tensor._make_wrapper_subclass(cls, shape, dtype=sample.dtype, device=sample.device)
        made._head, made._hidden, made._product, made._steps = head, hidden, product, steps
        made._recorded, made._numbers = torch.is_grad_enabled(), None
        return made

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

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Read late: a library that shards parameters gathers them at this."""
        weight = self._head.weight
        if hasattr(weight, "placements") or not weight.untyped_storage().size():
            raise ValueError(
                "the logits are computed where they are used, and the head's weight is sharded there: shard it together"
                ' with the model, as lasp.data_parallel(model, group, "fsdp2") does, and use them before the backward'
            )
        return weight, self._head.bias

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        self = args[0] if args and len(tensors) == 1 and isinstance(args[0], Logits) else None
        if self is not None and self._numbers is None and getattr(func, "__name__", None) in _STEPS:
            steps = (*self._steps, lambda x: func(x, *args[1:], **kwargs))
            return cls._made(self._head, self._hidden, self._product, steps)
        args, kwargs = tree_map_only(Logits, Logits.numbers, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was called on logits that are not computed, behind __torch_function__")


def log_probs_of(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """`label_log_probs` [...] where the logits [..., V] are there."""
    logits = logits.to(compute_dtype(logits))
    rows = cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return -rows.view(labels.shape)
