"""Which models are refused: all that were not run and compared, parameter by parameter, with one device."""

from __future__ import annotations

import sys
from collections.abc import Iterable
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
# Whose code may be wrapped around a module's forward, and which classes add nothing to the one that they stand for.
_DECORATING = ("transformers", "torch", "accelerate", "peft", "fla", "lasp")
_TRANSPARENT = ("torch.distributed.", "torch._dynamo.")
_MIXING = {nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d}  # among torch's activations


def takes_group(model: Any) -> bool:
    """Whether a model is of our own kind: its class says so, its forward has a `group`, and its mixers exchange."""
    return bool(getattr(type(model), "takes_group", False))


def check_model(model: Any) -> None:
    """Raises ValueError where the model, a module in it or an option of it is not known to be exact."""
    check_forwards(model.modules())
    check_noise(model)
    own = [path for path, m in model.named_modules() if has_own_forward(m)]
    if own:
        raise ValueError(f"the forward of {own[0] or type(model).__name__} is not that of its class, and not known")
    if takes_group(model):
        _check_own(model)
    else:
        _check_foreign(model)


def _check_own(model: Any) -> None:
    foreign = [
        f"{path} ({type(m).__qualname__})"
        for path, m in model.named_modules()
        if not is_tokenwise(m) and not any(cls.__module__.startswith("lasp.") for cls in type(m).__mro__)
    ]
    if foreign:
        raise ValueError(f"modules that may mix tokens and are not known: {', '.join(foreign)}")


def _check_foreign(model: Any) -> None:
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


def check_forwards(modules: Iterable[nn.Module]) -> None:
    """Raises ValueError for a class whose forward is not the one in its own file: it may leave out what was replaced.

    Liger, Unsloth and others put a forward of their own into the classes of transformers.
    """
    for cls in {type(module) for module in modules}:
        # FSDP2 makes a class of its own for each, with a copy of the forward.
        holders = (c for c in cls.__mro__ if "forward" in vars(c) and not c.__module__.startswith("torch.distributed."))
        owner = next(holders)
        function = vars(owner)["forward"]
        home = getattr(sys.modules.get(owner.__module__), "__dict__", None)
        while hasattr(function, "__wrapped__") and _written_in(function).split(".")[0] in _DECORATING:
            function = function.__wrapped__
        if getattr(function, "__globals__", None) is not home:
            raise ValueError(
                f"{owner.__name__}.forward was patched (from {_written_in(function)}) and need not come to what lasp "
                "replaces in it: use the model without the patch"
            )


def _written_in(function: Any) -> str:
    """The module that a function was written in; decorators copy `__module__`."""
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def check_noise(model: Any) -> None:
    """Raises ValueError for noise that a rank's part would get otherwise than the whole sequence."""
    for path, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if getattr(hook, "__name__", "") == "neftune_post_forward_hook":
                raise ValueError(f"neftune_noise_alpha: the noise on {path} is scaled by the length of a rank's part")
        if getattr(module, "layerdrop", 0):
            raise ValueError(f"layerdrop={module.layerdrop}: every rank would leave out other layers, set it to 0")
        variants = getattr(module, "lora_variant", {})
        if any(type(variant).__name__.startswith("ALora") for variant in variants.values()):
            raise ValueError(f"alora_invocation_tokens: {path} looks for them in a rank's part alone")


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


def is_tokenwise(module: nn.Module) -> bool:
    """Whether a module treats every token by itself; so does one that compiles, shards or checkpoints others."""
    return _plain_class(module) is nn.Module or _tokenwise(_plain_class(module))


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance's forward is not that of its class. Hooks of accelerate and the compiler put one there."""
    return "forward" in vars(module) and "_hf_hook" not in vars(module) and _plain_class(module) is not nn.Module


def _plain_class(module: nn.Module) -> type:
    return next(c for c in type(module).__mro__ if not c.__module__.startswith(_TRANSPARENT))


def _tokenwise(cls: type) -> bool:
    return cls in _TOKENWISE or (cls not in _MIXING and cls.__module__.startswith(_TRUSTED))


def _mixes_known(module: nn.Module) -> bool:
    """Whether a module mixes tokens in a way that has an adapter."""
    return type(module).__name__ in METHODS or any(calls(module, FUNCTIONS))
