"""What schedules would take: by hand where that is easy, and how one compares with another."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from lasp.parallel.cost import choose, seconds
from lasp.parallel.layout import make_plan
from lasp.parallel.scan import SCANS, Doubling, Gather, Pipeline, Ring, Scan
from lasp.parallel.schedule import Links, Sizes
from lasp.parallel.wires import Wire, Wires

SLOW = Wire(latency=1.0, bandwidth=1.0, hop=1.0)
WIRES = Wires(SLOW, SLOW)
SIZES = Sizes(state=8, transfer=2, rows=4)


def links(ranks: int) -> Links:
    return Links.of(make_plan((4,) * ranks, 0, "contiguous", None), ranks)


def cost(scan: Scan, ranks: int, sizes: Sizes = SIZES, wires: Wires = WIRES) -> float:
    return seconds(scan.schedule(links(ranks)), sizes, wires)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_formulas(ranks: int) -> None:
    """On one kind of wire, a latency a and b seconds a byte."""
    a, state, whole = 1.0, 8.0, 10.0
    assert cost(Gather(), ranks) == (ranks - 1) * (a + whole)
    assert cost(Ring(), ranks) == (ranks - 1) * (a + state)
    for blocks in (2, 4):
        assert cost(Pipeline(blocks), ranks) == (ranks - 1) * (a + state / blocks) + (blocks - 1) * state / blocks
    resting = SLOW._replace(gap=5.0, share=0.5)
    wires = Wires(resting, resting)
    assert cost(Gather(), ranks, wires=wires) == (ranks - 1) * (a + 2 * whole)
    assert cost(Ring(), ranks, wires=wires) == cost(Ring(), ranks), "no message follows another"
    for blocks in (2, 4):
        more = (blocks - 1) * max(5, 2 * state / blocks)  # the gap, or half the bandwidth
        assert cost(Pipeline(blocks), ranks, wires=wires) == (ranks - 1) * (a + state / blocks) + more
    # The first rank sends to 1, 2, 4, ... at once: they share its port, and who is told by them waits for that.
    steps = ranks.bit_length() - 1
    assert steps * (a + state) <= cost(Doubling(), ranks) <= steps * (a + steps * whole)


@pytest.mark.parametrize("wire", [Wire(3e-4, 1e9, 6e-5), Wire(1e-3, 1.25e8, 2e-4), Wire(3e-5, 4.5e11, 3e-6)])
@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_the_pipeline_has_as_many_blocks_as_are_best(ranks: int, wire: Wire) -> None:
    """Of all numbers of blocks none is predicted to take less."""
    sizes, wires = Sizes(1 << 22, 0, 128), Wires(wire, wire)
    fitted = Pipeline().fitted(links(ranks), sizes, wires)
    everyone = min(cost(Pipeline(blocks), ranks, sizes, wires) for blocks in range(1, 65))
    assert cost(fitted, ranks, sizes, wires) < 1.01 * everyone


def test_a_node_s_wires_do_not_count_where_a_hop_leaves_it() -> None:
    """The slowest hop is what blocks wait for."""
    fast, slow, sizes = Wire(1e-5, 1e12, 1e-6), Wire(1e-3, 1e8, 1e-4), Sizes(1 << 22, 0, 128)
    there = Links.of(make_plan((4,) * 8, 0, "contiguous", None), 8, node_size=4)
    assert Pipeline().fitted(there, sizes, Wires(fast, slow)) == Pipeline().fitted(links(8), sizes, Wires(slow, slow))
    assert Pipeline().fitted(links(8), sizes, Wires(fast, slow)) != Pipeline().fitted(there, sizes, Wires(fast, slow))


@pytest.mark.parametrize("scan", SCANS)
def test_one_rank_waits_for_nobody(scan: str) -> None:
    assert cost(SCANS[scan](), 1) == 0


def test_a_longer_message_takes_longer() -> None:
    for kind in SCANS.values():
        assert cost(kind(), 8, Sizes(16, 2, 4)) > cost(kind(), 8)


def chosen(ranks: int, sizes: Sizes, wire: Wire, node_size: int | None = None) -> Scan:
    plan = make_plan((4,) * ranks, 0, "contiguous", None)
    there, back = (Links.of(plan, ranks, reverse, node_size) for reverse in (False, True))
    return choose(there, back, sizes, Wires(wire, wire))


def test_the_choice(caplog: pytest.LogCaptureFixture) -> None:
    """Short states are a matter of latency, where few steps count; long ones of bytes, where a pipeline does."""
    sizes = Sizes(1 << 20, 1 << 20, 128)
    with caplog.at_level(logging.INFO):
        assert isinstance(chosen(16, sizes, Wire(1e-3, 1e12, 1e-3)), Doubling)
    assert 'scan="auto" takes doubling for 16 ranks and states of 1048576 bytes: gather 30 ms, ring ' in caplog.text
    assert isinstance(chosen(16, sizes, Wire(1e-3, 1e6, 1e-3)), Pipeline)
    assert isinstance(chosen(16, sizes, Wire(1e-3, 1e12, 1e-6)), Gather), "a collective hops faster than Python"


def test_a_gather_unless_another_is_worth_it() -> None:
    assert chosen(2, Sizes(1 << 20, 0, 128), Wire(1e-4, 1e9, 1e-4)) == Gather()
    assert chosen(1, Sizes(1 << 20, 0, 128), SLOW) == Gather()
    assert isinstance(chosen(2, Sizes(1 << 20, 1 << 20, 128), Wire(1e-6, 1e6, 1e-6)), Ring), "transfers stay at home"


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_tiny_states_are_gathered(backend: str) -> None:
    plan = make_plan((4,) * 4, 0, "contiguous", None)
    there, back = (Links.of(plan, 4, reverse, 4) for reverse in (False, True))
    assert choose(there, back, Sizes(4096, 4096, 16), Wires.default(backend)) == Gather()


def test_between_nodes() -> None:
    wires = Wires(Wire(0.0, 8.0, 0.0), SLOW)
    assert wires.between(0, 3, 4) == wires.node
    assert wires.between(3, 4, 4) == wires.network
    assert wires.between(3, 4, None) == wires.node


def test_a_file(tmp_path: Path) -> None:
    file, node = tmp_path / "links.json", {"latency": 1e-4, "bandwidth": 2e9}
    file.write_text(json.dumps({"links": {"node": node}}), encoding="utf-8")
    assert Wires.read(file) == Wires(*[Wire(1e-4, 2e9, 2e-5)] * 2)
    file.write_text(json.dumps({"links": {"node": node, "network": {**node, "hop": 1e-5}}}), encoding="utf-8")
    assert Wires.read(file).network == Wire(1e-4, 2e9, 1e-5)
    file.write_text(json.dumps({"links": {"node": {**node, "gap": 3e-4, "share": 0.5}}}), encoding="utf-8")
    assert Wires.read(file).node.overhead == 3e-4, "what was measured"
    for wrong in ({"latency": "slow"}, {"latency": 0}, {"latency": None}, {"gap": -1}, {"share": 0}):
        file.write_text(json.dumps({"links": {"node": {**node, **wrong}}}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"links\.json' is no file of `lasp doctor --probe`"):
            Wires.read(file)
    with pytest.raises(ValueError, match=r"none\.json' is no file of"):
        Wires.read(tmp_path / "none.json")
