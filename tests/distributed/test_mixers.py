"""Models of every mixer with the sequence cut over real ranks; tests/lasp/test_mixers_over_ranks.py has the layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.layers import MIXERS, mixer_class
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM

pytestmark = pytest.mark.mpi(min_size=4)

LENGTH, HIDDEN, HEADS = 35, 16, 2
# Documents of one token, none, on a border of ranks, over three ranks; the third rank's tokens are all of one.
DOCUMENTS = torch.tensor([0, 1, 9, 9, 30, 35])
Results = dict[str, Tensor]


def model_results(name: str, packed: bool, group: lasp.SequenceGroup | None) -> Results:
    """The loss, and the gradient of every parameter of a model of this mixer and softmax attention."""
    torch.manual_seed(0)
    config = LinearLlamaConfig(
        vocab_size=31, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=3, num_attention_heads=HEADS,
        pattern=[name, "softmax", name], initializer_range=0.2,
        mixer_options={"hgrn2": {"learned_bounds": True}} if name == "hgrn2" else None,
    )  # fmt: skip
    model = LinearLlamaForCausalLM(config).double()
    ids = torch.randint(0, 31, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids} | ({"cu_seqlens": DOCUMENTS} if packed else {})
    loss = model(**(batch if group is None else lasp.shard_batch(batch, group)), group=group).loss
    loss.backward()
    if group is not None:
        lasp.sync_gradients(model, group)
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def expected(once) -> Callable[..., Results]:
    """What one device finds."""
    return cache(lambda run, *args: once(run, *args, None))


def assert_same(found: Results, wanted: Results, tolerance: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    errors = {n: ((found[n] - w).abs().max() / w.abs().max().clamp(min=1e-6)).item() for n, w in wanted.items()}
    assert max(errors.values()) <= tolerance, {n: e for n, e in errors.items() if not e <= tolerance}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("layout", "packed"), [("contiguous", False), ("zigzag", True)])
def test_a_model_is_what_it_is_on_one_device(group_of, expected, name, layout, packed) -> None:
    assert_same(model_results(name, packed, group_of(4, layout)), expected(model_results, name, packed))


# How much of A travels with a state of K rows (docs/mixers.md).
SCALAR, CHANNELS, DENSE = (lambda k: 1), (lambda k: k), (lambda k: k * k)
TRANSFERS = {
    "gla": CHANNELS,
    "hgrn2": CHANNELS,
    "lightnet": CHANNELS,
    "mamba": CHANNELS,
    "mamba2": SCALAR,
    "mlstm": SCALAR,
} | dict.fromkeys(["deltanet", "gated_deltanet", "delta_product", "kda", "rwkv7", "mom"], DENSE)


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"softmax", "slstm"}))
def test_bytes_are_those_of_the_table(group_of, name: str) -> None:
    group, mixer = group_of(4), mixer_class(name)(HIDDEN, HEADS)
    _, state = mixer(torch.randn(1, 2, HIDDEN), output_final_state=True)
    heads, k, v = (state if isinstance(state, Tensor) else state.memory).shape[1:]
    with lasp.traffic() as ledger:
        y, _ = mixer(torch.randn(1, 5, HIDDEN, requires_grad=True), position_ids=torch.arange(5)[None], group=group)
        y.sum().backward()
    states = {"forward": k * v + TRANSFERS.get(name, lambda k: 0)(k), "backward": k * v}
    channels = 0 if mixer.short_conv is None else mixer.short_conv.weight.shape[0]
    memories = (
        5 if name == "mom" else 0
    )  # whose convolutions each have a state of three tokens: no halo of keys, values
    channels -= 2 * memories * HIDDEN
    neighbours = {"forward": group.rank > 0, "backward": group.rank < 3}
    for phase in ("forward", "backward"):
        # A row for LightNet's running sum, two fp64 numbers for mLSTM's maximum, which has no way back; three tokens of
        # halo from, and then for, the next rank.
        rows = {"lightnet": k, "mlstm": 4 if phase == "forward" else 0}.get(name, 0)
        gathered = sum(record.bytes for record in ledger.of(phase) if record.op == "all_gather")
        halo = sum(record.bytes for record in ledger.of(phase) if record.op == "all_to_all")
        seen = memories * (3 * 2 * HIDDEN + (9 if phase == "forward" else 0))
        assert gathered == 4 * 3 * (heads * (states[phase] + rows) + seen), "TRANSFERS says how much of A travels"
        assert halo == 4 * 3 * channels * neighbours[phase]
