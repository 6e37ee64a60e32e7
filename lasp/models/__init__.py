"""Linear-Llama3, a Hugging Face model whose token mixers are sequence-parallel (needs the `hf` extra)."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lasp.models.cache import RecurrentCache
from lasp.models.config import PRESETS, LinearLlamaConfig
from lasp.models.linear_llama import LinearLlamaForCausalLM, LinearLlamaModel

__all__ = [
    "PRESETS",
    "LinearLlamaConfig",
    "LinearLlamaForCausalLM",
    "LinearLlamaModel",
    "RecurrentCache",
    "register_auto_classes",
]


def register_auto_classes() -> None:
    """Let `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` load the models of this package from their folders."""
    AutoConfig.register(LinearLlamaConfig.model_type, LinearLlamaConfig, exist_ok=True)
    AutoModel.register(LinearLlamaConfig, LinearLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(LinearLlamaConfig, LinearLlamaForCausalLM, exist_ok=True)
