"""Ranks that are not at the same call, forward or backward: the same ValueError on every rank, and no wrong number."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.kernels.portable.recurrence import PortableRecurrence
from lasp.parallel.agreement import Channel, part
from lasp.parallel.group import _last_channel
from lasp.parallel.scan import SCANS

pytestmark = pytest.mark.mpi

WRONG_RANK = 2
TOKENS = 5


def linear(x: Tensor, group: lasp.SequenceGroup | None, **options: Any) -> Tensor:
    """x [B, T, 4, D] in the places of queries, keys and values."""
    return lasp.linear_attention(x, x, x, group=group, **options)


def linear_states(x: Tensor, group: lasp.SequenceGroup | None) -> Tensor:
    """Depends on the output through the final state alone."""
    return linear(x, group, output_final_state=True)[1]


def delta(x: Tensor, group: lasp.SequenceGroup | None) -> Tensor:
    return lasp.delta_rule(x, x / x.norm(dim=-1, keepdim=True), x, torch.full_like(x[..., 0], 0.5), group=group)


def softmax(x: Tensor, group: lasp.SequenceGroup | None, **options: Any) -> Tensor:
    return lasp.softmax_attention(x, x, x, group=group, **options)


def convolution(x: Tensor, group: lasp.SequenceGroup | None, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    x = x.flatten(2)
    return lasp.causal_conv1d(x, torch.ones(x.shape[2], 3, dtype=x.dtype), group=group, **options)


def convolution_states(x: Tensor, group: lasp.SequenceGroup | None) -> Tensor:
    return convolution(x, group, output_final_state=True)[1]


OPERATIONS: dict[str, Callable[[Tensor, lasp.SequenceGroup | None], Tensor]] = {
    **{f"linear, {scan}": partial(linear, scan=scan) for scan in SCANS},
    "linear, no mask": partial(linear, causal=False),
    "linear, final state": linear_states,
    "delta": delta,
    "softmax, ring": partial(softmax, method="ring"),
    "softmax, gather": partial(softmax, method="gather"),
    "softmax, ulysses": partial(softmax, method="ulysses"),
    "convolution": convolution,
    "convolution, final state": convolution_states,
    "running sum": lambda x, group: lasp.functional.logcumsumexp(x, group=group),
    "unshard": lambda x, group: lasp.unshard(x, group),
}


def tokens(seed: int) -> Tensor:
    """A whole sequence [1, 20, 4, 4]."""
    return torch.randn(1, 4 * TOKENS, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refused(world: Any, work: Callable[[], Any]) -> str:
    """The message of the ValueError that `work` raises, which must be the same on every rank."""
    with pytest.raises(ValueError) as caught:
        work()
    messages = world.allgather(str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_passes_in_another_order(world, group_of, name: str) -> None:
    group, operation = group_of(4), OPERATIONS[name]
    local = [lasp.shard(tokens(seed), group).requires_grad_() for seed in (0, 1)]
    losses = [operation(x, group).square().sum() for x in local]
    order = (1, 0) if world.rank == WRONG_RANK else (0, 1)
    message = refused(world, lambda: [losses[i].backward() for i in order])
    assert "ranks disagree on the call: rank 0: backward of " in message
    assert ", number 1, rank 1:" in message
    assert ", number 2, rank 3:" in message
    # The group still works, on the way back too.
    for seed in (2, 3):
        x = lasp.shard(tokens(seed), group).requires_grad_()
        operation(x, group).square().sum().backward()
        assert x.grad.isfinite().all()


WITH_CUT: dict[str, Callable[[Tensor, lasp.Cut], Tensor]] = {
    "linear": lambda x, cut: lasp.linear_attention(x, x, x, cut=cut),
    "softmax, ring": lambda x, cut: lasp.softmax_attention(x, x, x, method="ring", cut=cut),
    "softmax, ulysses": lambda x, cut: lasp.softmax_attention(x, x, x, method="ulysses", cut=cut),
    "convolution": lambda x, cut: lasp.causal_conv1d(x.flatten(2), torch.ones(16, 3, dtype=x.dtype), cut=cut),
    "unshard": lambda x, cut: lasp.unshard(x, cut=cut),
}


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("name", WITH_CUT)
def test_backward_passes_in_another_order_with_a_cut(world, group_of, name: str, batches: int) -> None:
    """Equal shapes meet, and no header says that they are not of the same call: the next one does."""
    group, operation = group_of(4), WITH_CUT[name]
    cuts = [group.cut(4 * TOKENS) for _ in range(batches)]
    local = [lasp.shard(tokens(seed), group).requires_grad_() for seed in (0, 1)]
    losses = [operation(x, cuts[i % batches]).square().sum() for i, x in enumerate(local)]
    for i in (1, 0) if world.rank == WRONG_RANK else (0, 1):
        losses[i].backward()
    # What comes next: a batch, what would hand the gradients to an optimizer, or nothing but `lasp.shutdown`.
    nexts = (
        lambda: group.cut(4 * TOKENS),
        lambda: lasp.sync_gradients(nn.Linear(1, 1), group),
        lambda: part([_last_channel(group.control)]),
    )
    message = refused(world, nexts[batches - 1])
    assert "ranks disagree on the order of calls with a cut and of their backward passes" in message
    cut = group.cut(4 * TOKENS)
    losses = [operation(x, cut).square().sum() for x in local]
    for loss in losses[::-1]:
        loss.backward()  # any order, if it is that of all ranks
    group.cut(4 * TOKENS)


def test_another_batchs_cut_on_one_rank(world, group_of) -> None:
    """Of documents that end where ranks do, so that nothing travels and no rank waits."""
    group = group_of(4)
    x, bounds = lasp.shard(tokens(0), group), [TOKENS * rank for rank in range(5)]
    cuts = [group.cut(4 * TOKENS, cu_seqlens=given) for given in (bounds, [0, 2, *bounds[1:]])]
    WITH_CUT["linear"](x, cuts[world.rank == WRONG_RANK])
    assert "ranks disagree on the order of calls with a cut" in refused(world, lambda: group.cut(4 * TOKENS))


def test_batches_that_are_computed_again_in_another_order(world, group_of) -> None:
    """Reentrant checkpointing makes a call anew, which is told from that of the other batch by its cut."""
    group = group_of(4)
    losses = []
    for cut in [group.cut(4 * TOKENS) for _ in range(2)]:
        x = lasp.shard(tokens(0), group).requires_grad_()
        losses.append(checkpoint(WITH_CUT["linear"], x, cut, use_reentrant=True).sum())
    for i in (1, 0) if world.rank == WRONG_RANK else (0, 1):
        losses[i].backward()
    assert "ranks disagree on the order of calls with a cut" in refused(world, lambda: group.cut(4 * TOKENS))


def test_a_thread_that_cuts_the_next_batches(world, group_of) -> None:
    """Its headers come anywhere among the turns that the ranks take behind the cuts before."""
    group = group_of(4)
    x = lasp.shard(tokens(0), group)
    for cut in [group.cut(4 * TOKENS) for _ in range(2)]:
        for late in range(4):
            made: list[lasp.Cut] = []
            thread = Thread(target=lambda: made.append(group.cut(4 * TOKENS)))  # noqa: B023
            for turn in range(4):
                if turn == (world.rank + late) % 4:
                    thread.start()
                WITH_CUT["linear"](x, cut)
            thread.join()
            assert len(made) == 1
        group.cut(4 * TOKENS)


def test_calls_with_a_cut_after_an_error_that_one_rank_told(world, group_of) -> None:
    """A cut of before the error is as good as before, also on the rank that has not heard the others yet."""
    group = group_of(4)
    x, cut = lasp.shard(tokens(0), group), group.cut(4 * TOKENS)

    def work() -> None:
        with group.telling("a layer"):
            if world.rank == WRONG_RANK:
                raise ValueError("of its own")
            linear(x, group)

    for _ in range(2):
        with pytest.raises(ValueError, match="of its own"):
            work()
        WITH_CUT["linear"](x, cut)
    group.cut(4 * TOKENS)


@pytest.mark.parametrize("name", ["linear, gather", "softmax, ulysses", "convolution", "unshard"])
def test_backward_on_one_rank_meets_a_forward(world, group_of, name: str) -> None:
    group, operation = group_of(4), OPERATIONS[name]
    x = lasp.shard(tokens(0), group).requires_grad_()
    loss = operation(x, group).sum()
    message = refused(world, loss.backward if world.rank == WRONG_RANK else lambda: operation(x, group))
    assert "number 2, rank 1: " in message
    assert "rank 2: backward of " in message
    assert operation(x.detach(), group).isfinite().all()


def test_an_unchecked_group_takes_any_order_together(group_of) -> None:
    """No header on the way back: what all ranks do alike is right all the same."""
    group = group_of(4, checks=False)
    x = lasp.shard(tokens(0), group).requires_grad_()
    losses = [(i + 1) * linear(x, group).sum() for i in range(2)]
    with lasp.traffic() as ledger:
        for loss in losses[::-1]:
            loss.backward()
    assert not ledger.of("control")
    whole = tokens(0).requires_grad_()
    (3 * linear(whole, None).sum()).backward()
    assert (x.grad - lasp.shard(whole.grad, group)).abs().max() < 1e-12


def swapped(first: Callable[[], Any], second: Callable[[], Any], wrong: bool) -> None:
    for call in (second, first) if wrong else (first, second):
        call()


def test_calls_in_another_order(world, group_of) -> None:
    group, wrong = group_of(4), world.rank == WRONG_RANK
    x = lasp.shard(tokens(0), group)
    for first, second, message in (
        (partial(linear, x, group), partial(delta, x, group), "the call: rank 0: linear_attention, number 1, rank 1"),
        (partial(linear, x, group), partial(linear, x, group, scan="ring"), "scan: rank 0: auto, rank 1: auto"),
        (partial(linear, x, group), partial(lasp.unshard, x, group), "rank 2: unshard, number 3"),
        (partial(softmax, x, group), partial(softmax, x, group, window=3), "window: rank 0: None"),
    ):
        assert message in refused(world, partial(swapped, first, second, wrong))
    assert linear(x, group).isfinite().all()


def test_a_skipped_call_is_seen_at_the_next_other_one(world, group_of) -> None:
    group = group_of(4)
    x = lasp.shard(tokens(0), group)

    def work() -> None:
        if world.rank != WRONG_RANK:
            linear(x, group)
        softmax(x, group)

    assert "rank 1: linear_attention, number 1, rank 2: softmax_attention" in refused(world, work)
    assert softmax(x, group).isfinite().all()


def test_two_groups_of_the_same_ranks_are_told_apart(world, group_of) -> None:
    one, other = group_of(4), group_of(4)
    x = lasp.shard(tokens(0), one)
    order = (other, one) if world.rank == WRONG_RANK else (one, other)
    assert "ranks disagree on the group" in refused(world, lambda: [linear(x, group) for group in order])
    assert linear(x, one).isfinite().all()
    assert linear(x, other).isfinite().all()


def test_a_group_that_one_rank_makes_while_others_call(world, subgroups, group_of) -> None:
    group = group_of(4)
    x = lasp.shard(tokens(0), group)
    work = (lambda: group_of(4)) if world.rank == WRONG_RANK else (lambda: linear(x, group))
    assert "rank 2: making a SequenceGroup" in refused(world, work)
    assert linear(x, group).isfinite().all()


@pytest.mark.parametrize("call", ["linear, gather", "unshard"])
def test_a_rank_that_leaves_while_others_call(world, group_of, call: str) -> None:
    """And one that calls while the others leave; all together they leave without a word."""
    group = group_of(4)
    x = lasp.shard(tokens(0), group)
    run, leave = partial(OPERATIONS[call], x, group), lambda: part([Channel(group.control)])
    for one, others in ((leave, run), (run, leave)):
        told = refused(world, one if world.rank == WRONG_RANK else others)
        assert told.startswith("ranks disagree on the call: rank 0: ")
        assert told.count(": shutdown") == (1 if one is leave else 3)
    leave()
    assert run().isfinite().all()


@pytest.mark.parametrize("kind", [MemoryError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["read_out", "grad_states"])
def test_a_call_that_ended_in_the_middle(
    world, group_of, monkeypatch: pytest.MonkeyPatch, kind: type, where: str
) -> None:
    """On all ranks here, after the exchange, so that none is left waiting."""

    def fail(*_: Any) -> None:
        raise kind("no more")

    group = group_of(4)
    x = lasp.shard(tokens(0), group).requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(PortableRecurrence, where, fail)
        with pytest.raises(kind):
            linear(x, group).sum().backward()
    call = "linear_attention, number 1" if where == "read_out" else "backward of linear_attention, number 1"
    for again in (partial(linear, x, group), partial(lasp.unshard, x, group)):
        with pytest.raises(ValueError, match=f"^{call}, which ended by {kind.__name__}, was left in the middle"):
            again()
    world.barrier()  # what the ranks told one another has arrived


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, ValueError])
def test_what_ends_one_rank_between_two_calls_is_told(world, group_of, kind: type) -> None:
    group = group_of(4)
    x = lasp.shard(tokens(0), group)

    def work() -> None:
        with group.telling("a layer"):
            if world.rank == WRONG_RANK:
                raise kind("of its own")
            linear(x, group)

    for _ in range(2):  # and the group works afterwards
        with pytest.raises(kind if world.rank == WRONG_RANK else ValueError) as caught:
            work()
        told = f"a layer ended by {kind.__name__}: of its own (rank 2 of 4)"
        assert str(caught.value) == ("of its own" if world.rank == WRONG_RANK else told)
    assert linear(x, group).isfinite().all()
    assert group.channel.count == 3


def test_what_ends_all_ranks_between_two_calls(group_of) -> None:
    group = group_of(4)
    x = lasp.shard(tokens(0), group)
    for _ in range(3):
        with pytest.raises(RuntimeError), group.telling("a layer"):
            raise RuntimeError
    loss = linear(x.requires_grad_(), group).sum()
    linear(x, group)
    loss.backward()
    assert group.channel.count == 5  # 3 that were told and 2 calls; a backward pass takes no number


# Forward passes that are computed again in the backward pass ------------------------------------------------------


class Layers(nn.Module):
    """Two layers of all that exchanges, each of which may be checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.weights = nn.ParameterList([torch.eye(4, dtype=torch.float64) * (1 + i) / 2 for i in range(2)])

    def layer(self, x: Tensor, weight: Tensor, group: lasp.SequenceGroup | None) -> Tensor:
        mixed = linear(x @ weight, group, scan="ring") + softmax(x, group, method="gather") + delta(x, group)
        return x + mixed + convolution(mixed, group).view_as(x)

    def forward(self, x: Tensor, group: lasp.SequenceGroup | None) -> Tensor:
        for weight in self.weights:
            if self.reentrant is None:
                x = self.layer(x, weight, group)
            else:
                x = checkpoint(self.layer, x, weight, group, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("ddp", [True, False])
def test_checkpointing(world, group_of, reentrant: bool, ddp: bool) -> None:
    group = group_of(4)
    whole = tokens(0).requires_grad_()
    plain = Layers(None)
    plain(whole, None).square().sum().backward()
    x = lasp.shard(tokens(0), group).requires_grad_()
    model = Layers(reentrant)
    # DDP and reentrant checkpointing need one use of every parameter in each pass, as here.
    wrapped = lasp.data_parallel(model, group) if ddp else model
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        wrapped(x, group).square().sum().backward()
    if not ddp:
        lasp.sync_gradients(model, group)
    assert (x.grad - lasp.shard(whole.grad, group)).abs().max() < 1e-10 * whole.grad.abs().max()
    for own, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert (own.grad - expected.grad).abs().max() < 1e-10 * expected.grad.abs().max()


def test_another_order_is_seen_under_checkpointing(world, group_of) -> None:
    """A call that is computed again keeps its number. (Reentrant checkpointing makes new calls, alike in any order.)"""
    group = group_of(4)
    local = [lasp.shard(tokens(seed), group).requires_grad_() for seed in (0, 1)]
    model = Layers(reentrant=False)
    losses = [model(x, group).square().sum() for x in local]
    order = (1, 0) if world.rank == WRONG_RANK else (0, 1)
    message = refused(world, lambda: [losses[i].backward() for i in order])
    assert "ranks disagree on the call: rank 0: backward of " in message
