"""MoM, a mixture of memories."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.functional import routed_delta_rule
from lasp.functional.memories import Routed, routed_conv1d, routed_linear
from lasp.layers.context import Context
from lasp.layers.deltanet import unit_length
from lasp.layers.gated_deltanet import GatedDeltaNet
from lasp.layers.mamba2 import inverse_softplus
from lasp.parallel.balance import beside, router_balance


class MixtureOfMemories(GatedDeltaNet):
    """Several gated DeltaNets side by side: a router sends each token to some of them, and all go to one shared memory.

    A memory that a token is not sent to stays exactly as it is. Each memory has its own keys, values, β and decays; the
    queries are common. The memories' outputs are summed by the router's weights, renormalised over the chosen ones; the
    shared memory counts with weight 1 (MoM, arXiv 2502.13685). The tokens of each memory are gathered and run together
    in one call with one exchange, on any layout. So are those that a memory's short convolution sees: keys and values
    are projected and convolved where they are sent alone. That of the queries sees the text as it is.

    Args:
        num_memories: how many, beside the shared one.
        top_k: to how many of them a token is sent.
        balance: weight of a loss that asks the router to use all memories alike (`lasp.parallel.balance`; 0.01 in the
            paper). It is no part of the model's loss: its gradient joins in backward, once per forward.
        *args, **kwargs: as for `Mixer`.

    Raises:
        ValueError: a top_k that is not in [1, num_memories], a negative balance, and what `DeltaNet` raises.
    """

    def __init__(self, *args: Any, num_memories: int = 4, top_k: int = 2, balance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 1 <= top_k <= num_memories:
            raise ValueError(f"top_k must lie in [1, num_memories], got {top_k} and {num_memories}")
        if not 0 <= balance < float("inf"):
            raise ValueError(f"balance must be a number of at least 0, got {balance}")
        self.num_memories, self.top_k, self.balance = num_memories, top_k, balance
        hidden, states = self.q_proj.in_features, (num_memories + 1) * self.num_kv_heads
        self.k_proj = nn.Linear(hidden, states * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, states * self.head_dim, bias=False)
        self.short_conv = self._new_conv()
        self.beta_proj = nn.Linear(hidden, states, bias=False)
        self.decay_proj = nn.Linear(hidden, states, bias=False)
        self.dt_bias = nn.Parameter(inverse_softplus(torch.logspace(-3, -1, states)))
        self.A_log = nn.Parameter(torch.linspace(1, 16, states).log())
        self.router = nn.Linear(hidden, num_memories, bias=False)

    def weights_met(self) -> dict[str, float]:
        share = (self.top_k + 1) / (self.num_memories + 1)
        channels = sum(each.out_features for each in self.projections)  # known where zero3 has weights away, too
        sent = share + (1 - share) * self.q_proj.out_features / channels  # the queries of all tokens are convolved
        return {"k_proj.weight": share, "v_proj.weight": share, "short_conv.weight": sent}

    def project(self, x: Tensor, context: Context) -> tuple[list[Tensor], Tensor | None, Context]:
        conv, memories, before = self.short_conv, self.route(x)[0], self.convolved(context)
        assert conv is not None, "of every DeltaNet"
        q = self.q_proj(x)
        queries = q.shape[-1]  # of this rank's heads
        q, tail = conv(q, context, slice(queries))
        scan = "auto" if str(self.scan) == "heads" else self.scan  # a convolution has no heads to share
        found = routed_conv1d(
            Routed(self._sent(x, memories), memories, context.attention_mask),
            self._by_memory(conv.weight[queries:]),
            initial_state=None if before is None else self._by_memory(before.tail[:, queries:], 1).mT.to(x.dtype),
            output_final_state=context.output_final_state,
            scan=scan,
            **context.sequence,
        )
        found, last = found if isinstance(found, tuple) else (found, None)
        if tail is not None and last is not None:
            parts = last.to(tail.dtype).mT.chunk(2, 2)
            tail = torch.cat([tail, *(part.flatten(1, 2) for part in parts)], 1)
        k, v = F.silu(found).chunk(2, -1)
        return [q, k.flatten(2), v.flatten(2)], tail, replace(context, state=None if before is None else before.memory)

    def features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (y.unflatten(2, (self.top_k + 1, -1)) for y in (k, v))
        return unit_length(q), unit_length(k), v

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which memories each token is sent to and with which weights, [B, T, top_k + 1], the shared one last; and all
        scores, [B, T, num_memories]."""
        scores = self.router(x).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)
        best, index = scores.topk(self.top_k, dim=-1)
        memories = F.pad(index, (0, 1), value=self.num_memories)
        return memories, F.pad(best / best.sum(-1, keepdim=True), (0, 1), value=1.0), scores

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        memories, weights, scores = self.route(x)
        gates = (y.unflatten(2, (self.num_memories + 1, -1)) for y in (self.beta(x), self.log_decay(x)))
        beta, log_decay = (y.take_along_dim(memories.unsqueeze(-1), 2) for y in gates)
        chosen = {"beta": beta, "memories": memories, "num_memories": self.num_memories + 1}
        o, state = self.recur(q, k, v, log_decay, context, routed_delta_rule, **chosen)
        o = torch.einsum("btnhv,btn->bthv", o, weights.to(o.dtype))
        if self.balance and torch.is_grad_enabled():
            turn = context.turn("router_balance", x)
            loss = router_balance(turn, scores, memories[..., :-1], context.attention_mask)
            o = beside(o, self.balance * loss)
        return o, state

    def _sent(self, x: Tensor, memories: Tensor) -> Tensor:
        """Keys and values [B, T, top_k + 1, channels] of each token in the memories that it is sent to."""
        projections = self.k_proj, self.v_proj
        if all(map(_is_plain, projections)):  # no adapters around them, and nothing that makes their weights
            weight = torch.cat([p.weight.unflatten(0, (self.num_memories + 1, -1)) for p in projections], 1)
            return routed_linear(x, weight, memories)
        every = torch.cat([p(x).unflatten(2, (self.num_memories + 1, -1)) for p in projections], 3)
        return every.take_along_dim(memories.unsqueeze(-1), 2)

    def _by_memory(self, x: Tensor, dim: int = 0) -> Tensor:
        """Channels along `dim`, those of all keys and then those of all values, as [memories, keys and values]."""
        return torch.cat([y.unflatten(dim, (self.num_memories + 1, -1)) for y in x.chunk(2, dim)], dim + 1)


def _is_plain(projection: nn.Module) -> bool:
    """Whether what it does is a product with its weight."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    return type(projection) is nn.Linear and projection.bias is None and not hooks
