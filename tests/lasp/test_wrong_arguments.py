"""Arguments of a wrong kind: every public operation refuses them in one line that names the argument."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch

import lasp
from tests.operations import OPERATIONS, Case

TENSORS = {
    "list": [[1.0, 2.0]],
    "number": 3,
    "text": "q",
    "array": numpy.ones((2, 24, 2, 8), dtype=numpy.float32),
    "sparse": torch.eye(4).to_sparse(),
    "integers": torch.ones(2, 24, 2, 8, dtype=torch.long),
    "no dims": torch.tensor(1.0),
    "other device": torch.ones(2, 24, 2, 8, device="meta"),
}
"""None of them fits where an operation wants a tensor; nor does None, where it needs one."""
OPTIONAL = ("log_decay", "initial_state", "sinks", "key_mask", "bias", "window_factor")
OPTIONS: dict[str, tuple[Any, ...]] = {
    "scale": ("x", True, float("nan"), [1.0], torch.ones(2), 1j, torch.ones((), requires_grad=True)),
    "softcap": ("x", False, float("inf"), 0.0, -1.0, (2.0,)),
    "window": (0, -1, 2.5, True, "2", [3]),
    "chunk_size": (0, -8, True, 8.0, "8", [8]),
    "causal": ("yes", 1, None, torch.tensor(True)),
    "output_final_state": ("no", 0, None),
    "exclusive": ("no", 0, None),
    "relative": ("no", 0, None),
    "cu_seqlens": (
        8, 24.0, "24", torch.tensor(24), torch.tensor([0.0, 24.0]), torch.tensor([[0, 24]]), [0, 12.0, 24], [False, 24],
        torch.tensor([0, 24], device="meta"), numpy.array([0.0, 24.0]), [], [0], [0, 25, 24], [-1, 24], [0, 23],
        {0, 24}, [[0, 24]], object(),
    ),
    "scan": ("star", 3, None, ["ring"]),
    "backend": ("torhc", 3, None),
    "method": ("rings", 3, None, ["ring"]),
    "activation": ("relu", 3, ["silu"]),
    "ignore_index": (1.5, "x", None, True),
    "num_items": ("x", [3], torch.ones(2)),
    "dim": (3, -4, 1.0, "1", None, True),
}  # fmt: skip
RECURRENT = ("scale", "output_final_state", "cu_seqlens", "scan", "backend", "chunk_size")
TAKES = {  # what each operation takes besides its tensors
    "linear_attention": (*RECURRENT, "causal"),
    "delta_rule": RECURRENT,
    "delta_product": RECURRENT,
    "dplr_delta_rule": tuple(name for name in RECURRENT if name != "backend"),
    "routed_delta_rule": RECURRENT,
    "selective_scan": ("output_final_state", "cu_seqlens", "scan", "chunk_size"),
    "diagonal_state_space": ("output_final_state", "cu_seqlens", "scan", "chunk_size"),
    "slstm": ("output_final_state", "cu_seqlens", "chunk_size"),
    "running_maximum": ("output_final_state", "cu_seqlens", "scan"),
    "softmax_attention": ("scale", "softcap", "window", "causal", "cu_seqlens", "method"),
    "hybrid_attention": (*RECURRENT, "window", "relative"),
    "causal_conv1d": ("activation", "output_final_state", "cu_seqlens"),
    "logcumsumexp": ("exclusive", "output_final_state", "cu_seqlens", "scan"),
    "cross_entropy": ("ignore_index", "num_items"),
    "linear_cross_entropy": ("ignore_index", "num_items"),
    "token_log_probs": ("ignore_index",),
    "shard": ("dim",),
    "unshard": ("dim",),
}


ARGUMENTS = [
    (operation, name)
    for operation in ("softmax_attention masked", *TAKES)
    for name in (*OPERATIONS[operation].shapes, *TAKES.get(operation, ()))
]


def wrong_values(operation: str, name: str) -> Iterator[Any]:
    if name not in OPERATIONS[operation].shapes:
        yield from OPTIONS[name]
        return
    cut = operation in ("shard", "unshard")  # which take tensors of any dtype and device
    yield from (
        x for x in TENSORS.values() if not (cut and isinstance(x, torch.Tensor) and not x.is_sparse and x.dim())
    )
    if name not in OPTIONAL and (operation, name) != ("token_log_probs", "weight"):  # without one, of logits
        yield None


@pytest.mark.parametrize(("operation", "name"), ARGUMENTS)
def test_a_wrong_argument_is_one_line_with_its_name(operation: str, name: str) -> None:
    inputs: dict[str, Any] = Case(operation, "contiguous", torch.float32).inputs(0)
    if name == "cu_seqlens":  # of one sequence
        whole = {*OPERATIONS[operation].whole} - {"initial_state"}
        inputs = {key: x if key in whole else x[:1] for key, x in inputs.items()}
    for value in wrong_values(operation, name):
        with pytest.raises(ValueError) as caught:
            OPERATIONS[operation].run(**{"group": None} | inputs | {name: value})
        message = str(caught.value)
        # Beside one tensor of another device it is the others that are.
        assert name in message or (isinstance(value, torch.Tensor) and value.is_meta), message
        assert "\n" not in message
        assert "Error" not in message, "a mistake that was foreseen"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_group_of_another_kind(operation: str) -> None:
    inputs = Case(operation, "contiguous", torch.float32).inputs(0)
    for wrong in ("sp", 2, torch.ones(2), [0, 1]):
        with pytest.raises(ValueError, match=r"group must be a lasp\.SequenceGroup or None"):
            OPERATIONS[operation].run(**inputs, group=wrong)


def test_gates_of_more_digits_than_what_they_gate() -> None:
    """fp64 beside fp32: they are rounded, in every operation, and their gradients are fp64."""
    for operation, own in OPERATIONS.items():
        names = {"log_decay", "beta", "step", "rates", "recurrent", "initial_state"} & own.shapes.keys() - {
            *own.complex
        }
        if not own.differentiable or not names:
            continue
        inputs = Case(operation, "contiguous", torch.float32).inputs(0)
        precise = {n: (x.double() if n in names else x) for n, x in inputs.items()}
        found = []
        for given in (inputs, precise):
            leaves = {n: x.requires_grad_() if x.is_floating_point() or x.is_complex() else x for n, x in given.items()}
            output = own.run(**leaves, group=None)
            output = output[0] if isinstance(output, tuple) else output
            output.sum().backward()
            found.append([output.detach(), *(leaves[n].grad for n in sorted(names))])
        assert [x.dtype for x in found[1]] == [torch.float32, *[torch.float64] * len(names)], operation
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one.to(other.dtype), rtol=1e-5, atol=1e-5)


def test_did_you_mean() -> None:
    x = torch.zeros(1, 4, 2, 8)
    for call, meant in (
        (lambda: lasp.softmax_attention(x, x, x, method="ulyses"), "'ulysses'"),
        (lambda: lasp.softmax_attention(x, x, x, method="gahter"), "'gather'"),
        (lambda: lasp.linear_attention(x, x, x, scan="rnig"), "'ring'"),
        (lambda: lasp.linear_attention(x, x, x, backend="pytorch"), "'torch'"),
        (lambda: lasp.causal_conv1d(x[0], torch.ones(8, 2), activation="silo"), "'silu'"),
    ):
        with pytest.raises(ValueError, match=f"; did you mean {meant}"):
            call()


def test_no_tokens() -> None:
    """An empty sequence has an empty result, and gradients of 0."""
    for operation in TAKES.keys() - {"cross_entropy", "linear_cross_entropy", "shard", "unshard"}:
        own = OPERATIONS[operation]
        inputs = Case(operation, "contiguous").inputs(0)
        trained = {n for n, x in inputs.items() if x.is_floating_point() and own.differentiable}
        inputs = {n: x if n in own.whole else x[:, :0].requires_grad_(n in trained) for n, x in inputs.items()}
        output = own.run(**inputs, group=None)
        output = output[0] if isinstance(output, tuple) else output
        assert output.shape[1] == 0
        if trained:
            output.sum().backward()
