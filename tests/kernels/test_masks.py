"""The decays between the tokens of a chunk: exact, for every length, however many blocks are made at once."""

from __future__ import annotations

import pytest
import torch

from lasp.kernels.portable.masks import TOGETHER, DecayMasks


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 37, 64])
@pytest.mark.parametrize(("blocks", "matrices"), [(1, 3), (8, 3), (3, 2), (2, TOGETHER + 1)])
def test_every_block_has_its_own(blocks: int, matrices: int, length: int) -> None:
    rng = torch.Generator().manual_seed(0)
    log_decay = -torch.rand(length, blocks * matrices, dtype=torch.float64, generator=rng).T  # as heads lie: strided
    sums = log_decay.cumsum(-1)
    expected = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).exp().tril().split(matrices)
    masks = DecayMasks(log_decay, matrices)
    for index in [*range(blocks), *reversed(range(blocks))]:
        torch.testing.assert_close(masks(index), expected[index], rtol=1e-13, atol=0)


def test_what_is_far_from_zero_keeps_its_digits() -> None:
    """A running sum near -3000 has steps of 2e-4 in fp32, and a small decay behind it would be lost in them."""
    log_decay = torch.full((1, 64), -100.0)
    log_decay[0, 40] = -1e-3
    made = DecayMasks(log_decay, 1)(0)
    assert made[0, 40, 39].item() == pytest.approx(0.99900049983, rel=1e-7)
    assert made[0, 41, 39].item() == pytest.approx(3.7164e-44, abs=1e-30)
    assert torch.equal(made[0].diagonal(), torch.ones(64))
    assert made.triu(1).count_nonzero() == 0
