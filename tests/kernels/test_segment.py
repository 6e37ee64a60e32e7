"""The affine map of a stretch of tokens."""

from __future__ import annotations

import pytest
import torch

from lasp.kernels.segment import Segment

K, V = 4, 3
SHAPES = {"per head": (2, 1, 1), "per channel": (2, K, 1), "dense": (2, K, K)}


def make(shape: tuple[int, ...], seed: int) -> Segment:
    rng = torch.Generator().manual_seed(seed)
    return Segment(
        torch.rand(*shape, generator=rng, dtype=torch.float64), torch.randn(2, K, V, generator=rng, dtype=torch.float64)
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_maps_compose_associatively(shape: tuple[int, ...]) -> None:
    first, second, third = (make(shape, seed) for seed in range(3))
    state = torch.randn(2, K, V, dtype=torch.float64)
    expected = third(second(first(state)))
    torch.testing.assert_close(first.then(second).then(third)(state), expected)
    torch.testing.assert_close(first.then(second.then(third))(state), expected)
    torch.testing.assert_close(Segment.identity(state).then(first)(state), first(state))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_adjoint_is_the_gradient(shape: tuple[int, ...]) -> None:
    segment = make(shape, 0)
    state = torch.randn(2, K, V, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, K, V, dtype=torch.float64)
    (expected,) = torch.autograd.grad(segment(state), state, grad)
    torch.testing.assert_close(segment.adjoint(torch.zeros_like(grad))(grad), expected)
