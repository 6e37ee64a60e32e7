"""What `fla.ops` takes and returns, token by token in PyTorch: in its place where no GPU is."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lasp.kernels import reference

Results = tuple[Tensor, Tensor | None]


def chunk_simple_gla(q, k, v, g=None, g_gamma=None, scale=None, **states: Any) -> Results:
    assert g_gamma is None
    assert g is None or g.shape == q.shape[:3]
    return _sequences(reference.linear_attention, (q, k, v, g), scale, **states)


def chunk_gla(q, k, v, g, scale=None, **states: Any) -> Results:
    assert q.shape == k.shape == g.shape
    return _sequences(reference.linear_attention, (q, k, v, g), scale, **states)


def chunk_delta_rule(q, k, v, beta, scale=None, **states: Any) -> Results:
    assert q.dtype != torch.float32
    return _sequences(reference.delta_rule, (q, k, v, beta), scale, **states)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, **states: Any) -> Results:
    assert g.shape == v.shape[:3]
    return _sequences(reference.delta_rule, (q, k, v, beta, g), scale, **states)


def chunk_kda(q, k, v, g, beta, scale=None, **states: Any) -> Results:
    assert g.shape == k.shape
    return _sequences(reference.delta_rule, (q, k, v, beta, g), scale, **states)


def _sequences(
    run: Any,
    inputs: tuple[Tensor | None, ...],
    scale: float | None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Results:
    """Sequences one behind the other, of heads that are all alike."""
    assert cu_seqlens is not None
    assert cu_seqlens.dtype == torch.int64
    assert initial_state is None or initial_state.dtype == torch.float32
    assert len({x.shape[:3] for x in inputs if x is not None}) == 1
    assert inputs[0] is not None
    assert inputs[0].shape[0] == 1
    exact = [x if x is None else x.float() for x in inputs]
    output, final = run(*exact, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    return output.to(inputs[0].dtype), final if output_final_state else None


@contextmanager
def in_place_of_fla() -> Iterator[None]:
    """Let `backend="fla"` find these."""
    package, ops = ModuleType("fla"), sys.modules[__name__]
    package.ops, package.__spec__ = ops, importlib.machinery.ModuleSpec("fla", None)  # type: ignore[attr-defined]
    names = ("fla", "fla.ops", "lasp.kernels.fla")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules |= {"fla": package, "fla.ops": ops}
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)
