"""MoM, a mixture of memories."""

from typing import Any

import torch
from torch import Tensor, nn

from lasp.functional import delta_rule
from lasp.layers.context import Context
from lasp.layers.gated_deltanet import GatedDeltaNet
from lasp.layers.mamba2 import inverse_softplus


class MixtureOfMemories(GatedDeltaNet):
    """Several gated DeltaNets side by side: a router sends each token to some of them, and all go to one shared memory.

    A memory that a token is not sent to stays exactly as it is. Each memory has its own keys, values, β and decays; the
    queries are common. The memories' outputs are summed by the router's weights, renormalised over the chosen ones; the
    shared memory counts with weight 1 (MoM, arXiv 2502.13685). The memories are heads of one call, in which a token
    erases, writes and decays nothing where it is not sent: one exchange, on any layout, at the arithmetic of all
    memories. The short convolution sees the text as it is, before the router.

    Args:
        num_memories: how many, beside the shared one.
        top_k: to how many of them a token is sent.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: a top_k that is not in [1, num_memories], and what `DeltaNet` raises.
    """

    def __init__(self, *args: Any, num_memories: int = 4, top_k: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 1 <= top_k <= num_memories:
            raise ValueError(f"top_k must lie in [1, num_memories], got {top_k} and {num_memories}")
        self.num_memories, self.top_k = num_memories, top_k
        hidden, states = self.q_proj.in_features, (num_memories + 1) * self.num_kv_heads
        self.k_proj = nn.Linear(hidden, states * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, states * self.head_dim, bias=False)
        self.short_conv = self._new_conv()
        self.beta_proj = nn.Linear(hidden, states, bias=False)
        self.decay_proj = nn.Linear(hidden, states, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(torch.logspace(-3, -1, states)))
        self.A_log = nn.Parameter(torch.linspace(1, 16, states).log())
        self.router = nn.Linear(hidden, num_memories, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which memories each token is sent to, bool, and with which weights, both [B, T, num_memories + 1]."""
        scores = self.router(x).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        best, index = scores.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, index, best / best.sum(-1, keepdim=True))
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        shared = torch.ones_like(scores[..., :1])
        return torch.cat([chosen, shared.bool()], -1), torch.cat([weights, shared], -1)

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        chosen, weights = self.route(x)
        chosen = chosen.repeat_interleave(self.num_kv_heads, -1)
        beta, log_decay = (torch.where(chosen, gate, 0) for gate in (self.beta(x), self.log_decay(x)))
        q = q.repeat(1, 1, self.num_memories + 1, 1)
        o, state = self.recur(q, k, v, log_decay, context, delta_rule, beta=beta)
        o = o.unflatten(2, (self.num_memories + 1, -1)) * weights[..., None, None].to(o.dtype)
        return o.sum(2), state
