"""The stages of `chunked.py` as operators: torch.compile, fake tensors and selective checkpointing see one step each.

An operator is known by what its stage fills, which is its fake. None has a derivative: that lives in
`lasp.parallel.linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.decay.chunked import DecayStages, Given
from lasp.kernels.decay.tiles import Geometry
from lasp.kernels.precision import compute_dtype

STAGES = (
    "chunk_states",
    "inside",
    "read_out",
    "forward",
    "adjoint_states",
    "grad_outputs",
    "grad_chunk_states",
    "backward",
)
# The numbers are those of a `Geometry` that the tensors do not tell; runs: each one's offset and length.
SCHEMA = (
    "(Tensor?[] inputs, Tensor?[] given, SymInt[] runs, SymInt heads, float scale, bool masked, SymInt size,"
    " bool trained) -> Tensor[]"
)

Operator = Callable[..., list[Tensor]]


def stage_operators(family: str, stages: DecayStages[Any]) -> dict[str, Operator]:
    """An operator for each stage of a family, by its name."""
    return {name: _operator(family, stages, name) for name in STAGES}


def _operator(family: str, stages: DecayStages[Any], name: str) -> Operator:
    def memory(inputs: Any, given: Given, *numbers: Any) -> list[Tensor]:
        return stages.memory(name, inputs, _geometry(inputs, *numbers))

    def run(inputs: Any, given: Given, *numbers: Any) -> list[Tensor]:
        geometry = _geometry(inputs, *numbers)
        filled = stages.memory(name, inputs, geometry)
        getattr(stages, name)(inputs, given, filled, geometry)
        return filled

    operator = torch.library.custom_op(f"lasp::{family}_{name}", run, mutates_args=(), schema=SCHEMA)
    operator.register_fake(memory)
    return operator


def _geometry(
    inputs: Any, runs: Sequence[int], heads: int, scale: float, masked: bool, size: int, trained: bool
) -> Geometry:
    q, v = inputs[0], inputs[2]
    return Geometry(
        tuple(zip(runs[::2], runs[1::2], strict=True)),
        size,
        batch=q.shape[0],
        heads=heads,
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        scale=scale,
        dtype=compute_dtype(q),
        masked=masked,
        trained=trained,
    )
