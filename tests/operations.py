"""Shared by the tests: every public operation as one line of a table, with its specification, and layouts of tensors.

A case is an operation, a layout in memory of all its inputs and incoming gradients, and a dtype. `solve` runs it on the
ranks of a group or on one device, `specify` token by token in fp64 on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import lookup_backend

import lasp
from lasp import functional
from lasp.kernels import reference

B, T, H, K, V, N = 2, 24, 2, 8, 6, 3  # N: steps to a token, width of a convolution, memories
HIDDEN = {torch.int64: -7, torch.bool: True}  # what no operation may read

# Layouts ------------------------------------------------------------------------------------------------------------


def is_continuous(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _filled(shape: Sequence[int], like: Tensor) -> Tensor:
    value = float("nan") if is_continuous(like) else HIDDEN[like.dtype]
    return torch.full(tuple(shape), value, dtype=like.dtype)


def _permuted(x: Tensor, order: Sequence[int]) -> Tensor:
    """x, its dims in memory in another order, from the slowest to the fastest."""
    inverse = sorted(range(x.dim()), key=lambda dim: order[dim])
    return x.permute(*order).contiguous().permute(*inverse)


def _sliced(x: Tensor) -> Tensor:
    """Every other element of every dim of a larger tensor."""
    large = _filled([2 * n for n in x.shape], x)
    part = large[(slice(None, None, 2),) * x.dim()]
    part.copy_(x)
    return part


def _offset(x: Tensor) -> Tensor:
    """The middle of a larger tensor: as `large[:, -n - 1 : -1]` in every dim."""
    large = _filled([n + 3 for n in x.shape], x)
    part = large[tuple(slice(-n - 1, -1) for n in x.shape)]
    part.copy_(x)
    return part


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: _permuted(x, [*range(x.dim() - 2), *reversed(range(max(x.dim() - 2, 0), x.dim()))]),
    "permuted": lambda x: _permuted(x, [*reversed(range(x.dim()))]),
    # The heads, of what has some: attention over values that are all alike has gradients of nothing but rounding.
    "expanded": lambda x: x.narrow(-2 if x.dim() > 3 else min(x.dim() - 1, 1), 0, 1).expand(x.shape),
    "broadcast": lambda x: x[..., :1].expand(x.shape),
    "sliced": _sliced,
    "offset": _offset,
}
"""Tensors like a given one, of its shape and in another layout; where memory is shared (stride 0), of other values."""

# Operations ---------------------------------------------------------------------------------------------------------

# fp32 beside half precision
_FULL = ("log_decay", "beta", "initial_state", "sinks", "window_factor", "rates", "step", "recurrent")
_RANGES: dict[str, Callable[[Tensor], Tensor]] = {  # of uniform values in [0, 1)
    "k": lambda x: (2 * x - 1) * x.shape[-1] ** -0.5,  # never longer than 1, in whatever layout
    "log_decay": lambda x: -x,
    "beta": lambda x: 2 * x,
    "erase": lambda x: x * x.shape[-1] ** -0.5,
    "read": lambda x: (2 * x - 1) * x.shape[-1] ** -0.5,
    "step": lambda x: 2 * x,
    "rates": lambda x: -2 * x,
    "recurrent": lambda x: x - 0.5,
    "memories": lambda x: x.argsort(-1)[..., :1],
    "phi_q": lambda x: x,
    "phi_k": lambda x: x,
    "window_factor": lambda x: x + 0.1,
    "labels": lambda x: (V * x).long(),
    "key_mask": lambda x: x > 0.3,
}


@dataclass(frozen=True)
class Operation:
    """run(group=..., **inputs) and specification(**inputs) return an output, or several.

    shapes: of the inputs, over the whole sequence; whole: those that are not cut over ranks; complex: those that are.
    outputs: of each whether it is "cut", "whole" (the same on every rank) or a "loss" (likewise, with the gradient of
    the rank's own tokens).
    """

    run: Callable[..., Any]
    specification: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    whole: tuple[str, ...] = ()
    complex: tuple[str, ...] = ()
    differentiable: bool = True
    outputs: tuple[str, ...] = ("cut",)


_TOKENS = {"q": (B, T, H, K), "k": (B, T, H, K), "v": (B, T, H, V)}
_STEPS = {"q": (B, T, H, K), "k": (B, T, N, H, K), "v": (B, T, N, H, V), "beta": (B, T, N, H)}
_STATE = {"initial_state": (B, H, K, V)}
_OF_MEMORIES = {"k": (B, T, 1, H, K), "v": (B, T, 1, H, V), "beta": (B, T, 1, H), "log_decay": (B, T, 1, H)}
_RECURRENCE: dict[str, Any] = {"whole": ("initial_state",), "outputs": ("cut", "whole")}


def _steps_by_hand(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, **state: Tensor) -> Any:
    """`delta_product` as a delta rule over n rows to a token: the first of them decays, the last is read."""
    q = F.pad(q.unsqueeze(2), (0, 0, 0, 0, N - 1, 0)).flatten(1, 2)
    log_decay = F.pad(log_decay.unsqueeze(2), (0, 0, 0, N - 1)).flatten(1, 2)
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    output, final = reference.delta_rule(q, k, v, beta, log_decay, **state)
    return output[:, N - 1 :: N], final


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


OPERATIONS: dict[str, Operation] = {
    "linear_attention": Operation(
        partial(lasp.linear_attention, output_final_state=True, chunk_size=8),
        reference.linear_attention,
        _TOKENS | {"log_decay": (B, T, H, K)} | _STATE,
        **_RECURRENCE,
    ),
    "linear_attention per head": Operation(
        partial(lasp.linear_attention, output_final_state=True, chunk_size=8),
        reference.linear_attention,
        _TOKENS | {"log_decay": (H,)} | _STATE,
        whole=("initial_state", "log_decay"),
        outputs=("cut", "whole"),
    ),
    "linear_attention unmasked": Operation(
        partial(lasp.linear_attention, causal=False, output_final_state=True, chunk_size=8),
        partial(reference.linear_attention, causal=False),
        _TOKENS | _STATE,
        **_RECURRENCE,
    ),
    "delta_rule": Operation(
        partial(lasp.delta_rule, output_final_state=True, chunk_size=8),
        reference.delta_rule,
        _TOKENS | {"beta": (B, T, H), "log_decay": (B, T, H)} | _STATE,
        **_RECURRENCE,
    ),
    "delta_product": Operation(
        partial(functional.delta_product, output_final_state=True, chunk_size=8),
        _steps_by_hand,
        _STEPS | {"log_decay": (B, T, H)} | _STATE,
        **_RECURRENCE,
    ),
    "dplr_delta_rule": Operation(
        partial(functional.dplr_delta_rule, output_final_state=True, chunk_size=8),
        reference.dplr_delta_rule,
        _TOKENS | dict.fromkeys(("read", "erase", "log_decay"), (B, T, H, K)) | _STATE,
        **_RECURRENCE,
    ),
    "routed_delta_rule": Operation(
        partial(functional.routed_delta_rule, num_memories=N, output_final_state=True, chunk_size=8),
        partial(reference.routed_delta_rule, num_memories=N),
        {"q": (B, T, H, K), **_OF_MEMORIES, "memories": (B, T, N), "initial_state": (B, N * H, K, V)},
        **_RECURRENCE,
    ),
    "selective_scan": Operation(
        partial(functional.selective_scan, output_final_state=True, chunk_size=8),
        reference.selective_scan,
        {"u": (B, T, K), "step": (B, T, K), "key": (B, T, N), "query": (B, T, N)}
        | {"rates": (K, N), "initial_state": (B, K, N)},
        whole=("rates", "initial_state"),
        outputs=("cut", "whole"),
    ),
    "diagonal_state_space": Operation(
        partial(functional.diagonal_state_space, output_final_state=True, chunk_size=8),
        reference.diagonal_state_space,
        {"u": (B, T, K), "rates": (K, N), "weights": (K, N), "initial_state": (B, K, N)},
        whole=("rates", "weights", "initial_state"),
        complex=("rates", "weights", "initial_state"),
        outputs=("cut", "whole"),
    ),
    "slstm": Operation(
        partial(functional.slstm, output_final_state=True, chunk_size=8),
        reference.slstm,
        {"gates": (B, T, 4, H, V), "recurrent": (4, H, V, V), "initial_state": (B, H, V, 4)},
        whole=("recurrent", "initial_state"),
        outputs=("cut", "whole"),
    ),
    "running_maximum": Operation(
        partial(functional.running_maximum, output_final_state=True),
        reference.running_maximum,
        {"x": (B, T, H), "log_decay": (B, T, H), "initial_state": (B, H)},
        whole=("initial_state",),
        differentiable=False,
        outputs=("cut", "cut", "whole"),
    ),
    "softmax_attention": Operation(lasp.softmax_attention, reference.softmax_attention, _TOKENS | {"v": (B, T, H, K)}),
    "softmax_attention masked": Operation(
        partial(lasp.softmax_attention, window=9),
        partial(reference.softmax_attention, window=9),
        _TOKENS | {"sinks": (H,), "key_mask": (B, T)},
        whole=("sinks",),
    ),
    "softmax_attention capped": Operation(
        partial(lasp.softmax_attention, softcap=2.0, causal=False),
        partial(reference.softmax_attention, softcap=2.0, causal=False),
        _TOKENS,
    ),
    "hybrid_attention": Operation(
        partial(lasp.hybrid_attention, window=5),
        partial(reference.hybrid_attention, window=5),
        _TOKENS | {"phi_q": (B, T, H, N), "phi_k": (B, T, H, N), "window_factor": (H,), "key_mask": (B, T)},
        whole=("window_factor",),
    ),
    "causal_conv1d": Operation(
        partial(lasp.causal_conv1d, activation="silu", output_final_state=True),
        partial(reference.causal_conv1d, activation="silu"),
        {"x": (B, T, K), "weight": (K, N), "bias": (K,), "initial_state": (B, K, N - 1)},
        whole=("weight", "bias", "initial_state"),
        outputs=("cut", "whole"),
    ),
    "logcumsumexp": Operation(
        partial(functional.logcumsumexp, output_final_state=True),
        reference.logcumsumexp,
        {"x": (B, T, H, K), "initial_state": (B, H, K)},
        whole=("initial_state",),
        outputs=("cut", "whole"),
    ),
    "cross_entropy": Operation(
        lasp.cross_entropy, _cross_entropy, {"logits": (B, T, V), "labels": (B, T)}, outputs=("loss",)
    ),
    "linear_cross_entropy": Operation(
        lasp.linear_cross_entropy,
        lambda hidden, weight, labels, bias: _cross_entropy(F.linear(hidden, weight, bias), labels),
        {"hidden": (B, T, K), "weight": (V, K), "labels": (B, T), "bias": (V,)},
        whole=("weight", "bias"),
        outputs=("loss",),
    ),
    "token_log_probs": Operation(
        lasp.token_log_probs,
        lambda hidden, weight, labels: F.linear(hidden, weight).log_softmax(-1).gather(-1, labels[..., None])[..., 0],
        {"hidden": (B, T, K), "weight": (V, K), "labels": (B, T)},
        whole=("weight",),
    ),
    "shard": Operation(lasp.shard, lambda x: x, {"x": (B, T, K)}, whole=("x",)),
    "unshard": Operation(lasp.unshard, lambda x: x, {"x": (B, T, K)}, outputs=("whole",)),
}


# Cases --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One operation on inputs and incoming gradients of one layout and dtype, with the sequence cut over `ranks`."""

    operation: str
    layout: str
    dtype: torch.dtype = torch.float64
    ranks: int = 1

    @property
    def table(self) -> Operation:
        return OPERATIONS[self.operation]

    def sum_up(self, found: dict[str, Tensor], add: Callable[[Tensor], Any]) -> None:
        """Let `add` put the ranks' parts of the gradients of what is not cut together, in place."""
        for name in self.table.whole if self.table.differentiable else ():
            part = found[f"d{name}"]
            found[f"d{name}"] = part.to(torch.promote_types(part.dtype, torch.float64), copy=True).contiguous()
            add(found[f"d{name}"])

    def inputs(self, rank: int | None) -> dict[str, Tensor]:
        """Those of one rank, or (None) of the whole sequence, contiguous and in fp64."""
        rng = torch.Generator().manual_seed(0)
        found = {}
        for name, shape in self.table.shapes.items():
            uniform = torch.rand(shape, generator=rng, dtype=torch.float64)
            values = _RANGES.get(name, lambda x: 4 * x - 2)(uniform)
            full = torch.float64 if self.dtype == torch.float64 else torch.float32
            if name in self.table.complex:
                values = torch.complex(-uniform, 9 * uniform.square()).to(full.to_complex())
            elif values.is_floating_point():
                values = values.to(full if name in _FULL else self.dtype)
            found[name] = self._part(values, name not in self.table.whole, rank)
        return found

    def gradients(self, outputs: Sequence[Tensor], rank: int | None) -> list[Tensor]:
        """Those of the outputs, likewise; values that every dtype holds."""
        rng = torch.Generator().manual_seed(1)
        found = []
        for x, kind in zip(outputs, self.table.outputs, strict=True):
            cut = kind == "cut"
            shape = (x.shape[0], T, *x.shape[2:]) if cut else x.shape
            values = torch.randint(-16, 17, shape, generator=rng).to(x.dtype) / 16
            # What is the same on every rank gets the sum of the ranks' gradients.
            found.append(self._part(values / self.ranks if kind == "whole" and rank is not None else values, cut, rank))
        return found

    def _part(self, values: Tensor, cut: bool, rank: int | None) -> Tensor:
        arrange = LAYOUTS[self.layout] if values.dim() else torch.clone
        parts = [arrange(part) for part in (values.chunk(self.ranks, 1) if cut else [values] * self.ranks)]
        if rank is not None:
            return parts[rank]
        whole = torch.cat(parts, 1) if cut else parts[0].contiguous()
        return whole.to(torch.promote_types(whole.dtype, torch.float64)) if is_continuous(whole) else whole

    def solve(self, run: Callable[..., Any] | None = None, rank: int = 0, group: Any = None) -> dict[str, Tensor]:
        """One rank's outputs and gradients of the operation, or of `run` in its place."""
        return self._solve(partial(run or self.table.run, group=group), rank)

    def specify(self, rank: int = 0) -> dict[str, Tensor]:
        """What they must be; of an input that is not cut the ranks' gradients in sum."""
        found = self._solve(self.table.specification, None)
        cut = [f"output {i}" for i, kind in enumerate(self.table.outputs) if kind == "cut"]
        cut += [f"d{name}" for name in self.table.shapes if name not in self.table.whole]
        return {name: x.chunk(self.ranks, 1)[rank] if name in cut else x for name, x in found.items()}

    def _solve(self, run: Callable[..., Any], rank: int | None) -> dict[str, Tensor]:
        inputs = {name: x.detach() for name, x in self.inputs(rank).items()}
        floats = {n: x.requires_grad_() for n, x in inputs.items() if is_continuous(x) and self.table.differentiable}
        outputs = run(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = floats and torch.autograd.grad(outputs, list(floats.values()), self.gradients(outputs, rank))
        found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
        return found | {f"d{name}": grad for name, grad in zip(floats, grads, strict=True)}


LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest errors, relative to a result's largest entry."""


NAMED = ("contiguous", "transposed", "expanded", "sliced", "offset")
"""Layouts that are compiled too: each is traced anew, which takes seconds."""

BACKENDS = ("aot_eager", "inductor")


class Compiled:
    """A function that Dynamo traces once for all backends; `backend` is whose code runs."""

    def __init__(self, run: Callable[..., Any]) -> None:
        def call(**arguments: Any) -> Any:
            return run(**arguments)

        self.backend = BACKENDS[0]
        self.run = torch.compile(call, backend=self._compile)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled = {name: lookup_backend(name)(deepcopy(graph), inputs) for name in BACKENDS}
        return lambda *arguments: compiled[self.backend](*arguments)


def in_all_modes(case: Case, compiled: Compiled, **where: Any) -> dict[str, dict[str, Tensor]]:
    """What a case gives as it is and, in a layout that is compiled, by each backend; where: rank and group."""
    found = {"eager": case.solve(**where)}
    for compiled.backend in BACKENDS if case.layout in NAMED else ():
        found[compiled.backend] = case.solve(compiled.run, **where)
    return found
