"""What the models of this package share: blocks of a mixer and a feed-forward, and the ways into them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lasp.kernels.documents import document_bounds
from lasp.layers import Mixer, State, mixer_class
from lasp.layers.hgrn2 import Hgrn2, rising_bounds
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.softmax import SoftmaxAttention
from lasp.models.config import MixerConfig
from lasp.parallel.batch import AGREEMENT, check_ids, check_tokens, read_agreement
from lasp.parallel.call import Arguments, begin_call, modes
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.parameters import outline


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
    mixer = build(
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
    _choose(mixer, config.scan, config.attention)
    return mixer


def bounded_layers(blocks: nn.ModuleList) -> list[Hgrn2]:
    """The mixers whose lower bounds are learned together."""
    mixers = (block.mixer for block in blocks)
    return [mixer for mixer in mixers if isinstance(mixer, Hgrn2) and mixer.learned_bounds]


def told_bounds(blocks: nn.ModuleList, logits: Tensor) -> dict[int, dict[str, Tensor]]:
    """What to tell which block, given the logits [L, width] of their bounds."""
    places = [mixer.layer_idx for mixer in bounded_layers(blocks)]
    bounds = rising_bounds(logits).unbind()
    return {place: {"lower_bound": bound} for place, bound in zip(places, bounds, strict=True)}


class Exchanging:
    """A model of mixers in which one can choose how the ranks exchange, after it was made."""

    def choose_exchange(self: Any, scan: str = "auto", attention: str = "auto") -> None:
        """Let all mixers use this scan and this method of softmax attention; "auto": what the configuration says."""
        for module in self.modules():
            if isinstance(module, Mixer):
                _choose(
                    module,
                    self.config.scan if scan == "auto" else scan,
                    self.config.attention if attention == "auto" else attention,
                )


def _choose(mixer: Mixer, scan: Any, attention: Any) -> None:
    if isinstance(mixer, RecurrentMixer):
        mixer.scan = scan
    elif isinstance(mixer, SoftmaxAttention):
        mixer.method = attention


def tokens_of(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The one of both that is given, [B, T] or [B, T, hidden].

    Raises:
        ValueError: not exactly one of them.
    """
    if input_ids is None and inputs_embeds is not None:
        return inputs_embeds
    if input_ids is None or inputs_embeds is not None:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    return input_ids


def take_cut(
    model: PreTrainedModel,
    tokens: Tensor,
    group: SequenceGroup | None,
    cut: Cut | None,
    cu_seqlens: Tensor | None,
    told: Mapping[str, Any],
) -> Cut:
    """The cut that a model runs with: the one it is given, or its own over a group, on which the ranks agree.

    tokens: [B, T] or [B, T, hidden]. told: arguments of which all ranks must give the same ones; an "agreement" among
    them, of a batch from a worker process, is compared too. A batch of `lasp.shard_batch` has cut and cu_seqlens, which
    must be those of the cut; with the group beside it the ranks agree on the model as well.

    Raises:
        ValueError: on every rank, where they differ or the documents are none; for a cut that does not fit.
    """

    def check() -> Arguments:
        check_tokens(tokens)
        if isinstance(cut, Cut):
            cut.check_mask(told.get("attention_mask"))
            if cu_seqlens is not None:
                cut.check_documents(cu_seqlens)
        if isinstance(cut, Cut) or (group is not None and group.size > 1):
            check_ids(tokens, getattr(model.get_input_embeddings(), "num_embeddings", None), cut)
        if cut is not None and group is not None and not group.cuts_as(cut.group):
            raise ValueError("the batch was cut over another group than the model is given")
        given = {name: value for name, value in told.items() if value is not None}
        if AGREEMENT in given and cut is None and group is None:
            raise ValueError("this batch was cut in a worker process: give the model its group, or lasp.parallelize it")
        fields = read_agreement(given.get(AGREEMENT)) | {"arguments": sorted(given), "batch": tokens.shape[0]}
        if group is not None and group.size > 1:
            fields |= {"model": outline(model), **modes()}
        bounds = None if cu_seqlens is None else document_bounds(cu_seqlens)
        return Arguments(fields, tokens.shape[1], bounds if cut is None else cut.bounds)

    own = None if group is not None else cut
    found = begin_call(group, type(model).__name__, check, own)()
    if cut is not None and found.lengths != cut.lengths:
        raise ValueError(f"the batch was cut as {list(cut.lengths)}, the ranks hold {list(found.lengths)} tokens")
    return found if cut is None else cut


def token_mask(attention_mask: Tensor | None, x: Tensor, past: int, cut: Cut) -> Tensor | None:
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
    return None if cut.size == 1 and mask.all() else mask
