"""What ranks write of a state: safetensors files each, and one index. DCP's planner says who writes what."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lasp.train.checkpoints.manifest import TOGETHER, Entry, flushed

FOLDER = "state"
INDEX = f"{FOLDER}/index.json"
LEAST = 1 << 24
"""Bytes of a state that are worth a further file."""


class ShardWriter(StorageWriter):
    """Storage of DCP: what it keeps are tensors, and no pickles.

    finish: called on rank 0 when all ranks have written; it is told their files. What it raises, all ranks raise.
    written: called on every rank when it has written, before it waits for the others.
    """

    def __init__(
        self, folder: Path, finish: Callable[[Mapping[str, Entry]], None], written: Callable[[], None]
    ) -> None:
        self.folder, self._finish, self._written = folder, finish, written

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name the files of each rank: of all ranks together as many as are compared side by side."""
        more = [f"-{number}" for number in range(1, TOGETHER // len(plans))]
        return [
            replace(plan, storage_data=[f"rank-{rank}{number}.safetensors" for number in ("", *more)])
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files, where it has anything to write."""
        results = []
        for name, items in _shared_out(plan.items, plan.storage_data).items():
            path = self.folder / FOLDER / name
            save_file({part_name(item.index): _own(planner.resolve_data(item)) for item in items}, path)
            kept = (name, flushed(path))
            results += [WriteResult(item.index, 0, kept) for item in items]
        self._written()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, on rank 0."""
        kept: dict[MetadataIndex, Any] = {result.index: result.storage_data for own in results for result in own}
        tensors = {name: _described(name, of, kept) for name, of in metadata.state_dict_metadata.items()}
        (self.folder / INDEX).write_text(json.dumps({"tensors": tensors}) + "\n", encoding="utf-8")
        files = {f"{FOLDER}/{file}": entry for file, entry in kept.values()}
        self._finish({INDEX: flushed(self.folder / INDEX), **files})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def part_name(index: MetadataIndex) -> str:
    """What a part of a tensor is called in its file: where it begins, behind the tensor's name."""
    return f"{index.fqn} at {','.join(map(str, index.offset or ()))}"


def _shared_out(items: Sequence[WriteItem], names: Sequence[str]) -> dict[str, list[WriteItem]]:
    """What lies in which of these files, alike in size; a small state needs the first alone."""
    sizes = {item.index: _size(item) for item in items}
    filled = dict.fromkeys(names[: max(1, sum(sizes.values()) // LEAST)], 0)
    files: defaultdict[str, list[WriteItem]] = defaultdict(list)
    for item in sorted(items, key=lambda item: -sizes[item.index]):
        name = min(filled, key=filled.__getitem__)
        filled[name] += sizes[item.index]
        files[name].append(item)
    return files


def _size(item: WriteItem) -> int:
    """Bytes of a part."""
    assert item.tensor_data is not None, "a state is made of tensors"
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _own(part: Any) -> Tensor:
    """A tensor on the CPU whose memory is its own, as safetensors wants it."""
    part = part.detach().cpu().contiguous()
    return part if part.untyped_storage().nbytes() == part.nbytes else part.clone()


def _described(name: str, of: Any, kept: Mapping[MetadataIndex, Any]) -> dict[str, Any]:
    assert isinstance(of, TensorStorageMetadata), "a state is made of tensors"
    parts = [
        {
            "offsets": list(chunk.offsets),
            "sizes": list(chunk.sizes),
            "file": kept[MetadataIndex(name, chunk.offsets)][0],
        }
        for chunk in of.chunks
    ]
    return {"dtype": str(of.properties.dtype).removeprefix("torch."), "shape": list(of.size), "parts": parts}
