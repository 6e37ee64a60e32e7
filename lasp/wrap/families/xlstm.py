"""xLSTM (arXiv:2405.04517)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lasp.functional import linear_attention
from lasp.kernels.precision import compute_dtype
from lasp.parallel.sharding import shard, unshard
from lasp.wrap.family import Family
from lasp.wrap.wiring import LayerCall, check_keywords


def mlstm(
    call: LayerCall,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    igate: Tensor,
    fgate: Tensor,
    **states: Any,
) -> tuple[Tensor, None]:
    """xLSTM's backend (arXiv:2405.04517, equations 19 to 27). query, key [B, H, T, K], value [B, H, T, V], gates
    [B, H, T] before their exponential and sigmoid; returns [B, H, T, V].

    The running maximum that stabilises is not affine: the gates of the whole sequence, two numbers per token and head,
    are gathered, and every rank runs over them. The normaliser is one more value.
    """
    check_keywords(type(module).__name__, states)
    if call.packed:
        raise ValueError("mLSTM takes no packed documents")
    dtype = compute_dtype(query)
    gates = unshard(torch.stack([igate, logsigmoid(fgate)]).movedim(-1, 1).double(), **call.ranks)  # [2, N, B, H]
    total = gates[1].cumsum(0)
    highest = total + (gates[0] - total).cummax(0).values.clamp(min=0)  # the state before the first token counts as 0
    kept = (gates[1] + nn.functional.pad(highest, (0, 0, 0, 0, 1, -1)) - highest).clamp(max=0)
    log_decay, log_input, highest = (
        shard(x, dim=0, **call.ranks).movedim(0, 1).to(dtype) for x in (kept, gates[0] - highest, highest)
    )
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (query, key, value))
    v = nn.functional.pad(v, (0, 1), value=1.0) * log_input.exp().unsqueeze(-1)
    output = linear_attention(q, k, v, log_decay, **call.recurrence)
    h, norm = output[..., :-1], output[..., -1:]
    h = h / (torch.maximum(norm.abs(), (-highest).exp().unsqueeze(-1)) + module.config.eps)
    return h.transpose(1, 2).to(value.dtype), None


FAMILIES = (
    Family(
        "xlstm",
        methods={"xLSTMBackend": {"forward": mlstm}},
        tiny={"hidden_size": 128, "embedding_dim": 128, "num_heads": 2, "num_blocks": 2},
    ),
)
