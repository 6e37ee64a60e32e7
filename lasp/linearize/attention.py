"""A softmax layer of transformers, whose attention is another: its projections, positions and output stay its own.

The instance gets a class of its own, below the one that it had. Its forward is that one's, in which two globals are
others: the registry of attention functions, and the function that puts positions into queries and keys.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lasp.functional import softmax_attention
from lasp.kernels.values import check_values, may_look_at
from lasp.linearize.methods import Around, Heads, Liger, Lolcats
from lasp.parallel.untraced import outside
from lasp.wrap.attention import MaskDescriptor
from lasp.wrap.swap import rebind, undecorated
from lasp.wrap.wiring import WIRING, LayerCall, check_keywords

if TYPE_CHECKING:
    from lasp.linearize.cache import StateLayer

MIXER = "linearized"  # the name of the child that mixes
REGISTRY, TURN = "ALL_ATTENTION_FUNCTIONS", "apply_rotary_pos_emb"
Function = Callable[..., Any]


class Errors:
    """How far the attention of layers is from the softmax attention that they had, summed over this rank's tokens."""

    def __init__(self) -> None:
        self.squares: dict[int, Tensor] = {}  # by the layer: differentiable
        self.powers: dict[int, Tensor] = {}  # of the softmax attention's output

    def note(self, layer: int, output: Tensor, wanted: Tensor, shown: Tensor | None) -> None:
        """output, wanted [B, T, H, D], shown [B, T]."""
        gap, wanted = output.float() - wanted.float(), wanted.float()
        if shown is not None:
            gap, wanted = (x * shown[..., None, None] for x in (gap, wanted))
        self.squares[layer], self.powers[layer] = gap.square().sum(), wanted.square().sum()


class Linearized(nn.Module):
    """What a linearised attention is besides the class that it was."""

    linearized: Liger | Lolcats
    linearized_from: Any  # of the class: what it was
    errors: Errors | None = None  # of an instance that learns from what it was, and returns that
    layer_idx: int

    @outside
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = _Call(self, kwargs)
        _running.calls.append(call)
        try:
            return _rebound(self.linearized_from)(self, *args, **kwargs)
        finally:
            _running.calls.pop()


@cache
def linearized_class(softmax: Any) -> type[nn.Module]:
    """The class of a linearised `softmax` attention; of the same folder of transformers, for whoever asks."""
    return type(
        f"Linearized{softmax.__name__}",
        (Linearized, softmax),
        {"linearized_from": softmax, "__module__": softmax.__module__},
    )


class _Running(threading.local):
    """The calls of linearised layers that are under way in a thread."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []


_running = _Running()


class _Call:
    """One call of a layer: its state of the tokens before, and what its forward has come by."""

    def __init__(self, module: Linearized, kwargs: dict[str, Any]) -> None:
        self.plain: tuple[Tensor, Tensor] | None = None  # queries and keys before their positions, [B, h, T, D]
        self.slot: StateLayer | None = None
        given = [kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None]
        if given:
            from lasp.linearize.cache import state_layer

            self.slot = state_layer(given[0], module.layer_idx)


@cache
def _rebound(softmax: Any) -> Function:
    known = undecorated(softmax.forward).__globals__
    return rebind(softmax.forward, {REGISTRY: _Registry(), TURN: partial(_turn, known[TURN])})


class _Registry:
    """In the place of transformers' registry of attention functions."""

    def get_interface(self, *_: Any) -> Function:
        return _attend

    def __getitem__(self, _: str) -> Function:
        return _attend


def _turn(original: Function, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Put positions into queries and keys, and remember them without."""
    _running.calls[-1].plain = (q, k)
    return original(q, k, *args, **kwargs)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, Hk, T, D] of this call's tokens alone; returns [B, T, H, D]."""
    where, call = type(module).__name__, _running.calls[-1]
    check_keywords(where, others)
    if dropout:
        raise ValueError(f"{where}: a linearised attention has no dropout, got {dropout}: set attention_dropout to 0")
    plain_q, plain_k = call.plain or (query, key)  # a layer may have no positions
    if plain_q.shape != query.shape or plain_k.shape != key.shape:
        raise ValueError(
            f"{where}: positions turn a part of each head only, {list(plain_q.shape)} of {list(query.shape)}"
        )
    heads = Heads(*(x.transpose(1, 2).to(value.dtype) for x in (query, key, value, plain_q, plain_k)))
    around = _around(module, attention_mask, query, scaling, position_ids, cu_seqlens)
    mixer = getattr(module, MIXER)
    if module.errors is not None:
        return _learn(module, heads, around, sliding_window), None
    if call.slot is None:
        return mixer(heads, around)[0], None
    around = Around(around.scale, around.key_mask, call.slot.state, keep=True)
    output, state = mixer(heads, around)
    call.slot.take(state, query.shape[2])
    return output, None


def _learn(module: Linearized, heads: Heads, around: Around, window: int | None) -> Tensor:
    """The softmax attention that the layer had; how far it is from it is noted."""
    with torch.no_grad():
        wanted = softmax_attention(
            heads.q, heads.k, heads.v, scale=around.scale, window=window, key_mask=around.key_mask,
            method=around.attention, **around.sequence,
        )  # fmt: skip
    output, _ = getattr(module, MIXER)(Heads(*(x.detach() for x in heads)), around)
    assert module.errors is not None, "it learns"
    module.errors.note(module.layer_idx, output, wanted, around.key_mask)
    return wanted


def _around(
    module: Any,
    mask: Any,
    query: Tensor,
    scaling: float | None,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Around:
    tokens, scale = query.shape[2], query.shape[-1] ** -0.5 if scaling is None else scaling
    shown = _shown(type(module).__name__, mask, tokens)
    if hasattr(module, WIRING):
        call = LayerCall.of(module, cu_seqlens, tokens)
        wiring = call.wiring
        return Around(scale, shown, sequence=call.sequence, scan=wiring.scan, attention=wiring.method)
    if cu_seqlens is None and positions is not None and positions.shape[-1] == tokens > 1:
        _check_positions(positions, shown)
    return Around(scale, shown, sequence={} if cu_seqlens is None else {"cu_seqlens": cu_seqlens})


def _shown(where: str, mask: Any, tokens: int) -> Tensor | None:
    """Which of the call's tokens may be seen [B, T], as a mask of any kind says it; a token that is not sees not even
    itself."""
    if isinstance(mask, MaskDescriptor):
        return mask.key_mask
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(f"{where}: a linearised attention reads a mask that is a tensor, got {type(mask).__name__}")
    if mask.dim() == 2:
        return mask[:, -tokens:].bool()
    own = mask[:, 0, -tokens:, -tokens:].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


def _check_positions(positions: Tensor, shown: Tensor | None) -> None:
    """Raises ValueError for packed documents: their masks say so to softmax attention alone."""
    if not may_look_at(positions):
        return
    follows = positions[:, 1:] > positions[:, :-1]
    if shown is not None:
        follows = follows | ~shown[:, :-1] | ~shown[:, 1:]
    told = "position_ids restart, and a state would pass from document to document: lasp.parallelize the model (with "
    check_values(follows, lambda: f"{told}group=None on one device) and give it cu_seqlens")
