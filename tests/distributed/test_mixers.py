"""Every mixer, as a layer and in a model, with the sequence cut over ranks: what it is on one device."""

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
# The first rank of four holds nothing but padding; some is inside the text, and some after it.
PADDED = torch.tensor([[0] * 11 + [1] * 6 + [0] * 3 + [1] * 11 + [0] * 4]).bool()
Results = dict[str, Tensor]


def layer_results(name: str, kind: str, group: lasp.SequenceGroup | None) -> Results:
    """Output, final state where there may be one, and the gradients of the input and of every parameter."""
    torch.manual_seed(0)
    mixer = mixer_class(name)(HIDDEN, HEADS, layer_idx=1, num_layers=2).double()
    x, grad = torch.randn(2, 1, LENGTH, HIDDEN, dtype=torch.float64).unbind()
    positions, mask = torch.arange(LENGTH).unsqueeze(0), PADDED if kind == "padded" else None
    if mask is not None:
        grad = grad * mask[..., None]
    if group is not None:
        x, grad, positions = (lasp.shard(part, group) for part in (x, grad, positions))
        mask = None if mask is None else lasp.shard(mask, group)
    x.requires_grad_()
    keeps_state = name != "softmax"
    y, state = mixer(
        x,
        position_ids=positions,
        attention_mask=mask,
        cu_seqlens=DOCUMENTS if kind == "packed" else None,
        output_final_state=keeps_state,
        group=group,
    )
    y.backward(grad)
    if group is not None:
        lasp.sync_gradients(mixer, group)
        y, dx = lasp.unshard(y.detach(), group), lasp.unshard(x.grad, group)
    else:
        dx = x.grad
    states = {"state": state} if isinstance(state, Tensor) else {f"state {i}": s for i, s in enumerate(state or ())}
    found = {"output": y, "input": dx} | states | {n: p.grad for n, p in mixer.named_parameters()}
    return {name: value.detach() for name, value in found.items()}


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


CUTS = [("contiguous", False), ("contiguous", True), ("zigzag", True)]


# Those of which two simulated ranks are tested beside their functions (tests/lasp).
SIMULATED = ("mamba", "mlstm", "rwkv7", "s4d", "slstm")
SIZES = [(name, size) for size in (2, 4) for name in MIXERS]


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[1] == 2 and case[0] in SIMULATED)) for case in SIZES],
)
@pytest.mark.parametrize(("layout", "packed"), CUTS)
def test_a_layer_is_what_it_is_on_one_device(group_of, expected, name, size, layout, packed) -> None:
    kind = "packed" if packed else "plain"
    wanted = expected(layer_results, name, kind)
    if (group := group_of(size, layout)) is not None:
        assert_same(layer_results(name, kind, group), wanted)


@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if mixer.conv_size is None])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_padding_passes_states_through_ranks(group_of, expected, name, layout) -> None:
    wanted = expected(layer_results, name, "padded")
    found = layer_results(name, "padded", group_of(4, layout))
    for results in (found, wanted):  # what comes of padding is nobody's
        results["output"] = results["output"] * PADDED[..., None]
    assert_same(found, wanted)


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
