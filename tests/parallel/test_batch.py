"""What shard_batch makes of a whole batch, before it is cut: conversions, documents, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lasp
from lasp.parallel.batch import complete, fingerprint

numpy = pytest.importorskip("numpy")
IDS = torch.arange(1, 9).view(2, 4)
ROW = torch.arange(1, 9).view(1, 8)
POSITIONS = [[0, 1, 2, 0, 1, 0, 1, 2]]
SEQ_IDX = [[0, 0, 0, 1, 1, 2, 2, 2]]
BOUNDS = [0, 3, 5, 8]


def refused(match: str, **batch: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        lasp.shard_batch(batch, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [
        IDS.tolist(),
        IDS.numpy(),
        IDS.numpy().astype("uint16"),
        IDS.int(),
        list(IDS.numpy()),
        tuple(map(tuple, IDS.tolist())),
    ],
)
def test_lists_arrays_and_any_integers_are_taken(ids: Any) -> None:
    batch = lasp.shard_batch({"input_ids": ids, "labels": ids}, None)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], IDS)
    assert batch["labels"].tolist() == [[2, 3, 4, -100], [6, 7, 8, -100]]


@pytest.mark.parametrize(
    ("match", "batch"),
    [
        (r"input_ids must be \[B, N\], got shape \[8\]", {"input_ids": torch.arange(8)}),
        (r"input_ids must be \[B, N\], got shape \[1, 2, 4\]", {"input_ids": IDS.unsqueeze(0)}),
        ("input_ids must be integers, got float32", {"input_ids": IDS.float()}),
        ("input_ids must be integers, got bool", {"input_ids": IDS > 3}),
        ("labels must be integers, got float16", {"input_ids": IDS, "labels": IDS.half()}),
        ("position_ids must be integers, got float32", {"input_ids": IDS, "position_ids": IDS.float()}),
        (r"differ in length: pack .* or pad.*expected sequence", {"input_ids": [[1, 2, 3], [4, 5]]}),
        (r"input_ids is no tensor and cannot be made one.*str", {"input_ids": "abc"}),
        (r"a batch needs a token, got shape \[0, 4\]", {"input_ids": IDS[:0]}),
        (r"a batch needs a token, got shape \[2, 0\]", {"input_ids": IDS[:, :0]}),
        (r"input_ids must be \[B, N\], got shape \[0\]", {"input_ids": []}),
        ("needs input_ids or inputs_embeds, got labels", {"labels": IDS}),
        ("needs input_ids or inputs_embeds, got nothing", {}),
        (r"labels has shape \[2, 3\], but the batch has 4 tokens", {"input_ids": IDS, "labels": IDS[:, :3]}),
        (r"labels has shape \[1, 4\], but the batch has 2 sequences", {"input_ids": IDS, "labels": IDS[:1]}),
        (r"attention_mask must be \[B, N\], got shape \[2, 1, 4, 4\]", {"attention_mask": torch.ones(2, 1, 4, 4)}),
        (r"position_ids has shape \[3, 4\], but .* 2 seq", {"input_ids": IDS, "position_ids": torch.ones(3, 4).int()}),
        (r"inputs_embeds must be \[B, N, D\], got shape \[2, 4\]", {"inputs_embeds": IDS.float()}),
        ("a batch lies on one device, got input_ids on cpu, labels on meta", {"labels": IDS.to("meta")}),
        ("shard_batch knows .*; got pixels, sizes", {"pixels": IDS, "sizes": None}),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_one_line(match: str, batch: dict[str, Any]) -> None:
    extra = {"labels", "attention_mask", "pixels"} & set(batch) and "needs" not in match
    refused(match, **({"input_ids": IDS} if extra else {}) | batch)


SAID = {
    "cu_seqlens": {"cu_seqlens": BOUNDS},
    "flash keywords": {"cu_seq_lens_q": torch.tensor(BOUNDS).int(), "cu_seq_lens_k": torch.tensor(BOUNDS).int()},
    "longest": {"cu_seq_lens_q": BOUNDS, "max_length_q": 3, "max_length_k": 3},
    "positions": {"position_ids": POSITIONS},
    "seq_idx": {"seq_idx": SEQ_IDX},
    "all": {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "seq_idx": SEQ_IDX, "position_ids": POSITIONS},
    "an empty document": {"cu_seqlens": [0, 3, 3, 5, 8], "position_ids": POSITIONS},
    "a mask": {"position_ids": POSITIONS, "attention_mask": torch.ones(1, 8)},
}


@pytest.mark.parametrize("said", SAID.values(), ids=SAID)
def test_documents_are_taken_from_whatever_names_them(said: dict[str, Any]) -> None:
    batch = lasp.shard_batch({"input_ids": ROW, "labels": ROW} | said, None)
    names = {"input_ids", "labels", "shift_labels", "position_ids", "cu_seqlens", "cut"}
    assert batch.keys() - {"attention_mask"} == names
    held = frozenset(batch.keys() - {"cut"})
    assert batch["cut"] == lasp.Cut(None, (8,), tuple(said.get("cu_seqlens", BOUNDS)), held, (1, 8))
    assert batch["cu_seqlens"].tolist() == list(said.get("cu_seqlens", BOUNDS))
    assert batch["position_ids"].tolist() == POSITIONS
    assert batch["labels"].tolist() == [[2, 3, -100, 5, -100, 7, 8, -100]]


@pytest.mark.parametrize(
    ("match", "said"),
    [
        ("cu_seq_lens_q and cu_seq_lens_k disagree .* at 5", {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": [0, 3, 8]}),
        ("cu_seqlens and position_ids disagree .* border at 5", {"cu_seqlens": [0, 3, 8], "position_ids": POSITIONS}),
        ("cu_seqlens and seq_idx disagree .* border at 4", {"cu_seqlens": [0, 3, 4, 5, 8], "seq_idx": SEQ_IDX}),
        ("seq_idx and position_ids .* at 2", {"seq_idx": SEQ_IDX, "position_ids": [[0, 1, 0, 0, 1, 0, 1, 2]]}),
        ("cu_seqlens must end at the whole sequence's length 8, got 5", {"cu_seq_lens_q": [0, 3, 5]}),
        ("position_ids go back to 0 at token 3.*position 1 at token 6", {"position_ids": [[0, 1, 2, 0, 1, 2, 1, 1]]}),
        ("position_ids go back to 0 at token 3.*position 2 at token 0", {"position_ids": [[2, 3, 4, 0, 1, 2, 3, 4]]}),
    ],
)  # fmt: skip
def test_documents_that_contradict_one_another_are_refused(match: str, said: dict[str, Any]) -> None:
    refused(match, input_ids=ROW, **said)


@pytest.mark.parametrize(
    "said", [{"cu_seqlens": [0, 2, 4]}, {"position_ids": [[0, 1, 0, 1]] * 2}, {"seq_idx": [[0, 0, 0, 0], [0, 0, 1, 1]]}]
)
def test_documents_in_several_rows_are_refused(said: dict[str, Any]) -> None:
    (key,) = said
    refused(f"{key} tell of packed documents, which are one row, got 2 rows", input_ids=IDS, **said)


def test_padding_behind_packed_documents() -> None:
    """Positions of 0 are documents of one token each; where a mask names the padding, it belongs to the last one."""
    positions = [[0, 1, 2, 0, 1, 0, 0, 0]]
    batch = lasp.shard_batch({"input_ids": ROW, "position_ids": positions}, None)
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6, 7, 8]
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    batch = lasp.shard_batch({"input_ids": ROW, "position_ids": positions, "attention_mask": mask}, None)
    assert batch["cu_seqlens"].tolist() == [0, 3, 8]


def test_padding_in_front_begins_no_document() -> None:
    positions, mask = torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    batch = lasp.shard_batch({"input_ids": IDS, "position_ids": positions, "attention_mask": mask}, None)
    assert "cu_seqlens" not in batch
    assert torch.equal(batch["position_ids"], positions)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True},
    ],
)
@pytest.mark.parametrize("kind", ["pt", "np"])
def test_packed_batches_of_transformers_are_documents(options: dict[str, Any], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    samples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}, {"input_ids": [6, 7, 8]}]
    packed = transformers.DataCollatorWithFlattening(return_tensors=kind, **options)(samples)
    ours = lasp.shard_batch(lasp.PackingCollator(8)(samples), None)
    theirs = lasp.shard_batch(packed, None)
    assert theirs.keys() == ours.keys()
    assert theirs.pop("cut") == ours.pop("cut")
    assert all(theirs[key].tolist() == ours[key].tolist() for key in ours)


def test_the_fingerprint_is_of_every_value_dtype_and_shape() -> None:
    def of(**batch: Any) -> tuple[str, ...]:
        return tuple(fingerprint(complete({"input_ids": IDS, "labels": IDS} | batch, True)).values())

    swapped, long = IDS.clone(), torch.arange(200_000).view(2, -1)
    swapped[0, :2] = swapped[0, :2].flip(0)
    late = long.clone()
    late[1, -2:] = late[1, -2:].flip(0)
    different = [
        of(), of(input_ids=swapped), of(input_ids=IDS.flip(0)), of(labels=IDS + 1), of(labels=None),
        of(attention_mask=torch.ones(2, 4)), of(attention_mask=torch.ones(2, 4).int()),
        of(input_ids=long, labels=long), of(input_ids=late, labels=long),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert of() == of(labels=IDS.tolist(), input_ids=IDS.t().contiguous().t())
    embeds = torch.randn(2, 4, 3, dtype=torch.bfloat16)
    seen = {
        tuple(fingerprint(complete({"inputs_embeds": x}, True)).values()) for x in (embeds, -embeds, embeds.float())
    }
    assert len(seen) == 3
