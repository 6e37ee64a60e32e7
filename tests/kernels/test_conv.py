"""The causal convolution on one device, against the token-by-token reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import lasp
from tests.convolution import largest_error, make_convolution, solve_convolution

DOCUMENTS = (0, 0, 1, 3, 3, 20, 36, 37, 37)  # empty, shorter than the kernel, and of one token

convolve = partial(lasp.causal_conv1d, output_final_state=True)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
@pytest.mark.parametrize(
    "options", [{}, {"activation": None}, {"bias": False}, {"initial": False}], ids=lambda options: str(options)
)
def test_parity(width: int, cu_seqlens: tuple[int, ...] | None, options: dict[str, Any]) -> None:
    problem = make_convolution(width, cu_seqlens=cu_seqlens, **options)
    assert largest_error(solve_convolution(problem, convolve), solve_convolution(problem)) < 1e-10


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_lower_precision(dtype: torch.dtype, limit: float, cu_seqlens: tuple[int, ...] | None) -> None:
    problem = make_convolution(cu_seqlens=cu_seqlens, dtype=dtype)
    found = solve_convolution(problem, convolve)
    assert {x.dtype for x in found.values()} == {dtype}
    assert largest_error(found, solve_convolution(problem)) < limit


@pytest.mark.parametrize("length", [0, 1, 3])
def test_sequences_no_longer_than_the_kernel(length: int) -> None:
    problem = make_convolution(length=length)
    assert largest_error(solve_convolution(problem, convolve), solve_convolution(problem)) < 1e-10


@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
def test_the_output_is_contiguous_and_no_view_of_the_input(cu_seqlens: tuple[int, ...] | None) -> None:
    """Heads are split off with `view`, and a kept final state must not keep the whole sequence."""
    problem = make_convolution(cu_seqlens=cu_seqlens)
    output, final = convolve(**problem.inputs, cu_seqlens=cu_seqlens)
    assert output.is_contiguous()
    assert final.untyped_storage().nbytes() == final.nbytes


def test_a_stream_continues_from_its_final_state() -> None:
    problem = make_convolution(initial=False)
    x, weight, bias = (problem.inputs[name] for name in ("x", "weight", "bias"))
    whole, _ = convolve(x, weight, bias)
    state, parts = None, []
    for part in x.split([1, 1, 2, 20, 13], 1):
        output, state = convolve(part, weight, bias, initial_state=state)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def test_parameters_may_be_fp32_beside_bf16() -> None:
    problem = make_convolution(dtype=torch.bfloat16)
    inputs = {name: value if name == "x" else value.float() for name, value in problem.inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolve(**inputs)[0].dtype == torch.bfloat16
        assert convolve(**{name: value.float() for name, value in inputs.items()})[0].dtype == torch.float32
    assert torch.equal(convolve(**inputs)[0], convolve(**problem.inputs)[0])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"activation": "swish"}, "activation must be one of None, silu, got 'swish'"),
    "x": ({"x": torch.zeros(2, 5)}, "x must be floating [batch, tokens, channels], got torch.float32 [2, 5]"),
    "weight": ({"weight": torch.zeros(2, 4)}, "weight must be [D, W] with D = 3 channels of x, got [2, 4]"),
    "weight of torch": ({"weight": torch.zeros(3, 1, 4)}, "weight must be [D, W] with D = 3"),
    "bias": ({"bias": torch.zeros(3, 1)}, "bias must be [D] = [3], got [3, 1]"),
    "state": (
        {"initial_state": torch.zeros(2, 3, 4)},
        "initial_state must be [B, D, W - 1] = [2, 3, 3], got [2, 3, 4]",
    ),
    "integers": ({"weight": torch.zeros(3, 4).long()}, "weight must be floating and on the device of x, cpu"),
    "documents": ({"cu_seqlens": [0, 37]}, "cu_seqlens packs documents into one sequence and needs B = 1, got B = 2"),
    "not a tensor": ({"x": None}, "x must be a tensor, got None"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str) -> None:
    changed, message = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        convolve(**(make_convolution().inputs | changed))
    assert message in str(caught.value)
