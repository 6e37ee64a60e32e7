"""ShardedCollator and PackingCollator: from samples to this rank's part of a batch, in a DataLoader or a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from lasp.parallel.batch import AGREEMENT, as_tensor, complete, fingerprint, write_agreement
from lasp.parallel.cut import check_group
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import even_slices
from lasp.parallel.sharding import agree_and_cut, cut_batch

# What torch, numpy and transformers say of rows that are no tensor.
_RAGGED = ("equal size", "sequence of length", "inhomogeneous", "Unable to create tensor")

Collator = Callable[[Sequence[Any]], Mapping[str, Any]]


class Place(NamedTuple):
    """What a process that cannot reach the other ranks knows of a SequenceGroup: this rank's place, in integers."""

    rank: int
    size: int
    layout: str
    checks: bool

    def slices(self, length: int) -> list[slice]:
        """As of the group."""
        return even_slices(length, self.rank, self.size, self.layout)


class ShardedCollator:
    """A `collate_fn` that makes a batch of whole sequences and cuts it as `lasp.shard_batch` does.

    collator: samples to a batch that `shard_batch` takes; by default mappings of equally long "input_ids", "labels" and
    so on, as tensors, arrays or lists, are stacked. shift: as in `shard_batch`.

    All ranks of the group must give it the same samples in the same order: the same seed of the sampler, which deals
    out samples over dp alone. Raises ValueError on every rank where they did not (a group without checks does not
    look), where the collator failed, and for a batch that `shard_batch` refuses.

    A worker process of a DataLoader cannot reach the other ranks. There the batch is made and cut, and in the place of
    "cut" what has to be compared, or an error, travels with it as "agreement", an uint8 tensor: the parallelised model
    compares it at the start of its forward. It is pickled without the group, as a worker that is spawned needs it.
    """

    def __init__(self, group: SequenceGroup | None, collator: Collator | None = None, shift: bool = True) -> None:
        check_group(group)
        self.group: SequenceGroup | Place | None = group
        self.collator, self.shift = collator or stack_samples, shift

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        group = self.group
        if not isinstance(group, Place) and get_worker_info() is None:
            return agree_and_cut(lambda: self._collate(samples), group, self.shift)
        if group is None or group.size == 1 or not group.checks:
            return cut_batch(complete(self._collate(samples), self.shift), group)
        try:
            whole = complete(self._collate(samples), self.shift)
            return cut_batch(whole, group) | {AGREEMENT: write_agreement(fingerprint(whole))}
        except Exception as error:  # raised here, it would leave the other ranks waiting
            return {AGREEMENT: write_agreement({}, f"{type(error).__name__} in a worker process: {error}")}

    def __getstate__(self) -> dict[str, Any]:
        group = self.group
        if isinstance(group, SequenceGroup):
            group = Place(group.rank, group.size, group.layout, group.checks)
        return self.__dict__ | {"group": group}

    def _collate(self, samples: Sequence[Any]) -> Mapping[str, Any]:
        try:
            return self.collator(samples)
        except Exception as error:
            if not any(words in str(error) for words in _RAGGED):
                raise
            raise ValueError(f"samples differ in length: pack (lasp.PackingCollator) or pad them ({error})") from error


class PackingCollator:
    """A `collate_fn` that packs samples of any lengths into one row of at most `tokens` tokens, without padding.

    samples: mappings of "input_ids" and, where only some tokens are targets, "labels", one-dimensional tensors, arrays
    or lists; tokens whose "attention_mask" is 0 are left out. Labels are the input_ids where a sample has none. Returns
    "input_ids" [1, N], "labels" [1, N] and "cu_seqlens" [samples + 1], which `lasp.shard_batch` takes: every sample is
    a document of its own, and no target crosses its end. `lasp.ShardedCollator(group, lasp.PackingCollator(8192))`
    gives each rank its part.

    A collator cannot hold samples back, and drops none: it raises ValueError for samples that together exceed `tokens`,
    and names one that does so alone; choose the batch size by the longest. Also for values of other lengths, and other
    keys.
    """

    def __init__(self, tokens: int) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"tokens must be a positive integer, got {tokens!r}")
        self.tokens = tokens

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts = [_text(i, sample) for i, sample in enumerate(samples)]
        lengths = [len(ids) for ids, _ in texts]
        if not sum(lengths):
            raise ValueError(f"{len(texts)} samples without a token cannot be packed")
        for i, length in enumerate(lengths):
            if length > self.tokens:
                raise ValueError(f"sample {i} of the batch has {length} tokens, a row has at most {self.tokens}")
        if sum(lengths) > self.tokens:
            raise ValueError(
                f"{len(texts)} samples of {sum(lengths)} tokens exceed a row of {self.tokens}, and none is dropped: "
                "take a smaller batch size or more tokens"
            )
        ids, labels = (torch.cat(parts).unsqueeze(0) for parts in zip(*texts, strict=True))
        return {"input_ids": ids, "labels": labels, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0)}


def _text(i: int, sample: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The ids and labels of a sample's tokens, without padding."""
    if unknown := sorted(set(sample) - {"input_ids", "labels", "attention_mask"}):
        raise ValueError(
            f"PackingCollator packs input_ids, labels, attention_mask; sample {i} has {', '.join(unknown)}"
        )
    values = {key: as_tensor(key, value) for key, value in sample.items() if value is not None}
    if "input_ids" not in values:
        raise ValueError(f"sample {i} of the batch has no input_ids")
    ids = values["input_ids"]
    for key, value in values.items():
        if value.dim() != 1 or value.shape != ids.shape:
            raise ValueError(
                f"sample {i} of the batch has {key} of shape {list(value.shape)}, but needs one per token of input_ids "
                f"{list(ids.shape)}"
            )
    real = values.get("attention_mask", torch.ones_like(ids)).bool()
    return ids[real], values.get("labels", ids)[real]


def stack_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples of equal length as one batch of tensors [B, N]."""
    batch: dict[str, Any] = default_collate([{k: torch.as_tensor(v) for k, v in s.items()} for s in samples])
    return batch
