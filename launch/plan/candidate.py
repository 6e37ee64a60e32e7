"""Candidates: ways to lay a training step out over ranks, those that fit their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from lasp.parallel.layout import Layout
from lasp.parallel.methods import Method
from lasp.parallel.scan import ScanName
from lasp.train.config import EngineName, MemoryConfig

LEVERS: dict[str, MemoryConfig] = {
    "none": MemoryConfig(),
    "fused loss": MemoryConfig(fuse_loss=True),
    "checkpoints": MemoryConfig(fuse_loss=True, checkpoint_every=1),
    "tiles": MemoryConfig(fuse_loss=True, checkpoint_every=1, mlp_tile=1024),
}
"""Each with those before it."""


@dataclass(frozen=True)
class Job:
    """What is to be trained: tokens of a sequence, and of a step; over so many nodes of so many chips."""

    seq: int
    tokens: int
    nodes: int
    gpus: int

    def __post_init__(self) -> None:
        if min(self.seq, self.tokens, self.nodes, self.gpus) < 1:
            raise ValueError(f"--seq, --tokens-per-step, --nodes and --gpus must be at least 1, got {self}")
        if self.tokens % self.seq:
            raise ValueError(f"--tokens-per-step must be a multiple of --seq, got {self.tokens} and {self.seq}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def node_size(self) -> int | None:
        """How many consecutive ranks share a node; None if all do."""
        return None if self.nodes == 1 else self.gpus


@dataclass(frozen=True)
class Candidate:
    """dp x sp ranks, and what they run."""

    dp: int
    sp: int
    layout: Layout
    scan: ScanName
    method: Method
    engine: EngineName
    levers: str

    def repeat(self, job: Job) -> int:
        """Micro-batches of one sequence per step."""
        return job.tokens // (job.seq * self.dp)

    def __str__(self) -> str:
        scan = f"scan {self.scan}, attention {self.method}, " if self.sp > 1 else ""
        return f"dp {self.dp} x sp {self.sp}, {scan}{self.engine}, levers: {self.levers}"


def candidates(
    job: Job, layout: Layout, scans: list[ScanName], methods: list[Method], engines: list[EngineName], levers: list[str]
) -> Iterator[Candidate]:
    """All whose numbers divide; levers that come to the same are one, under the first name; one rank alone has nothing
    to exchange, and one method."""
    for sp in (number for number in range(1, job.ranks + 1) if job.ranks % number == 0):
        dp = job.ranks // sp
        if job.seq // sp < 1 or job.tokens % (job.seq * dp):
            continue
        some = product(scans, methods) if sp > 1 else [(scans[0], methods[0])]
        pulled = {_pulled(LEVERS[lever], ceil(job.seq / sp)): lever for lever in reversed(levers)}
        for (scan, method), engine, lever in product(some, engines, reversed(pulled.values())):
            yield Candidate(dp, sp, layout, scan, method, engine, lever)


def _pulled(levers: MemoryConfig, tokens: int) -> MemoryConfig:
    """What a rank of so many tokens has of them: a tile that holds all is none."""
    return levers if levers.mlp_tile is None or levers.mlp_tile < tokens else replace(levers, mlp_tile=None)
