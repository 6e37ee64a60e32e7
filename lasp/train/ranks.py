"""This process's place among the ranks of a run, and what training needs of the others."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lasp.parallel import collectives
from lasp.parallel.agreement import Disagreement
from lasp.parallel.group import SequenceGroup, init_mesh, join_world, shutdown
from lasp.train.config import TrainConfig
from lasp.train.source import MicroBatch

T = TypeVar("T")


def check_device(device: str | None, ranks: int = 1) -> None:
    """ValueError when this machine has not what `device` says, or a GPU for each of some ranks that use them."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not there:
        raise ValueError('device = "cuda", but torch finds no GPU here')
    if device != "cpu" and 0 < there < ranks:
        raise ValueError(
            f'{ranks} ranks of this machine need a GPU each, torch finds {there}; device = "cpu" needs none'
        )


def replicas(device: str | None, ranks: int) -> int:
    """How many groups of so many ranks the GPUs of this machine take, at least one; one on the CPU."""
    there = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    return max(1, there // ranks)


def fitted(config: TrainConfig, ranks: int) -> TrainConfig:
    """The configuration of the same run by so many ranks, where it is elastic and they are too few: a step reads the
    same sequences. ValueError where they cannot be shared out alike."""
    if not config.elastic or config.dp is None or ranks >= config.dp * config.sp * config.tp:
        return config
    replica = min(config.sp * config.tp, ranks)
    dp, batches = ranks // replica, config.dp * config.accumulation
    if dp * replica != ranks or replica % config.tp or batches % dp:
        raise ValueError(
            f"elastic = true: {ranks} ranks cannot share out what dp {config.dp} x sp {config.sp} x tp {config.tp} "
            f"ranks with {config.accumulation} micro-batches a step have"
        )
    return replace(config, dp=dp, sp=replica // config.tp, accumulation=batches // dp)


def agree_on_config(everyone: SequenceGroup, config: TrainConfig | None, error: str | None = None) -> None:
    """Whether all ranks were given the same configuration. All of them call this.

    ValueError on every rank: the `error` of those that have none, or the first field that differs, with its values.
    """
    told = {"configuration": hashlib.sha256(repr(config).encode()).hexdigest()[:8]}
    try:
        everyone.agree("reading the configuration", told, error).wait()
    except Disagreement as found:
        if config is None or found.field not in told:
            raise
        # All ranks are here, and meet at every field up to the first that differs: one header would not hold them all.
        for name, value in _fields(asdict(config)):
            everyone.agree("comparing the configuration", {name: value}).wait()
        raise


def _fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a configuration, a table's names ahead of what it holds: ranks may have other ones."""
    if prefix:
        yield f"the fields of {prefix.removesuffix('.')}", _short(", ".join(values))
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _short(repr(value))


def _short(text: str, most: int = 120) -> str:
    """A text as a header has room for it, and as different from others as the whole."""
    if len(text) <= most and text.isascii():
        return text
    begin = text[: most // 4].encode("ascii", "backslashreplace").decode()
    return f"{begin}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


@dataclass(frozen=True)
class Ranks:
    """The axes of a run. One process alone is a run of one rank."""

    mesh: DeviceMesh
    """All ranks, by their place on the axes dp, sp and tp."""

    sequence: SequenceGroup
    """Those that share this rank's sequences."""

    everyone: SequenceGroup
    """All ranks in a row: for agreements and barriers."""

    @classmethod
    def join(cls, config: TrainConfig) -> Self:
        """Meet the other ranks. All of them call this; ValueError on each when dp x sp x tp is not their number."""
        everyone = join_world()
        mesh = init_mesh(sp=config.sp, dp=config.dp, tp=config.tp, device=config.device)
        return cls(mesh, SequenceGroup.from_mesh(mesh, layout=config.layout), everyone)

    def leave(self) -> None:
        """Part from the other ranks, together with them."""
        shutdown()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.everyone.rank == 0

    @property
    def dp_rank(self) -> int:
        """This rank's place on the data-parallel axis."""
        return self.mesh.get_local_rank("dp")

    @property
    def dp_size(self) -> int:
        """Length of the data-parallel axis."""
        return self.mesh["dp"].size()

    @property
    def tp_size(self) -> int:
        """Length of the tensor-parallel axis."""
        return self.mesh["tp"].size()

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        kind = self.mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def place(self, batch: MicroBatch) -> dict[str, Any]:
        """What a model is given of a micro-batch: its tensors where this rank computes, and its cut."""
        tensors = {name: tensor.to(self.device) for name, tensor in batch.tensors.items()}
        cut = self.sequence.cut(batch.length, cu_seqlens=batch.bounds)
        return {**tensors, "labels": tensors["shift_labels"], "cut": cut}

    def total(self, number: int) -> int:
        """The sum over dp and sp of the ranks' numbers, which are the same along tp."""
        if self.everyone.size == 1:
            return number
        told = collectives.all_reduce(torch.tensor([number]), self.everyone.control, "control").wait()
        return int(told.item()) // self.tp_size

    def mean(self, value: Tensor) -> float:
        """The mean of a scalar over the data-parallel axis, the same on every rank when it is the same along sp."""
        if self.dp_size == 1:
            return value.item()
        total = value.detach().clone().view(1)
        return collectives.all_reduce(total, self.mesh.get_group("dp"), "control").wait().item() / self.dp_size

    def any(self, value: bool) -> bool:
        """Whether something holds on any rank, the same on every rank."""
        return self.any_of(value)[0]

    def any_of(self, *values: bool) -> list[bool]:
        """`any` of several things, in one exchange."""
        told = torch.tensor([int(value) for value in values])
        return [n > 0 for n in collectives.all_reduce(told, self.everyone.control, "control").wait().tolist()]

    def gather(self, own: Tensor) -> Tensor:
        """What every rank has of some numbers [n], as [ranks, n]."""
        return collectives.all_gather(own, self.everyone.control, "control").wait()

    def together(self, work: Callable[[], T]) -> T:
        """What some work gives on this rank; the same ValueError on all where one of them cannot do it."""
        result, error = None, None
        try:
            result = work()
        except ValueError as found:
            error = str(found)
        self.everyone.agree("a step of the run on one rank", {}, error).wait()
        return cast(T, result)  # or there was an error, and everyone has raised it

    def barrier(self) -> None:
        """Wait for everyone."""
        collectives.barrier(self.everyone.control)
