"""Liquid's models: short convolutions among layers of softmax attention."""

from __future__ import annotations

from lasp.wrap.family import Family
from lasp.wrap.stand_ins import convolution
from lasp.wrap.swap import Function

_FUNCTIONS: dict[str, Function] = {"causal_conv1d_fn": convolution}

FAMILIES = (
    Family("lfm3", _FUNCTIONS),
    Family("lfm2", _FUNCTIONS, tiny={"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}),
    Family("lfm2_moe", _FUNCTIONS, tiny={"layer_types": ["conv", "full_attention"]}),
)
