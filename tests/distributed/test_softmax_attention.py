"""Softmax attention with the sequence cut over 1, 2 and 4 ranks, against attention with all scores written out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lasp
from lasp.kernels.softmax.blocks import BlockAttention
from lasp.kernels.softmax.mask import Mask
from lasp.parallel import collectives, keys
from lasp.parallel.collectives import Pending
from lasp.parallel.layout import even_pieces, pieces_of
from lasp.parallel.methods import Shapes, rounds
from lasp.parallel.schedule import EVERYONE
from tests.attention import AttentionProblem, largest_error, make_attention, solve_attention
from tests.distributed.cutting import put_together

pytestmark = pytest.mark.mpi

LENGTH = 37
# Documents of one token, none, ending at a border of 10 | 9 | 9 | 9 and of 1 | 20 | 0 | 16, and across three ranks.
DOCUMENTS = (0, 1, 10, 10, 11, 33, 36, 37, 37)
VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window below a shard": {"window": 4},
    "window above a shard": {"window": 15},
    "window of one": {"window": 1},
    "documents": {"cu_seqlens": DOCUMENTS},
    "documents bidirectional": {"cu_seqlens": DOCUMENTS, "causal": False},
    "documents window": {"cu_seqlens": DOCUMENTS, "window": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "key mask": {"key_mask": True},
    "grouped heads": {"heads": (8, 2, 2), "dims": (4, 7)},
    "one head of keys": {"heads": (4, 1, 1)},
    "many heads": {"heads": (44, 11, 11)},
    "unlike heads": {"heads": (2, 4, 1)},
    "everything": {"cu_seqlens": DOCUMENTS, "window": 6, "softcap": 2.0, "sinks": True, "key_mask": True},
    "everything bidirectional": {"causal": False, "sinks": True, "key_mask": True, "dims": (4, 8)},
}
METHODS = ["ring", "gather", "ulysses", "ulysses_ring"]


def even_lengths(length: int, size: int, layout: str) -> tuple[int, ...]:
    pieces = even_pieces(length, size, layout)
    return tuple(sum(p.stop - p.start for p in pieces if p.rank == rank) for rank in range(size))


PLACES = {
    "1": (1, "contiguous", (37,)),
    "1 zigzag": (1, "zigzag", (37,)),
    "2": (2, "contiguous", (19, 18)),
    "2 uneven": (2, "contiguous", (37, 0)),
    "2 zigzag": (2, "zigzag", even_lengths(LENGTH, 2, "zigzag")),
    "4": (4, "contiguous", (10, 9, 9, 9)),
    "4 uneven": (4, "contiguous", (1, 20, 0, 16)),
    "4 zigzag": (4, "zigzag", even_lengths(LENGTH, 4, "zigzag")),
}


# Every variant where the cut is hardest, these few at the other places.
FEW = ("causal", "documents window", "everything", "everything bidirectional")
CASES = [
    (place, variant) for place in PLACES for variant in VARIANTS if place in ("4 uneven", "4 zigzag") or variant in FEW
]


@lru_cache
def reference_of(variant: str) -> tuple[AttentionProblem, dict[str, torch.Tensor]]:
    problem = make_attention(LENGTH, **VARIANTS[variant])
    return problem, solve_attention(problem)


def cut_attention(problem: AttentionProblem, group: lasp.SequenceGroup, lengths: tuple[int, ...]) -> AttentionProblem:
    """This rank's part of a problem."""
    pieces = [p for p in pieces_of(lengths, group.layout) if p.rank == group.rank]

    def part(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None or x.dim() == 1:
            return x
        return torch.cat([x[:, p.start : p.stop] for p in pieces], 1)

    inputs = {name: part(x) for name, x in problem.inputs.items()}
    return replace(problem, inputs=inputs, key_mask=part(problem.key_mask), grad=part(problem.grad))


def solve_cut(problem: AttentionProblem, group: lasp.SequenceGroup, lengths: tuple[int, ...], method: str) -> dict:
    """The cut problem's results, put together again."""
    attention = partial(lasp.softmax_attention, group=group, method=method)
    local = solve_attention(cut_attention(problem, group, lengths), attention)
    return put_together(local, {"dsinks"}, group, lengths)


@pytest.fixture(scope="module")
def cached_group_of(group_of) -> Callable[..., lasp.SequenceGroup | None]:
    """Groups that exchange heads make process groups of their own; the tests share them."""
    return lru_cache(lambda size, layout, heads: group_of(size, layout, heads=heads))


@pytest.fixture
def split_by_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ring pass some of the heads around at a time, as it does with long shards."""
    monkeypatch.setattr(keys, "LEAST_MESSAGE", 1)


@pytest.mark.parametrize(("place", "variant"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_parity(cached_group_of, split_by_heads: None, place: str, variant: str, method: str) -> None:
    size, layout, lengths = PLACES[place]
    group = cached_group_of(size, layout, 2 if method == "ulysses_ring" and size > 1 else 1)
    if group is not None:
        problem, expected = reference_of(variant)
        assert largest_error(solve_cut(problem, group, lengths, method), expected) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_long_shards(cached_group_of, layout: str, method: str) -> None:
    """Shards of several explicitly masked tiles; fp32, as the kernels are meant to run."""
    group = cached_group_of(4, layout, 2 if method == "ulysses_ring" else 1)
    options = {"cu_seqlens": (0, 700, 701, 790, 2603), "window": 300, "heads": (4, 2, 2), "dims": (8, 8)}
    problem = make_attention(2603, dtype=torch.float32, **options)
    # In fp32 and uncut, too: the reference would write out all scores.
    expected = solve_attention(problem, lasp.softmax_attention)
    found = solve_cut(problem, group, even_lengths(2603, 4, layout), method)
    assert largest_error(found, {name: x.double() for name, x in expected.items()}) < 1e-5


def test_bf16(cached_group_of) -> None:
    problem = make_attention(256, heads=(4, 2, 2), dims=(32, 32), dtype=torch.bfloat16)
    expected = solve_attention(problem)
    uncut = largest_error(solve_attention(problem, lasp.softmax_attention), expected)
    for method in METHODS[:3]:
        found = solve_cut(problem, cached_group_of(4, "zigzag", 1), (64,) * 4, method)
        assert largest_error(found, expected) <= 2 * uncut


def test_unchecked_group_gives_the_same(group_of) -> None:
    group = group_of(4, layout="zigzag", checks=False)
    problem, expected = reference_of("documents")
    local = cut_attention(problem, group, PLACES["4 zigzag"][2])
    with lasp.traffic() as ledger:
        found = lasp.softmax_attention(**local.inputs, **local.options, group=group, method="ring")
    assert not ledger.of("control")
    whole = lasp.unshard(found, group_of(4, layout="zigzag"))
    assert largest_error({"output": whole}, {"output": expected["output"]}) < 1e-10


# The ledger ---------------------------------------------------------------------------------------------------------

TOKENS, HEADS, DIMS = 12, (4, 2, 2), (6, 4)  # per rank
VALUES = 2 * TOKENS * HEADS[1] * sum(DIMS)  # of the keys and values of one rank: two batches
INPUT, SUM = 2, 4  # bytes of a bf16 input and of an fp32 sum


def traffic_of(group: lasp.SequenceGroup, method: str, **options: Any) -> tuple[list, list]:
    """What a call on bf16 inputs exchanged, forward and backward: (op, bytes, steps) each."""
    problem = make_attention(TOKENS * group.size, heads=HEADS, dims=DIMS, dtype=torch.bfloat16, **options)
    local = cut_attention(problem, group, (TOKENS,) * group.size)
    with lasp.traffic() as ledger:
        solve_attention(local, partial(lasp.softmax_attention, group=group, method=method))
    forward, backward = (
        [(record.op, record.bytes, record.steps) for record in ledger.of(phase)] for phase in ("forward", "backward")
    )
    return forward, backward


@pytest.mark.parametrize("size", [2, 4])
def test_ring_bytes_without_mask(group_of, size: int) -> None:
    if (group := group_of(size)) is None:
        return
    forward, backward = traffic_of(group, "ring", causal=False)
    assert forward == [("ring", (size - 1) * VALUES * INPUT, size - 1)]
    assert backward == [("ring", (size - 1) * VALUES * (INPUT + SUM), size)]


@pytest.mark.parametrize("size", [2, 4])
def test_ring_bytes_contiguous(group_of, size: int) -> None:
    """Keys only travel to later ranks; gradients pass over the same ranks and come home."""
    if (group := group_of(size)) is None:
        return
    rank, last = group.rank, size - 1
    forward, backward = traffic_of(group, "ring")
    assert forward == [("ring", rank * VALUES * INPUT, size - 1)]
    gradients = max(rank - 1, 0) + (rank < last)
    assert backward == [("ring", rank * VALUES * INPUT + gradients * VALUES * SUM, size)]


@pytest.mark.parametrize("size", [2, 4])
def test_ring_bytes_zigzag(group_of, size: int) -> None:
    """Against the order of ranks: a rank's early half meets all others, its late half only the ranks before it."""
    if (group := group_of(size, layout="zigzag")) is None:
        return
    rank, half = group.rank, VALUES // 2
    forward, backward = traffic_of(group, "ring")
    halves = 2 * (size - 1 - rank) + rank
    assert forward == [("ring", halves * half * INPUT, size - 1)]
    gradients = (size - 2) + max(size - 2 - rank, 0) + 1 + (rank > 0)
    assert backward == [("ring", halves * half * INPUT + gradients * half * SUM, size)]


def test_some_heads_at_a_time_bring_the_same_bytes(group_of, monkeypatch: pytest.MonkeyPatch) -> None:
    if (group := group_of(2)) is None:
        return
    whole = traffic_of(group, "ring", causal=False)
    monkeypatch.setattr(keys, "LEAST_MESSAGE", 1)
    for records, (one,) in zip(traffic_of(group, "ring", causal=False), whole, strict=True):
        assert len(records) == HEADS[1]
        assert {op for op, _, _ in records} == {"ring"}
        assert sum(num_bytes for _, num_bytes, _ in records) == one[1]
        assert all(steps == one[2] for _, _, steps in records)


def test_a_window_within_the_shard_takes_one_hop(group_of) -> None:
    group = group_of(4)
    forward, backward = traffic_of(group, "ring", window=TOKENS)
    before, after = group.rank > 0, group.rank < 3
    assert forward == [("ring", before * VALUES * INPUT, 1)]
    assert backward == [("ring", before * VALUES * INPUT + after * VALUES * SUM, 2)]


def test_a_window_takes_one_hop_on_zigzag_too(group_of) -> None:
    """Early halves are needed by the next rank, late ones by the rank before: each goes its own way. The two halves of
    the last rank touch, and go as one."""
    group = group_of(4, layout="zigzag")
    forward, backward = traffic_of(group, "ring", window=TOKENS // 2)
    half, keys, gradients = VALUES // 2, (1, 2, 3, 1)[group.rank], (1, 2, 2, 2)[group.rank]
    assert forward == [("ring", keys * half * INPUT, 1)]
    assert backward == [("ring", keys * half * INPUT + gradients * half * SUM, 2)]


def test_documents_within_their_shards_stay_there(group_of) -> None:
    group = group_of(4)
    problem = make_attention(4 * TOKENS, cu_seqlens=[0, TOKENS, 2 * TOKENS, 3 * TOKENS, 4 * TOKENS])
    local = cut_attention(problem, group, (TOKENS,) * 4)
    with lasp.traffic() as ledger:
        solve_attention(local, partial(lasp.softmax_attention, group=group, method="ring"))
    assert {record.phase for record in ledger.records} == {"control"}


@pytest.mark.parametrize("size", [2, 4])
def test_gather_bytes(group_of, size: int) -> None:
    if (group := group_of(size)) is None:
        return
    forward, backward = traffic_of(group, "gather")
    assert forward == [("all_gather", (size - 1) * VALUES * INPUT, 1)]
    assert backward == [("reduce_scatter", (size - 1) * VALUES * SUM, 1)]


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is_priced_by_is_what_it_sends(cached_group_of, method: str, layout: str) -> None:
    """The rounds of `method="auto"` and the ledger, which counts the messages themselves."""
    group = cached_group_of(4, layout, 2 if method == "ulysses_ring" else 1)
    sent = traffic_of(group, method, key_mask=True)
    mask, shapes = Mask((0, 4 * TOKENS)), Shapes(2, HEADS[0], HEADS[1], *DIMS, INPUT, SUM, key_mask=True)
    for records, way in zip(sent, rounds(method, group.cut(4 * TOKENS), mask, shapes), strict=True):
        parcels = [parcel for together in way for parcel in together]
        heard = [p for p in parcels if p.target == group.rank or (p.target == EVERYONE and p.source != group.rank)]
        assert sum(parcel.bytes for parcel in heard) == sum(num_bytes for _, num_bytes, _ in records)
        assert len(way) == sum(steps for _, _, steps in records)


@pytest.mark.parametrize("heads", [(4, 2, 2), (3, 3, 3)], ids=str)
def test_auto(world, cached_group_of, heads: tuple[int, ...]) -> None:
    """One of them, the same on all ranks, which may say so themselves; with the outputs and gradients of any."""
    group, problem = cached_group_of(4, "zigzag", 1), make_attention(LENGTH, heads=heads)
    with lasp.traffic() as ledger:
        found = solve_cut(problem, group, even_lengths(LENGTH, 4, "zigzag"), "auto")
    assert largest_error(found, solve_attention(problem)) < 1e-10
    ops = {"all_to_all"} if heads[0] == 4 else {"ring"}
    assert {record.op for record in ledger.records if record.phase != "control"} - {"all_gather"} == ops


def head_bytes(members: int) -> tuple[int, int]:
    """Bytes that an exchange of heads among `members` receives, of q, k, v and of the output. Keys are at least one
    head per rank."""
    rows = 2 * TOKENS * (members - 1) * INPUT
    queries, keys = HEADS[0] // members, max(HEADS[1] // members, 1)
    return rows * (queries * DIMS[0] + keys * sum(DIMS)), rows * queries * DIMS[1]


@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_bytes(group_of, size: int) -> None:
    if (group := group_of(size)) is None:
        return
    inputs, output = head_bytes(size)
    forward, backward = traffic_of(group, "ulysses")
    assert forward == [("all_to_all", inputs, 1), ("all_to_all", output, 1)]
    assert backward == [("all_to_all", output, 1), ("all_to_all", inputs, 1)]


def test_ulysses_ring_bytes(group_of) -> None:
    """Two neighbours exchange heads: a ring of two passes twice the tokens of half the heads."""
    inputs, output = head_bytes(2)
    forward, backward = traffic_of(group_of(4, heads=2), "ulysses_ring", causal=False)
    assert forward == [("all_to_all", inputs, 1), ("ring", VALUES * INPUT, 1), ("all_to_all", output, 1)]
    assert backward == [("all_to_all", output, 1), ("ring", VALUES * (INPUT + SUM), 2), ("all_to_all", inputs, 1)]


def test_one_rank_sends_nothing(group_of) -> None:
    if (group := group_of(1)) is not None:
        for method in METHODS:
            assert traffic_of(group, method) == ([], [])


def test_the_next_block_is_in_flight_while_this_one_computes(group_of, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    for name in ("attend", "gradients"):
        kernel = getattr(BlockAttention, name)
        monkeypatch.setattr(BlockAttention, name, lambda *a, _k=kernel, _n=name: (events.append(_n), _k(*a))[1])
    rotate = collectives.rotate

    def spy(outgoing, incoming, group, result):
        if outgoing or incoming:
            events.append("start")
        pending = rotate(outgoing, incoming, group, result)
        return Pending(pending.works, result, lambda found: (events.append("wait"), found)[1] if incoming else found)

    monkeypatch.setattr(collectives, "rotate", spy)
    if (group := group_of(2)) is None:
        return
    traffic_of(group, "ring", causal=False)
    assert events[:5] == ["start", "attend", "wait", "attend", "start"]
    # Backward: keys arrive as before, and the other rank's gradients are sent when they are complete.
    assert events[4:] == ["start", "gradients", "wait", "gradients", "start", "wait"]


# Work and memory ----------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """The most bytes of storage that operations made inside the block and that lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self.now += (size := x.untyped_storage().nbytes())
                self.peak = max(self.peak, self.now)
                weakref.finalize(x.untyped_storage(), self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak_of(group: lasp.SequenceGroup, method: str, backward: bool, heads: int) -> int:
    problem = make_attention(PEAK_TOKENS * group.size, heads=(heads,) * 3, dims=(16, 16), dtype=torch.float32)
    local = cut_attention(problem, group, (PEAK_TOKENS,) * group.size)
    attention = partial(lasp.softmax_attention, group=group, method=method)
    with PeakMemory() as memory:
        if backward:
            solve_attention(local, attention)
        else:
            attention(**local.inputs)
    return memory.peak


PEAK_TOKENS = 64  # per rank


@pytest.mark.parametrize("heads", [8, 10])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peak_memory_of_the_ring_does_not_grow_with_ranks(
    world, group_of, split_by_heads: None, backward: bool, heads: int
) -> None:
    peaks = {}
    for size in (2, 4):
        group = group_of(size, layout="zigzag")
        for method in ("ring", "gather"):
            own = 0 if group is None else peak_of(group, method, backward, heads)
            peaks[size, method] = world.allreduce(own, MPI.MAX)
    block = PEAK_TOKENS * heads * 32 * 4  # bytes of the keys and values of one rank, or of their gradients
    headers = 8 * 1024  # of agreements, which a thread of gloo may hold a moment longer: in any of the four calls
    assert peaks[4, "ring"] <= peaks[2, "ring"] + headers
    assert peaks[4, "gather"] >= peaks[2, "gather"] + (6 if backward else 4) * block - headers


# Mistakes -----------------------------------------------------------------------------------------------------------

WRONG_RANK = 2


def good(rank: int) -> dict[str, Any]:
    """Arguments of a call that works: six tokens on every rank."""
    rng = torch.Generator().manual_seed(rank)
    return {name: torch.randn(1, 6, 4, 4, generator=rng, dtype=torch.float64) for name in "qkv"}


# name: (what it does to good arguments, what the message says)
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "tokens": (lambda a: {"k": a["k"][:, :5]}, "must share batch and tokens, got q [1, 6, 4, 4], k [1, 5, 4, 4]"),
    "key dim": (lambda a: {"k": a["k"][..., :3]}, "q and k must share their last dim"),
    "dtypes": (lambda a: {"k": a["k"].float()}, "must share a floating dtype, got torch.float64, torch.float32"),
    "heads": (lambda a: {"k": a["k"][:, :, :3]}, "numbers of heads must divide one another, got {'q': 4, 'k': 3"),
    "window": (lambda a: {"window": 0}, "window must be a whole number of at least 1, got 0"),
    "window without mask": (lambda a: {"window": 3, "causal": False}, "got window=3 with causal=False"),
    "softcap": (lambda a: {"softcap": -1.0}, "softcap must be positive, got -1.0"),
    "softcap of words": (lambda a: {"softcap": "2"}, "softcap must be a finite number, got '2'"),
    "scale": (lambda a: {"scale": float("nan")}, "scale must be a finite number, got nan"),
    "trained scale": (
        lambda a: {"scale": torch.ones((), requires_grad=True)},
        "scale must be a finite number, got ten",
    ),
    "device of sinks": (
        lambda a: {"sinks": torch.zeros(4, device="meta")},
        "sinks must be on the device of q, cpu, got meta",
    ),
    "device of key mask": (
        lambda a: {"key_mask": torch.ones(1, 6, dtype=torch.bool, device="meta")},
        "key_mask must be on the device of q, cpu, got meta",
    ),
    "window of truth": (lambda a: {"window": True}, "window must be a whole number of at least 1, got True"),
    "sinks": (lambda a: {"sinks": torch.zeros(3)}, "sinks must be floating [4], got torch.float32 [3]"),
    "key mask": (lambda a: {"key_mask": torch.ones(1, 5, dtype=torch.bool)}, "key_mask must be bool [1, 6], got torch"),
    "key mask dtype": (lambda a: {"key_mask": torch.ones(1, 6)}, "key_mask must be bool [1, 6], got torch.float32"),
    "bounds": (lambda a: {"cu_seqlens": [0, 9, 7, 24]}, "cu_seqlens must never decrease, got 9 followed by 7"),
    "method": (lambda a: {"method": "star"}, "method must be one of auto, ring, gather, ulysses, ulysses_ring, got 's"),
    "heads on ranks": (
        lambda a: {name: a[name][:, :, :2] for name in "qkv"} | {"method": "ulysses"},
        "method 'ulysses' deals out heads to 4 ranks, which must divide their number, got 2 query heads; 'ring'",
    ),
    "no heads in the group": (lambda a: {"method": "ulysses_ring"}, "needs a group made with heads=h"),
}

# Fine on each rank alone, wrong together.
DISAGREEMENTS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "method": (lambda a: {"method": "gather"}, "ranks disagree on method: rank 0: auto, rank 1: auto, rank 2: gather"),
    "window": (lambda a: {"window": 3}, "ranks disagree on window: rank 0: None"),
    "sinks": (lambda a: {"sinks": torch.zeros(4)}, "ranks disagree on sinks"),
    "key mask": (lambda a: {"key_mask": torch.ones(1, 6, dtype=torch.bool)}, "ranks disagree on key_mask"),
    "documents": (lambda a: {"cu_seqlens": [0, 24]}, "ranks disagree on cu_seqlens"),
    "gradients": (lambda a: {"q": a["q"].clone().requires_grad_()}, "ranks disagree on backward"),
    "heads": (lambda a: {"k": a["k"][:, :, :2]}, "ranks disagree on heads"),
}


def told(world, group: lasp.SequenceGroup, arguments: dict[str, Any]) -> str:
    """The message of the ValueError that the call raises, which must be the same on every rank."""
    with pytest.raises(ValueError) as caught:
        lasp.softmax_attention(group=group, **arguments)
    messages = world.allgather(str(caught.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_of_one_rank_or_of_all(world, cached_group_of, name: str) -> None:
    group, (spoil, message) = cached_group_of(4, "zigzag", 1), MISTAKES[name]
    arguments = good(world.rank)
    spoiled = arguments | spoil(arguments)
    assert message in told(world, group, spoiled)
    assert message in (one := told(world, group, spoiled if world.rank == WRONG_RANK else arguments))
    assert f"(rank {WRONG_RANK} of 4)" in one
    assert lasp.softmax_attention(group=group, **arguments).isfinite().all()


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree(world, cached_group_of, name: str) -> None:
    group, (change, message) = cached_group_of(4, "contiguous", 1), DISAGREEMENTS[name]
    arguments = good(world.rank)
    changed = arguments | (change(arguments) if world.rank == WRONG_RANK else {})
    assert message in told(world, group, changed)


def test_heads_must_divide_the_group(group_of) -> None:
    with pytest.raises(ValueError, match="heads must divide the number of ranks in the group, 4, got 3"):
        group_of(4, heads=3)
