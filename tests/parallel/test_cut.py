"""Cut: what follows from the lengths of the ranks and the documents, and what is no cut."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import lasp
from lasp.parallel.cut import even_lengths
from lasp.parallel.layout import LAYOUTS, even_slices

BOUNDS = (0, 1, 10, 10, 31, 37)


def on_rank(rank: int, layout: str = "contiguous", size: int = 4) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, layout=layout, size=size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_a_rank_knows_the_positions_of_its_tokens(layout: str, bounds: tuple[int, ...] | None) -> None:
    ends = [0, 37] if bounds is None else list(bounds)
    whole = torch.cat([torch.arange(b - a) for a, b in pairwise(ends)])
    for rank in range(4):
        cut = lasp.Cut(on_rank(rank, layout), even_lengths(37, 4, layout), bounds)
        slices = even_slices(37, rank, 4, layout)
        assert cut.positions().tolist() == torch.cat([whole[part] for part in slices]).tolist()
        assert cut.parts == tuple((part.start, part.stop) for part in slices)
        assert (cut.tokens, cut.total, cut.size, cut.packed) == (len(cut.positions()), 37, 4, bounds is not None)


def test_what_follows_is_made_once() -> None:
    cut = lasp.Cut(on_rank(1, size=3), (3, 0, 5), (0, 4, 8))
    assert cut.plan() is cut.plan()
    assert cut.plan(2) is cut.plan(2)
    assert cut.plan(2).local_runs == ((0, 0),)
    assert cut.cu_seqlens().tolist() == [0, 4, 8]
    assert cut.cu_seqlens(torch.device("cpu")) is cut.cu_seqlens(torch.device("cpu"))
    assert lasp.Cut(None, (8,)).cu_seqlens() is None
    assert copy.deepcopy(cut) is cut is cut.to("cpu", non_blocking=True)


def test_equal_facts_are_equal_cuts() -> None:
    group = on_rank(0, size=2)
    cut = lasp.Cut(group, (3, 5), (0, 8))
    cut.plan()
    assert cut == lasp.Cut(group, (3, 5), (0, 8)) != lasp.Cut(group, (3, 5))


@pytest.mark.parametrize(
    ("words", "layout", "lengths", "bounds"),
    [
        ("must end at the whole sequence's length 8, got 9", "contiguous", (3, 5), (0, 9)),
        ("must never decrease", "contiguous", (3, 5), (0, 5, 4, 8)),
        ("must begin with 0", "contiguous", (3, 5), (1, 8)),
        ("one number of tokens per rank, 2 of them", "contiguous", (3, 4, 1), None),
        ("one number of tokens per rank, 2 of them", "contiguous", (9, -1), None),
        ("one number of tokens per rank, 2 of them", "contiguous", [3, 5], None),
        (r"cut as \[4, 4\], but the ranks hold \[3, 5\]", "zigzag", (3, 5), None),
    ],
)
def test_no_cut(words: str, layout: str, lengths: tuple[int, ...], bounds: tuple[int, ...] | None) -> None:
    with pytest.raises(ValueError, match=words):
        lasp.Cut(on_rank(0, layout, 2), lengths, bounds)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("8 of 8 tokens, got 7", {"q": torch.zeros(1, 7, 2, 4)}),
        ("give cut or cu_seqlens, not both", {"cu_seqlens": [0, 8]}),
        ("needs B = 1, got B = 2", {"q": torch.zeros(2, 8, 2, 4)}),
        ("cut must be a lasp.Cut, got 'house'", {"cut": "house"}),
        ("takes a cut or a group, not both", {"group": SimpleNamespace(size=1)}),
    ],
)
@pytest.mark.parametrize("operation", [lasp.linear_attention, lasp.softmax_attention])
def test_what_does_not_fit_a_cut_is_one_line(operation, words: str, given: dict) -> None:
    keywords = {"q": torch.zeros(1, 8, 2, 4), "cut": lasp.Cut(None, (8,), (0, 3, 8))} | given
    with pytest.raises(ValueError, match=words):
        operation(k=keywords["q"], v=keywords["q"], **keywords)


def test_documents_of_another_cut_are_refused() -> None:
    cut = lasp.Cut(None, (8,), (0, 3, 8))
    cut.check_documents(torch.tensor([0, 3, 8]))
    for others in ([0, 4, 8], [0, 8]):
        with pytest.raises(ValueError, match="others than those of the batch's cut"):
            cut.check_documents(torch.tensor(others))


def test_torch_hands_a_cut_on_as_it_is() -> None:
    """FSDP and the mixed precision of DDP rebuild what they find in the arguments of a module."""
    from torch.distributed.utils import _apply_to_tensors

    cut = lasp.Cut(None, (8,), (0, 3, 8))
    assert _apply_to_tensors(lambda x: x, {"cut": cut})["cut"] is cut
    with pytest.raises(AttributeError, match="never changed"):
        cut.lengths = (9,)


def test_bounds_of_any_kind() -> None:
    cut = lasp.Cut(None, (8,), (0, 3, 8))
    for bounds in ([0, 3, 8], torch.tensor([0, 3, 8])):
        assert lasp.Cut(None, (8,), bounds) == cut
        assert hash(lasp.Cut(None, (8,), bounds)) == hash(cut)


def test_torchs_default_device_does_not_matter() -> None:
    cut, ids = lasp.Cut(None, (8,), (0, 3, 8)), torch.arange(8).view(1, 8)
    with torch.device("meta"):
        assert cut.positions().tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        cut.check_documents(cut.cu_seqlens())
        assert torch.equal(lasp.shard_batch({"input_ids": ids}, None)["input_ids"], ids)


def test_what_is_kept_outlives_the_mode_of_who_asked_first() -> None:
    cut = lasp.Cut(None, (8,), (0, 3, 8))
    with torch.inference_mode():
        cut.positions()
        cut.cu_seqlens()
    assert not cut.positions().is_inference()
    assert not cut.cu_seqlens().is_inference()
