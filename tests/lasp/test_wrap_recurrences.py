"""What models hand to recurrences and rounding made improper: gates a hair above 1."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.wrap.families.mamba import selective_scan
from lasp.wrap.families.mamba2 import chunk_scan
from lasp.wrap.families.xlstm import mlstm
from lasp.wrap.stand_ins import gated_delta_rule
from lasp.wrap.wiring import LayerCall, Wiring

CALL = LayerCall(Wiring(None, "auto", "auto", "eager"), None, None)
ROUNDED = 4e-15  # as large as the running maximum of an mLSTM makes a log decay that should be 0


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def delta(gate: float) -> Tensor:
    q, k, v = random(3, 1, 9, 2, 4).softmax(-1)
    return gated_delta_rule(CALL, q, k, v, torch.full((1, 9, 2), gate), random(1, 9, 2).sigmoid())[0]


def mamba2(gate: float) -> Tensor:
    x, b, c = random(3, 1, 9, 2, 4)
    return chunk_scan(CALL, x, torch.ones(1, 9, 2), torch.full((2,), gate), b, c, 4)


def mamba(gate: float) -> Tensor:
    u, b, c = random(3, 1, 4, 9)
    return selective_scan(CALL, u, torch.ones(1, 4, 9), torch.full((4, 4), gate), b, c)


@pytest.mark.parametrize("recurrence", [delta, mamba2, mamba])
def test_a_gate_rounded_above_one_counts_as_one(recurrence: Callable[[float], Tensor]) -> None:
    with pytest.raises(ValueError, match="log_decay must be <= 0"):
        lasp.linear_attention(*random(3, 1, 9, 2, 4), torch.full((2,), ROUNDED))
    assert torch.equal(recurrence(ROUNDED), recurrence(0.0))


def test_the_gates_of_an_mlstm_are_clamped() -> None:
    """Input gates that fall as fast as the state decays: the running maximum is the decayed first one throughout."""
    tokens = 400
    forget = torch.linspace(-3, 3, tokens, dtype=torch.float64).expand(1, 2, tokens)
    enter = 5 + torch.zeros_like(forget).cumsum(-1) - 20 * (torch.arange(tokens) > 0)
    total = torch.nn.functional.logsigmoid(forget).cumsum(-1)
    highest = total + (enter - total).cummax(-1).values.clamp(min=0)
    kept = torch.nn.functional.logsigmoid(forget)[..., 1:] + highest[..., :-1] - highest[..., 1:]
    assert kept.max() > 0  # or the test would show nothing
    module: Any = SimpleNamespace(config=SimpleNamespace(eps=1e-6))
    output, _ = mlstm(CALL, module, *random(3, 1, 2, tokens, 4), enter, forget)
    assert output.isfinite().all()
