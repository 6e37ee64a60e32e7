"""What the models of this package share: blocks of a mixer and a feed-forward, and the ways into them."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lasp.layers import Mixer, State, mixer_class
from lasp.models.config import MixerConfig
from lasp.parallel.group import SequenceGroup


class SwiGLU(nn.Module):
    """Llama's feed-forward: down(silu(gate(x)) * up(x)), [..., hidden] to [..., hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x)); the keywords are those of `Mixer.forward`."""

    def __init__(self, config: MixerConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, **context: Any) -> tuple[Tensor, State | None]:
        mixed, final_state = self.mixer(self.input_layernorm(x), **context)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), final_state


def build_blocks(config: MixerConfig) -> nn.ModuleList:
    """All blocks of a model.

    Raises:
        ValueError: what the mixers raise.
    """
    return nn.ModuleList(Block(config, layer_idx) for layer_idx in range(config.num_hidden_layers))


def build_mixer(config: MixerConfig, layer_idx: int) -> Mixer:
    """The mixer of one layer.

    Raises:
        ValueError: what the mixer raises.
    """
    name = config.layer_mixers[layer_idx]
    build: Callable[..., Mixer] = mixer_class(name)
    return build(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        causal=config.causal,
        layer_idx=layer_idx,
        num_layers=config.num_hidden_layers,
        **config.options_of(name),
    )


def embed(table: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Embeddings [B, T, hidden] of input_ids [B, T], unless they are given.

    Raises:
        ValueError: not exactly one of both.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    return table(input_ids) if inputs_embeds is None else inputs_embeds


def is_parallel(group: SequenceGroup | None) -> bool:
    """Whether other ranks hold a part of the sequence."""
    return group is not None and group.size > 1


def token_mask(attention_mask: Tensor | None, x: Tensor, past: int, group: SequenceGroup | None) -> Tensor | None:
    """Which tokens of x [B, T, hidden] are not padding, bool [B, T]; None when all are."""
    if attention_mask is None:
        return None
    batch, length = x.shape[:2]
    if attention_mask.shape not in {(batch, length), (batch, past + length)}:
        raise ValueError(
            f"attention_mask must have shape {(batch, length)} or, with {past} cached tokens,"
            f" {(batch, past + length)}, got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    # Padding turns a decay per head into one per token. All ranks must do so alike, so a rank may not look at its own.
    return None if not is_parallel(group) and mask.all() else mask
