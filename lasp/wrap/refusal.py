"""Which models are refused: all that were not run and compared, parameter by parameter, with one device."""

from __future__ import annotations

from typing import Any

from torch import nn

from lasp.wrap import fla
from lasp.wrap.modules import METHODS
from lasp.wrap.recurrences import FUNCTIONS
from lasp.wrap.swap import calls

# Folders of transformers/models; `make test-slow` compares the causal language models of each with one device.
VERIFIED = (
    "afmoe", "apertus", "arcee", "aria", "axk1", "bailing_hybrid", "bamba", "beam", "bert", "bert_generation",
    "biogpt", "bitnet", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3",
    "diffllama", "electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1",
    "falcon_mamba", "flex_olmo", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "glm", "glm4",
    "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "granite", "granite_swa",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium", "hrm_text",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "jais2", "jamba", "jetmoe", "kimi_linear",
    "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "longcat_flash", "mamba", "mamba2", "mellum",
    "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2", "minimax_m3_vl", "ministral", "ministral3", "mistral",
    "mixtral", "modernbert_decoder", "moshi", "nanochat", "nemotron", "nemotron_h", "olmo", "olmo2", "olmo3",
    "olmo_hybrid", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_5",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "recurrent_gemma", "roc_bert", "rwkv", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "vaultgemma", "xlstm", "youtu", "zamba", "zamba2", "zaya",
)  # fmt: skip
# Modules of torch that treat every token by itself.
_TOKENWISE = {
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout,
    nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict,
}  # fmt: skip
_TRUSTED = (
    "transformers.activations", "transformers.pytorch_utils", "torch.nn.modules.activation", "peft.tuners.lora",
    "peft.utils.other",
)  # fmt: skip
_MIXING = {nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d}  # among torch's activations


def check_model(model: Any) -> None:
    """Raises ValueError where the model, a module in it or an option of it is not known to be exact."""
    name, folder = type(model).__name__, family(model)
    if folder not in (*VERIFIED, *fla.MODELS):
        own = sorted({type(m).__name__ for m in model.modules() if not _tokenwise(type(m))} - {name})
        raise ValueError(
            f"{name} ({type(model).__module__}) is not verified: of its modules {', '.join(own)} any may mix tokens "
            "unseen. docs/models.md lists what is. It needs an adapter in lasp/wrap where it mixes tokens, a line in "
            "lasp/wrap/refusal.py, and lasp.verify"
        )
    if name not in (_causal_language_models() if folder in VERIFIED else {fla.MODELS[folder]}):
        raise ValueError(f"{name}: only causal language models are sequence-parallel")
    foreign = [f"{path} ({type(m).__qualname__})" for path, m in model.named_modules() if not _known(model, path, m)]
    if foreign:
        raise ValueError(
            f"modules that may mix tokens and are not known in {name}: {', '.join(foreign)}. Each needs an adapter in "
            "lasp/wrap; what treats every token by itself can be built from torch.nn's layers"
        )
    if folder in fla.MODELS:
        fla.check_options(model)
    if getattr(model, "use_kernels", False):
        raise ValueError("use_kernels=True replaces whole modules; load the model without it")
    if "_loss_function" in vars(model):
        raise ValueError(
            f"{name} has a loss_function of its own, which would see a rank's part: del model._loss_function"
        )


def check_adapters(model: Any) -> None:
    """Raises ValueError for a wrapper of peft that puts tokens before the sequence: every rank would have them."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"{type(config).__name__} puts tokens of its own before every rank's part; LoRA does not")


def _causal_language_models() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def family(module: Any) -> str | None:
    """The folder of transformers/models, or "fla." and that of fla/models, that a module's class comes from."""
    package, *parts = type(module).__module__.split(".")
    if package not in ("transformers", "fla") or len(parts) < 2 or parts[0] != "models":
        return None
    return parts[1] if package == "transformers" else f"fla.{parts[1]}"


def _known(model: nn.Module, path: str, module: nn.Module) -> bool:
    cls = type(module)
    if (family(model) in fla.MODELS and fla.is_known(module)) or family(module) == family(model) or _tokenwise(cls):
        return "Indexer" not in cls.__name__
    # Convolutions and the like belong to the mixer around them, if that is one that we know.
    mixer = model.get_submodule(path.rpartition(".")[0])
    return cls.__module__.startswith("torch.nn.") and _mixes_known(mixer) and family(mixer) == family(model)


def _tokenwise(cls: type) -> bool:
    return cls in _TOKENWISE or (cls not in _MIXING and cls.__module__.startswith(_TRUSTED))


def _mixes_known(module: nn.Module) -> bool:
    """Whether a module mixes tokens in a way that has an adapter."""
    return type(module).__name__ in METHODS or any(calls(module, FUNCTIONS))
