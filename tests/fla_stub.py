"""Models whose layers call what those of flash-linear-attention call, under its names and in its classes' order.

Every function computes token by token in PyTorch what the kernel's documentation says.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

HEADS, DIM, VOCABULARY = 2, 4, 97
IN_KERNEL = dict.fromkeys(("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "use_qk_l2norm_in_kernel"), True)


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None) -> tuple[Tensor, None]:
    """Every rule at once: decay g [B, T, H, K or 1], then erase with beta [B, T, H], or not, and write."""
    state = v.new_zeros(*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1])
    rows = []
    for t in range(v.shape[1]):
        state = state * g[:, t].exp().unsqueeze(-1)
        value = v[:, t]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t].unsqueeze(-1) * value.unsqueeze(-2)
        rows.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * k.shape[-1] ** -0.5, state))
    return torch.stack(rows, 1), None


def chunk_gla(q, k, v, g, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None):
    return recurrence(q, k, v, g)


def fused_recurrent_gla(q, k, v, gk=None, initial_state=None, output_final_state=False, cu_seqlens=None):
    return recurrence(q, k, v, gk)


def l2norm(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def chunk_delta_rule(q, k, v, beta, initial_state=None, use_qk_l2norm_in_kernel=False, cu_seqlens=None):
    assert use_qk_l2norm_in_kernel
    return recurrence(l2norm(q), l2norm(k), v, torch.zeros_like(k), beta)


def chunk_gated_delta_rule(q, k, v, g, beta, A_log, dt_bias, cu_seqlens=None, allow_neg_eigval=False, **options):
    assert options == IN_KERNEL
    g = -A_log.exp() * F.softplus(g + dt_bias)
    return recurrence(l2norm(q), l2norm(k), v, g.unsqueeze(-1), (1 + allow_neg_eigval) * beta.sigmoid())


def chunk_retention(q, k, v, cu_seqlens=None):
    decay = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=q.dtype))
    return recurrence(q, k, v, decay.log().view(HEADS, 1).expand(q.shape))


def chunk_kda(q, k, v, g, beta, A_log, dt_bias, cu_seqlens=None, lower_bound=None, **options):
    assert options == IN_KERNEL
    g, rate = g + dt_bias.view(HEADS, DIM), A_log.exp().view(HEADS, 1)
    g = -rate * F.softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()
    return recurrence(l2norm(q), l2norm(k), v, g, beta.sigmoid())


def causal_conv1d(x, weight, bias=None, activation=None, backend=None, cu_seqlens=None):
    y = F.conv1d(x.mT, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    y = y[..., : x.shape[1]].mT
    return (y if activation is None else F.silu(y)), None


def unpad_hidden_states(hidden_states, cu_seqlens, attention_mask, q_len):
    return hidden_states, None, cu_seqlens


class ShortConvolution(nn.Conv1d):
    __module__ = "fla.modules.stub"

    def __init__(self, size: int) -> None:
        super().__init__(size, size, 4, padding=3, groups=size)
        self.activation = "silu"

    def forward(self, x, mask=None, cache=None, output_final_state=False, cu_seqlens=None):
        return causal_conv1d(x, self.weight.squeeze(1), self.bias, self.activation, cu_seqlens=cu_seqlens)


class Layer(GradientCheckpointingLayer):
    """What the four layers share: projections, a short convolution, gates."""

    lower_bound: float | None = None

    def __init__(self) -> None:
        super().__init__()
        size = HEADS * DIM
        self.project, self.gates, self.beta = nn.Linear(size, 3 * size), nn.Linear(size, size), nn.Linear(size, HEADS)
        self.conv1d, self.o_proj = ShortConvolution(3 * size), nn.Linear(size, size)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(HEADS)), nn.Parameter(torch.ones(size))

    def queries_keys_values(self, x, cu_seqlens):
        mixed, _ = self.conv1d(x=self.project(x), cache=None, output_final_state=False, cu_seqlens=cu_seqlens)
        return mixed.unflatten(-1, (3, HEADS, DIM)).unbind(2)

    def channel_gates(self, x):
        return self.gates(x).unflatten(-1, (HEADS, DIM))


class GatedLinearAttention(Layer):
    __module__ = "fla.layers.stub"

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        length = hidden_states.shape[1]
        x, _, cu_seqlens = unpad_hidden_states(hidden_states, kwargs.get("cu_seqlens"), attention_mask, length)
        q, k, v = self.queries_keys_values(x, cu_seqlens)
        g = F.logsigmoid(self.channel_gates(x))
        if length <= 12:
            o, _ = fused_recurrent_gla(q=q, k=k, v=v, gk=g, output_final_state=use_cache, cu_seqlens=cu_seqlens)
        else:
            o, _ = chunk_gla(q=q, k=k, v=v, g=g, initial_state=None, state_v_first=True, cu_seqlens=cu_seqlens)
        return self.o_proj(o.flatten(2)), None, past_key_values


class DeltaNet(Layer):
    __module__ = "fla.layers.stub"

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        length = hidden_states.shape[1]
        x, _, cu_seqlens = unpad_hidden_states(hidden_states, kwargs.get("cu_seqlens"), attention_mask, length)
        q, k, v = self.queries_keys_values(x, cu_seqlens)
        beta = self.beta(x).sigmoid()
        o, _ = chunk_delta_rule(q=q, k=k, v=v, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=cu_seqlens)
        return self.o_proj(o.flatten(2)), None, past_key_values


class GatedDeltaNet(Layer):
    __module__ = "fla.layers.stub"

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        length = hidden_states.shape[1]
        x, _, cu_seqlens = unpad_hidden_states(
            hidden_states=hidden_states,
            cu_seqlens=kwargs.get("cu_seqlens"),
            attention_mask=attention_mask,
            q_len=length,
        )
        if cu_seqlens is None:  # all three at once
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            mixed, _ = causal_conv1d(x=self.project(x), weight=weight, bias=bias, activation="silu", backend="triton")
            q, k, v = mixed.unflatten(-1, (3, HEADS, DIM)).unbind(2)
        else:
            q, k, v = self.queries_keys_values(x, cu_seqlens)
        gates = {"A_log": self.A_log, "dt_bias": self.dt_bias[:HEADS], "g": self.gates(x)[..., :HEADS]}
        o, _ = chunk_gated_delta_rule(
            q=q, k=k, v=v, beta=self.beta(x), **gates, **IN_KERNEL, allow_neg_eigval=True, cu_seqlens=cu_seqlens
        )
        return self.o_proj(o.flatten(2)), None, past_key_values


class KimiDeltaAttention(Layer):
    __module__ = "fla.layers.stub"

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        length = hidden_states.shape[1]
        x, _, cu_seqlens = unpad_hidden_states(hidden_states, kwargs.get("cu_seqlens"), attention_mask, length)
        q, k, v = self.queries_keys_values(x, cu_seqlens)
        gates = {"A_log": self.A_log, "dt_bias": self.dt_bias, "g": self.channel_gates(x)}
        o, _ = chunk_kda(
            q=q, k=k, v=v, beta=self.beta(x), **gates, **IN_KERNEL, lower_bound=self.lower_bound, cu_seqlens=cu_seqlens
        )
        return self.o_proj(o.flatten(2)), None, past_key_values


class RotaryEmbedding(nn.Module):
    __module__ = "fla.modules.stub"
    dim, base, scale, interleaved = DIM, 10000.0, None, False

    def forward(self, q, k, seqlen_offset=0, max_seqlen=None, cu_seqlens=None):
        angles = torch.arange(q.shape[1], dtype=q.dtype).outer(torch.tensor([1.0, 0.01], dtype=q.dtype)).unsqueeze(1)
        turned = torch.polar(torch.ones_like(angles), angles)
        pairs = (torch.complex(*x.chunk(2, -1)) * turned for x in (q, k))
        return tuple(torch.cat([x.real, x.imag], -1) for x in pairs)


class MultiScaleRetention(Layer):
    __module__ = "fla.layers.stub"

    def __init__(self) -> None:
        super().__init__()
        self.rotary = RotaryEmbedding()

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, **kwargs):
        length = hidden_states.shape[1]
        x, _, cu_seqlens = unpad_hidden_states(hidden_states, kwargs.get("cu_seqlens"), attention_mask, length)
        q, k, v = self.queries_keys_values(x, cu_seqlens)
        q, k = self.rotary(q, k, seqlen_offset=0, max_seqlen=length, cu_seqlens=cu_seqlens)
        o, _ = chunk_retention(q=q, k=k, v=v, cu_seqlens=cu_seqlens)
        return self.o_proj(o.flatten(2)), None, past_key_values


class Model(PreTrainedModel, GenerationMixin):
    """A layer behind an embedding, and the loss where flash-linear-attention's models compute it."""

    config_class = PretrainedConfig
    supports_gradient_checkpointing = True
    layer: type[Layer]

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embeddings, self.attn = nn.Embedding(VOCABULARY, HEADS * DIM), self.layer()
        self.lm_head, self.criterion = nn.Linear(HEADS * DIM, VOCABULARY), None

    def forward(
        self, input_ids=None, attention_mask=None, labels=None, use_cache=None, num_items_in_batch=None, **kwargs
    ):
        x = self.embeddings(input_ids)
        x = x + self.attn(x, attention_mask=attention_mask, use_cache=use_cache, **kwargs)[0]
        loss, logits = self._compute_logits_and_loss(
            hidden_states=x,
            labels=labels,
            logits_to_keep=0,
            num_items_in_batch=num_items_in_batch,
            fuse_linear_cross_entropy=False,
        )
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _compute_logits_and_loss(self, hidden_states, labels=None, logits_to_keep=0, **options):
        logits = self.lm_head(hidden_states)
        if labels is None:
            return None, logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


class GLAForCausalLM(Model):
    __module__ = "fla.models.gla.stub"
    layer = GatedLinearAttention


class DeltaNetForCausalLM(Model):
    __module__ = "fla.models.delta_net.stub"
    layer = DeltaNet


class GatedDeltaNetForCausalLM(Model):
    __module__ = "fla.models.gated_deltanet.stub"
    layer = GatedDeltaNet


class KDAForCausalLM(Model):
    __module__ = "fla.models.kda.stub"
    layer = KimiDeltaAttention


class RetNetForCausalLM(Model):
    __module__ = "fla.models.retnet.stub"
    layer = MultiScaleRetention


MODELS = (GLAForCausalLM, DeltaNetForCausalLM, GatedDeltaNetForCausalLM, KDAForCausalLM, RetNetForCausalLM)
for cls in [x for x in vars().values() if isinstance(x, type) and x.__module__.startswith("fla.")]:
    sys.modules[cls.__module__] = sys.modules[__name__]  # a class's module is looked up


def make(cls: type[Model]) -> Model:
    """A model in fp64, with the same weights everywhere."""
    torch.manual_seed(0)
    return cls(PretrainedConfig(vocab_size=VOCABULARY)).double()
