"""SequenceGroup: the ranks that share one sequence, as a frozen value; and the mesh it is cut from."""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lasp.parallel import collectives
from lasp.parallel.agreement import Agreement
from lasp.parallel.layout import LAYOUTS, house_slices

# Axes of a mesh whose ranks hold different parameters, or different parts of them.
MODEL_AXES = ("tp", "pp")


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that hold one sequence together, and this rank's place among them.

    Made by `from_mesh` or `from_group`; never changed, never looked up, passed as an argument.
    """

    process_group: dist.ProcessGroup
    control: dist.ProcessGroup  # carries headers on the CPU; the same group where that one can
    rank: int
    size: int
    layout: str
    checks: bool
    mesh: DeviceMesh | None = None
    axis: str | None = None  # of the mesh, where there is one
    heads: int = 1  # neighbours that exchange heads in ulysses x ring

    @classmethod
    def from_mesh(
        cls, mesh: DeviceMesh, axis: str = "sp", layout: str = "contiguous", heads: int = 1, checks: bool = True
    ) -> SequenceGroup:
        """The ranks along one axis of a mesh (`lasp.init_mesh`).

        layout: "contiguous" or "zigzag". checks: begin every call with a header that all ranks compare; an unchecked
        group trusts that the ranks hold the house's cut of the sequence. heads: how many neighbouring ranks exchange
        heads in `softmax_attention(method="ulysses_ring")`, while the rest of the group is a ring; it divides the size.
        """
        if axis not in (mesh.mesh_dim_names or ()):
            raise ValueError(f"the mesh has axes {mesh.mesh_dim_names}, not {axis!r}")
        return cls._make(mesh.get_group(axis), layout, heads, checks, mesh, axis)

    @classmethod
    def from_group(
        cls,
        process_group: dist.ProcessGroup | None = None,
        layout: str = "contiguous",
        checks: bool = True,
        heads: int = 1,
    ) -> SequenceGroup:
        """The ranks of an existing process group, by default the world. Every rank of it calls this."""
        return cls._make(process_group, layout, heads, checks)

    @classmethod
    def _make(
        cls,
        process_group: dist.ProcessGroup | None,
        layout: str,
        heads: int,
        checks: bool,
        mesh: DeviceMesh | None = None,
        axis: str | None = None,
    ) -> SequenceGroup:
        process_group = process_group or dist.group.WORLD
        if process_group is None:
            raise ValueError("there is no process group yet: lasp.init_mesh makes one")
        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of this process group")
        control = _cpu_group(process_group)
        error = None if layout in LAYOUTS else f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}"
        if not isinstance(heads, int) or heads < 1 or size % heads:
            error = f"heads must divide the number of ranks in the group, {size}, got {heads!r}"
        Agreement(control, {"layout": layout, "heads": heads, "checks": checks}, error).wait()
        return cls(process_group, control, rank, size, layout, checks, mesh, axis, heads)

    def slices(self, length: int) -> list[slice]:
        """The token ranges of a sequence of `length` tokens that this rank holds, in local order."""
        return house_slices(length, self.rank, self.size, self.layout)

    @cached_property
    def replicas(self) -> SequenceGroup:
        """All ranks that hold the same parameters, in a row: this sequence's and those of its data-parallel replicas.

        Every axis of the whole mesh counts, under any name and in any order, but "tp" and "pp". Without a mesh it is
        the sequence's own ranks. With one it is a process group of its own even for one replica: on the sequence's,
        the scans of earlier layers would queue behind buckets of gradients. Made at the first use, by all of them.
        """
        if self.mesh is None or self.axis is None:
            return self._make(self.process_group, "contiguous", 1, self.checks)
        root = self.mesh._get_root_mesh()
        axes = tuple(name for name in root.mesh_dim_names or () if name not in MODEL_AXES or name == self.axis)
        flat = root[axes]._flatten("_".join(axes)) if len(axes) > 1 else root[axes]
        missed = set(dist.get_process_group_ranks(self.process_group)) - set(flat.mesh.flatten().tolist())
        if missed:
            raise ValueError(
                f"the ranks of a sequence lie along axis {self.axis!r}, of a mesh with axes {root.mesh_dim_names}: "
                f"{' and '.join(MODEL_AXES)} hold parts of a model, not of a sequence"
            )
        return self._make(flat.get_group(), "contiguous", 1, self.checks, flat)

    def agree(self, fields: dict[str, Any], error: str | None = None, tokens: int = 0) -> Agreement:
        """Start the header exchange of a call: `fields` must be equal on all ranks, `error` is this rank's own."""
        return Agreement(self.control, fields, error, tokens)


def init_mesh(
    *, sp: int = 1, dp: int | None = None, tp: int = 1, device: str | torch.device | None = None
) -> DeviceMesh:
    """A DeviceMesh with axes ("dp", "sp", "tp"); sequence-parallel ranks are neighbours.

    dp=None takes what sp and tp leave of the world. Creates the process group if there is none: from the launcher's
    rendezvous, or of this process alone where no launcher set one up. device: "cuda" when there is one, else "cpu".
    Raises ValueError when the sizes do not multiply to the world size.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if not dist.is_initialized():
        _init_process_group()
    world = dist.get_world_size()
    sizes = {"dp": dp, "sp": sp, "tp": tp}
    if any(size is not None and size < 1 for size in sizes.values()):
        raise ValueError(f"the axes of a mesh must be at least 1, got {sizes}")
    dp = max(1, world // (sp * tp)) if dp is None else dp
    if dp * sp * tp != world:
        told = f"dp x sp x tp = {dp} x {sp} x {tp} = {dp * sp * tp} ranks, but the world has {world}"
        alone = f": start it with torchrun --nproc-per-node {dp * sp * tp}" if world == 1 else ""
        raise ValueError(told + alone)
    return init_device_mesh(kind, (dp, sp, tp), mesh_dim_names=("dp", "sp", "tp"))


def join_world() -> SequenceGroup:
    """All ranks in a row, for agreements and barriers. Creates the process group if there is none, as `init_mesh`."""
    if not dist.is_initialized():
        _init_process_group()
    return SequenceGroup.from_group()


def create_world(store: dist.Store, rank: int, size: int) -> None:
    """Create the process group of `size` ranks that meet in a store, in the place of a launcher's rendezvous."""
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=size)


def shutdown() -> None:
    """Leave the process group together, as the last thing a script does; nothing happens where there is none.

    Every rank calls it: destroying the group while a peer still sends aborts that peer.
    """
    if dist.is_initialized():
        collectives.barrier(None)
        dist.destroy_process_group()
        _wait_for_gloo()


def _wait_for_gloo(seconds: float = 5.0) -> None:
    """Wait until gloo's threads have let go of the last tensors, for `seconds` at most.

    They do so a little after the call has returned, and take the interpreter's lock for it. One that a busy machine
    holds up until the interpreter has ended takes the process down: "terminate called without an active exception".
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_is_busy_gloo, Path("/proc/self/task").glob("*"))):
        time.sleep(1e-3)


def _is_busy_gloo(task: Path) -> bool:
    """Whether this thread is one of gloo's and at work. Only Linux tells; elsewhere there are no such folders."""
    try:
        if (task / "comm").read_text().strip() != "pt_gloo_runloop":
            return False
        file = os.open(task / "stat", os.O_RDONLY)
    except OSError:
        return False  # it has ended
    try:
        # Reading leaves the interpreter's lock to others: a thread that waits for it is awake in what is read.
        return os.read(file, 4096).rpartition(b") ")[2][:1] != b"S"
    finally:
        os.close(file)


def _init_process_group() -> None:
    """Join the launcher's rendezvous; a process that no launcher started is a world of its own."""
    atexit.register(_wait_for_gloo)  # for scripts that end without `shutdown`
    try:
        dist.init_process_group(_backend())
    except ValueError as error:
        if "environment variable RANK" not in str(error):
            raise  # a launcher was here, but did not say all
        create_world(dist.HashStore(), rank=0, size=1)


def _backend() -> str:
    """What carries tensors: NCCL those of GPUs, gloo those of CPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _cpu_group(process_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that can carry CPU tensors: NCCL alone cannot."""
    if dist.get_world_size(process_group) == 1 or "cpu" in dist.get_backend_config(process_group):
        return process_group
    ranks = dist.get_process_group_ranks(process_group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
