"""SequenceGroup: the ranks that share one sequence, as a frozen value; and the mesh it is cut from."""

from __future__ import annotations

import atexit
import hashlib
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lasp.kernels.arguments import check_integer, told
from lasp.kernels.documents import document_bounds
from lasp.parallel import collectives
from lasp.parallel.agreement import NUMBER, Agreement, Call, Channel, Refused, part
from lasp.parallel.call import Arguments, begin_call, modes
from lasp.parallel.cut import Cut, even_lengths
from lasp.parallel.layout import LAYOUTS, Layout, even_slices
from lasp.parallel.wires import PROCESSES, Wires

# Axes of a mesh whose ranks hold different parameters, or different parts of them.
MODEL_AXES = ("tp", "pp")

_DRAWN = 10**12  # of so many numbers each rank draws one: no two groups of a run have the same

# The process groups that carry headers, in the order of their making, and the channels of the SequenceGroups over each:
# who leaves tells the ranks of them.
_controls: WeakKeyDictionary[dist.ProcessGroup, WeakSet[Channel]] = WeakKeyDictionary()
_TOLD = 20  # of so many channels of one process group the orders fit into a header


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """The ranks that hold one sequence together, and this rank's place among them.

    Made by `from_mesh` or `from_group`; never changed, never looked up, passed as an argument.
    """

    process_group: dist.ProcessGroup
    control: dist.ProcessGroup  # carries headers on the CPU; the same group where that one can
    rank: int
    size: int
    layout: Layout
    checks: bool
    channel: Channel = field(repr=False)  # of headers, and the count of the group's calls
    mesh: DeviceMesh | None = None
    axis: str | None = None  # of the mesh, where there is one
    heads: int = 1  # neighbours that exchange heads in ulysses x ring
    node_size: int | None = None  # how many consecutive ranks share each host; None where they lie otherwise
    wires: Wires = PROCESSES  # what connects the ranks, for scan="auto"

    @classmethod
    def from_mesh(
        cls,
        mesh: DeviceMesh,
        axis: str = "sp",
        layout: Layout = "contiguous",
        heads: int = 1,
        checks: bool | Literal["calls", "off"] = True,
        wires: Wires | Path | str | None = None,
    ) -> SequenceGroup:
        """The ranks along one axis of a mesh (`lasp.init_mesh`). Every rank of the mesh calls this.

        layout: "contiguous" or "zigzag". checks: True or "calls" to begin every call that is given the group with a
        header that all ranks compare; False or "off" trusts that the ranks hold the even cut of the sequence. heads:
        how many neighbouring ranks exchange heads in `softmax_attention(method="ulysses_ring")`, while the rest of the
        group is a ring; it divides the size. wires: what connects the ranks, for scan="auto": a file of `lasp doctor
        --probe`, or a value of `lasp.parallel.wires`; by default what its backend usually runs on. Raises ValueError,
        on every rank of the mesh, for an unknown axis or layout, or where the ranks differ.
        """
        if not isinstance(mesh, DeviceMesh):
            raise ValueError(f"mesh must be a DeviceMesh, which lasp.init_mesh makes, got {told(mesh)}")
        error = None
        if axis not in (mesh.mesh_dim_names or ()):
            error = f"the mesh has axes {', '.join(mesh.mesh_dim_names or ())}, not {axis!r}"
        fields = {"axis": axis, "shape of the mesh": list(mesh.shape), **_said(layout, heads, checks)}
        _agree_on_mesh("from_mesh", mesh.mesh.flatten().tolist(), fields, error)
        return cls._make(mesh.get_group(axis), layout, heads, checks, wires, mesh, axis)

    @classmethod
    def from_group(
        cls,
        process_group: dist.ProcessGroup | None = None,
        layout: Layout = "contiguous",
        checks: bool | Literal["calls", "off"] = True,
        heads: int = 1,
        wires: Wires | Path | str | None = None,
    ) -> SequenceGroup:
        """The ranks of an existing process group, by default the world. Every rank of it calls this.

        The other arguments, and what is refused, are as in `from_mesh`.
        """
        return cls._make(process_group, layout, heads, checks, wires)

    @classmethod
    def _make(
        cls,
        process_group: dist.ProcessGroup | None,
        layout: Layout,
        heads: int,
        checks: bool | Literal["calls", "off"],
        wires: Wires | Path | str | None,
        mesh: DeviceMesh | None = None,
        axis: str | None = None,
    ) -> SequenceGroup:
        process_group = process_group or dist.group.WORLD
        if process_group is None:
            raise ValueError("there is no process group yet: lasp.init_mesh makes one")
        if not isinstance(process_group, dist.ProcessGroup) and process_group is not dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"process_group must be one of torch.distributed, got {told(process_group)}")
        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of this process group")
        control = _cpu_group(process_group)
        channel = Channel(control)
        error = None
        if layout not in LAYOUTS:
            error = f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}"
        elif not isinstance(heads, int) or heads < 1 or size % heads:
            error = f"heads must divide the number of ranks in the group, {size}, got {heads!r}"
        elif checks not in (True, False, "calls", "off"):
            error = f"checks must be True, False, 'calls' or 'off', got {checks!r}"
        checks = checks in (True, "calls")
        known = Wires.default(str(dist.get_backend(process_group)))
        try:
            known = _known_wires(wires) or known
        except ValueError as reason:
            error = error or str(reason)
        # Groups of the same ranks are told apart by what the first of these draws.
        drawn = secrets.randbelow(_DRAWN)
        fields = _said(layout, heads, checks) | {"wires": [list(wire) for wire in known]}
        own = drawn + _DRAWN * _host()
        numbers = Agreement(channel, Call("making a SequenceGroup", 0), fields, error, own).wait()
        _controls.setdefault(control, WeakSet()).add(channel)
        channel.identity = {"layout": layout, NUMBER: numbers[0] % _DRAWN}
        neighbours = node_size([number // _DRAWN for number in numbers])
        return cls(process_group, control, rank, size, layout, checks, channel, mesh, axis, heads, neighbours, known)

    def slices(self, length: int) -> list[slice]:
        """The token ranges of a sequence of `length` tokens that this rank holds, in local order."""
        return even_slices(length, self.rank, self.size, self.layout)

    def cut(
        self,
        length: int | None = None,
        *,
        lengths: Sequence[int] | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Cut:
        """How the sequences of a batch lie on the ranks: every rank calls this, and one exchange of headers agrees.

        length: of the whole sequence, cut evenly (`slices`); or lengths: every rank's number of tokens, any
        in the contiguous layout. cu_seqlens: bounds of packed documents [documents + 1]. Raises ValueError, on every
        rank, for what is no cut, and where the ranks differ, also in autocast and in whether gradients are recorded.
        """

        def check() -> Arguments:
            made = self._make_cut(length, lengths, cu_seqlens)
            fields = {"lengths": _in_short(made.lengths), **modes()}
            return Arguments(fields, made.tokens, made.bounds)

        return begin_call(self, "cut", check)() if self.checks else self._make_cut(length, lengths, cu_seqlens)

    def _make_cut(self, length: Any, lengths: Any, cu_seqlens: Any) -> Cut:
        """The cut that this rank is told."""
        if (length is None) == (lengths is None):
            raise ValueError(f"a cut needs a length or lengths, got {length} and {lengths}")
        own = self._even(length) if lengths is None else tuple(lengths)
        if len(own) != self.size:
            raise ValueError(f"lengths must be one per rank, {self.size} of them, got {len(own)}")
        for tokens in own:
            check_integer("the number of tokens of a rank", tokens, 0)
        return Cut(self, own, None if cu_seqlens is None else document_bounds(cu_seqlens))

    def cuts_as(self, other: SequenceGroup | None) -> bool:
        """Whether another group, maybe made anew, cuts sequences over the same ranks in the same way."""
        if other is None:
            return self.size == 1
        one, two = ((g.process_group, g.layout, g.heads) for g in (self, other))
        return one == two or self.size == other.size == 1

    def _even(self, length: Any) -> tuple[int, ...]:
        check_integer("the length of a cut", length, 1)
        return even_lengths(length, self.size, self.layout)

    @cached_property
    def replicas(self) -> SequenceGroup:
        """All ranks that hold the same parameters, in a row: this sequence's and those of its data-parallel replicas.

        Every axis of the whole mesh counts, under any name and in any order, but "tp" and "pp". Without a mesh it is
        the sequence's own ranks. With one it is a process group of its own even for one replica: on the sequence's,
        the scans of earlier layers would queue behind buckets of gradients. Made at the first use, by all of them.
        """
        made = self._replicas()
        made.channel.others = (self.channel,)
        return made

    def _replicas(self) -> SequenceGroup:
        if self.mesh is None or self.axis is None:
            return self._make(self.process_group, "contiguous", 1, self.checks, self.wires)
        root = self.mesh._get_root_mesh()
        axes = tuple(name for name in root.mesh_dim_names or () if name not in MODEL_AXES or name == self.axis)
        flat = root[axes]._flatten("_".join(axes)) if len(axes) > 1 else root[axes]
        missed = set(dist.get_process_group_ranks(self.process_group)) - set(flat.mesh.flatten().tolist())
        if missed:
            raise ValueError(
                f"the ranks of a sequence lie along axis {self.axis!r}, of a mesh with axes {root.mesh_dim_names}: "
                f"{' and '.join(MODEL_AXES)} hold parts of a model, not of a sequence"
            )
        return self._make(flat.get_group(), "contiguous", 1, self.checks, self.wires, flat)

    def agree(self, operation: str, fields: dict[str, Any], error: str | None = None, tokens: int = 0) -> Agreement:
        """Start the header exchange of a call: `fields` must be equal on all ranks, `error` is this rank's own."""
        return self.channel.agree(self.channel.next_call(operation), fields, error, tokens)

    @contextmanager
    def first(self, work: str) -> Iterator[bool]:
        """Around long work of rank 0, which alone is given True. The others wait until it has left the block, in the
        store where the world met, where no time runs out. Every rank of the group calls it."""
        if self.size == 1:
            yield True
            return
        name = str(self.agree(f"beginning: {work}", {}, tokens=secrets.randbelow(_DRAWN)).wait()[0])
        store = common_store(work)
        try:
            yield self.rank == 0
        finally:
            if self.rank == 0:
                store.set(name, "done")
        while not store.check([name]):
            time.sleep(0.1)

    @contextmanager
    def telling(self, work: str) -> Iterator[None]:
        """Around work between calls: what ends it on one rank is a ValueError on those that wait for a header of it."""
        try:
            yield
        except Refused:
            raise
        except BaseException as error:
            if self.checks and self.size > 1:
                self.channel.tell(work, f"{work} ended by {type(error).__name__}: {error}")
            raise

    def __copy__(self) -> SequenceGroup:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a SequenceGroup lives in its process and cannot be saved: save model.state_dict(), or the whole model "
            "after lasp.unparallelize(model)"
        )


def _in_short(lengths: tuple[int, ...]) -> str:
    """Lengths for a header of fixed size."""
    told = str(list(lengths))
    return told if len(told) <= 80 else f"{told[:40]}... ({hashlib.sha256(told.encode()).hexdigest()[:16]})"


def _host() -> int:
    """A number for the machine that this rank runs on, by its name."""
    return int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:6], "big")


def node_size(hosts: list[int]) -> int | None:
    """How many consecutive ranks share each host; None where hosts have unequal numbers, or others lie between."""
    nodes = [len(list(same)) for _, same in groupby(hosts)]
    return nodes[0] if len(set(nodes)) == 1 and len(nodes) == len(set(hosts)) else None


def _known_wires(wires: Any) -> Wires | None:
    """Those that a caller means; None for None. Raises ValueError for anything that tells of no wires."""
    if isinstance(wires, str | Path):
        return Wires.read(wires)
    if wires is not None and not isinstance(wires, Wires):
        raise ValueError(f"wires must be a file of `lasp doctor --probe` or a Wires, got {wires!r}")
    return wires


def _said(layout: str, heads: int, checks: bool | str) -> dict[str, Any]:
    """What ranks that make a group must share."""
    return {"layout": layout, "heads": heads, "checks": {"calls": True, "off": False}.get(str(checks), checks)}


def _agree_on_mesh(operation: str, ranks: list[int], fields: dict[str, Any], error: str | None) -> None:
    """Raise the same ValueError on all of some ranks of the world where one has an error, or they differ."""
    world = dist.group.WORLD
    if world is None:
        raise ValueError(f"{operation}: the process group that the mesh is of is no more")
    if len(ranks) > 1 and "cpu" in dist.get_backend_config(world):
        Agreement(Channel(world, ranks), Call(operation, 0), fields, error).wait()
    if error is not None:
        raise ValueError(error)


def init_mesh(
    *, sp: int = 1, dp: int | None = None, tp: int = 1, device: str | torch.device | None = None
) -> DeviceMesh:
    """A DeviceMesh with axes ("dp", "sp", "tp"); sequence-parallel ranks are neighbours.

    dp=None takes what sp and tp leave of the world. Creates the process group if there is none: from the launcher's
    rendezvous, or of this process alone where no launcher set one up. device: "cuda" when there is one, else "cpu".
    Raises ValueError, on every rank, when the sizes do not multiply to the world size, or differ between ranks.
    """
    kind, error = _device_kind(device)
    if not dist.is_initialized():
        _init_process_group()
    world = dist.get_world_size()
    sizes = {"dp": dp, "sp": sp, "tp": tp}
    if any(size is not None and (not isinstance(size, int) or size < 1) for size in sizes.values()):
        replicas, error = 1, error or f"the axes of a mesh must be at least 1, got {sizes}"
    else:
        replicas = max(1, world // (sp * tp)) if dp is None else dp
        if (ranks := replicas * sp * tp) != world:
            alone = f": start it with torchrun --nproc-per-node {ranks}" if world == 1 else ""
            error = (
                error or f"dp x sp x tp = {replicas} x {sp} x {tp} = {ranks} ranks, but the world has {world}{alone}"
            )
    _agree_on_mesh("init_mesh", list(range(world)), {"dp": replicas, "sp": sp, "tp": tp, "device": kind}, error)
    return init_device_mesh(kind, (replicas, sp, tp), mesh_dim_names=("dp", "sp", "tp"))


def _device_kind(device: str | torch.device | None) -> tuple[str, str | None]:
    """The type of a device, by default the GPU's if there is one; and what is wrong with it."""
    try:
        kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    except (RuntimeError, TypeError):
        return told(device), f"device must be one of torch's, such as cpu or cuda, got {told(device)}"
    return kind, "there is no GPU here that torch can use" if kind == "cuda" and not torch.cuda.is_available() else None


def join_world() -> SequenceGroup:
    """All ranks in a row, for agreements and barriers. Creates the process group if there is none, as `init_mesh`."""
    if not dist.is_initialized():
        _init_process_group()
    return SequenceGroup.from_group()


def create_world(store: dist.Store, rank: int, size: int) -> None:
    """Create the process group of `size` ranks that meet in a store, in the place of a launcher's rendezvous."""
    dist.init_process_group(_backend(), store=store, rank=rank, world_size=size)


def common_store(name: str) -> dist.Store:
    """The store in which the ranks of the world met, for what is said under some name."""
    return dist.PrefixStore(name, dist.distributed_c10d._get_default_store())


def limit_waits(timeout: timedelta) -> None:
    """Let exchanges of all process groups that there are fail after some time."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def shutdown() -> None:
    """Leave the process group together, as the last thing a script does; nothing happens where there is none.

    Every rank calls it: destroying the group while a peer still sends aborts that peer. Raises ValueError where another
    rank waits for a call that this one left out, or took its calls with a cut in another order, and there too.
    """
    if dist.is_initialized():
        part(_last_channels())
        collectives.barrier(None)
        dist.destroy_process_group()
        _wait_for_gloo()


def _last_channels() -> list[Channel]:
    """One for each process group of this rank that carries headers and is not destroyed, which tells all orders there.

    The world's is the last of them: a rank that waits for a call does so in a smaller group, if there is one.
    """
    world = dist.group.WORLD
    assert world is not None, "there is one"
    groups = [group for group in list(_controls) if group is not world and _is_known(group)]
    return [_last_channel(group) for group in (*groups, world) if "cpu" in dist.get_backend_config(group)]


def _last_channel(process_group: dist.ProcessGroup) -> Channel:
    """Where to leave a process group: its header tells the orders of the SequenceGroups that are alive over it."""
    last = Channel(process_group)
    taken = [channel for channel in _controls.get(process_group, ()) if channel.followed]
    last.others = tuple(sorted(taken, key=lambda channel: channel.identity[NUMBER])[:_TOLD])
    return last


def _is_known(group: dist.ProcessGroup) -> bool:
    """Whether torch still has this process group."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


def _wait_for_gloo(seconds: float = 5.0) -> None:
    """Wait until gloo's threads have let go of the last tensors, for `seconds` at most.

    They do so a little after the call has returned, and take the interpreter's lock for it. One that a busy machine
    holds up until the interpreter has ended takes the process down: "terminate called without an active exception".
    """
    deadline, quiet = time.monotonic() + seconds, 0
    while time.monotonic() < deadline and quiet < 3:  # one look may meet a thread between two pieces of its work
        quiet = 0 if any(map(_is_busy_gloo, Path("/proc/self/task").glob("*"))) else quiet + 1
        time.sleep(1e-3)


def _is_busy_gloo(task: Path) -> bool:
    """Whether this thread is one of gloo's and at work. Only Linux tells; elsewhere there are no such folders."""
    try:
        if (task / "comm").read_text().strip() != "pt_gloo_runloop":
            return False
        file = os.open(task / "stat", os.O_RDONLY)
        try:
            # Reading leaves the interpreter's lock to others: a thread that waits for it is awake in what is read.
            return os.read(file, 4096).rpartition(b") ")[2][:1] != b"S"
        finally:
            os.close(file)
    except OSError:
        return False  # it has ended


def _init_process_group() -> None:
    """Join the launcher's rendezvous; a process that no launcher started is a world of its own."""
    atexit.register(_wait_for_gloo)  # for scripts that end without `shutdown`
    try:
        dist.init_process_group(_backend())
    except ValueError as error:
        if "environment variable RANK" not in str(error):
            raise  # a launcher was here, but did not say all
        _warn_if_alone()
        create_world(dist.HashStore(), rank=0, size=1)


def _backend() -> str:
    """What carries tensors: NCCL those of GPUs, gloo those of CPUs."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _warn_if_alone() -> None:
    """Say it where a launcher that torch does not listen to has started several processes.

    This file reads the environment as torch's own rendezvous does, to tell what no argument can.
    """
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        said = os.environ.get(name, "")
        if said.isdecimal() and int(said) > 1:
            warnings.warn(
                f"{name}={said}, but RANK, WORLD_SIZE and MASTER_ADDR are not set: this process is a world of its own "
                "and shares nothing with others; start the ranks with torchrun, or set these",
                stacklevel=4,
            )
            return


def _cpu_group(process_group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that can carry CPU tensors: NCCL alone cannot."""
    if dist.get_world_size(process_group) == 1 or "cpu" in dist.get_backend_config(process_group):
        return process_group
    ranks = dist.get_process_group_ranks(process_group)
    return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
