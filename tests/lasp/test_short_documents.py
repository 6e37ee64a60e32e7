"""Many short documents on one device: batches of those of one length, with the results of one by one."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch

import lasp
from lasp.functional.delta import delta_product
from lasp.functional.documents import ShortDocuments
from tests.oracle import DECAYS, assert_close, make_problem, solve

CHUNK = 8
LENGTHS = {
    "one length": [4] * 9,
    "several": [1, 3, 1, 3, 3, 1, 8, 8, 2, 2],
    "empty ones": [0, 2, 2, 0, 0, 5, 5, 0],
    "long ones between": [20, 2, 2, 9, 2, 8, 8, 17, 2],
}


def bounds_of(lengths: list[int]) -> tuple[int, ...]:
    return (0, *accumulate(lengths))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("decay", [*DECAYS, "unmasked"])
def test_linear_attention(decay: str, lengths: list[int]) -> None:
    masked = decay != "unmasked"
    problem = make_problem(decay if masked else "none", sum(lengths), cu_seqlens=bounds_of(lengths), causal=masked)
    run = partial(lasp.linear_attention, output_final_state=True, chunk_size=CHUNK)
    assert ShortDocuments.of(bounds_of(lengths), CHUNK) is not None
    assert_close(solve(problem, run), solve(problem), problem, 1e-12)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("decay", ["none", "token", "channel"])
def test_delta_rule(decay: str, lengths: list[int]) -> None:
    problem = make_problem(decay, sum(lengths), cu_seqlens=bounds_of(lengths), beta=1.5)
    run = partial(lasp.delta_rule, output_final_state=True, chunk_size=CHUNK)
    assert_close(solve(problem, run), solve(problem), problem, 1e-11)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_delta_product(lengths: list[int]) -> None:
    torch.manual_seed(0)
    tokens, bounds = sum(lengths), bounds_of(lengths)
    k = torch.nn.functional.normalize(torch.randn(1, tokens, 2, 2, 4, dtype=torch.float64), dim=-1)
    q, v = torch.randn(1, tokens, 2, 4, dtype=torch.float64), torch.randn_like(k)
    beta, state = torch.rand(1, tokens, 2, 2, dtype=torch.float64), torch.randn(len(lengths), 2, 4, 4).double()
    run = partial(delta_product, chunk_size=CHUNK, output_final_state=True)
    output, final = run(q, k, v, beta, initial_state=state, cu_seqlens=bounds)
    for n, (start, stop) in enumerate(pairwise(bounds)):
        own = (x[:, start:stop] for x in (q, k, v, beta))
        expected = run(*own, initial_state=state[n : n + 1])
        torch.testing.assert_close((output[:, start:stop], final[n : n + 1]), expected, rtol=0, atol=1e-12)


def test_few_documents_of_one_length_stay_as_they_are() -> None:
    assert ShortDocuments.of(bounds_of([1, 2, 3, 4]), CHUNK) is None
    assert ShortDocuments.of(bounds_of([4, 30, 50]), CHUNK) is None
    assert ShortDocuments.of(bounds_of([30] * 9), CHUNK) is None
    many = ShortDocuments.of(bounds_of([4, 30, 4, 4, 2, 2, 50]), CHUNK)
    assert many is not None
    assert many.groups == [[0, 2, 3], [4, 5], [1, 6]]


def test_a_thousand_documents_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = lasp.kernels.portable.recurrence.PortableRecurrence.forward
    monkeypatch.setattr(
        lasp.kernels.portable.recurrence.PortableRecurrence, "forward", lambda *args: calls.append(1) or forward(*args)
    )
    x = torch.randn(1, 4000, 2, 4)
    assert lasp.linear_attention(x, x, x, cu_seqlens=range(0, 4001, 4)).shape == x.shape
    assert len(calls) == 1
