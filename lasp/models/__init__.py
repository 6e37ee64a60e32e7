"""Hugging Face models whose token mixers are sequence-parallel (needs the `hf` extra).

Linear-Llama3 is a language model, Linear-RoBERTa an encoder.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from lasp.models.cache import RecurrentCache
from lasp.models.config import PRESETS, LinearLlamaConfig
from lasp.models.linear_llama import LinearLlamaForCausalLM, LinearLlamaModel
from lasp.models.linear_roberta import LinearRobertaConfig, LinearRobertaForMaskedLM, LinearRobertaModel

__all__ = [
    "PRESETS",
    "LinearLlamaConfig",
    "LinearLlamaForCausalLM",
    "LinearLlamaModel",
    "LinearRobertaConfig",
    "LinearRobertaForMaskedLM",
    "LinearRobertaModel",
    "RecurrentCache",
    "register_auto_classes",
]


def register_auto_classes() -> None:
    """Let the Auto classes of transformers load the models of this package from their folders; done at import."""
    AutoConfig.register(LinearLlamaConfig.model_type, LinearLlamaConfig, exist_ok=True)
    AutoModel.register(LinearLlamaConfig, LinearLlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(LinearLlamaConfig, LinearLlamaForCausalLM, exist_ok=True)
    AutoConfig.register(LinearRobertaConfig.model_type, LinearRobertaConfig, exist_ok=True)
    AutoModel.register(LinearRobertaConfig, LinearRobertaModel, exist_ok=True)
    AutoModelForMaskedLM.register(LinearRobertaConfig, LinearRobertaForMaskedLM, exist_ok=True)


register_auto_classes()
