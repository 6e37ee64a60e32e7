"""The probe passes on what is parallel, and tells where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lasp
from lasp.wrap.wiring import LayerCall

pytest.importorskip("transformers")

from tests.hf_models import FAMILIES, kinds, make_single

GroupOf = Callable[..., lasp.SequenceGroup | None]
# Where the first module that mixes tokens leaves off: its output is the first that can differ.
MIXERS = (
    "attn",
    "mixer",
    "mamba",
    "conv",
    "temporal_block",
    "attention",
    "mlstm",
    "rg_lru",
    "time_shift",
    "forget_gate",
)


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_linear", "bamba"])
def test_passes(group_of: GroupOf, name: str) -> None:
    group, model = group_of(4, "zigzag"), make_single(name)
    assert group is not None
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    report = lasp.verify(model, group, seq_len=41)
    assert report.exact
    assert report.first_layer is None
    assert "parallel and exact" in str(report)
    assert report.gradients.keys() == {key for key, p in model.named_parameters()}
    lasp.verify(lasp.parallelize(model, group), group, seq_len=41)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# One of each kind of mixing; the other families with the slow tests.
KINDS = {"llama", *kinds()}


@pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_fails_without_the_exchange(group_of: GroupOf, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group, model = group_of(2, "contiguous"), make_single(name)
    if group is None:
        return
    monkeypatch.setattr(LayerCall, "sequence", {"cu_seqlens": None, "group": None})
    with pytest.raises(ValueError, match=r"not parallel: first (\S+), by") as caught:
        lasp.verify(model, group, seq_len=41)
    first = str(caught.value).split(", by")[0].removeprefix("not parallel: first ")
    assert any(word in first for word in MIXERS), first


def test_ranks_with_different_weights(group_of: GroupOf) -> None:
    group, model = group_of(4, "contiguous"), make_single("llama")
    assert group is not None
    if group.rank == 2:
        with torch.no_grad():
            model.lm_head.weight *= 2
    with pytest.raises(ValueError, match="ranks disagree on loss on one device"):
        lasp.verify(model, group)
