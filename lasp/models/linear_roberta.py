"""Linear-RoBERTa: an encoder of Linear-Llama3's blocks, trained to restore masked tokens (LASP-2, section 4).

Like RoBERTa it reads a whole text at once; unlike RoBERTa its positions are rotary, so that no length is too long.
"""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput

from lasp.models.blocks import Exchanging, build_blocks, take_cut, token_mask, tokens_of
from lasp.models.config import MixerConfig
from lasp.parallel.batch import AGREEMENT
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.loss import cross_entropy


class LinearRobertaConfig(MixerConfig):
    """Configuration of a Linear-RoBERTa; by default of the size of RoBERTa-base.

    Args:
        mixer, pattern: as for `MixerConfig`, of mixers that see later tokens: "linear" and "softmax".
        rope_theta: base of the rotary positions of every layer, unless its mixer_options say otherwise.
        **kwargs: as for `MixerConfig`.

    Raises:
        ValueError: what `MixerConfig` raises.
    """

    model_type = "linear_roberta"
    causal: ClassVar[bool] = False

    vocab_size: int = 50265
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mixer: str = "linear"
    tie_word_embeddings: bool = True
    rope_theta: float = 10_000.0

    def options_of(self, name: str) -> dict[str, Any]:
        """The further keywords of the mixer called `name`."""
        return {"rope_theta": self.rope_theta, **super().options_of(name)}


class LinearRobertaPreTrainedModel(Exchanging, PreTrainedModel):
    """What transformers wants to know of the family."""

    config_class = LinearRobertaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    takes_group = True  # asked by lasp.parallelize, which binds one
    _no_split_modules = ("Block",)


class LinearRobertaModel(LinearRobertaPreTrainedModel):
    """The blocks without the head: tokens to hidden states."""

    def __init__(self, config: LinearRobertaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = build_blocks(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        group: SequenceGroup | None = None,
        cut: Cut | None = None,
    ) -> BaseModelOutput:
        """Arguments and errors as for `LinearRobertaForMaskedLM.forward`; last_hidden_state is [B, T, hidden]."""
        told = {"attention_mask": attention_mask}
        cut = take_cut(self, tokens_of(input_ids, inputs_embeds), group, cut, cu_seqlens, told)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask = token_mask(attention_mask, x, 0, cut)
        for block in self.layers:
            x, _ = block(x, position_ids=position_ids, attention_mask=mask, cut=cut)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class MaskedTokenHead(nn.Module):
    """RoBERTa's way from hidden states to the logits' features: norm(gelu(dense(x))), [..., hidden] to the same."""

    def __init__(self, config: LinearRobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x)))


class LinearRobertaForMaskedLM(LinearRobertaPreTrainedModel):
    """Linear-RoBERTa with its head for masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (read per class by transformers)
    accepts_loss_kwargs = True  # asked by Trainer: the loss divides by num_items_in_batch

    def __init__(self, config: LinearRobertaConfig) -> None:
        super().__init__(config)
        self.model = LinearRobertaModel(config)
        self.head = MaskedTokenHead(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        group: SequenceGroup | None = None,
        cut: Cut | None = None,
        agreement: Tensor | None = None,
    ) -> MaskedLMOutput | tuple:
        """Logits of the tokens themselves, and the loss when labels are given.

        With a group, every [B, T] argument holds this rank's T tokens (`lasp.shard_batch(..., shift=False)` cuts them).

        Args:
            input_ids: [B, T], some of them masked; or inputs_embeds: [B, T, hidden].
            attention_mask: [B, T]; zeros are padding, which no token sees. With a group, either every rank gives one or
                none does.
            position_ids: [B or 1, T], positions in the document (default: counted from 0).
            labels: [B, T], what each token was, -100 where it is not to be restored.
            shift_labels: another name of labels: `lasp.shard_batch` returns both, here of the same, unshifted values.
            cu_seqlens: [N + 1], ends of packed documents in the whole sequence (B = 1).
            num_items_in_batch: what to divide the loss by (default: valid labels of the whole sequence).
            return_dict: False for a tuple.
            group: ranks that hold the rest of the sequence.
            cut: of the batch (`lasp.shard_batch`), in the place of group and cu_seqlens: nothing has to be agreed then.
            agreement: what a batch from a worker process carries (`lasp.ShardedCollator`), compared here.

        Returns:
            loss (scalar) and logits [B, T, vocab]. The loss is the mean over the whole sequence, with the gradient of
            this rank's part of it (`lasp.cross_entropy`).

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a mask of another shape; and what the mixers and
                `lasp.cross_entropy` raise.
        """
        targets = shift_labels if labels is None else labels
        told = {"attention_mask": attention_mask, "labels": targets, AGREEMENT: agreement}
        cut = take_cut(self, tokens_of(input_ids, inputs_embeds), group, cut, cu_seqlens, told)
        outputs = self.model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cut=cut,
        )
        logits = self.lm_head(self.head(outputs.last_hidden_state))
        loss = None
        if targets is not None:
            loss = cross_entropy(logits, targets, cut=cut, num_items=num_items_in_batch)
        result = MaskedLMOutput(loss=loss, logits=logits)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()
