"""The part every token mixer shares: projections, heads, positions, and the way out.

A mixer turns [B, T, hidden] into [B, T, hidden] in six steps,

    q, k, v = short_conv(projections of x)           where the mixer has one; then split into heads
    q, k, v = features(q, k, v)                      a feature map
    q, k = rotary(q, k, positions)                   where the mixer has one
    o, state = mix(x, q, k, v, context)              lasp.functional, the only step that meets other tokens and ranks
    o = norm(o) per head, times gate(g_proj(x))      where the mixer has them
    y = out_proj(o)

and a subclass says only what is its own.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers.context import Context, sequence_of
from lasp.layers.rotary import Rotary
from lasp.layers.short_conv import ShortConv
from lasp.layers.state import ConvolvedMemory, State
from lasp.parallel.cut import Cut, check_cut
from lasp.parallel.group import SequenceGroup

GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "silu": F.silu}


class Mixer(nn.Module):
    """Base of the token mixers.

    Args:
        hidden_size: width of the residual stream.
        num_heads: heads of the queries, and of the output.
        num_kv_heads: heads of the keys and values, and of what the mixer keeps of them (default: num_heads). Must
            divide num_heads; fewer of them make states, and what ranks exchange, smaller.
        head_dim: width of a head (default: hidden_size / num_heads).
        norm_eps: epsilon of the output norm, where there is one.
        causal: False lets every token see its whole document, as in an encoder.
        layer_idx, num_layers: place of this layer in its model, 0 <= layer_idx < num_layers.

    Raises:
        ValueError: head counts or widths that do not divide or are not positive, a place outside the model,
            causal=False for a mixer that knows only the past.
    """

    causal_only: ClassVar[bool] = False
    output_norm: ClassVar[bool] = True
    gate: ClassVar[str | None] = None  # a name in GATES; None: no output gate
    rotary: Rotary | None = None  # None: positions are not read
    conv_size: ClassVar[int | None] = None  # tokens that the short convolution sees; None: there is none
    own: slice = slice(None)  # the key/value heads that are this rank's; all, but under tensor parallelism

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        causal: bool = True,
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
        if self.causal_only and not causal:
            raise ValueError(f"{type(self).__name__} fades with time and knows only the past, got causal=False")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.layer_idx = layer_idx
        self.num_layers = num_layers

        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(hidden_size, kv_width, bias=False)
        self.g_proj = None if self.gate is None else nn.Linear(hidden_size, width, bias=False)
        self.norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if self.output_norm else None
        self.out_proj = nn.Linear(width, hidden_size, bias=False)
        self.short_conv = self._new_conv()

    @classmethod
    def option_names(cls) -> set[str]:
        """Names of the keywords this mixer takes beyond those of every mixer."""
        return _keywords(cls) - _keywords(Mixer)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """Of x, all that the short convolution sees."""
        return self.q_proj, self.k_proj, self.v_proj

    def weights_met(self) -> dict[str, float]:
        """By name, the parameters that are no matrix or filter which a token passes, or that it passes a share of, with
        that share. What a recurrence's own count of operations has of them is 0 here."""
        return {}

    def project(self, x: Tensor, context: Context) -> tuple[list[Tensor], Tensor | None, Context]:
        """The projections of x after the short convolution, where there is one, its tail, and the context of what
        follows."""
        projected = [projection(x) for projection in self.projections]
        if self.short_conv is None:
            return projected, None, context
        before = self.convolved(context)
        # All channels at once: one exchange of halos.
        x, tail = self.short_conv(torch.cat(projected, -1), context)
        parts = list(x.split([part.shape[-1] for part in projected], -1))
        return parts, tail, replace(context, state=None if before is None else before.memory)

    def split(self, *projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The projections [B, T, width] as heads."""
        q, k, v = projected
        return self._heads(q), self._heads(k), self._heads(v)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is mixed, from the heads of the projections: q [B, T, H, D], k and v [B, T, H_kv, D]."""
        return q, k, v

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, State | None]:
        """The output [B, T, H, D] of each head, and the final state where the context asks for it."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: State | None = None,
        output_final_state: bool = False,
        group: SequenceGroup | None = None,
        cut: Cut | None = None,
        lower_bound: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Mix the tokens of x.

        Args:
            x: [B, T, hidden], this rank's tokens when a group is given.
            position_ids: [B or 1, T], positions in the document; read by mixers with rotary positions, which count from
                0 in each document without them.
            attention_mask: [B, T] bool, local; no other token sees a False one, and it leaves a state exactly as it
                found it. None: all True. With a group, either every rank gives one or none does.
            cu_seqlens: [N + 1], ends of packed documents in the whole sequence (B = 1).
            state: what `output_final_state` returned for the tokens before these.
            output_final_state: whether to return the state after the last token.
            group: ranks that hold the rest of the sequence.
            cut: of the batch (`lasp.shard_batch`), in the place of group and cu_seqlens.
            lower_bound: [H_kv·D], of the gates of a mixer that learns one together with other layers (Hgrn2).

        Returns:
            y [B, T, hidden] and the final state of the mixer's kind, None unless asked for.

        Raises:
            ValueError: positions are needed and cannot be known (a state or other ranks came before these tokens), an
                attention_mask that is not a [B, T] bool, a state of another kind of mixer; and what the function of
                `lasp.functional` behind the mixer raises.
        """
        if attention_mask is not None:
            _check_mask(attention_mask, x)
        sequence = sequence_of(cut=cut, group=group, cu_seqlens=cu_seqlens)
        if cut is not None:
            check_cut(cut, x.shape[1], type(self).__name__)
        context = Context(attention_mask, state, output_final_state, sequence, lower_bound)
        projected, tail, context = self.project(x, context)
        q, k, v = self.features(*self.split(*projected))
        if self.rotary is not None:
            q, k = self.rotary(q, k, self._first_positions(x, context) if position_ids is None else position_ids)
        o, final_state = self.mix(x, q, k, v, context)
        if tail is not None and final_state is not None:
            final_state = ConvolvedMemory(final_state, tail)
        return self._output(x, o), final_state

    def _new_conv(self) -> ShortConv | None:
        """The short convolution of the projections' channels, where the mixer has one."""
        if self.conv_size is None:
            return None
        return ShortConv(sum(p.out_features for p in self.projections), self.conv_size)

    def convolved(self, context: Context) -> ConvolvedMemory | None:
        """The state of a mixer with a short convolution. Raises ValueError for that of another."""
        state = context.state
        if state is not None and not isinstance(state, ConvolvedMemory):
            raise ValueError(f"{type(self).__name__} continues from a ConvolvedMemory, got {type(state).__name__}")
        return state

    def _output(self, x: Tensor, o: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        if self.g_proj is not None and self.gate is not None:
            o = o * GATES[self.gate](self._heads(self.g_proj(x)))
        return self.out_proj(o.flatten(-2))

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))

    def _first_positions(self, x: Tensor, context: Context) -> Tensor:
        """Positions [1, T] counted from 0 in each document, for tokens with nothing before them."""
        if context.state is not None:
            raise ValueError(f"{type(self).__name__} needs position_ids to continue from a state")
        positions = context.positions(x)
        if positions is None:
            group = context.sequence["group"]
            raise ValueError(
                f"{type(self).__name__} needs position_ids: rank {group.rank} of {group.size} sees only a part of the "
                "sequence (lasp.shard_batch returns them)"
            )
        return positions


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


def _check_mask(attention_mask: Tensor, x: Tensor) -> None:
    if attention_mask.dtype != torch.bool or attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask must be bool of shape {tuple(x.shape[:2])}, got {attention_mask.dtype}"
            f" of shape {tuple(attention_mask.shape)}"
        )
