"""The model of a run: what its configuration names, checked without memory for weights, and built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lasp.linearize.convert import follow, read
from lasp.memory.checkpoints import checkpoint_activations
from lasp.memory.fused_loss import fuse_loss
from lasp.memory.parts import layers_of
from lasp.memory.tiles import tile_mlp
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.train.config import LoraConfig, MemoryConfig
from lasp.train.data.tokenizer import Tokenizer
from lasp.wrap.refusal import check_model


@dataclass(frozen=True)
class ModelPlan:
    """A model that can be built, on every rank alike."""

    config: Any
    """Its configuration, of transformers; the vocabulary holds the tokenizer's."""

    weights: str | None
    """The folder or name on the hub whose weights it begins with; None for random ones."""

    lora: LoraConfig
    """The adapters around it."""

    @classmethod
    def make(cls, fields: dict[str, Any], lora: LoraConfig, tokenizer: Tokenizer) -> Self:
        """From the fields of `config.model`. ValueError for a model that cannot be, is not verified to be exact with
        its sequences cut, or has a smaller vocabulary than the tokenizer."""
        fields = dict(fields)
        kind, name = fields.pop("kind", "linear_llama"), fields.pop("name", None)
        from_scratch = fields.pop("from_scratch", False)
        if not isinstance(from_scratch, bool):
            raise ValueError(f"model.from_scratch must be true or false, got {from_scratch!r}")
        if name is None:
            if kind != "linear_llama" or from_scratch:
                raise ValueError(f'model.kind must be "linear_llama", or model.name name another, got {kind!r}')
            config = _own_config(fields, tokenizer)
        else:
            config = _named_config(name, from_scratch, fields)
        plan = cls(config, None if name is None or from_scratch else str(name), lora)
        plan._check()
        if (size := config.get_text_config().vocab_size) < tokenizer.vocab_size:
            raise ValueError(f"model.vocab_size={size} is less than the tokenizer's {tokenizer.vocab_size}")
        return plan

    def build(self, seed: int, dtype: torch.dtype) -> nn.Module:
        """The model before its first step, the same on every rank and, but for rounding, in every dtype."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self._from_scratch() if self.weights is None else self._pretrained(self.weights)
            return self._adapted(model.to(dtype)).train()

    def skeleton(self, dtype: torch.dtype = torch.float32) -> Any:
        """The same without memory for its weights, and without values."""
        with torch.device("meta"):
            return self._adapted(self._from_scratch().to(dtype)).train()

    def fresh(self) -> Any:
        """The model with random weights, on torch's default device."""
        return self._adapted(self._from_scratch())

    def _check(self) -> None:
        try:
            model = self.skeleton()
        except Exception as error:  # torch, transformers and peft have their own ways to reject sizes
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"no model can be built of {type(self.config).__name__}: {told}") from error
        check_model(model.get_base_model() if self.lora.rank else model)

    def _from_scratch(self) -> Any:
        from transformers import AutoModelForCausalLM

        if isinstance(self.config, LinearLlamaConfig):
            return LinearLlamaForCausalLM(self.config)
        return follow(AutoModelForCausalLM.from_config(self.config))

    def _pretrained(self, folder: str) -> Any:
        try:
            return read(folder, dtype=torch.float32)
        except Exception as error:  # so have readers of weights
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"the weights of model.name={folder!r} cannot be read: {told}") from error

    def _adapted(self, model: Any) -> Any:
        if not self.lora.rank:
            return model
        import peft

        options = {"r": self.lora.rank, "lora_alpha": self.lora.alpha, "target_modules": self.lora.target_modules}
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def pull(model: Any, levers: MemoryConfig) -> Any:
    """A parallelised model with these levers on memory, in place. ValueError where one does not fit the model."""
    if levers.fuse_loss:
        fuse_loss(model)
    if levers.mlp_tile is not None:
        tile_mlp(model, levers.mlp_tile)
    if levers.checkpoint_every is not None:
        checkpoint_activations(model, every=levers.checkpoint_every, offload=levers.offload)
    return model


def compile_layers(model: Any) -> Any:
    """A model whose layers are compiled when they are called first, in place: one program for layers of a kind."""
    for layer in layers_of(model):
        layer.compile()
    return model


def _own_config(fields: dict[str, Any], tokenizer: Tokenizer) -> LinearLlamaConfig:
    fields = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.end, **fields}
    preset = fields.pop("preset", None)
    # transformers would take any keyword for a new field.
    if unknown := sorted(fields.keys() - LinearLlamaConfig.__dataclass_fields__.keys()):
        raise ValueError(f"unknown fields of the model: {', '.join(unknown)}")
    try:
        return LinearLlamaConfig.preset(preset, **fields) if preset else LinearLlamaConfig(**fields)
    except Exception as error:  # transformers has its own ways to reject values
        raise ValueError(f"no model can be built from {fields}: {error}") from error


def _named_config(name: Any, from_scratch: bool, fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    if not isinstance(name, str) or not name:
        raise ValueError(f"model.name must name a folder or a model of the hub, got {name!r}")
    if fields and not from_scratch:
        raise ValueError(
            f"model.name={name!r} with its weights has its own {', '.join(sorted(fields))}: model.from_scratch = true "
            "takes others, and random weights"
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"model.name={name!r} is a folder without a config.json")
    try:
        known = AutoConfig.from_pretrained(name)
        if unknown := sorted(fields.keys() - known.to_dict().keys()):
            raise ValueError(f"unknown fields of the model: {', '.join(unknown)}")
        return AutoConfig.from_pretrained(name, **fields) if fields else known
    except Exception as error:  # so have readers of configurations
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the configuration of model.name={name!r} cannot be read: {told}") from error
