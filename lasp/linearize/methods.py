"""What stands in for the softmax attention of a layer: between its projections, which stay, and its way out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import hybrid_attention, linear_attention, softmax_attention
from lasp.functional.hybrid_arguments import HybridState
from lasp.kernels.arguments import check_integer
from lasp.kernels.precision import compute_dtype
from lasp.layers.features import Hedgehog
from lasp.layers.recurrent import skip_padding
from lasp.layers.softmax import attend_to_known
from lasp.layers.state import KeyValues


class Heads(NamedTuple):
    """What a softmax layer attends with."""

    q: Tensor  # [B, T, H, D], with positions
    k: Tensor  # [B, T, Hk, D], with positions
    v: Tensor  # [B, T, Hk, D]
    plain_q: Tensor  # the same before their positions
    plain_k: Tensor


@dataclass(frozen=True)
class Around:
    """What surrounds the tokens of one call. key_mask [B, T]: False hides a key. state: of the tokens before, where
    `keep` asks for the one after. sequence: keywords of `lasp.functional` that say how the sequence lies, with `scan`;
    attention: the method of softmax attention over ranks."""

    scale: float
    key_mask: Tensor | None = None
    state: Any = None
    keep: bool = False
    sequence: dict[str, Any] = field(default_factory=dict)
    scan: Any = "auto"
    attention: Any = "auto"


class LigerState(NamedTuple):
    """What Liger's layer keeps of the tokens so far."""

    memory: Tensor  # [B, Hk, D, D] in fp32 (fp64)
    near: KeyValues  # of the window


class Liger(nn.Module):
    """`(GLA + sliding-window softmax) / 2`, of the layer's own projections and nothing else (arXiv:2503.01496, 3.2).

    The gated recurrence reads softmax(q) and softmax(k), over the channels of a head and without positions, and decays
    by `logsigmoid(k) / 16` per channel: the gate is the key projection, pooled to its own size. In fp32 (fp64).
    """

    trained: ClassVar[bool] = False  # has parameters of its own

    def __init__(self, heads: int, key_heads: int, head_dim: int, window: int = 64) -> None:
        super().__init__()
        check_integer("window", window, 1)
        self.window = window

    def forward(self, heads: Heads, around: Around) -> tuple[Tensor, LigerState | None]:
        """The output [B, T, H, D] in v's dtype, and the state after the last token where it is asked for."""
        state: LigerState | None = around.state
        dtype = compute_dtype(heads.v)
        q, k, v = (x.to(dtype) for x in (heads.plain_q, heads.plain_k, heads.v))
        keys, log_decay = k.softmax(-1), F.logsigmoid(k) / 16
        if around.key_mask is not None:
            keys, gates = skip_padding(keys, log_decay, around.key_mask)
            log_decay = log_decay if gates is None else gates
        far = linear_attention(
            q.softmax(-1), keys, v, log_decay, scale=1.0, initial_state=None if state is None else state.memory,
            output_final_state=around.keep, scan=around.scan, **around.sequence,
        )  # fmt: skip
        far, memory = far if isinstance(far, tuple) else (far, None)
        near, known = self._near(heads, around, None if state is None else state.near)
        output = ((far + near.to(dtype)) / 2).to(heads.v.dtype)
        return output, None if memory is None or known is None else LigerState(memory, known)

    def _near(self, heads: Heads, around: Around, before: KeyValues | None) -> tuple[Tensor, KeyValues | None]:
        known = None
        if around.keep:
            shown = around.key_mask
            new = KeyValues(heads.k, heads.v, torch.ones_like(heads.k[..., 0, 0], dtype=torch.bool))
            new = new if shown is None else new._replace(shown=shown)
            known = new if before is None else before.followed_by(new)
        if before is not None and known is not None:
            q = heads.q * (around.scale * heads.q.shape[-1] ** 0.5)  # which has a scale of its own
            near = attend_to_known(q, known, self.window)
        else:
            near = softmax_attention(
                heads.q, heads.k, heads.v, scale=around.scale, window=self.window, key_mask=around.key_mask,
                method=around.attention, **around.sequence,
            )  # fmt: skip
        return near, None if known is None else known.last(self.window - 1)


class ClampedHedgehog(Hedgehog):
    """Hedgehog's features, at least 1e-12, so that no sum of their products is 0."""

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = super().forward(x.to(compute_dtype(x)))
        return features.clamp(min=1e-12)


FAST = {"window_logit": 10.0}
"""How many times the learning rate of feature maps, whose entries move by tenths, parameters have that move by units:
at one rate the window would count a tenth of what it should long after the maps have learned."""


class Lolcats(nn.Module):
    """Softmax over a window, Hedgehog features over all before it, one normaliser (arXiv:2410.10254, 3.2 and 3.3).

    A feature map per head of queries, of queries and of keys, learned and the identity before that. The window's
    exponentials, relative to the largest of them, count sigmoid(window_logit) as much: 0.1 before training.
    """

    trained: ClassVar[bool] = True

    def __init__(self, heads: int, key_heads: int, head_dim: int, window: int = 64) -> None:
        super().__init__()
        check_integer("window", window, 1)
        self.window = window
        self.q_features, self.k_features = (ClampedHedgehog(heads, head_dim) for _ in range(2))
        self.window_logit = nn.Parameter(torch.full((heads,), -2.197))

    def forward(self, heads: Heads, around: Around) -> tuple[Tensor, HybridState | None]:
        """The output [B, T, H, D] in v's dtype, and the state after the last token where it is asked for."""
        q, k = heads.q, heads.k
        repeated = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        found = hybrid_attention(
            q, k, heads.v, self.q_features(q), self.k_features(repeated), window=self.window,
            window_factor=self.window_logit.to(compute_dtype(q)).sigmoid(), scale=around.scale,
            key_mask=around.key_mask, initial_state=around.state, output_final_state=around.keep, scan=around.scan,
            **around.sequence,
        )  # fmt: skip
        return found if isinstance(found, tuple) else (found, None)


METHODS: dict[str, type[Liger | Lolcats]] = {"liger": Liger, "lolcats": Lolcats}
