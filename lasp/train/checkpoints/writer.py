"""What ranks write of a state: a safetensors file each, and one index. DCP's planner says who writes what."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from lasp.train.checkpoints.manifest import Entry, flushed

FOLDER = "state"
INDEX = f"{FOLDER}/index.json"


class ShardWriter(StorageWriter):
    """Storage of DCP: what it keeps are tensors, and no pickles.

    finish: called on rank 0 when all ranks have written; it is told their files. What it raises, all ranks raise.
    """

    def __init__(self, folder: Path, finish: Callable[[Mapping[str, Entry]], None]) -> None:
        self.folder, self._finish = folder, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{rank}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, where it has anything to write."""
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        if plan.items:
            parts = {part_name(item.index): _own(planner.resolve_data(item)) for item in plan.items}
            path = self.folder / FOLDER / plan.storage_data
            save_file(parts, path)
            kept = (plan.storage_data, flushed(path))
            done = Future()
            done.set_result([WriteResult(item.index, 0, kept) for item in plan.items])
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
