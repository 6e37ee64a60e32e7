"""Linear-Llama3: Llama's blocks around linear mixers, as a Hugging Face model (LASP-2, arXiv 2502.07563, section 4).

Hybrids have softmax attention in some layers (`pattern="LLLN"`: in every fourth). Parallelism enters through one
argument, `cut`, on its way down to the mixers; nothing else here knows of ranks. Generation carries a
`RecurrentCache`: one state per layer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lasp.layers import State
from lasp.models.blocks import (
    Exchanging,
    bounded_layers,
    build_blocks,
    take_cut,
    token_mask,
    tokens_of,
    told_bounds,
)
from lasp.models.cache import NAME, NAMES, RecurrentCache, one_cache
from lasp.models.config import LinearLlamaConfig
from lasp.parallel.batch import AGREEMENT
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.loss import cross_entropy

IGNORE_INDEX = -100


class LinearLlamaPreTrainedModel(Exchanging, PreTrainedModel):
    """What transformers wants to know of the family."""

    config_class = LinearLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _skip_keys_device_placement = NAMES
    takes_group = True  # asked by lasp.parallelize, which binds one
    _is_stateful = True  # generate() then refuses what would have to take tokens back


class LinearLlamaModel(LinearLlamaPreTrainedModel):
    """The blocks without the head: tokens to hidden states."""

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = build_blocks(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        bounded = bounded_layers(self.layers)
        # Of the whole model, not of a layer: each layer's bound depends on those of all.
        self.lower_bounds = nn.Parameter(torch.zeros(len(bounded), bounded[0].k_proj.out_features)) if bounded else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        group: SequenceGroup | None = None,
        cut: Cut | None = None,
        cache: RecurrentCache | None = None,
    ) -> BaseModelOutputWithPast:
        """Arguments and errors as for `LinearLlamaForCausalLM.forward`; last_hidden_state is [B, T, hidden]."""
        before = one_cache(past_key_values, cache)
        told = {"attention_mask": attention_mask, "past_key_values": before}
        cut = take_cut(self, tokens_of(input_ids, inputs_embeds), group, cut, cu_seqlens, told)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        after = self._cache(before, use_cache, cut)
        past = 0 if before is None else before.seen_tokens
        if position_ids is None and past:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        mask = token_mask(attention_mask, x, past, cut)

        bounds = {} if self.lower_bounds is None else told_bounds(self.layers, self.lower_bounds)
        states: list[State | None] = []
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: tuple[Tensor, ...] = ()
        for index, block in enumerate(self.layers):
            if wanted:
                hidden_states += (x,)
            x, state = block(
                x,
                position_ids=position_ids,
                attention_mask=mask,
                state=None if before is None else before.states[index],
                output_final_state=after is not None,
                cut=cut,
                **bounds.get(index, {}),
            )
            states.append(state)
        if after is not None:
            after.update(states, new_tokens=x.shape[1])
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden_states, x) if wanted else None,
            **{NAME: after},
        )

    def _cache(self, past: RecurrentCache | None, use_cache: bool | None, cut: Cut) -> RecurrentCache | None:
        """The cache that takes this call's states, or None."""
        plain = not cut.packed and cut.size == 1
        if (past is not None or use_cache) and not plain:
            raise ValueError("a cache continues one text on one device: it takes neither cu_seqlens nor a group")
        if past is not None and len(past.states) != len(self.layers):
            raise ValueError(f"past_key_values has {len(past.states)} layers, the model {len(self.layers)}")
        if use_cache is None:
            use_cache = past is not None or (self.config.use_cache and not self.training and plain)
        if not use_cache:
            return None
        return RecurrentCache(len(self.layers)) if past is None else past


class LinearLlamaForCausalLM(LinearLlamaPreTrainedModel, GenerationMixin):
    """Linear-Llama3 with its language-modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (read per class by transformers)
    accepts_loss_kwargs = True  # asked by Trainer: the loss divides by num_items_in_batch

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config)
        self.model = LinearLlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then leaves the cache to forward()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        group: SequenceGroup | None = None,
        cut: Cut | None = None,
        agreement: Tensor | None = None,
        cache: RecurrentCache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next tokens, and the loss when targets are given.

        With a group, every [B, T] argument holds this rank's T tokens (`lasp.shard_batch` cuts them).

        Args:
            input_ids: [B, T]; or inputs_embeds: [B, T, hidden].
            attention_mask: [B, T], or [B, past + T] after `past` cached tokens; zeros are padding, which changes no
                state wherever it stands. With a group, either every rank gives one or none does.
            position_ids: [B or 1, T], positions in the document (default: counted from the cached tokens on).
            labels: [B, T], the tokens themselves, shifted here; only without a group. A document's last token has no
                target.
            shift_labels: [B, T], the target of each token, used as it is. -100 marks tokens without one.
            cu_seqlens: [N + 1], ends of packed documents in the whole sequence (B = 1).
            past_key_values: the states to continue from; advanced in place unless use_cache is False.
            use_cache: whether to return the states (default: `config.use_cache`, in evaluation mode on one device and
                without cu_seqlens).
            logits_to_keep: how many logits to compute, from the end (0: all), or the indices of their tokens.
            num_items_in_batch: what to divide the loss by (default: valid targets of the whole sequence).
            output_hidden_states: whether to return the embeddings and the output of every block.
            output_attentions: must not be True: no attention weights are kept.
            return_dict: False for a tuple.
            group: ranks that hold the rest of the sequence.
            cut: of the batch (`lasp.shard_batch`), in the place of group and cu_seqlens: nothing has to be agreed then.
            agreement: what a batch from a worker process carries (`lasp.ShardedCollator`), compared here.
            cache: what transformers 5.24 calls past_key_values; only one of the two.

        Returns:
            loss (scalar), logits [B, T or logits_to_keep, vocab], past_key_values (cache, since transformers 5.24),
            hidden_states. The loss is the mean over the whole sequence, with the gradient of this rank's part of it
            (`lasp.cross_entropy`).

        Raises:
            ValueError: labels without shift_labels under a group, targets with logits_to_keep, not exactly one of
                input_ids and inputs_embeds, a mask of another shape, a cache of another model or together with
                cu_seqlens or a group, output_attentions; and what the mixers raise.
        """
        if output_attentions:
            raise ValueError("output_attentions: linear mixers have no attention weights, and softmax ones keep none")
        told = {"attention_mask": attention_mask, "past_key_values": one_cache(past_key_values, cache)}
        told |= {"labels": labels, "shift_labels": shift_labels, AGREEMENT: agreement}
        cut = take_cut(self, tokens_of(input_ids, inputs_embeds), group, cut, cu_seqlens, told)
        targets = next_tokens(labels, cut) if shift_labels is None else shift_labels
        if targets is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"a loss needs the logits of every token, got logits_to_keep={logits_to_keep}")
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            cut=cut,
            cache=cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if targets is not None:
            loss = cross_entropy(logits, targets, cut=cut, ignore_index=IGNORE_INDEX, num_items=num_items_in_batch)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{NAME: outputs.get(NAME)},
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()


def next_tokens(labels: Tensor | None, cut: Cut) -> Tensor | None:
    """Targets [B, T] of the tokens `labels` [B, T]: each one's successor in its document, -100 where there is none."""
    if labels is None:
        return None
    if cut.size > 1:
        raise ValueError("labels cannot be shifted across ranks: give shift_labels, as lasp.shard_batch does")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cut.bounds is not None:
        targets[:, [stop - 1 for stop in cut.bounds[1:] if stop > 0]] = IGNORE_INDEX
    return targets
