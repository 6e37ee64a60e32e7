"""Calls over ranks, selectively checkpointed: as they are otherwise."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lasp

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(200)]


def mixed(group: lasp.SequenceGroup, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Every kind of exchange, with something else in between."""
    weight = torch.linspace(-1, 1, 3 * q.shape[2] * q.shape[3], dtype=q.dtype).view(-1, 3)
    read = lasp.causal_conv1d(q.flatten(2) * 2, weight, group=group, activation="silu").view_as(q)
    output = lasp.linear_attention(read + q, k, v, log_decay, group=group)
    output = lasp.delta_rule(output.sin(), F.normalize(k, dim=-1), v * 2, beta, group=group)
    return lasp.softmax_attention(output, k, v, group=group).cos()


def inputs(group: lasp.SequenceGroup, length: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 1, length, 2, 4, generator=rng, dtype=torch.float64)
    gates, beta = torch.rand(2, 1, length, 2, generator=rng, dtype=torch.float64)
    return [lasp.shard(x, group).clone().requires_grad_() for x in (q, k, v, -gates, beta)]


def check(seen: Any, expected: Any, given: list[Tensor]) -> None:
    outputs = [call(*given) for call in (seen, expected)]
    grads = [torch.autograd.grad(output.square().sum(), given) for output in outputs]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kept", ["mm", "lasp"])
def test_selective_checkpointing_over_ranks(group_of, kept: str) -> None:
    if (group := group_of(2)) is None:
        return

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if kept in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    call = partial(mixed, group)
    for length in (20, 70, 133):
        check(partial(checkpoint, call, use_reentrant=False, context_fn=contexts), call, inputs(group, length))
