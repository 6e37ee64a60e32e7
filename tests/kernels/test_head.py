"""Log-probabilities tile by tile, against the logits as a whole: values, every gradient, and what is in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lasp
from lasp.kernels import head
from lasp.kernels.logits import Logits

VOCABULARY, DIM, TOKENS = 37, 8, 22
CAP = (lambda z: z / 3, torch.tanh, lambda z: z * 3)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No multiple of a tile fits."""
    monkeypatch.setattr(head, "TOKENS", 5)
    monkeypatch.setattr(head, "CLASSES", 9)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(2, TOKENS // 2, DIM, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (2, TOKENS // 2))
    labels[0, :6] = -100  # more than a whole block of tokens
    return hidden, nn.Linear(DIM, VOCABULARY, dtype=dtype), labels


def assert_same(found: Tensor, expected: Tensor, trained: list[Tensor], rtol: float = 0, atol: float = 1e-13) -> None:
    weights = torch.linspace(-1, 1, expected.numel(), dtype=expected.dtype).view_as(expected)
    own, plain = ((torch.autograd.grad((x * weights).sum(), trained)) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(own, plain, rtol=rtol, atol=atol)


@pytest.mark.parametrize("steps", [(), CAP, (torch.Tensor.float,)])
@pytest.mark.parametrize("biased", [False, True])
def test_tiles_equal_the_whole(small_tiles: None, steps: Any, biased: bool) -> None:
    hidden, layer, labels = inputs()
    bias = layer.bias if biased else None
    logits = F.linear(hidden, layer.weight, bias)
    for step in steps:
        logits = step(logits)
    expected = -F.cross_entropy(logits.mT, labels, reduction="none")
    found = head.label_log_probs(hidden, layer.weight, bias, labels, steps=steps)
    atol = 1e-13 if logits.dtype == torch.float64 else 1e-5
    assert_same(found.to(expected.dtype), expected, [hidden, *layer.parameters()][: 2 + biased], atol=atol)


def test_a_tied_head_gets_both_gradients(small_tiles: None) -> None:
    _, layer, labels = inputs()
    ids = labels.clamp(min=0)
    found, expected = (
        call(F.embedding(ids, layer.weight).sin(), layer.weight)
        for call in (
            lambda x, w: lasp.linear_cross_entropy(x, w, labels),
            lambda x, w: lasp.cross_entropy(x @ w.T, labels),
        )
    )
    assert_same(found, expected, [layer.weight])


def test_tokens_without_a_label_have_no_part(small_tiles: None) -> None:
    hidden, layer, labels = inputs()
    with torch.no_grad():
        hidden[0, 2] = torch.nan
    assert lasp.linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias).isfinite()
    nothing = torch.full_like(labels, -100)
    assert lasp.linear_cross_entropy(hidden, layer.weight, nothing).isnan()
    assert not lasp.token_log_probs(hidden, layer.weight, nothing).any()


def test_half_precision_is_summed_in_single(small_tiles: None) -> None:
    """bf16 has 8 bits: gradients added up in it over five blocks would be off by more."""
    hidden, layer, labels = inputs(torch.bfloat16)
    found = lasp.linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias)
    trained = [hidden, *layer.parameters()]
    exact = [x.detach().double().requires_grad_() for x in trained]
    expected = lasp.cross_entropy(F.linear(*exact).bfloat16().double(), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    for own, plain in zip(
        torch.autograd.grad(found, trained),
        torch.autograd.grad(lasp.cross_entropy(F.linear(*exact), labels), exact),
        strict=True,
    ):
        assert own.dtype == torch.bfloat16
        torch.testing.assert_close(own.double(), plain, rtol=2**-7, atol=2e-4)


def test_autocast_is_followed(small_tiles: None) -> None:
    hidden, layer, labels = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = lasp.linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias)
        expected = lasp.cross_entropy(layer(hidden), labels)
    torch.testing.assert_close(found, expected)
    for own, plain in zip(*(torch.autograd.grad(x, [hidden, layer.weight]) for x in (found, expected)), strict=True):
        torch.testing.assert_close(own, plain, rtol=2**-6, atol=1e-3)


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.numbers = max(
            [self.numbers, *(x.numel() for x in tree_leaves(found) if isinstance(x, Tensor) and not x.is_meta)]
        )
        return found


@pytest.mark.parametrize("of", ["hidden", "logits"])
def test_no_logits_in_memory(small_tiles: None, of: str) -> None:
    hidden, layer, labels = inputs()
    with Largest() as largest:
        logits = Logits.of(layer, hidden) / 2
        loss = (
            lasp.cross_entropy(logits, labels)
            if of == "logits"
            else lasp.linear_cross_entropy(hidden, layer.weight, labels, bias=layer.bias)
        )
        loss.backward()
    assert largest.numbers == VOCABULARY * DIM < TOKENS * VOCABULARY


def test_logits_are_a_tensor_when_looked_at() -> None:
    hidden, layer, labels = inputs()
    plain = torch.tanh(layer(hidden).float() * 0.5) * 2
    logits = torch.tanh(Logits.of(layer, hidden).float() * 0.5) * 2
    assert (logits.shape, logits.dtype, logits.dim()) == (plain.shape, plain.dtype, 3)
    assert lasp.token_log_probs(logits, None, labels).shape == labels.shape
    assert_same(logits + 0, plain, [hidden, *layer.parameters()], atol=1e-6)
    for use in (lambda x: x == 0.5, lambda x: x != x, lambda x: x % 2, lambda x: 2**x, lambda x: x // 2, lambda x: +x):
        torch.testing.assert_close(use(logits), use(plain), atol=1e-6, rtol=0)
    with torch.no_grad():
        logits[:, :, 3] = 0
        plain[:, :, 3] = 0
    torch.testing.assert_close(lasp.cross_entropy(logits, labels), lasp.cross_entropy(plain, labels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"weight must be \[vocabulary, D\] with D = 4 of hidden, got \[5, 3\]"),
        ({"weight": torch.zeros(5, 4).double()}, "weight must be torch.float32 as hidden, got torch.float64"),
        ({"weight": torch.zeros(5, 4).long()}, "weight must be floating and on the device of hidden"),
        ({"bias": torch.zeros(4)}, r"bias must be \[vocabulary\] = \[5\], got \[4\]"),
        ({"labels": torch.zeros(2, 3).long()}, r"hidden \[1, 3, 4\] needs labels \[1, 3\], got \[2, 3\]"),
        ({"labels": torch.full((1, 3), 5)}, r"labels must lie in 0\.\.4 or be -100, got 5\.\.5"),
        ({"hidden": torch.zeros(1, 3, 4).long()}, "hidden must be floating"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], message: str) -> None:
    given = {"hidden": torch.zeros(1, 3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(1, 3).long()} | change
    for call in (lasp.linear_cross_entropy, lasp.token_log_probs):
        with pytest.raises(ValueError, match=message):
            call(**given)
    if "bias" in change:
        with pytest.raises(ValueError, match="a bias goes with a weight"):
            lasp.token_log_probs(**given | {"weight": None})
