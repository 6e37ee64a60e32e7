"""Simulated steps: by hand where that is easy, and beside what others published."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from lasp.launch.simulate import published
from lasp.launch.simulate.exchanges import KeyRing, causal_rotation, links_of, scan_ways, sum_of_gradients
from lasp.launch.simulate.machine import MACHINES, Machine
from lasp.launch.simulate.program import Exchange, Layer, Pass, Program, Stage, Step
from lasp.launch.simulate.timeline import Timeline, play
from lasp.parallel.cost import seconds
from lasp.parallel.layout import Layout, even_pieces
from lasp.parallel.scan import SCANS, TwoLevel
from lasp.parallel.schedule import Sizes
from lasp.parallel.traffic import Letter, Traffic
from lasp.parallel.wires import Wire, Wires

SLOW = Wire(latency=1.0, bandwidth=1.0, hop=1.0)
WIRES = Wires(SLOW, SLOW)
SIZES = Sizes(state=8, transfer=2, rows=4)


def step(scan: str, ranks: int, ahead: float, beside: float, layers: int = 1, relay: float = 0.0) -> Step:
    ways = scan_ways(SCANS[scan](), SIZES, links_of(ranks, "contiguous", 4), WIRES, lambda size: relay)
    way = [Pass(1.0, (Stage(ahead, exchange, beside),), 2.0, 1.0) for exchange in ways]
    return Step([Layer("mixer", *way)] * layers, logits=3.0, optimizer=4.0)


def played(step: Step, ranks: int) -> Timeline:
    return play(step.program(), ranks, Traffic(WIRES, 4))


def test_a_ring_of_two() -> None:
    """The second rank waits for the first one's state, a latency and 8 bytes, there; the first one back."""
    timeline = played(step("ring", 2, ahead=1.0, beside=4.0), 2)
    hop, work = 1.0 + 8.0, 1.0 + 1.0 + 4.0 + 2.0 + 1.0
    waited = hop - 4.0
    assert [span.name for span in timeline.spans[1][:4]] == ["matmul", "mixer", "mixer", "ring"]
    # Back, the first rank is ahead by what the second one waited, and waits for that as well.
    assert timeline.seconds == (work + waited) + 3.0 + (work + waited) + 4.0
    assert timeline.items(1) == {"matmul": 4.0, "mixer": 14.0, "waiting for ring": 5.0, "logits": 3.0, "optimizer": 4.0}


def test_what_is_put_to_use_before_it_is_sent_on() -> None:
    """A chain: every rank but the first and the last relays."""
    alone = Step([Layer("mixer", *step("ring", 4, 0.0, 0.0, relay=5.0).layers[0][1:3])])
    forward = alone._replace(layers=[alone.layers[0]._replace(backward=Pass(0.0, ()))])
    assert played(forward, 4).seconds == 1.0 + 3 * (9.0 + 5.0) + 2.0 + 1.0


@pytest.mark.parametrize("scan", SCANS)
def test_without_work_an_exchange_takes_what_the_cost_model_says(scan: str) -> None:
    links = links_of(8, "zigzag", 4)
    kind = SCANS[scan]().fitted(links[0], SIZES, WIRES)
    ways = scan_ways(kind, SIZES, links, WIRES, lambda size: 0.0)
    program = Program()
    assert ways.there is not None
    program.wait(program.start(ways.there))
    assert play(program, 8, Traffic(WIRES, 4)).seconds == seconds(kind.schedule(links[0]), SIZES, WIRES)


@pytest.mark.parametrize("scan", SCANS)
def test_the_critical_path_is_the_step(scan: str, tmp_path: Path) -> None:
    """Work and messages one behind the other from the first moment to the last; and a trace of them."""
    timeline = played(step(scan, 8, ahead=1.0, beside=0.5, layers=3, relay=0.25), 8)
    path = timeline.critical_path()
    assert (path[0].start, path[-1].end) == (0, timeline.seconds)
    assert all(first.end == later.start for first, later in pairwise(path))
    assert {segment.name.partition("(")[0] for segment in path} >= {scan}
    timeline.write(tmp_path / "trace.json", 4)
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X" and event["pid"] >= 0} == set(range(8))
    assert sum(event["dur"] for event in events if event["pid"] == -1 and event["ph"] == "X") == pytest.approx(
        1e6 * timeline.seconds
    )


@pytest.mark.parametrize(("card", "taken"), [(None, 9.0), (2.0, 9.0), (1.0, 17.0), (0.5, 33.0)])
def test_a_node_has_one_card(card: float | None, taken: float) -> None:
    """Two ranks that send 8 bytes each to another node share it; one of them may have a wire alone."""
    program = Program()
    program.wait(program.start(Exchange("messages", [Letter(0, 0, 2, 8), Letter(0, 1, 3, 8)])))
    assert play(program, 4, Traffic(WIRES, 2, card)).seconds == taken
    near = Program()
    near.wait(near.start(Exchange("messages", [Letter(0, 0, 1, 8), Letter(0, 2, 3, 8)])))
    assert play(near, 4, Traffic(WIRES, 2, card)).seconds == 9.0


def test_gradients_travel_beside_the_layers_before() -> None:
    gradients = sum_of_gradients(80.0, 4, WIRES, 4)
    assert gradients is not None
    assert gradients.collectives == [2 * 3 * (1.0 + 20.0)]
    layer = Layer("mixer", Pass(10.0, ()), Pass(20.0, ()), gradients)
    assert played(Step([layer] * 2), 4).seconds == 20.0 + 20.0 + 126.0 + 20.0
    assert played(Step([layer] * 2, repeat=2), 4).seconds == 60.0 + 20.0 + 20.0 + 126.0 + 20.0
    assert sum_of_gradients(80.0, 1, WIRES, 4) is None


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_keys_on_a_ring(layout: Layout) -> None:
    """Every query meets every key before it, once there and once back, however it is cut."""
    ring = KeyRing(causal_rotation(64, 4, layout), even_pieces(64, 4, layout), 1.0, 1.0)
    stages, last = ring.forward()
    work = [stage.beside for stage in stages] + [last]
    assert sum(sum(own) for own in work if isinstance(own, tuple)) == 64 * 64 / 2
    if layout == "zigzag":
        assert all(len(set(own)) == 1 for own in work if isinstance(own, tuple)), "every rank has as much to do"
    back = [stage.beside for stage in ring.backward()]
    assert sum(sum(own) for own in back if isinstance(own, tuple)) == 2.5 * 64 * 64 / 2
    timeline = play(Step([Layer("softmax", Pass(0.0, stages, last), Pass(0.0, ring.backward()))]).program(), 4,
                    Traffic(WIRES, 4))  # fmt: skip
    assert timeline.seconds > 3.5 * 64 * 64 / 8


def test_machines(tmp_path: Path) -> None:
    assert Machine.named("h100") is MACHINES["h100"]
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"base": "h100", "chip": {"matmul": 0.5}, "network": {"bandwidth": 1e9}, "card": 2e9}))
    own = Machine.named(str(file))
    assert (own.chip.matmul, own.chip.flops) == (0.5, MACHINES["h100"].chip.flops)
    assert (own.wires.network.bandwidth, own.wires.node, own.card) == (1e9, MACHINES["h100"].wires.node, 2e9)
    written = {"benchmark": "chip", "command": "lasp bench chip", "chip": {"mixers": {"GLA": [0.2, 2]}}}
    file.write_text(json.dumps(written))
    assert Machine.named(str(file)).chip.mixers == {"GLA": (0.2, 2.0)}
    file.write_text(json.dumps(written | {"together": {"flops": 1e10, "mixers": {"GLA": [0.1, 3]}}}))
    alone, over_ranks = {"GLA": (0.2, 2.0)}, {"GLA": (0.1, 3.0)}
    for neighbours, sp, flops, mixers in (
        (1, 1, MACHINES["cpu"].chip.flops, alone),
        (2, 1, 1e10, alone),
        (2, 2, 1e10, over_ranks),
        (1, 2, MACHINES["cpu"].chip.flops, over_ranks),  # on two nodes
    ):
        chip = Machine.named(str(file)).among(neighbours, sp)
        assert (chip.flops, chip.mixers) == (flops, mixers)
    wrongs: dict[str, object] = {
        "unknown keys gpu": {"gpu": 1},
        "unknown figures of a chip: speed": {"together": {"speed": 1}},
        "figures must be positive, got flops = 0": {"chip": {"flops": 0}},
        "describes no machine": [],
        "not enough values": {"chip": {"mixers": {"GLA": [0.2]}}},
        "got mixers.GLA.1 = 0": {"chip": {"mixers": {"GLA": [0.2, 0]}}},
    }
    for wrong, told in wrongs.items():
        file.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=wrong):
            Machine.named(str(file))
    with pytest.raises(ValueError, match="--gpu must be a100, h100, h200, b200, cpu or a file, got 'v100'"):
        Machine.named("v100")


def check(cells: list[published.Cell]) -> None:
    assert {cell.name: round(cell.off, 1) for cell in cells if not cell.met} == {}


def test_lasp2_beside_lasp1_and_ring() -> None:
    """The gains of LASP-2 on 64 GPUs, within five points; those at 512K are met by nothing that was fitted."""
    gains = published._gains()
    check(gains)
    assert [cell.fitted for cell in gains] == [False, True, False, True]


@pytest.mark.slow
def test_what_was_published() -> None:
    """Every cell of docs/planning.md, more than half of which nothing was fitted on."""
    cells = published.cells()
    check(cells)
    names = [cell.name for cell in cells]
    assert {name for fit in published.FITS.values() for name in fit.cells} <= set(names)
    assert len({*names}) == len(names)
    assert sum(cell.fitted for cell in cells) <= len(cells) // 2


def test_two_level_crosses_with_all_its_cards() -> None:
    """A hop between nodes is cut over the ranks of a node: a card that carries one rank's wire makes it slower."""
    ways = scan_ways(TwoLevel(node_size=4), SIZES, links_of(16, "contiguous", 4), WIRES, lambda size: 0.0)
    program = Program()
    assert ways.there is not None
    program.wait(program.start(ways.there))
    wide, narrow = (play(program, 16, Traffic(WIRES, 4, card)).seconds for card in (4.0, 1.0))
    assert narrow > wide
