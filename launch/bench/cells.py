"""Cells of a table: training steps of a small Linear-Llama3 in one process group each, which may fail alone.

    cell = Cell(tokens=8192, ranks=4, ways=("ring",), mixer="gla", pattern="LLLN")
    records_of(cell)    a record per way: tokens/s, peak memory, bytes received, seconds waited; or why there are none

Where ranks are limited in memory, a cell that wants more is a record as well.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.multiprocessing as mp

import lasp
from lasp.launch.bench import cell_rank
from lasp.launch.network import bits_per_second, network

Records = list[dict[str, Any]]

OK, OUT_OF_MEMORY, TOO_SLOW, NOT_BEGUN = "ok", "out of memory", "too slow", "not begun"
LOOPBACK = "loopback"
START = 120.0
"""Seconds in which ranks have to begin: the first ones wait until libraries are imported, once for all."""


@dataclass(frozen=True)
class Cell:
    """tokens: of a step, over all ranks. ways: those that take turns in this process group, of `ways.py`. sizes: of the
    model, beside its mixer and pattern. documents: bounds of packed ones, None for a single text. repeat: how many
    steps are timed; 0: none, but one is made. memory: GiB that a rank may hold beyond its libraries. rate: of an
    emulated network. patience: seconds of each way until it is given up."""

    tokens: int
    ranks: int
    ways: tuple[str, ...]
    mixer: str
    pattern: str
    layout: str
    sizes: dict[str, int]
    documents: tuple[int, ...] | None = None
    repeat: int = 2
    memory: float | None = None
    rate: str | None = None
    patience: float = 60.0


def records_of(cell: Cell) -> Records:
    """A record of each of a cell's ways."""
    found = _run(cell)
    status = found.pop("status")
    return [_record(cell, way, status) | found.get(way, {}) for way in cell.ways]


def without(cell: Cell, status: str) -> Records:
    """The records of a cell that was not measured, and why."""
    return [_record(cell, way, status) for way in cell.ways]


def _record(cell: Cell, way: str, status: str) -> dict[str, Any]:
    """What is known of a cell beforehand."""
    return {
        "way": way, "tokens": cell.tokens, "ranks": cell.ranks, "mixer": cell.mixer, "pattern": cell.pattern,
        "layout": cell.layout, "network": LOOPBACK if cell.rate is None else cell.rate.removeprefix("rate="),
        "memory_limit": cell.memory, "documents": None if cell.documents is None else len(cell.documents) - 1,
        "model": {"kind": "linear_llama", **cell.sizes}, "dtype": "float32", "device": "cpu",
        "versions": {"lasp": lasp.__version__, "torch": torch.__version__},
        "status": status, **dict.fromkeys(cell_rank.MEASURED),
    }  # fmt: skip


def _run(cell: Cell) -> dict[str, Any]:
    """The status of a process group, and what was measured of each way: of the worst rank."""
    emulated = nullcontext() if cell.rate is None else network(cell.ranks, bits_per_second(cell.rate))
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, OMP_NUM_THREADS="1"), emulated as wired:
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([cell_rank.__name__])
        told = json.dumps({"cell": asdict(cell), "network": None if wired is None else asdict(wired)})
        ranks = mp.start_processes(
            cell_rank.main, (folder, told), nprocs=cell.ranks, join=False, start_method="forkserver"
        )
        status = _status(ranks, Path(folder), cell)
        own = [json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("found*")]
    if status != OK:
        return {"status": status}
    worst: dict[str, Any] = {}
    for way in cell.ways:
        worst[way] = {name: max(each[way][name] for each in own) for name in cell_rank.MEASURED[1:]}
        worst[way]["rate"] = cell.tokens / worst[way]["seconds"] if cell.repeat else None
    return {"status": OK, **worst}


def _status(ranks: Any, folder: Path, cell: Cell) -> str:
    """How the ranks of a cell ended, when they have."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of each rank that it ends
    deadline, starting = time.monotonic() + START, True
    try:
        while not ranks.join(timeout=0.2):
            if starting and len(list(folder.glob("started*"))) == cell.ranks:
                deadline, starting = time.monotonic() + cell.patience * len(cell.ways), False
            if time.monotonic() > deadline:
                return TOO_SLOW
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        return _why(folder, cell.memory is not None, error)
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()
    return OK


def _why(folder: Path, limited: bool, error: Exception) -> str:
    """What the ranks have written down, or what is known of one that was killed."""
    told = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("failed*"))]
    if OUT_OF_MEMORY in told:
        return OUT_OF_MEMORY
    name = getattr(error, "signal_name", None)
    if name is not None:
        return OUT_OF_MEMORY if limited or name == signal.SIGKILL.name else f"killed by {name}"
    return min(told, key=_is_of_a_peer, default=str(error).strip().splitlines()[-1])


def _is_of_a_peer(message: str) -> bool:
    """Whether a rank failed because another one did."""
    return "gloo" in message or "Connection" in message


def columns(records: Sequence[dict[str, Any]], name: str) -> list[Any]:
    """The different values of a field, in their order."""
    return list(dict.fromkeys(record[name] for record in records))


def shown(record: dict[str, Any] | None, name: str = "rate", times: float = 1.0) -> str:
    """A figure of a record as a cell of a table."""
    if record is None:
        return ""
    if record["status"] != OK:
        return {OUT_OF_MEMORY: "OOM", TOO_SLOW: "too slow", NOT_BEGUN: "-"}.get(record["status"], "cannot")
    return f"{times * record[name]:.0f}"
