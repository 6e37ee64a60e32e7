"""The part every token mixer shares: projections, heads, padding, and the way out.

A mixer turns [B, T, hidden] into [B, T, hidden] in five steps,

    q, k, v = projections of x, split into heads
    q, k, v = features(q, k, v)                      a feature map, a rotation
    o, state = recurrence(q, k, v, log_decay(x))     lasp.functional, the only step that meets other tokens and ranks
    o = norm(o) per head, times gate(g_proj(x))
    y = out_proj(o)

and a subclass says only what is its own. The norm stands where older linear attention divides by q·Σk: it bounds the
output for signed features too, where that denominator can cross zero (TransNormerLLM, arXiv 2307.14995).
"""

import inspect
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import linear_attention
from lasp.parallel.group import SequenceGroup

GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


class Mixer(nn.Module):
    """Base of the token mixers with a state `S_t = a_t S_{t-1} + k_t v_t^T`; by itself: no features, no decay, no gate.

    Args:
        hidden_size: width of the residual stream.
        num_heads: heads of the queries, and of the output.
        num_kv_heads: heads of the keys and values, and of the decays and states (default: num_heads). Must divide
            num_heads; fewer of them make the states, and what ranks exchange, smaller.
        head_dim: width of a head (default: hidden_size / num_heads).
        norm_eps: epsilon of the output norm.
        layer_idx, num_layers: place of this layer in its model, 0 <= layer_idx < num_layers.

    Raises:
        ValueError: head counts or widths that do not divide or are not positive, a place outside the model.
    """

    causal: bool = True
    needs_positions: ClassVar[bool] = False
    gate: ClassVar[str | None] = None  # a name in GATES; None: no output gate

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        num_layers: int = 1,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_heads(hidden_size, num_heads, num_kv_heads, head_dim)
        if not 0 <= layer_idx < num_layers:
            raise ValueError(
                f"layer_idx must lie in [0, num_layers), got layer_idx {layer_idx}, num_layers {num_layers}"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.layer_idx = layer_idx
        self.num_layers = num_layers

        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.g_proj = None if self.gate is None else nn.Linear(hidden_size, width, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    @classmethod
    def option_names(cls) -> set[str]:
        """Names of the keywords this mixer takes beyond those of every mixer."""
        return _keywords(cls) - _keywords(Mixer)

    def features(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the recurrence reads, from the projections: q [B, T, H, D], k and v [B, T, H_kv, D], shapes kept."""
        return q, k, v

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Logarithm of the decay, <= 0 and at least fp32: None | [H_kv] | [B, T, H_kv] | [B, T, H_kv, D]."""
        return None

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
        output_final_state: bool = False,
        group: SequenceGroup | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of x.

        Args:
            x: [B, T, hidden], this rank's tokens when a group is given.
            position_ids: [B or 1, T], positions in the document; read by mixers with `needs_positions`, which count
                from 0 in each document without them.
            attention_mask: [B, T] bool, local; a False token leaves the state exactly as it found it. None: all True.
                With a group, either every rank gives one or none does.
            cu_seqlens: [N + 1], ends of packed documents in the whole sequence (B = 1).
            state: [B or N, H_kv, D, D], what `output_final_state` returned for the tokens before these.
            output_final_state: whether to return the state after the last token.
            group: ranks that hold the rest of the sequence.

        Returns:
            y [B, T, hidden] and the final state (fp32, or fp64 for fp64 inputs), None unless asked for.

        Raises:
            ValueError: positions are needed and cannot be known (a state or other ranks came before these tokens), an
                attention_mask that is not a [B, T] bool; and what `lasp.linear_attention` raises.
        """
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.needs_positions and position_ids is None:
            position_ids = self._first_positions(x, cu_seqlens, state, group)
        q, k, v = self.features(q, k, v, position_ids)
        log_decay = self.log_decay(x)
        if attention_mask is not None:
            k, log_decay = skip_padding(k, log_decay, attention_mask)
        result = linear_attention(
            q,
            k,
            v,
            log_decay,
            initial_state=state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
            causal=self.causal,
            group=group,
        )
        o, final_state = result if isinstance(result, tuple) else (result, None)
        return self._output(x, o), final_state

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        o = self.norm(o)
        if self.g_proj is not None and self.gate is not None:
            o = o * GATES[self.gate](self._heads(self.g_proj(x)))
        return self.out_proj(o.flatten(-2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def _first_positions(
        self, x: Tensor, cu_seqlens: Tensor | None, state: Tensor | None, group: SequenceGroup | None
    ) -> Tensor:
        """Positions [1, T] counted from 0 in each document, for tokens with nothing before them."""
        if state is not None:
            raise ValueError(f"{type(self).__name__} needs position_ids to continue from a state")
        if group is not None and group.size > 1:
            raise ValueError(
                f"{type(self).__name__} needs position_ids: rank {group.rank} of {group.size}"
                " sees only a part of it (lasp.shard_batch returns them)"
            )
        positions = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            ends = cu_seqlens.to(positions)
            positions = positions - ends[torch.searchsorted(ends, positions, right=True) - 1]
        return positions.unsqueeze(0)


def skip_padding(k: Tensor, log_decay: Tensor | None, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keys and decays with which a token of `attention_mask` False (padding) maps every state to itself.

    It adds no key, and a decay that would fade the state while padding passes becomes 1. A decay per head therefore
    becomes one per token.

    Args:
        k: [B, T, H, D].
        log_decay: None | [H] | [B, T, H] | [B, T, H, D].
        attention_mask: [B, T] bool.
    """
    if attention_mask.dtype != torch.bool or attention_mask.shape != k.shape[:2]:
        raise ValueError(
            f"attention_mask must be bool of shape {tuple(k.shape[:2])}, got {attention_mask.dtype}"
            f" of shape {tuple(attention_mask.shape)}"
        )
    mask = attention_mask[..., None]
    k = k.masked_fill(~mask[..., None], 0)
    if log_decay is not None:
        log_decay = torch.where(mask if log_decay.ndim < 4 else mask[..., None], log_decay, 0)
    return k, log_decay


def _keywords(mixer: type[Mixer]) -> set[str]:
    parameters = inspect.signature(mixer).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _check_heads(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> None:
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(f"num_heads must divide hidden_size unless head_dim is given, got {num_heads}, {hidden_size}")
    if hidden_size < 1 or (head_dim is not None and head_dim < 1):
        raise ValueError(f"hidden_size and head_dim must be positive, got {hidden_size} and {head_dim}")
