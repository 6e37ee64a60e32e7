"""Tiny models of every family of transformers that `lasp.parallelize` takes, with all arithmetic in fp64."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers

VOCABULARY = 97
_BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "experts_implementation": "eager",
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DELTA = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}}
_MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "moe_intermediate_size": 16,
}  # fmt: skip
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_HYBRID = ["linear_attention", "full_attention"]


class Family(NamedTuple):
    """A folder of transformers/models, the names of its classes, and options; None takes one of the base away."""

    folder: str
    prefix: str
    options: dict[str, Any]
    config: str | None = None
    recurrent: bool = True


def _softmax(folder: str, prefix: str, config: str | None = None, **options: Any) -> Family:
    return Family(folder, prefix, options | {"num_hidden_layers": options.get("num_hidden_layers", 2)}, config, False)


def _hybrid(folder: str, prefix: str, config: str | None = None, **options: Any) -> Family:
    return Family(folder, prefix, {"num_hidden_layers": 2} | options, config)


FAMILIES = {
    "llama": _softmax("llama", "Llama"),
    "llama_dynamic": _softmax(
        "llama", "Llama", max_position_embeddings=16, rope_parameters=_ROPE | {"rope_type": "dynamic", "factor": 4.0}
    ),
    "phi3_longrope": _softmax(
        "phi3", "Phi3", original_max_position_embeddings=16,
        rope_parameters=_ROPE | {
            "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 4.0, 9.0, 16.0],
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": _softmax("mistral", "Mistral", sliding_window=9),
    "qwen2": _softmax("qwen2", "Qwen2"),
    "qwen3": _softmax("qwen3", "Qwen3", head_dim=8),
    "gemma2": _softmax("gemma2", "Gemma2", head_dim=8, sliding_window=9, query_pre_attn_scalar=8),
    "gemma3": _softmax(
        "gemma3", "Gemma3", "Gemma3Text", head_dim=8, sliding_window=9, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": _softmax("gpt_oss", "GptOss", head_dim=8, sliding_window=9, rope_parameters=_ROPE, **_LOCAL),
    "mixtral": _softmax("mixtral", "Mixtral", **_LOCAL),
    "qwen3_moe": _softmax("qwen3_moe", "Qwen3Moe", head_dim=8, **_MOE),
    "qwen3_next": _hybrid(
        "qwen3_next", "Qwen3Next", head_dim=16, shared_expert_intermediate_size=16, layer_types=_HYBRID, **_MOE,
        **_DELTA,
    ),
    "qwen3_5": _hybrid("qwen3_5", "Qwen3_5", "Qwen3_5Text", head_dim=32, layer_types=_HYBRID, **_MROPE, **_DELTA),
    "qwen3_5_moe": _hybrid(
        "qwen3_5_moe", "Qwen3_5Moe", "Qwen3_5MoeText", head_dim=32, layer_types=_HYBRID, intermediate_size=None,
        shared_expert_intermediate_size=16, **_MROPE, **_MOE, **_DELTA,
    ),
    "olmo_hybrid": _hybrid(
        "olmo_hybrid", "OlmoHybrid", layer_types=_HYBRID, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=16, rope_parameters=_ROPE,
    ),
    "kimi_linear": _hybrid(
        "kimi_linear", "KimiLinear", layer_types=_HYBRID, linear_head_dim=8, linear_num_heads=4, **_LOCAL, **_MLA
    ),
    "bailing_hybrid": _hybrid(
        "bailing_hybrid", "BailingHybrid", head_dim=8, n_group=2, topk_group=1, layer_group_size=2,
        first_k_dense_replace=1, num_mtp_layers=0, **_LOCAL, **_MLA,
    ),
    "minimax": _hybrid("minimax", "MiniMax", head_dim=8, block_size=16, **_LOCAL),
    "bamba": _hybrid("bamba", "Bamba", attn_layer_indices=[1], **_SSD),
    "mamba2": _hybrid("mamba2", "Mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=16),
    "mamba": _hybrid("mamba", "Mamba", state_size=4),
    "falcon_mamba": _hybrid("falcon_mamba", "FalconMamba", state_size=4),
    "falcon_h1": _hybrid("falcon_h1", "FalconH1", mamba_d_ssm=64, **_SSD),
    "nemotron_h": _hybrid(
        "nemotron_h", "NemotronH", layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], head_dim=8,
        num_hidden_layers=None, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=16,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    ),
    "zamba2": _hybrid(
        "zamba2", "Zamba2", num_hidden_layers=4, num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=4, chunk_size=16,
        use_mem_rope=True, num_mem_blocks=1, layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "zamba": _hybrid(
        "zamba", "Zamba", num_hidden_layers=4, num_key_value_heads=4, mamba_d_state=4, n_mamba_heads=2,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "granitemoehybrid": _hybrid(
        "granitemoehybrid", "GraniteMoeHybrid", layer_types=_HYBRID, shared_intermediate_size=16,
        position_embedding_type="rope", attention_multiplier=0.35, **_LOCAL, **_SSD,
    ),
    "jamba": _hybrid(
        "jamba", "Jamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, num_experts=4,
        num_experts_per_tok=2,
    ),
    "lfm2": _hybrid("lfm2", "Lfm2", full_attn_idxs=[1]),
    "lfm2_moe": _hybrid("lfm2_moe", "Lfm2Moe", layer_types=["conv", "full_attention"], num_dense_layers=1, **_MOE),
    "lfm3": _hybrid(
        "lfm3", "Lfm3", num_hidden_layers=3, sliding_window=9,
        layer_types=["conv", "full_attention", "sliding_attention"],
    ),
    "recurrent_gemma": _hybrid(
        "recurrent_gemma", "RecurrentGemma", num_hidden_layers=3, attention_window_size=9, lru_width=32,
        max_position_embeddings=None,
    ),
    "rwkv": _hybrid("rwkv", "Rwkv", context_length=128),
    "xlstm": _hybrid("xlstm", "xLSTM", hidden_size=128, num_heads=2, chunk_size=16),
    "zaya": _hybrid("zaya", "Zaya", head_dim=8, num_experts=4),
}  # fmt: skip


@cache
def in_double(folder: str) -> ModuleType:
    """The library's source of a model with its fp32 steps in fp64, under a name of its own."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    source = inspect.getsource(module).replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    source = re.sub(r"getattr\(torch, config\.\w+\)", "torch.float64", source)
    twin = ModuleType(f"{module.__name__}_double")
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    sys.modules[twin.__name__] = twin
    exec(compile(source, str(module.__file__), "exec"), twin.__dict__)
    return twin


def make(name: str) -> Any:
    """A model of a family with random weights, in fp64 throughout, as in training."""
    family = FAMILIES[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # tables made at the start too
    try:
        torch.manual_seed(0)
        model = getattr(in_double(family.folder), family.prefix + "ForCausalLM")(configuration(name)).double()
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():  # a bias of 0 would hide mistakes
        if parameter.dim() < 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def make_single(name: str) -> Any:
    """The library's own model in fp32."""
    torch.manual_seed(0)
    return getattr(transformers, FAMILIES[name].prefix + "ForCausalLM")(configuration(name))


def configuration(name: str) -> Any:
    """The tiny configuration of a family."""
    family = FAMILIES[name]
    options = {key: value for key, value in (_BASE | family.options).items() if value is not None}
    return getattr(transformers, (family.config or family.prefix) + "Config")(**options)
