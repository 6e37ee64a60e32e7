"""Tiny models of every family of transformers that `lasp.parallelize` takes, with all arithmetic in fp64."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from functools import cache
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lasp.wrap import families
from lasp.wrap.family import Family
from lasp.wrap.shrink import shrink

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


class Tiny(NamedTuple):
    """A model type of transformers, and options of its configuration; None takes one of the base away."""

    kind: str
    options: dict[str, Any]


def _tiny(kind: str, **options: Any) -> Tiny:
    return Tiny(kind, {"num_hidden_layers": 2} | options)


_GIVEN = {
    "llama": _tiny("llama"),
    "llama_dynamic": _tiny(
        "llama", max_position_embeddings=16, rope_parameters=_ROPE | {"rope_type": "dynamic", "factor": 4.0}
    ),
    "phi3_longrope": _tiny(
        "phi3", original_max_position_embeddings=16,
        rope_parameters=_ROPE | {
            "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 4.0, 9.0, 16.0],
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": _tiny("mistral", sliding_window=9),
    "qwen2": _tiny("qwen2"),
    "qwen3": _tiny("qwen3", head_dim=8),
    "gemma2": _tiny("gemma2", head_dim=8, sliding_window=9, query_pre_attn_scalar=8),
    "gemma3": _tiny(
        "gemma3_text", head_dim=8, sliding_window=9, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gpt_oss": _tiny("gpt_oss", head_dim=8, sliding_window=9, rope_parameters=_ROPE, **_LOCAL),
    "mixtral": _tiny("mixtral", **_LOCAL),
    "qwen3_moe": _tiny("qwen3_moe", head_dim=8, **_MOE),
    "qwen3_next": _tiny(
        "qwen3_next", head_dim=16, shared_expert_intermediate_size=16, layer_types=_HYBRID, **_MOE,
        **_DELTA,
    ),
    "qwen3_5": _tiny("qwen3_5_text", head_dim=32, layer_types=_HYBRID, **_MROPE, **_DELTA),
    "qwen3_5_moe": _tiny(
        "qwen3_5_moe_text", head_dim=32, layer_types=_HYBRID, intermediate_size=None,
        shared_expert_intermediate_size=16, **_MROPE, **_MOE, **_DELTA,
    ),
    "olmo_hybrid": _tiny(
        "olmo_hybrid", layer_types=_HYBRID, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=8, linear_value_head_dim=16, rope_parameters=_ROPE,
    ),
    "kimi_linear": _tiny(
        "kimi_linear", layer_types=_HYBRID, linear_head_dim=8, linear_num_heads=4, **_LOCAL, **_MLA
    ),
    "bailing_hybrid": _tiny(
        "bailing_hybrid", head_dim=8, n_group=2, topk_group=1, layer_group_size=2,
        first_k_dense_replace=1, num_mtp_layers=0, **_LOCAL, **_MLA,
    ),
    "minimax": _tiny("minimax", head_dim=8, block_size=16, **_LOCAL),
    "mamba2": _tiny("mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=16),
    "mamba": _tiny("mamba", state_size=4),
    "nemotron_h": _tiny(
        "nemotron_h", layers_block_type=["linear_attention", "moe", "full_attention", "mlp"], head_dim=8,
        num_hidden_layers=None, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, chunk_size=16,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    ),
    "zamba2": _tiny(
        "zamba2", num_hidden_layers=4, num_key_value_heads=4, mamba_d_state=8, n_mamba_heads=4, chunk_size=16,
        use_mem_rope=True, num_mem_blocks=1, layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "zamba": _tiny(
        "zamba", num_hidden_layers=4, num_key_value_heads=4, mamba_d_state=4, n_mamba_heads=2,
        layers_block_type=["linear_attention", "hybrid"] * 2,
    ),
    "granitemoehybrid": _tiny(
        "granitemoehybrid", layer_types=_HYBRID, shared_intermediate_size=16,
        position_embedding_type="rope", attention_multiplier=0.35, **_LOCAL, **_SSD,
    ),
    "recurrent_gemma": _tiny(
        "recurrent_gemma", num_hidden_layers=3, attention_window_size=9, lru_width=32,
        max_position_embeddings=None,
    ),
    "rwkv": _tiny("rwkv", context_length=128),
    "xlstm": _tiny("xlstm", hidden_size=128, num_heads=2, chunk_size=16),
    "zaya": _tiny("zaya", head_dim=8, num_experts=4),
}  # fmt: skip


def has_stand_ins(record: Family) -> bool:
    """Whether a family of transformers mixes tokens in code of its own."""
    return bool(record.functions or record.methods) and not record.folder.startswith("fla.")


def kinds() -> list[str]:
    """The first family of every file of records whose families have stand-ins."""
    files = [importlib.import_module(f"{families.__name__}.{file.name}") for file in iter_modules(families.__path__)]
    return [file.FAMILIES[0].folder for file in files if has_stand_ins(file.FAMILIES[0])]


# Whatever has stand-ins is compared: in the configuration that `lasp verify` makes, where none is given above.
FAMILIES = [*_GIVEN, *(n for n, record in families.FAMILIES.items() if has_stand_ins(record) and n not in _GIVEN)]


@cache
def in_double(name: str) -> ModuleType:
    """The source of a module of the library with its fp32 steps in fp64, under a name of its own."""
    module = importlib.import_module(name)
    source = inspect.getsource(module).replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    source = re.sub(r"getattr\(torch, config\.\w+\)", "torch.float64", source)
    twin = ModuleType(f"{module.__name__}_double")
    twin.__package__, twin.__file__ = module.__package__, module.__file__
    sys.modules[twin.__name__] = twin
    exec(compile(source, str(module.__file__), "exec"), twin.__dict__)
    return twin


def make(name: str) -> Any:
    """A model of a family with random weights, in fp64 throughout, as in training."""
    config, default = configuration(name), torch.get_default_dtype()
    cls = _model_class(config)
    torch.set_default_dtype(torch.float64)  # tables made at the start too
    try:
        torch.manual_seed(0)
        model = getattr(in_double(cls.__module__), cls.__name__)(config).double()
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():  # a bias of 0 would hide mistakes
        if parameter.dim() < 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def make_single(name: str) -> Any:
    """The library's own model in fp32."""
    config = configuration(name)
    torch.manual_seed(0)
    return _model_class(config)(config)


def _model_class(config: Any) -> Any:
    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])


def configuration(name: str) -> Any:
    """The tiny configuration of a family."""
    if name not in _GIVEN:
        config = shrink(transformers.CONFIG_MAPPING[name]())
        config._experts_implementation = "eager"  # the default knows no fp64
        return config
    options = {key: value for key, value in (_BASE | _GIVEN[name].options).items() if value is not None}
    return transformers.CONFIG_MAPPING[_GIVEN[name].kind](**options)
