"""Methods of softmax attention: what each would send, and which one `method="auto"` takes. Integers alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import lasp
from lasp.kernels.softmax.mask import Mask
from lasp.parallel.cost import rounds_seconds
from lasp.parallel.cut import Cut, even_lengths
from lasp.parallel.methods import Shapes, check_method, choose, rounds
from lasp.parallel.wires import GPUS, Wire, Wires

SLOW = Wire(latency=1.0, bandwidth=1.0, hop=1.0)
LATENCY, BYTES = Wire(1e-3, 1e15, 1e-3), Wire(1e-9, 1e6, 1e-9)


def cut_of(ranks: int, layout: Any = "contiguous", heads: int = 1, wire: Wire = SLOW, **facts: Any) -> Cut:
    none: Any = None
    wires = facts.pop("wires", Wires(wire, wire))
    group = lasp.SequenceGroup(
        none, none, 0, ranks, layout, False, none, heads=heads, wires=wires, node_size=facts.pop("node_size", None)
    )
    return Cut(group, even_lengths(64 * ranks, ranks, layout), **facts)


def shapes(query_heads: int, key_heads: int, key_mask: bool = False) -> Shapes:
    return Shapes(1, query_heads, key_heads, 8, 8, 2, 4, key_mask)


def chosen(cut: Cut, query_heads: int, key_heads: int, causal: bool = True, window: int | None = None) -> str:
    return choose(cut, Mask(cut.bounds or (0, cut.total), causal, window), shapes(query_heads, key_heads))


def took(method: str, cut: Cut, causal: bool = True) -> list[float]:
    ways = rounds(method, cut, Mask((0, cut.total), causal), shapes(4, 4))
    return [rounds_seconds(way, cut.size, Wires(SLOW, SLOW)) for way in ways]


@pytest.mark.parametrize("ranks", [2, 4])
def test_formulas(ranks: int) -> None:
    """On one kind of wire, a second a message and a byte; tokens of 4 heads, with 16 channels of keys and values."""
    keys, gradients = 64 * 4 * 16 * 2, 64 * 4 * 16 * 4
    assert took("gather", cut_of(ranks)) == [(ranks - 1) * (1 + keys), (ranks - 1) * (1 + gradients)]
    # Gradients hop behind the keys, and home in the end.
    assert took("ring", cut_of(ranks), causal=False) == [
        (ranks - 1) * (1 + keys),
        (1 + keys) + (ranks - 2) * (1 + keys + gradients) + (1 + gradients),
    ]
    # Queries, keys and values are dealt out and outputs back, of which a share stays.
    dealt = 2 * 1 + 64 * 4 * (16 + 16) * 2 * (ranks - 1) // ranks
    assert took("ulysses", cut_of(ranks)) == [dealt, dealt]


def test_what_latency_and_bytes_choose(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert chosen(cut_of(8, wire=LATENCY), 8, 8) == "ulysses", "four rounds"
    assert 'method="auto" takes ulysses for 8 ranks and 1 x 64 tokens each: ring 15 ms, ulysses 4 ms' in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert chosen(cut_of(8, wire=LATENCY, bounds=(0, 99, 512)), 8, 8) == "ulysses"
    assert not caplog.text, "said once"
    assert chosen(cut_of(2, wire=LATENCY), 8, 8) == "ring", "three rounds"
    assert chosen(cut_of(8, wire=BYTES), 7, 7) == "ring", "nobody else takes seven heads"
    assert chosen(cut_of(4, wire=Wire(1e-3, 1e15, 1e-5)), 9, 1) == "gather", "one message of few heads"
    assert chosen(cut_of(4, wire=Wire(1e-3, 1e15, 1e-5)), 9, 3) == "ring", "which would keep more than the queries"
    assert chosen(cut_of(1), 8, 8) == "ring"


def test_masks_count() -> None:
    """Hops go no further than keys are seen."""
    assert chosen(cut_of(8, wire=LATENCY), 8, 8, window=16) == "ring"
    bounds = tuple(range(0, 513, 64))
    assert chosen(cut_of(8, wire=LATENCY, bounds=bounds), 8, 8) == "ring", "documents stay on their ranks"
    assert rounds("ring", cut_of(8, bounds=bounds), Mask(bounds), shapes(8, 8)) == ([], [])


def test_neighbours_that_exchange_heads() -> None:
    """Heads are dealt out inside nodes, over whose fast wires they go, and keys hop between these."""
    nodes: dict[str, Any] = {"heads": 4, "node_size": 4, "wires": Wires(Wire(1e-6, 1e12, 1e-6), BYTES)}
    assert chosen(cut_of(8, **nodes), 16, 2) == "ulysses_ring"
    assert chosen(cut_of(8, **nodes), 6, 2) == "ring", "four ranks do not divide six heads"
    assert chosen(cut_of(4, heads=4, wire=LATENCY), 8, 8) == "ulysses"


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["ring", "gather", "ulysses", "ulysses_ring"])
def test_every_rank_counts_the_same(method: str, layout: str) -> None:
    cuts = [cut_of(4, layout, heads=2, wires=GPUS) for _ in range(4)]
    for rank, cut in enumerate(cuts):
        object.__setattr__(cut.group, "rank", rank)
    found = [rounds(method, cut, Mask((0, cut.total)), shapes(4, 2, key_mask=True)) for cut in cuts]
    assert found[0] == found[1] == found[2] == found[3]
    assert all(parcel.bytes > 0 for way in found[0] for parcels in way for parcel in parcels)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="method must be one of auto, ring, gather, ulysses, ulysses_ring, got 'star'"):
        check_method("star", None, 4)
    with pytest.raises(ValueError, match="deals out heads to 4 ranks, which must divide their number, got 2"):
        check_method("ulysses", cut_of(4).group, 2)
    with pytest.raises(ValueError, match="needs a group made with heads=h"):
        check_method("ulysses_ring", cut_of(4).group, 4)
    check_method("auto", cut_of(4).group, 3)
