"""PackingCollator: samples of any lengths in one row, and what does not fit named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lasp

numpy = pytest.importorskip("numpy")
TEXTS = [[1, 2, 3], [4], [5, 6]]


@pytest.mark.parametrize("kind", [list, torch.tensor, numpy.array, lambda ids: numpy.array(ids, "uint16")])
def test_samples_become_documents_of_one_row(kind: Any) -> None:
    samples = [{"input_ids": kind(ids)} for ids in TEXTS]
    samples[2]["labels"] = [-100, 6]
    batch = lasp.PackingCollator(tokens=6)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4, -100, 6]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 4, 6]
    assert lasp.shard_batch(batch, None)["labels"].tolist() == [[2, 3, -100, -100, 6, -100]]


def test_padding_and_empty_samples_take_no_room() -> None:
    samples = [
        {"input_ids": [0, 0, 1, 2], "attention_mask": [0, 0, 1, 1], "labels": [-100, -100, -100, 2]},
        {"input_ids": []},
        {"input_ids": torch.tensor([3, 4, 0]), "attention_mask": torch.tensor([1, 1, 0])},
    ]
    batch = lasp.PackingCollator(4)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 4]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize(
    ("match", "samples"),
    [
        ("sample 1 of the batch has 7 tokens, a row has at most 6", [{"input_ids": [1]}, {"input_ids": [1] * 7}]),
        ("2 samples of 8 tokens exceed a row of 6, and none is dropped", [{"input_ids": [1] * 4}] * 2),
        ("sample 0 of the batch has labels of shape .1., but", [{"input_ids": [1, 2], "labels": [1]}]),
        ("packs input_ids, labels, .*; sample 1 has text", [{"input_ids": [1]}, {"input_ids": [1], "text": "a"}]),
        ("sample 0 of the batch has no input_ids", [{"labels": [1]}]),
        ("sample 0 of the batch has input_ids of shape .1, 2.", [{"input_ids": [[1, 2]]}]),
        ("input_ids must be integers, got float32", [{"input_ids": [1.5]}]),
        ("2 samples without a token", [{"input_ids": []}] * 2),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(match: str, samples: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=match):
        lasp.PackingCollator(tokens=6)(samples)


@pytest.mark.parametrize("tokens", [0, -1, 2.0, "8", True, None])
def test_tokens_are_a_positive_integer(tokens: Any) -> None:
    with pytest.raises(ValueError, match="tokens must be a positive integer"):
        lasp.PackingCollator(tokens)
