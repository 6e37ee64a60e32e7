"""The running log-sum-exp on one device, against the token-by-token reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lasp.functional import logcumsumexp
from tests.convolution import largest_error
from tests.running_sums import make_sums, solve_sums

DOCUMENTS = (0, 1, 10, 10, 21, 22, 36, 37, 37)
run = partial(logcumsumexp, output_final_state=True)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["", "packed"])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_parity(exclusive: bool, initial: bool, cu_seqlens: tuple[int, ...] | None, spread: float) -> None:
    problem = make_sums(exclusive=exclusive, initial=initial, cu_seqlens=cu_seqlens, spread=spread)
    assert largest_error(solve_sums(problem, run), solve_sums(problem)) < 1e-10


def test_tokens_of_nothing_change_nothing() -> None:
    problem = make_sums(initial=False)
    hidden = torch.arange(37) % 5 < 2  # the first two among them
    x = problem.x.clone()
    x[:, hidden] = -torch.inf
    x.requires_grad_()
    z, final = run(x)
    assert z[:, :2].isneginf().all()
    alone = problem.x[:, ~hidden].requires_grad_()
    expected, expected_final = run(alone)
    torch.testing.assert_close(z[:, ~hidden], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, expected_final, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(z[:, ~hidden].square().sum() + final.sum(), x)
    (grad_alone,) = torch.autograd.grad(expected.square().sum() + expected_final.sum(), alone)
    torch.testing.assert_close(grad[:, ~hidden], grad_alone, rtol=1e-12, atol=1e-12)
    assert (grad[:, hidden] == 0).all()


def test_no_tokens_and_bfloat16() -> None:
    state = torch.randn(2, 3)
    z, final = run(torch.empty(2, 0, 3), initial_state=state)
    assert z.shape == (2, 0, 3)
    assert torch.equal(final, state)
    assert logcumsumexp(torch.zeros(1, 4, 3, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(3)}, "x must be floating \\[batch, tokens, ...\\], got torch.float32 \\[3\\]"),
        ({"x": torch.zeros(1, 3, 2).long()}, "got torch.int64"),
        ({"initial_state": torch.zeros(2, 3)}, "\\[B, ...\\] = \\[1, 2\\], got \\[2, 3\\]"),
        ({"cu_seqlens": [0, 4]}, "must end at the whole sequence's length 3, got 4"),
        ({"cu_seqlens": [0, 3], "x": torch.zeros(2, 3, 2)}, "needs B = 1, got B = 2"),
    ],
)
def test_mistakes_are_value_errors(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        logcumsumexp(**{"x": torch.zeros(1, 3, 2), **change})
