"""The recurrences that are measured on a GPU: their inputs, ours, flash-linear-attention's, and what they must cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lasp
from lasp.launch.bench.kernels import Shape

CHUNK = 64
"""Tokens to a chunk, here and there by default: what the counts of operations assume."""


@dataclass(frozen=True)
class Mixer:
    """gates: None, "head", "token" or "channel"; delta: the delta rule. peer: flash-linear-attention's function."""

    name: str
    gates: str | None
    delta: bool
    peer: str

    def inputs(self, shape: Shape, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """q, k of length 1 in the delta family, v; beta in it; gates in fp32."""
        size, rng = (shape.batch, shape.tokens, shape.heads, shape.dim), torch.Generator(device).manual_seed(0)
        make = partial(torch.randn, generator=rng, device=device)
        q, k, v = (make(size).to(dtype) for _ in range(3))
        gates = {"head": size[2:3], "token": size[:3], "channel": size}
        decay = [] if self.gates is None else [-0.1 * make(gates[self.gates]).sigmoid()]
        if not self.delta:
            return [q, k, v, *decay]
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
        return [q, k, v, make(size[:3]).sigmoid().to(dtype), *decay]

    def trained(self, inputs: list[Tensor]) -> list[Tensor]:
        """Those that have a gradient: all but decays per head, which Lightning Attention and RetNet fix."""
        return inputs[:3] if self.gates == "head" else inputs

    def ours(self, *inputs: Tensor, **options: Any) -> Any:
        """Our output, and what else the options ask for."""
        run: Callable[..., Any] = lasp.delta_rule if self.delta else lasp.linear_attention
        return run(*inputs, **options)

    def theirs(self, *inputs: Tensor) -> Tensor:
        """The output of flash-linear-attention."""
        from fla import ops

        q, k, v, *rest = inputs
        beta = {"beta": rest.pop(0)} if self.delta else {}
        decay = {"g_gamma" if self.gates == "head" else "g": rest[0]} if rest else {}
        output: Tensor = getattr(ops, self.peer)(q, k, v, **beta, **decay)[0]
        return output

    def operations(self, shape: Shape, backward: bool) -> int:
        """Multiplications and additions in matrix products, the least that chunks of 64 take.

        Decay family: per token and head 2 products of a chunk's length with a dim and 2 of two dims forward, 5 and 4
        backward. Delta family: as arXiv:2510.26692 counts the forward pass, 6 D^2 + 3 C D + C^2; backward twice that.
        """
        c, d = CHUNK, shape.dim
        if self.delta:
            each = (6 * d * d + 3 * c * d + c * c) * (3 if backward else 1)
        else:
            each = 2 * (7 * c * d + 6 * d * d) if backward else 2 * (2 * c * d + 2 * d * d)
        return shape.batch * shape.tokens * shape.heads * each

    def traffic(self, inputs: list[Tensor], backward: bool) -> int:
        """Bytes that must be read and written: inputs and output; backward also gradients, and the inputs again."""
        read, output = (sum(x.nbytes for x in tensors) for tensors in (inputs, inputs[2:3]))
        gradients = sum(x.nbytes for x in self.trained(inputs))
        return 2 * read + 2 * output + gradients if backward else read + output


MIXERS = {
    mixer.name: mixer
    for mixer in (
        Mixer("basic", None, False, "chunk_simple_gla"),
        Mixer("lightning", "head", False, "chunk_simple_gla"),
        Mixer("scalar gate", "token", False, "chunk_simple_gla"),
        Mixer("GLA", "channel", False, "chunk_gla"),
        Mixer("Gated DeltaNet", "token", True, "chunk_gated_delta_rule"),
        Mixer("KDA", "channel", True, "chunk_kda"),
    )
}


def has_peer() -> bool:
    """Whether flash-linear-attention is installed and this machine has what its import wants: a GPU."""
    return torch.cuda.is_available() and importlib.util.find_spec("fla") is not None
