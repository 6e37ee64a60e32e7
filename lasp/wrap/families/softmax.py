"""Softmax attention, through the registry that all of these call: nothing stands in for code of their own."""

from __future__ import annotations

from lasp.wrap.family import Family

_NOTHING_BESIDES = (
    "afmoe", "apertus", "arcee", "aria", "axk1", "beam", "bert", "bert_generation", "biogpt", "bitnet", "cohere",
    "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v3", "diffllama", "electra", "ernie", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "glm",
    "glm4", "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoeshared", "hrm_text", "hy_v3", "hyperclovax", "jais2", "jetmoe",
    "kolibri1", "laguna", "llama", "longcat_flash", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2",
    "minimax_m3_vl", "ministral3", "mistral", "mixtral", "modernbert_decoder", "moshi", "nanochat", "olmo", "olmo2",
    "olmo3", "olmoe", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roc_bert",
    "seed_oss", "smollm3", "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
)  # fmt: skip

FAMILIES = (
    *(Family(folder) for folder in _NOTHING_BESIDES),
    Family("deepseek_v2", tiny={"num_experts_per_tok": 2}),
    Family("helium", tiny={"head_dim": 8}),
    Family("hunyuan_v1_dense", tiny={"head_dim": 16}),
    Family("hunyuan_v1_moe", tiny={"head_dim": 16}),
    Family("ministral", tiny={"head_dim": 16}),
    Family("nemotron", tiny={"num_key_value_heads": 2}),
)
