"""The delta rule with several memories: each by itself, token by token over what it is sent; and its router."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize, one_hot

import lasp
from lasp.functional import routed_delta_rule
from lasp.functional.memories import Routed, routed_conv1d
from lasp.kernels import reference
from lasp.kernels.gathered import counts_of
from lasp.launch.threads import run
from lasp.layers import MixtureOfMemories
from lasp.parallel.balance import router_balance
from lasp.parallel.call import ALONE
from lasp.parallel.work import work
from tests.ranks import CUTS, DOCUMENTS, assert_same, cut_results, results

MEMORIES, HEADS, KEYS, VALUES = 4, 2, 6, 5


@cache
def case(packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Two of three memories to a token, and none of them ever the fourth; what comes of it token by token."""
    rng = torch.Generator().manual_seed(0)
    batch, documents = (1, len(DOCUMENTS) - 1) if packed else (2, 2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    of_both = batch, 37, 2, HEADS
    tokens = {
        "q": normal(batch, 37, 2 * HEADS, KEYS),
        "k": normalize(normal(*of_both, KEYS), dim=-1),
        "v": normal(*of_both, VALUES),
        "beta": 2 * normal(*of_both).sigmoid(),
        "log_decay": -normal(*of_both).abs(),
        "memories": normal(batch, 37, 3).argsort(-1)[..., :2],
    }
    fixed = {"initial_state": normal(documents, MEMORIES * HEADS, KEYS, VALUES)}
    grad = normal(batch, 37, 2, 2 * HEADS, VALUES)
    options = {"num_memories": MEMORIES, "cu_seqlens": DOCUMENTS if packed else None}
    return tokens, fixed, grad, results(reference.routed_delta_rule, tokens, fixed, grad, **options)


def routed(**given: Any) -> Any:
    return routed_delta_rule(**given, num_memories=MEMORIES, output_final_state=True, chunk_size=4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_every_memory_by_itself(cut: str, packed: bool) -> None:
    tokens, fixed, grad, wanted = case(packed)
    assert_same(cut_results(routed, tokens, fixed, grad, CUTS[cut], DOCUMENTS if packed else None), wanted)


def test_all_memories_as_heads_are_the_same() -> None:
    tokens, fixed, grad, wanted = case(False)
    assert_same(results(lambda **given: routed(**given, scan="heads"), tokens, fixed, grad), wanted)
    on_meta = {name: x.to("meta") for name, x in {**tokens, **fixed}.items()}
    assert [x.shape for x in routed(**on_meta)] == [x.shape for x in routed(**tokens, **fixed)]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"memories": torch.zeros(2, 37, 2, dtype=torch.int64)}, "different memories below 4"),
        ({"memories": torch.tensor([0, 4]).expand(2, 37, 2)}, "different memories below 4"),
        ({"memories": torch.zeros(2, 37, 1)}, "int64"),
        ({"initial_state": torch.zeros(2, 4, KEYS, VALUES)}, "4 x 2 heads"),
        ({"k": torch.ones(2, 37, HEADS, KEYS)}, "n, H"),
        ({"q": torch.ones(2, 37, 3, KEYS, dtype=torch.float64)}, "divide its heads"),
    ],
)
def test_mistakes_are_value_errors(wrong: dict[str, Tensor], words: str) -> None:
    tokens, fixed, *_ = case(False)
    with pytest.raises(ValueError, match=words):
        routed(**{**tokens, **fixed, **wrong})


def convolution(
    *, x: Tensor, weight: Tensor, memories: Tensor, initial_state: Tensor, bounds: tuple[int, ...] | None = None
) -> Any:
    """Tap by tap over the tokens of each memory."""
    output, states = torch.zeros_like(x), []
    spans = (
        [(row, 0, x.shape[1]) for row in range(len(x))] if bounds is None else [(0, *span) for span in pairwise(bounds)]
    )
    for document, (row, start, stop) in enumerate(spans):
        ends = []
        for memory, taps in enumerate(weight):
            at, choice = (memories[row, start:stop] == memory).nonzero().unbind(1)
            seen = torch.cat([initial_state[document, memory], x[row, start + at, choice]])
            for place, (token, chosen) in enumerate(zip(at, choice, strict=True)):
                read = (seen[place : place + 3] * taps.T).sum(0)
                output = output.index_put((torch.tensor(row), start + token, chosen), read)
            ends.append(seen[len(seen) - 2 :])
        states.append(torch.stack(ends))
    return output, torch.stack(states)


@cache
def convolved(packed: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(2)
    (tokens, *_), batch = case(packed), 1 if packed else 2
    documents = len(DOCUMENTS) - 1 if packed else 2
    x = torch.randn(batch, 37, 2, 3, generator=rng, dtype=torch.float64)
    fixed = {
        "weight": torch.randn(MEMORIES, 3, 3, generator=rng, dtype=torch.float64),
        "initial_state": torch.randn(documents, MEMORIES, 2, 3, generator=rng, dtype=torch.float64),
    }
    own = {"x": x, "memories": tokens["memories"]}
    return own, fixed, x.cos(), results(convolution, own, fixed, x.cos(), bounds=DOCUMENTS if packed else None)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_a_memory_convolves_its_own_tokens(cut: str, packed: bool) -> None:
    tokens, fixed, grad, wanted = convolved(packed)

    def found(x: Tensor, memories: Tensor, **given: Any) -> Any:
        return routed_conv1d(Routed(x, memories), **given, output_final_state=True)

    assert_same(cut_results(found, tokens, fixed, grad, CUTS[cut], DOCUMENTS if packed else None), wanted)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"x": torch.ones(2, 37, 3)}, r"\[B, T, n, C\]"),
        ({"weight": torch.ones(MEMORIES, 3, 1)}, "at least two taps"),
        ({"weight": torch.ones(MEMORIES, 4, 3)}, r"x \[2, 37, 2, 3\] on cpu, weight \[4, 4, 3\]"),
        ({"weight": None}, "weight must be a tensor"),
        ({"memories": torch.zeros(2, 37, 2, dtype=torch.int64)}, "different memories below 4"),
        ({"memories": torch.zeros(2, 36, 2, dtype=torch.int64)}, r"\[2, 37, 2\], got torch.int64 \[2, 36, 2\]"),
        ({"mask": torch.ones(2, 37)}, r"bool \[2, 37\], got torch.float32"),
        ({"initial_state": torch.ones(2, MEMORIES, 3, 3)}, r"initial_state must be \[2, 4, 2, 3\]"),
    ],
)
def test_every_rank_is_told_what_one_may_not_convolve(wrong: dict[str, Any], words: str) -> None:
    tokens, fixed, *_ = convolved(False)

    def rank(group: lasp.SequenceGroup) -> str:
        given = {**tokens, **fixed} | (wrong if group.rank else {})
        sent = Routed(given.pop("x"), given.pop("memories"), given.pop("mask", None))
        with pytest.raises(ValueError, match=words) as told:
            routed_conv1d(sent, **given, group=group)
        return str(told.value)

    first, second = run(2, rank, checks=True)
    assert first == second


def test_what_a_token_meets_is_known_where_weights_are_away() -> None:
    """As under zero3, between the forward passes of modules."""
    mixer = MixtureOfMemories(16, 2)
    expected = mixer.weights_met()
    for parameter in mixer.parameters():
        parameter.data = torch.empty(0)
    assert mixer.weights_met() == expected


def test_without_values_every_memory_has_as_many_rows() -> None:
    """On meta and of fake tensors: as many rows in all, and what ranks exchange."""
    assert counts_of(torch.empty(10, device="meta", dtype=torch.int64), 4) == [2, 3, 2, 3]
    mixer = MixtureOfMemories(16, 2)
    x = torch.randn(2, 37, 16)

    def seen(mixer: Any, x: Tensor) -> tuple[Any, float]:
        with work() as counted:
            y, state = mixer(x.requires_grad_(), output_final_state=True)
            y.sum().backward()
        return [(t.shape, t.dtype) for t in (y, *state, x.grad)], counted.flops

    with_values = seen(mixer, x)
    assert seen(deepcopy(mixer).to("meta"), x.detach().to("meta")) == with_values
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert seen(MixtureOfMemories(16, 2), torch.randn(2, 37, 16)) == with_values


def test_what_is_masked_no_memory_convolves() -> None:
    tokens, fixed, *_ = convolved(False)
    mask = torch.arange(37) % 3 > 0
    shown = {name: x[:, mask] for name, x in tokens.items()}
    wanted, last = routed_conv1d(Routed(**shown), **fixed, output_final_state=True)
    found, after = routed_conv1d(Routed(**tokens, mask=mask.expand(2, 37)), **fixed, output_final_state=True)
    assert torch.equal(found[:, mask], wanted)
    assert torch.equal(after, last)
    assert not found[:, ~mask].any()


def dense(mixer: MixtureOfMemories) -> MixtureOfMemories:
    """The same with keys and values of all memories, and these as heads, for every token (docs/mixers.md)."""
    made = deepcopy(mixer)
    made.scan = "heads"
    for projection in (made.k_proj, made.v_proj):
        projection.register_forward_hook(lambda *_: None)
    return made


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_layer_is_its_dense_form(top_k: int) -> None:
    torch.manual_seed(0)
    mixer = MixtureOfMemories(24, 4, top_k=top_k).double()
    x = torch.randn(2, 37, 24, dtype=torch.float64, requires_grad=True)
    found, wanted = (
        [y, *torch.autograd.grad(y.cos().sum(), [x, *layer.parameters()])]
        for layer, (y, _) in ((layer, layer(x)) for layer in (mixer, dense(mixer)))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def router_gradients(x: Tensor, balance: float, lengths: tuple[int, ...]) -> Tensor:
    """What the router of a layer gets from the sum of its output, over ranks that hold so many tokens of x each."""

    torch.manual_seed(0)
    whole = MixtureOfMemories(16, 2, balance=balance).double()

    def rank(group: lasp.SequenceGroup) -> Tensor:
        mixer, start = deepcopy(whole), sum(lengths[: group.rank])
        y, _ = mixer(x[:, start : start + lengths[group.rank]], cut=lasp.Cut(group, lengths))
        return torch.autograd.grad(y.sum(), mixer.router.weight)[0]

    return torch.stack(run(len(lengths), rank)).sum(0)


@pytest.mark.parametrize("lengths", [(11,), (2, 0, 6, 3)])
def test_the_routers_balance_is_that_of_the_whole_sequence(lengths: tuple[int, ...]) -> None:
    x = torch.randn(2, 11, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = router_gradients(x, 0.5, lengths) - router_gradients(x, 0.0, lengths)
    torch.manual_seed(0)
    weight = MixtureOfMemories(16, 2).double().router.weight
    scores = (x @ weight.T).softmax(-1)
    share = one_hot(scores.topk(2).indices, 4).sum(2).double().mean((0, 1))
    (wanted,) = torch.autograd.grad(0.5 * 4 * (share * scores.mean((0, 1))).sum(), weight)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_padding_does_not_count_in_the_balance() -> None:
    scores = torch.rand(2, 7, 4, dtype=torch.float64).softmax(-1)
    chosen, mask = scores.topk(2).indices, torch.arange(7) < 5
    alone, padded = (
        router_balance(ALONE, *parts) for parts in ((scores[:, :5], chosen[:, :5]), (scores, chosen, mask.expand(2, 7)))
    )
    torch.testing.assert_close(padded, alone)
    even = torch.full((1, 4, 4), 0.25), torch.arange(4).view(1, 4, 1)
    assert router_balance(ALONE, *even).item() == pytest.approx(1)
