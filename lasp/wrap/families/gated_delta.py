"""Gated DeltaNet (arXiv:2412.06464), among layers of softmax attention."""

from __future__ import annotations

from lasp.wrap.family import Family
from lasp.wrap.stand_ins import convolution, gated_delta_rule
from lasp.wrap.swap import Function

_FUNCTIONS: dict[str, Function] = {"causal_conv1d_fn": convolution, "torch_chunk_gated_delta_rule": gated_delta_rule}

FAMILIES = tuple(Family(folder, _FUNCTIONS) for folder in ("qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid"))
