"""ShardedCollator: from samples to this rank's part of a batch, in a DataLoader or a Trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.group import SequenceGroup
from lasp.parallel.sharding import shard_batch

Collator = Callable[[Sequence[Any]], Mapping[str, Any]]


class ShardedCollator:
    """A `collate_fn` that makes a batch of whole sequences and cuts it as `lasp.shard_batch` does.

    collator: samples to a batch that `shard_batch` takes; by default mappings of equally long "input_ids", "labels" and
    so on, as tensors, arrays or lists, are stacked. shift: as in `shard_batch`.

    All ranks of the group must give it the same samples in the same order: the same seed of the sampler, which deals
    out samples over dp alone. Raises ValueError on every rank where they did not (a group without checks does not
    look), where the collator failed, for a batch that `shard_batch` refuses, and in a worker process of a DataLoader:
    it cannot reach the other ranks.
    """

    def __init__(self, group: SequenceGroup | None, collator: Collator | None = None, shift: bool = True) -> None:
        self.group, self.collator, self.shift = group, collator or stack_samples, shift

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if self.group is not None and self.group.size > 1 and get_worker_info() is not None:
            raise ValueError("a ShardedCollator asks the other ranks, and no worker can: use num_workers=0")
        local: dict[str, Any] = {}

        def check() -> Arguments:
            batch = self.collator(samples)
            local.update(shard_batch(batch, self.group, self.shift))
            tokens = local["position_ids"].shape[-1]
            return Arguments({"samples, which all ranks of a sequence share": _fingerprint(batch)}, tokens)

        begin_call(self.group, check)()
        return local


def stack_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of equal length as one batch of tensors [B, N]."""
    batch: dict[str, Any] = default_collate([{k: torch.as_tensor(v) for k, v in s.items()} for s in samples])
    return batch


def _fingerprint(batch: Mapping[str, Any]) -> str:
    """A short hash of every value of a batch."""
    digest = hashlib.sha256()
    for key, value in sorted(batch.items()):
        if value is not None:
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
