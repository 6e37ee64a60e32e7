"""Bytes of scans four times over: as planned, as scheduled, in the ledger, and as they crossed between ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch

import lasp
from lasp.launch.plan.estimate import sizes_of
from lasp.launch.plan.footprint import Footprints, Setting
from lasp.launch.simulate.exchanges import links_of, scan_ways
from lasp.launch.simulate.machine import MACHINES
from lasp.launch.threads import run
from lasp.models import LinearLlamaConfig
from lasp.models.blocks import build_mixer
from lasp.parallel.layout import Layout
from lasp.parallel.scan import SCANS
from lasp.parallel.schedule import Sizes
from lasp.train.config import LoraConfig, MemoryConfig
from lasp.train.model import ModelPlan

# Transfers of each kind: known by all ranks, one number of a head, some of a head, and matrices.
MIXERS = ("lightning", "mamba2", "gla", "gated_deltanet")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "zigzag")
WIRES = MACHINES["cpu"].wires


def config_of(mixer: str, **fields: Any) -> LinearLlamaConfig:
    tiny = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return LinearLlamaConfig(**tiny, vocab_size=64, mixer=mixer, **fields)


@lru_cache
def planned_sizes(mixer: str) -> Sizes:
    """Of a state and a transfer, as the plan finds them."""
    model = ModelPlan(config_of(mixer), None, LoraConfig())
    return sizes_of(Footprints(Setting(model, MemoryConfig(), "contiguous", "gather", "ring", "float32", WIRES)))


def planned(mixer: str, scan: str, ranks: int, layout: Layout, node_size: int) -> tuple[int, float]:
    """Bytes that all ranks receive for the scans of one layer, both ways: by schedules, and of the plan's letters."""
    sizes, links = planned_sizes(mixer), links_of(ranks, layout, node_size)
    kind = SCANS[scan]().fitted(links[0], sizes, WIRES)
    schedules = kind.schedule(links[0]), kind.schedule_back(links[1], links[0])
    ways = scan_ways(kind, sizes, links, WIRES, lambda size: 0.0)
    letters = sum(letter.size for way in ways if way is not None for letter in way.letters)
    return sum(way.received(rank, sizes) for way in schedules for rank in range(ranks)), letters


def counted(mixer: str, scan: str, ranks: int, layout: Layout, node_size: int) -> int:
    """Those that the ledger has of a step of the layer on simulated ranks. What it has in all is what crossed."""
    layer = build_mixer(config_of(mixer, scan=scan), 0)

    def step(group: lasp.SequenceGroup) -> Any:
        output, _ = copy.deepcopy(layer)(torch.ones(1, 2, 32), cut=group.cut(2 * ranks))
        output.sum().backward()
        return group.process_group.wires

    with lasp.traffic() as ledger:
        wires = run(ranks, step, layout, node_size)[0]
    assert sum(wires.crossed) == ledger.received
    return sum(record.bytes for record in ledger.records if record.op == SCANS[scan]().op)


def compare(mixers: Sequence[str], scan: str, ranks: int, layouts: tuple[Layout, ...], node_size: int) -> None:
    for mixer in mixers:
        for layout in layouts:
            scheduled, letters = planned(mixer, scan, ranks, layout, node_size)
            assert counted(mixer, scan, ranks, layout, node_size) == scheduled > 0, (mixer, layout)
            assert letters == (0 if scan == "gather" else scheduled), "what a collective brings is no letter"


@pytest.mark.parametrize("scan", SCANS)
def test_planned_bytes_are_the_ledger_s(scan: str) -> None:
    compare([mixer for mixer in MIXERS if mixer != "mamba2"], scan, 4, LAYOUTS, 2)


@pytest.mark.parametrize("scan", ["doubling", "two_level"])
def test_planned_bytes_of_64_ranks_are_the_ledger_s(scan: str) -> None:
    compare(["gated_deltanet"], scan, 64, ("contiguous",), 8)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_planned_bytes_of_every_mixer_are_the_ledger_s(scan: str, ranks: int) -> None:
    compare(MIXERS, scan, ranks, LAYOUTS, 1 if ranks == 2 else 4)
