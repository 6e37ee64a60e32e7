"""Which models are refused: all that were not run and compared, parameter by parameter, with one device."""

from __future__ import annotations

from typing import Any

from torch import nn

from lasp.wrap.modules import METHODS
from lasp.wrap.recurrences import FUNCTIONS
from lasp.wrap.swap import calls

# Folders of transformers/models whose causal language models the tests compare.
VERIFIED = (
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "gemma2", "gemma3", "gpt_oss", "granitemoehybrid", "jamba",
    "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "llama", "mamba", "mamba2", "minimax", "mistral", "mixtral",
    "nemotron_h", "olmo_hybrid", "qwen2", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
    "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
)  # fmt: skip
# Modules of torch that treat every token by itself.
_TOKENWISE = {
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout,
    nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict,
}  # fmt: skip
_TRUSTED = ("transformers.activations", "transformers.pytorch_utils", "torch.nn.modules.activation", "peft.tuners.lora")
_MIXING = {nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d}  # among torch's activations


def check_model(model: Any) -> None:
    """Raises ValueError where the model, a module in it or an option of it is not known to be exact."""
    name, folder = type(model).__name__, family(model)
    if folder not in VERIFIED:
        raise ValueError(
            f"{name} ({type(model).__module__}) is not verified: one of its modules may mix tokens unseen: "
            f"{', '.join(sorted({type(m).__name__ for m in model.modules()}))}. Verified are {', '.join(VERIFIED)}. "
            "It needs an adapter in lasp/wrap where it mixes tokens, a line in lasp/wrap/refusal.py, and lasp.verify"
        )
    if not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(f"{name}: only causal language models are sequence-parallel")
    foreign = [f"{path} ({type(m).__qualname__})" for path, m in model.named_modules() if not _known(model, path, m)]
    if foreign:
        raise ValueError(
            f"modules that may mix tokens and are not known in {name}: {', '.join(foreign)}. Each needs an adapter in "
            "lasp/wrap; what treats every token by itself can be built from torch.nn's layers"
        )
    if getattr(model, "use_kernels", False):
        raise ValueError("use_kernels=True replaces whole modules; load the model without it")


def family(module: Any) -> str | None:
    """The folder of transformers/models that a module's class comes from."""
    parts = type(module).__module__.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] else None


def _known(model: nn.Module, path: str, module: nn.Module) -> bool:
    cls = type(module)
    if family(module) == family(model) or cls in _TOKENWISE:
        return "Indexer" not in cls.__name__
    if cls not in _MIXING and cls.__module__.startswith(_TRUSTED):
        return True
    # Convolutions and the like belong to the mixer around them, if that is one that we know.
    mixer = model.get_submodule(path.rpartition(".")[0])
    return cls.__module__.startswith("torch.nn.") and mixes_known(mixer) and family(mixer) == family(model)


def mixes_known(module: nn.Module) -> bool:
    """Whether a module mixes tokens in a way that has an adapter."""
    return type(module).__name__ in METHODS or any(calls(module, FUNCTIONS))
