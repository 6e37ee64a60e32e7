"""One rank of a cell: training steps of a model by each way in turns."""

from __future__ import annotations

import json
import os
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lasp
from lasp.launch.bench.resident import AnonymousPeak, give_back_freed, keep_freed, status
from lasp.launch.bench.timing import interleave
from lasp.launch.bench.ways import DATA_PARALLEL, shared
from lasp.launch.network import Network
from lasp.launch.probe import probe
from lasp.launch.rank import tie
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.parallel import collectives
from lasp.parallel.wires import Wires

MEASURED = ("rate", "seconds", "peak_bytes", "received", "waited")
"""tokens/s of all ranks; seconds of a step; the most memory beyond what the libraries hold; bytes of a step; seconds of
it that the rank waited."""


def main(rank: int, folder: str, cell: str) -> None:
    """Writes what was found, or why there is nothing, into the folder."""
    tie(os.getppid())
    Path(folder, f"started{rank}").touch()
    told = json.loads(cell)
    try:
        found = _measure(rank, folder, told["cell"], told["network"])
    except Exception as error:
        Path(folder, f"failed{rank}").write_text(_reason(error), encoding="utf-8")
        os._exit(1)  # the others may be anywhere
    Path(folder, f"found{rank}").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


def _reason(error: BaseException) -> str:
    said = str(error)
    if isinstance(error, MemoryError) or any(
        words in said for words in ("allocate memory", "bad_alloc", "start new thread", "Cannot allocate")
    ):
        return "out of memory"
    return f"{type(error).__name__}: {said.strip().splitlines()[0] if said.strip() else ''}"


def _measure(rank: int, folder: str, cell: dict[str, Any], wired: dict[str, Any] | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    give_back_freed()
    if wired is not None:
        emulated = Network(**wired)
        emulated.enter(rank)
        os.environ.update(emulated.environment)
    size = cell["ranks"]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(minutes=10)
    )
    wires = None
    if wired is not None:
        wire = probe(lasp.SequenceGroup.from_group(), repeat=3)
        wires = Wires(wire, wire)
    narrow = {"hidden_size": 8 * cell["sizes"]["num_attention_heads"], "intermediate_size": 16}
    small = cell | {"sizes": cell["sizes"] | narrow, "tokens": 64 * size, "documents": None}
    made = {alone: _group(cell, alone, wires) for alone in sorted({way == DATA_PARALLEL for way in cell["ways"]})}
    groups = {way: made[way == DATA_PARALLEL] for way in cell["ways"]}
    for way, group in groups.items():  # the libraries' own memory, and the stacks of their threads
        Training(small, way, group).step()
    if cell["memory"] is not None:
        limit = status("VmData") + int(cell["memory"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = status("RssAnon")
    runs = {way: Training(cell, way, group) for way, group in groups.items()}
    found = {way: _look(training, before) for way, training in runs.items()}
    if cell["repeat"]:
        if cell["memory"] is None:
            keep_freed()
        world = dist.group.WORLD
        steps: dict[str, Any] = {way: training.step for way, training in runs.items()}
        taken = interleave(steps, cell["repeat"], together=lambda: collectives.barrier(world), warm=False)
        for way, seconds in taken.items():
            found[way]["seconds"] = seconds
    lasp.shutdown()
    return found


def _look(training: Training, before: int) -> dict[str, Any]:
    """The memory of the first step, after which the optimizer has its states, or of the second; the exchanges of it."""
    training.step()
    with AnonymousPeak() as peak, lasp.traffic() as ledger:
        training.step()
    return {"peak_bytes": peak.bytes - before, "received": ledger.received, "waited": ledger.waited(), "seconds": 0.0}


def _group(cell: dict[str, Any], alone: bool, wires: Wires | None) -> lasp.SequenceGroup:
    """The ranks that share a sequence: all, or each alone."""
    size = dist.get_world_size()
    mesh = lasp.init_mesh(sp=1 if alone else size, dp=size if alone else 1, device="cpu")
    group = lasp.SequenceGroup.from_mesh(mesh, layout=cell["layout"], wires=wires)
    assert group.replicas.size == size, "made here, with its threads"
    return group


class Training:
    """Steps of a model over all ranks: of one sequence that they share, or of as many tokens in sequences of each."""

    def __init__(self, cell: dict[str, Any], way: str, group: lasp.SequenceGroup) -> None:
        alone, self.group = way == DATA_PARALLEL, group
        torch.manual_seed(0)
        config = LinearLlamaConfig(**cell["sizes"], mixer=cell["mixer"], pattern=cell["pattern"], attention="ring")
        model = LinearLlamaForCausalLM(config).train()
        self.model: Any = lasp.data_parallel(shared(model, "gather" if alone else way, self.group), self.group)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.tokens = cell["tokens"] // dist.get_world_size() if alone else cell["tokens"]
        ids = torch.randint(cell["sizes"]["vocab_size"], (1, self.tokens), generator=torch.Generator().manual_seed(1))
        self.batch: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if cell["documents"] is not None:
            self.batch["cu_seqlens"] = torch.tensor(cell["documents"])

    def step(self) -> None:
        """From the batch to the updated parameters."""
        batch = lasp.shard_batch(self.batch, self.group)
        self.model(**batch, num_items_in_batch=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
