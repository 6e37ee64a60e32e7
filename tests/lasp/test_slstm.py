"""sLSTM's scalar memory: token by token, not stabilised, and passed from rank to rank."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lasp.functional import slstm
from tests.ranks import CUTS, DOCUMENTS, assert_same, cut_results, results

HEADS, DIM = 2, 3


def literal(*, gates: Tensor, recurrent: Tensor, before: Tensor, bounds: tuple[int, ...] | None = None) -> Any:
    """before [documents, H, D, 3]: h, c and n."""
    outputs, finals = [], []
    for n, (start, stop) in enumerate(pairwise([0, gates.shape[1]] if bounds is None else bounds)):
        h, c, total = (before if bounds is None else before[n : n + 1]).unbind(-1)
        for t in range(start, stop):
            z, i, f, o = (gates[:, t] + torch.einsum("bhd,ghde->bghe", h, recurrent)).unbind(1)
            c = f.sigmoid() * c + i.exp() * z.tanh()
            total = f.sigmoid() * total + i.exp()
            h = o.sigmoid() * c / total
            outputs.append(h)
        finals.append(torch.stack([h, c, total], -1))
    return torch.stack(outputs, 1), torch.cat(finals)


def passed(*, before: Tensor, **given: Any) -> Any:
    state = torch.cat([before, torch.zeros_like(before[..., :1])], -1)
    output, final = slstm(**given, initial_state=state, output_final_state=True, chunk_size=4)
    h, c, n, m = final.unbind(-1)
    return output, torch.stack([h, c * m.detach().exp(), n * m.detach().exp()], -1)


@cache
def case(packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    batch, documents = (1, len(DOCUMENTS) - 1) if packed else (3, 3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    tokens = {"gates": normal(batch, 37, 4, HEADS, DIM)}
    fixed = {"recurrent": normal(4, HEADS, DIM, DIM) / 2, "before": normal(documents, HEADS, DIM, 3)}
    fixed["before"][..., 2] = fixed["before"][..., 2].exp()
    grad = normal(batch, 37, HEADS, DIM)
    return tokens, fixed, grad, results(literal, tokens, fixed, grad, **({"bounds": DOCUMENTS} if packed else {}))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_token_by_token(cut: str, packed: bool) -> None:
    tokens, fixed, grad, wanted = case(packed)
    assert_same(cut_results(passed, tokens, fixed, grad, CUTS[cut], DOCUMENTS if packed else None), wanted)


def test_gates_of_any_size() -> None:
    """From e^-300 to e^300, a first token of e^-300 among them."""
    gates, recurrent = torch.randn(1, 20, 4, HEADS, DIM), torch.zeros(4, HEADS, DIM, DIM)
    gates[:, :, 1] *= 100
    gates[:, 0, 1] = -300
    wanted, _ = literal(
        gates=gates.double(), recurrent=recurrent.double(), before=torch.zeros(1, HEADS, DIM, 3).double()
    )
    torch.testing.assert_close(slstm(gates, recurrent).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"gates": torch.ones(1, 5, 3, HEADS, DIM)}, r"\[B, T, 4, H, D\], got torch.float32 \[1, 5, 3, 2, 3\]"),
        ({"recurrent": torch.ones(4, HEADS, DIM, 1)}, r"\[4, 2, 3, 3\], got \[4, 2, 3, 1\]"),
        ({"initial_state": torch.ones(1, HEADS, DIM, 3)}, r"\[1, 2, 3, 4\], got"),
    ],
)
def test_mistakes_are_value_errors(wrong: dict[str, Tensor], words: str) -> None:
    good = {"gates": torch.ones(1, 5, 4, HEADS, DIM), "recurrent": torch.ones(4, HEADS, DIM, DIM)}
    with pytest.raises(ValueError, match=words):
        slstm(**{**good, **wrong})
