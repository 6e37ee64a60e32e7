"""Tensor parallelism in one process: the parts of a block add up to the whole, output and gradients."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from lasp.layers import MIXERS
from lasp.models import LinearLlamaConfig
from lasp.models.blocks import Block
from lasp.models.tensor_parallel import check_heads, cut_parameters, parameters_of, share_of, take_heads

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("mixer", sorted(MIXERS.keys() - {"mamba"}))
def test_the_parts_of_a_block_add_up_to_it(mixer):
    torch.manual_seed(0)
    config = LinearLlamaConfig(vocab_size=8, num_hidden_layers=1, mixer=mixer, pattern=[mixer], **SIZES)
    block, part = Block(config, 0).double(), Block(share_of(config, 2), 0)
    for name in ("mixer", "mlp"):
        whole = getattr(block, name)
        parts = [deepcopy(whole) for _ in range(2)]
        x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
        expected = output(whole, x)
        found = sum(run_part(own, getattr(part, name), x, rank) for rank, own in enumerate(parts))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        weight = torch.randn_like(expected)
        expected.backward(weight)
        gradient, x.grad = x.grad, None
        found.backward(weight)
        torch.testing.assert_close(x.grad, gradient, rtol=1e-10, atol=1e-12)
        for (path, parameter), *own in zip(whole.named_parameters(), *(p.parameters() for p in parts), strict=True):
            cut = [dim for dim in range(parameter.dim()) if own[0].shape[dim] != parameter.shape[dim]]
            grads = [p.grad for p in own]
            together = torch.cat(grads, cut[0]) if cut else sum(grads)
            torch.testing.assert_close(together, parameter.grad, rtol=1e-10, atol=1e-12, msg=path)


def run_part(module: nn.Module, part: nn.Module, x: torch.Tensor, rank: int) -> torch.Tensor:
    places = list(cut_parameters(module, part, rank, 2))
    for place in places:
        if place.dim is not None and place.index is None:
            own = getattr(place.owner, place.name).detach().chunk(2, place.dim)[rank]
            place.owner.register_parameter(place.name, nn.Parameter(own.clone()))
    take_heads(module, rank, 2)
    with parameters_of(places, lambda whole: whole):
        return output(module, x)


def output(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = module(x)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_key_value_heads": 2}, "tp = 4 does not divide the model's num_key_value_heads = 2"),
        ({"num_attention_heads": 6, "head_dim": 8}, "num_attention_heads = 6 and num_key_value_heads = 6"),
        ({"intermediate_size": 30}, "intermediate_size = 30"),
        ({"mixer": "mamba"}, "channels of mamba"),
        ({"mixer": "mom", "mixer_options": {"mom": {"balance": 0.01}}}, "balance loss of mom"),
    ],
)
def test_what_ranks_cannot_share_is_refused(fields, said):
    config = LinearLlamaConfig(
        **{"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, **fields}
    )
    with pytest.raises(ValueError, match=said):
        check_heads(config, 4)
