"""What mixers compute is counted by formula, forward and once, whatever carries it out."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lasp
from lasp.kernels.softmax.mask import Mask
from lasp.parallel.work import seen_keys, work


@pytest.mark.parametrize(
    "mask",
    [
        Mask((0, 7)),
        Mask((0, 3, 4, 10)),
        Mask((0, 7), causal=False),
        Mask((0, 9, 11), window=3),
        Mask((0, 4), window=9),
    ],
    ids=["causal", "documents", "without-mask", "window", "wide-window"],
)
def test_seen_keys_are_those_that_the_mask_shows(mask):
    assert seen_keys(mask) == sum(mask.visible(query).length for query in range(mask.bounds[-1]))


def test_mixers_are_counted_forward_and_once():
    q, k, v = (torch.randn(2, 12, 4, dim, requires_grad=True) for dim in (8, 8, 16))
    rate = torch.full((2, 12, 4), 0.1)
    key = k / k.norm(dim=-1, keepdim=True)
    with work() as linear:
        lasp.linear_attention(q, k, v).sum().backward()
    with work() as again:
        checkpoint(lasp.linear_attention, q, k, v, use_reentrant=False).sum().backward()
    with work() as delta:
        lasp.delta_rule(q, key, v, rate, -rate).sum().backward()
    with work() as softmax:
        lasp.softmax_attention(q, k, v).sum().backward()
    states = 2 * 12 * 4 * 8 * 16
    assert linear.flops == again.flops == 4 * states
    assert delta.flops == 6 * states
    assert softmax.flops == 2 * 4 * 2 * (8 + 16) * 12 * 13 / 2
