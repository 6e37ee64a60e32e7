"""Kimi Delta Attention (arXiv:2510.26692), a delta rule with a decay per channel, among layers of softmax attention."""

from __future__ import annotations

from lasp.wrap.family import Family
from lasp.wrap.stand_ins import convolution, gated_delta_rule
from lasp.wrap.swap import Function

_FUNCTIONS: dict[str, Function] = {"causal_conv1d_fn": convolution, "chunk_kimi_delta_attention": gated_delta_rule}

FAMILIES = (Family("kimi_linear", _FUNCTIONS), Family("bailing_hybrid", _FUNCTIONS))
