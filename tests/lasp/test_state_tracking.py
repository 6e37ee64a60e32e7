"""What a recurrence can count depends on its eigenvalues: parity needs a -1 (arXiv 2411.12537)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lasp.layers import DeltaNet

WIDTH, STEPS, TEXTS = 32, 300, 64


class Counter(nn.Module):
    """One layer of DeltaNet between an embedding of bits and a small head."""

    def __init__(self, allow_neg_eigval: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, WIDTH)
        self.mixer = DeltaNet(WIDTH, 4, allow_neg_eigval=allow_neg_eigval)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2))

    def forward(self, bits: Tensor) -> Tensor:
        return self.head(self.mixer(self.embedding(bits))[0])


def train(model: nn.Module, rng: torch.Generator) -> None:
    """Texts grow from 4 to 64 bits over the first half."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, STEPS)
    for step in range(STEPS):
        bits = torch.randint(0, 2, (TEXTS, min(64, 4 + step * 60 // (STEPS // 2))), generator=rng)
        loss = F.cross_entropy(model(bits).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, length: int, rng: torch.Generator) -> float:
    bits = torch.randint(0, 2, (TEXTS, length), generator=rng)
    return (model(bits).argmax(-1) == bits.cumsum(1) % 2).double().mean().item()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("allow_neg_eigval", [True, False])
def test_parity_takes_negative_eigenvalues(allow_neg_eigval: bool) -> None:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    model = Counter(allow_neg_eigval)
    train(model, rng)
    learnt, longer = accuracy(model, 64, rng), accuracy(model, 256, rng)
    if allow_neg_eigval:
        assert learnt > 0.999
        assert longer > 0.98
    else:  # the coin's half, and a little for the first few bits
        assert learnt < 0.7
        assert longer < 0.6
