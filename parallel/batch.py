"""What a whole batch says, checked and completed: tokens, documents, targets, positions; and its fingerprint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.arguments import told
from lasp.kernels.documents import document_bounds
from lasp.parallel.cut import Cut

IGNORE_INDEX = -100
CUT = "cut"  # how the batch lies on the ranks
AGREEMENT = (
    "agreement"  # of a batch that was made where the other ranks cannot be reached: what they have yet to compare
)

_KEYS = ("input_ids", "inputs_embeds", "labels", "position_ids", "attention_mask", "cu_seqlens")
# Collators of transformers say where packed documents begin in up to four ways, and how long the longest is.
_BOUNDS = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")
_INTEGERS = ("input_ids", "labels", "position_ids", "seq_idx", *_BOUNDS)
_BLOCK = 1 << 16  # elements that are hashed at a time: in a cache, and embeddings need no second copy


def complete(batch: Mapping[str, Any], shift: bool) -> dict[str, Tensor]:
    """The batch that `lasp.shard_batch` cuts: tensors that belong together, documents as cu_seqlens, positions, and
    with `shift` each token's target as "labels".

    Raises ValueError for what is no batch.
    """
    if unknown := sorted(set(batch) - {*_KEYS, *_BOUNDS, *_LONGEST, "seq_idx"}):
        raise ValueError(f"shard_batch knows {', '.join(_KEYS)}; got {', '.join(unknown)}")
    given = {key: as_tensor(key, x) for key, x in batch.items() if x is not None and key not in _LONGEST}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is None:
        raise ValueError(f"a batch needs input_ids or inputs_embeds, got {', '.join(given) or 'nothing'}")
    _check_together(given, tokens)
    documents = _documents(given, tokens)
    bounds = (0, tokens.shape[1]) if documents is None else tuple(documents.tolist())
    whole = {key: given[key] for key in _KEYS if key in given}
    if documents is not None:
        whole["cu_seqlens"] = documents
    if "position_ids" not in whole:
        whole["position_ids"] = _positions(bounds, tokens.device)
    if "labels" in whole and shift:
        whole["labels"] = _shifted(whole["labels"], bounds)
    return whole


def token_dim(key: str) -> int | None:
    """Along which dim a value of a batch has its tokens; None for what is whole on every rank."""
    return {"cu_seqlens": None, "position_ids": -1}.get(key, 1)


def fingerprint(whole: Mapping[str, Tensor]) -> dict[str, str]:
    """Of each value of a batch its dtype, shape and a hash, for a header that all ranks of a sequence compare."""
    return {
        f"{key} of the batch, which all ranks of a sequence share": (
            f"{_name(x.dtype)} {list(x.shape)} {_hash(x.detach().contiguous().flatten()):016x}"
        )
        for key, x in whole.items()
    }


def id_range(whole: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """The least and the largest of the input_ids, read to the host; None where there are none."""
    if "input_ids" not in whole:
        return None
    least, largest = torch.stack(whole["input_ids"].aminmax()).tolist()
    return least, largest


def check_tokens(tokens: Any) -> None:
    """Raises ValueError for what is neither input_ids [B, T] nor inputs_embeds [B, T, D], of a sequence at least."""
    given = list(tokens.shape) if isinstance(tokens, Tensor) else told(tokens)
    if (
        not isinstance(tokens, Tensor)
        or tokens.dim() != (3 if tokens.is_floating_point() else 2)
        or not tokens.shape[0]
    ):
        raise ValueError(f"a model takes input_ids [B, T], integers, or inputs_embeds [B, T, D], got {given}")


def check_ids(tokens: Tensor, vocabulary: int | None, cut: Cut | None) -> None:
    """Raises ValueError for ids that an embedding of so many does not have, of a cut's batch where they are known.

    The embedding would fail on the rank that holds the id alone, on a GPU without saying which.
    """
    if vocabulary is None or tokens.is_floating_point() or not tokens.numel():
        return
    found = id_range({"input_ids": tokens}) if cut is None else cut.ids
    if found is not None and (found[0] < 0 or found[1] >= vocabulary):
        raise ValueError(f"input_ids must be from 0 to {vocabulary - 1}, got {found[0] if found[0] < 0 else found[1]}")


def write_agreement(fields: Mapping[str, str], error: str | None = None) -> Tensor:
    """A fingerprint that is yet to be compared, or why there is none; a tensor, since loops move what is in a batch."""
    return torch.frombuffer(bytearray(json.dumps({"fields": fields, "error": error}).encode()), dtype=torch.uint8)


def read_agreement(written: Tensor | None) -> dict[str, str]:
    """The fingerprint in it; raises the error in it as ValueError."""
    if written is None:
        return {}
    found = json.loads(bytes(written.tolist()))
    if found["error"]:
        raise ValueError(found["error"])
    fields: dict[str, str] = found["fields"]
    return fields


def as_tensor(key: str, value: Any) -> Tensor:
    """A value of a batch or a sample, ids and labels as 64-bit integers. Raises ValueError where they are none."""
    rows = isinstance(value, (list, tuple)) and len(value) > 0 and hasattr(value[0], "shape")
    try:
        x = torch.stack([_as_given(row) for row in value]) if rows else _as_given(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{key} is no tensor and cannot be made one; samples that differ in length: pack (lasp.PackingCollator) or "
            f"pad them ({error})"
        ) from error
    if key not in _INTEGERS:
        return x
    if not x.numel():  # of an empty list, which is float
        return x.long()
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"{key} must be integers, got {_name(x.dtype)}")
    return x if key in _BOUNDS else x.long()  # tables of embeddings take no uint16, losses no int32


def _as_given(value: Any) -> Tensor:
    """A tensor where it lies, whatever torch's default device is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _check_together(given: Mapping[str, Tensor], tokens: Tensor) -> None:
    """[B, N], inputs_embeds [B, N, D], position_ids [.., B or 1, N], on one device."""
    cut = {key: x for key, x in given.items() if key not in _BOUNDS}
    for key, x in cut.items():
        dims = {"inputs_embeds": 3, "position_ids": max(x.dim(), 2)}.get(key, 2)
        if x.dim() != dims:
            raise ValueError(f"{key} must be [{'B, N, D' if dims == 3 else 'B, N'}], got shape {list(x.shape)}")
    rows, length = tokens.shape[:2]
    if rows * length == 0:
        raise ValueError(f"a batch needs a token, got shape {list(tokens.shape)}")
    for key, x in cut.items():
        own_rows, own_length = x.shape[-2:] if key == "position_ids" else x.shape[:2]
        if own_length != length:
            raise ValueError(f"{key} has shape {list(x.shape)}, but the batch has {length} tokens per sequence")
        if own_rows != rows and (key != "position_ids" or own_rows != 1):
            raise ValueError(f"{key} has shape {list(x.shape)}, but the batch has {rows} sequences")
    if len({x.device for x in cut.values()}) > 1:
        told = ", ".join(f"{key} on {x.device}" for key, x in cut.items())
        raise ValueError(f"a batch lies on one device, got {told}")


def _documents(given: Mapping[str, Tensor], tokens: Tensor) -> Tensor | None:
    """cu_seqlens [documents + 1], from all of the batch that says where documents begin: it must say the same."""
    rows, length = tokens.shape[:2]
    said = {key: document_bounds(given[key], length) for key in _BOUNDS if key in given}
    for key, starts in _starts(given).items():
        said[key] = (0, *(starts.any(0).nonzero().flatten() + 1).tolist(), length)
    if not said:
        return None
    if rows > 1:
        raise ValueError(f"{' and '.join(said)} tell of packed documents, which are one row, got {rows} rows")
    first = next(iter(said))
    for key, bounds in said.items():
        if borders := sorted(set(bounds) ^ set(said[first])):  # empty documents aside
            raise ValueError(f"{first} and {key} disagree on documents: one has a border at {borders[0]}, one has not")
    if first in _BOUNDS:
        return given[first]
    if first == "position_ids":
        _check_counting(given, said[first])
    return torch.tensor(said[first], device=tokens.device)


def _starts(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where seq_idx changes and position_ids go back to 0 within rows: bool [B, N - 1], of all tokens but the first."""
    starts = {}
    if "seq_idx" in given:
        starts["seq_idx"] = given["seq_idx"][:, 1:] != given["seq_idx"][:, :-1]
    if "position_ids" in given and given["position_ids"].dim() == 2:
        starts["position_ids"] = given["position_ids"][:, 1:] == 0
        if "attention_mask" in given:  # padding begins no document, nor does the first token after padding on the left
            real = given["attention_mask"].bool()
            starts["position_ids"] = starts["position_ids"] & real[:, 1:] & real.cumsum(1)[:, :-1].bool()
    return {key: found for key, found in starts.items() if found.any()}


def _check_counting(given: Mapping[str, Tensor], bounds: tuple[int, ...]) -> None:
    positions = given["position_ids"]
    wrong = positions != _positions(bounds, positions.device)
    if "attention_mask" in given:
        wrong &= given["attention_mask"].bool()
    if wrong.any():
        at = int(wrong.flatten().nonzero()[0])
        raise ValueError(
            f"position_ids go back to 0 at token {bounds[1]}, as those of packed documents, but do not count from 0 in "
            f"each: position {positions.flatten()[at]} at token {at}; give cu_seqlens"
        )


def _positions(bounds: tuple[int, ...], device: torch.device) -> Tensor:
    """Positions [1, N] counted from the start of each document."""
    parts = [torch.arange(stop - start, device=device) for start, stop in pairwise(bounds)]
    return torch.cat(parts).unsqueeze(0)


def _shifted(labels: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """Each token's target: its successor's label within the document."""
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    ends = [stop - 1 for stop in bounds[1:] if stop > 0]
    shifted[:, ends] = IGNORE_INDEX
    return shifted


def _hash(x: Tensor) -> int:
    """64 bits of a flat tensor's bits, on its device: a polynomial over blocks of sums of words times odd weights, all
    modulo 2**64, so exact in any order of summation."""
    words = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    weights = torch.arange(min(len(x), _BLOCK), device=x.device) * 0x1E3779B97F4A7C15
    weights = (weights ^ (weights >> 29)) * 0x3F58476D1CE4E5B9 | 1
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for block in words.split(_BLOCK):
        total = total * 0x14057B7EF767814F + (block.long() * weights[: len(block)]).sum()
    return int(total) % (1 << 64)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
