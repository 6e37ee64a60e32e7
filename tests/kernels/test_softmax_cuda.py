"""The adapters to attention on GPUs, on stand-ins for the operators: what they give them, and make of what returns."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lasp.kernels import backend
from lasp.kernels.softmax import cuda
from lasp.kernels.softmax.cuda import CudaEfficient, CudaFlash, CudnnFlash, FlashPackage
from lasp.kernels.softmax.operators import Operator, Plain, Scores

ROWS, HEADS = 37, 4


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """What the operators of PyTorch are given, as ours are: dense rows that begin where loads do, and as many heads."""
    for x in tensors:
        assert x.shape[1] == HEADS
        assert x.stride(-1) == 1
        assert all(n % 8 == 0 for n in x.stride()[:-1])
    return [x.transpose(1, 2) for x in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = Plain().forward(q, k, v, Scores(scale, causal))
    return output.transpose(1, 2), lse.transpose(1, 2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Any:
    found = Plain().backward(grad, q, k, v, out, lse.transpose(1, 2), Scores(scale, causal))
    return tuple(x.transpose(1, 2) for x in found)


def flash(q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, scale: float) -> Any:
    return *forward(*(x.transpose(1, 2) for x in (q, k, v)), causal, scale), None


def flash_backward(grad, q, k, v, out, lse, first, second, rows, keys, dropout, causal, seed, offset, *, scale) -> Any:
    assert (rows, keys) == (q.shape[2], k.shape[2])
    return backward(*(x.transpose(1, 2) for x in (grad, q, k, v, out)), lse, causal, scale)


def cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: None, sums: bool, dropout: float, causal: bool, *, scale: float
) -> Any:
    output, lse = forward(*heads_first(q, k, v), causal, scale)
    return output, lse.unsqueeze(-1), *[None] * 7


def cudnn_backward(
    grad, q, k, v, out, lse, seed, offset, bias, first, second, rows, keys, dropout, causal, *, scale
) -> Any:
    assert (lse.shape, rows, keys) == ((q.shape[0], HEADS, ROWS, 1), q.shape[2], k.shape[2])
    return backward(*heads_first(grad, q, k, v, out), lse.squeeze(-1), causal, scale)


def efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: None, sums: bool, dropout: float, causal: bool, *, scale: float
) -> Any:
    output, lse = forward(*heads_first(q, k, v), causal, scale)
    return output, torch.nn.functional.pad(lse, (0, 64 - ROWS), value=torch.nan), None, None


def efficient_backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale) -> Any:
    assert wanted == [True, True, True, False]
    assert lse.shape == (q.shape[0], HEADS, 64)
    assert lse[..., ROWS:].isposinf().all()
    return *backward(*heads_first(grad, q, k, v, out), lse[..., :ROWS], causal, scale), None


def package_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
) -> Any:
    assert (dropout_p, window_size_left, window_size_right, alibi_slopes, return_softmax) == (0.0, -1, -1, None, False)
    output, lse = Plain(softcap or None).forward(q, k, v, Scores(softmax_scale, causal))
    return output, lse.transpose(1, 2), None, None


def package_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
) -> Any:  # fmt: skip
    assert softmax_lse.shape == (q.shape[0], HEADS, ROWS)
    assert softmax_lse.is_contiguous()
    scores = Scores(softmax_scale, causal)
    found = Plain(softcap or None).backward(dout, q, k, v, out, softmax_lse.transpose(1, 2), scores)
    for total, own in zip((dq, dk, dv), found, strict=True):
        total.copy_(own)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "flash": (flash, flash_backward),
        "cudnn": (cudnn, cudnn_backward),
        "efficient": (efficient, efficient_backward),
    }
    named = {
        f"_scaled_dot_product_{name}_attention{way}": function
        for name, functions in given.items()
        for way, function in zip(("", "_backward"), functions, strict=True)
    }
    monkeypatch.setattr(cuda, "aten", SimpleNamespace(**named))
    package: Any = ModuleType("flash_attn.flash_attn_interface")
    package._flash_attn_forward, package._flash_attn_backward = package_forward, package_backward
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", package)


@pytest.mark.parametrize(
    ("operator", "heads", "value_dim"),
    [(CudaFlash(), 4, 16), (CudnnFlash(), 2, 16), (CudaEfficient(), 2, 24), (FlashPackage(), 2, 16),
     (FlashPackage(3.0), 2, 16)],
    ids=["flash", "cudnn", "efficient", "package", "package with softcap"],
)  # fmt: skip
@pytest.mark.parametrize("causal", [True, False])
def test_an_adapter_is_attention(stand_ins: None, operator: Operator, heads: int, value_dim: int, causal: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    # Views of a cache, whose rows do not begin where loads do.
    q, k, v, grad = (
        torch.randn(2, ROWS, count, dim + 3, generator=rng)[..., 1 : dim + 1]
        for count, dim in ((HEADS, 16), (heads, 16), (heads, value_dim), (HEADS, value_dim))
    )
    scores, plain = Scores(0.3, causal), Plain(getattr(operator, "softcap", None))
    output, lse = operator.forward(q, k, v, scores)
    wanted = plain.forward(q, k, v, scores)
    torch.testing.assert_close((output, lse), wanted)
    # Of a whole attention, of which these keys are a part.
    found = operator.backward(grad, q, k, v, output, lse + 0.5, scores)
    torch.testing.assert_close(found, plain.backward(grad, q, k, v, output, lse + 0.5, scores))


def test_which_operator_a_card_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()
    capability = [(8, 0)]
    monkeypatch.setattr(backend, "has_package", installed.__contains__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])

    def chosen(
        key: int = 64, value: int = 64, dtype: torch.dtype = torch.bfloat16, masked: bool = False, softcap: Any = None
    ) -> type:
        k, v = (
            SimpleNamespace(shape=(1, 9, 2, dim), dtype=dtype, is_cuda=True, device=torch.device("cuda"))
            for dim in (key, value)
        )
        return type(backend.softmax_operator(k, v, masked, softcap))  # type: ignore[arg-type]

    assert chosen() == chosen(256, 256) == CudaFlash
    assert chosen(64, 128) == chosen(dtype=torch.float32) == CudaEfficient
    for plain in ({"masked": True}, {"softcap": 30.0}, {"key": 60}, {"value": 512}, {"dtype": torch.float64}):
        assert chosen(**plain) == Plain
    capability[0] = (9, 0)
    assert chosen() == CudnnFlash
    assert chosen(256, 256) == CudaFlash
    installed.add("flash_attn")
    assert chosen() == chosen(softcap=30.0) == FlashPackage
    assert chosen(dtype=torch.float32) == CudaEfficient
