"""A tiny configuration of the same model: every kind of layer once, every size small."""

from __future__ import annotations

from typing import Any

from lasp.wrap.families import family_of

_HIDDEN, _INNER, _HEADS, _KEY_HEADS, _HEAD_DIM, _EXPERTS = 32, 48, 4, 2, 16, 4
# By the names that configurations of transformers give them.
_SIZES: dict[str, Any] = {
    "vocab_size": 97, "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "context_length": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "lru_width", "attention_hidden_size"), _HIDDEN),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_size"), _HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dense_intermediate_size"), _INNER),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size"), _INNER),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), _KEY_HEADS),
    "swa_num_attention_heads": _HEADS,
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim"), _HEAD_DIM),
    "swa_v_head_dim": _HEAD_DIM, "qk_rope_head_dim": 8, "qk_head_dim": _HEAD_DIM + 8,
    "kv_lora_rank": 16, "q_lora_rank": 16, "query_pre_attn_scalar": 16,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"), 1),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "num_kv_shared_layers"), 0),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 9),
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "short_conv_kernel_size": 4, "block_size": 16,
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 2),
    # What acts beyond a length acts within a short sequence too.
    "attention_chunk_size": 9, "floor_scale": 8, "original_max_position_embeddings": 16,
    "mamba_d_ssm": 64, "attn_layer_period": 2, "attn_layer_offset": 1, "layer_group_size": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "laurel_rank": 8, "rotary_dim": 4,
    "router_hidden_size": 16, "adapter_rank": 8,
    "is_decoder": True,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
_DERIVED = ("model_type", "transformers_version", "per_layer_config")


def shrink(config: Any) -> Any:
    """A text configuration of the same kind and options with 32 channels, and of every kind of layer one.

    config: a PretrainedConfig of transformers, left as it is. A size with a name not known here stays, unless the
    record of its family says what it should be (`Family.tiny`).
    """
    config = config.get_text_config(decoder=True)
    options = {key: value for key, value in config.to_dict().items() if value is not None and key not in _DERIVED}
    layers = next((options[name] for name in _LAYERS if options.get(name)), 2)
    chosen = _kinds_of_layers(options, layers)
    for name, value in options.items():
        if name in _LAYERS and value:
            options[name] = len(chosen)
        elif isinstance(value, list) and len(value) == layers:
            options[name] = [value[index] for index in chosen]
        elif name in _SIZES and (value or name.endswith(("token_id", "decoder"))):
            options[name] = _SIZES[name]
    if options.get("kv_lora_rank"):  # latent attention: as many keys as queries, and only a part of a head rotates
        options |= {"num_key_value_heads": _HEADS, "head_dim": _SIZES["qk_rope_head_dim"]}
    rope = options.get("rope_parameters")
    if isinstance(rope, dict):
        options["rope_parameters"] = rope | {k: _SIZES[k] for k in rope if k in _SIZES}
        if "mrope_section" in rope:
            options["head_dim"], options["rope_parameters"]["mrope_section"] = 32, [2, 1, 1]
    family = family_of(config)
    return type(config)(**options | ({} if family is None else dict(family.tiny)))


def _kinds_of_layers(options: dict[str, Any], layers: int) -> list[int]:
    """The first layer of every kind, and two at least."""
    lists = [value for value in options.values() if isinstance(value, list) and len(value) == layers]
    kinds = [str([values[index] for values in lists]) for index in range(layers)]
    first = sorted({kinds.index(kind) for kind in kinds})[:6]
    return first if len(first) > 1 else list(range(min(2, layers)))
