"""What a rank reads of a state: the parts that its own tensors need, wherever they lie. DCP's planner finds them."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from lasp.train.checkpoints.manifest import Damaged, Manifest, read_json
from lasp.train.checkpoints.writer import FOLDER, INDEX, part_name

_FILE = re.compile(r"rank-\d{1,9}(?:-\d)?\.safetensors", re.ASCII)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


class Part(NamedTuple):
    """A block of a tensor, in one file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str


class Saved(NamedTuple):
    """A tensor of a state."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: list[Part]


def read_index(manifest: Manifest) -> dict[str, Saved]:
    """The tensors of a checkpoint by name. Damaged where they are not whole, or larger than the files they lie in."""
    path = manifest.path / INDEX
    manifest.check([INDEX])
    limit = (1 << 22) + sum(entry.size for entry in manifest.files.values()) // 4  # a thousand ranks have long indices
    try:
        index = {str(name): _saved(of) for name, of in read_json(manifest.path, INDEX, limit)["tensors"].items()}
    except Damaged:
        raise
    except Exception as error:  # what was written may be anything
        raise Damaged(f"{str(path)!r} is not the index of a checkpoint") from error
    held: Counter[str] = Counter()
    for saved in index.values():
        for part in saved.parts:
            held[f"{FOLDER}/{part.file}"] += math.prod(part.sizes) * saved.dtype.itemsize
    for name, size in held.items():
        if name not in manifest.files or size > manifest.files[name].size:
            raise Damaged(f"{str(path)!r} wants {size} bytes of {name}, which has fewer")
    return index


def read_into(tensors: Mapping[str, Tensor], index: Mapping[str, Saved], manifest: Manifest) -> None:
    """Fill tensors, which the index has with the same shapes and dtypes; of a DTensor this rank's part.

    Damaged, naming the file and before any is filled, when one that is needed is not what was written.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), Metadata({name: _metadata(index[name]) for name in tensors}), True)
    files: defaultdict[str, list[ReadItem]] = defaultdict(list)
    for item in planner.create_local_plan().items:
        files[_file(index, item.storage_index)].append(item)
    manifest.check(files)
    for name, items in files.items():
        try:
            with safe_open(manifest.path / name, framework="pt") as file:
                for item in items:
                    planner.resolve_tensor(item).copy_(_read(file, item, index))
        except Exception as error:  # safetensors has its own ways to reject files
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise Damaged(f"cannot read {str(manifest.path / name)!r} of the checkpoint: {told}") from error


def _read(file: Any, item: ReadItem, index: Mapping[str, Saved]) -> Tensor:
    """The block that an item asks for."""
    saved, name = index[item.storage_index.fqn], part_name(item.storage_index)
    whole = file.get_slice(name)
    if tuple(whole.get_shape()) != _part(index, item.storage_index).sizes:
        raise ValueError(f"{name} is {tuple(whole.get_shape())}, which is not what the index says")
    wanted = tuple(slice(start, start + n) for start, n in zip(item.storage_offsets, item.lengths, strict=True))
    block: Tensor = whole[wanted] if wanted else file.get_tensor(name)
    if block.dtype != saved.dtype:
        raise ValueError(f"{name} is of {block.dtype}, which is not what the index says")
    return block


def _part(index: Mapping[str, Saved], place: MetadataIndex) -> Part:
    return next(part for part in index[place.fqn].parts if part.offsets == tuple(place.offset or ()))


def _file(index: Mapping[str, Saved], place: MetadataIndex) -> str:
    return f"{FOLDER}/{_part(index, place).file}"


def _saved(of: Mapping[str, Any]) -> Saved:
    """ValueError, or whatever else, for what does not describe a tensor without holes."""
    shape = _sizes(of["shape"])
    parts = [Part(_sizes(part["offsets"]), _sizes(part["sizes"]), part["file"]) for part in of["parts"]]
    for part in parts:
        inside = [start + n <= size for start, n, size in zip(part.offsets, part.sizes, shape, strict=True)]
        if not all(inside) or not _FILE.fullmatch(part.file):
            raise ValueError(part)
    if len({part.offsets for part in parts}) < len(parts) or sum(math.prod(p.sizes) for p in parts) != math.prod(shape):
        raise ValueError(shape)
    return Saved(_DTYPES[of["dtype"]], shape, parts)


def _sizes(numbers: Any) -> tuple[int, ...]:
    if (
        not isinstance(numbers, list)
        or len(numbers) > 16
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
    ):
        raise ValueError(numbers)
    return tuple(numbers)


def _metadata(saved: Saved) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in saved.parts]
    return TensorStorageMetadata(TensorProperties(dtype=saved.dtype), torch.Size(saved.shape), chunks)
