"""Every mixer with the sequence cut over simulated ranks: outputs, final states and all gradients are those of one
device. tests/distributed/test_mixers.py has models of them on real ranks."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lasp
from lasp.launch.threads import run
from lasp.layers import MIXERS, Mixer, SoftmaxAttention, mixer_class
from lasp.layers.hgrn2 import rising_bounds
from tests.ranks import assert_same

LENGTH, HIDDEN, HEADS = 35, 16, 2
# Documents of one token, none, on a border of ranks, over three ranks; the third rank's tokens are all of one.
DOCUMENTS = torch.tensor([0, 1, 9, 9, 30, 35])
# The first rank of four holds nothing but padding; some is inside the text, and some after it.
PADDED = torch.tensor([[0] * 11 + [1] * 6 + [0] * 3 + [1] * 11 + [0] * 4]).bool()
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MIXERS} | {
    "gla, narrow keys": ("gla", {"expand_k": 0.5}),
    "hgrn2, learned bounds": ("hgrn2", {"learned_bounds": True}),
    "mom, balance": ("mom", {"balance": 0.1}),
}
QUICK = [(1, "zigzag", "packed"), (2, "contiguous", "plain"), (2, "zigzag", "packed"), (4, "contiguous", "plain"),
         (4, "contiguous", "packed"), (4, "zigzag", "packed")]  # fmt: skip
EVERY = [
    (size, layout, kind) for size in (1, 2, 4) for layout in ("contiguous", "zigzag") for kind in ("plain", "packed")
]


class Problem(NamedTuple):
    """bound: the lower bound of a mixer that is told one."""

    mixer: Mixer
    x: Tensor
    grad: Tensor
    bound: Tensor | None


@cache
def problem(variant: str) -> Problem:
    torch.manual_seed(0)
    name, options = VARIANTS[variant]
    mixer = mixer_class(name)(HIDDEN, HEADS, layer_idx=1, num_layers=2, **options).double()
    x, grad = torch.randn(2, 1, LENGTH, HIDDEN, dtype=torch.float64).unbind()
    bounds = rising_bounds(torch.randn(3, HIDDEN, dtype=torch.float64))
    return Problem(mixer, x, grad, bounds[1] if options.get("learned_bounds") else None)


def solve(given: Problem, kind: str, group: lasp.SequenceGroup | None) -> dict[str, Tensor]:
    """Output, final states where there may be some, and the gradients of the input and of every parameter."""
    mixer, x, grad, bound = copy.deepcopy(given)
    positions, mask = torch.arange(LENGTH).unsqueeze(0), PADDED if kind == "padded" else None
    if mask is not None:
        grad = grad * mask[..., None]
    if group is not None:
        x, grad, positions = (lasp.shard(part, group) for part in (x, grad, positions))
        mask = None if mask is None else lasp.shard(mask, group)
    told = {} if bound is None else {"lower_bound": bound.requires_grad_()}
    y, state = mixer(
        x.requires_grad_(),
        position_ids=positions,
        attention_mask=mask,
        cu_seqlens=DOCUMENTS if kind == "packed" else None,
        output_final_state=not isinstance(mixer, SoftmaxAttention),
        group=group,
        **told,
    )
    y.backward(grad)
    found = {"output": y, "input": x.grad}
    if group is not None:
        lasp.sync_gradients(mixer, group)
        found = {name: lasp.unshard(part.detach(), group) for name, part in found.items()}
    if mask is not None:  # what comes of padding is nobody's
        found["output"] = found["output"] * PADDED[..., None]
    found |= {f"state {i}": part for i, part in enumerate(tree_leaves(state)) if part is not None}
    found |= {name: parameter.grad for name, parameter in [*mixer.named_parameters(), *told.items()]}
    return {name: value.detach() for name, value in found.items()}


def compare(variant: str, cuts: list[tuple[int, Any, str]]) -> None:
    for size, layout, kind in cuts:
        wanted = alone(variant, kind)
        parts = run(size, partial(solve, problem(variant), kind), layout)
        bounds = [part.pop("lower_bound") for part in parts if "lower_bound" in part]
        for part in parts:
            assert_same(part | ({"lower_bound": sum(bounds)} if bounds else {}), wanted)


@cache
def alone(variant: str, kind: str) -> dict[str, Tensor]:
    return solve(problem(variant), kind, None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_is_what_it_is_on_one_device(variant: str) -> None:
    compare(variant, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_over_any_ranks_is_what_it_is_on_one_device(variant: str) -> None:
    compare(variant, [cut for cut in EVERY if cut not in QUICK])


@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if mixer.conv_size is None])
def test_padding_passes_states_through_ranks(name: str) -> None:
    compare(name, [(4, "contiguous", "padded"), (4, "zigzag", "padded")])
