"""Blockwise softmax attention on one device, against attention with all scores written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import lasp
from lasp.kernels.precision import compute_dtype
from lasp.kernels.softmax import blocks, mask
from lasp.kernels.softmax.blocks import BlockAttention, Keys, Queries, empty_attention, merge, merge_sinks
from lasp.kernels.softmax.cuda import aligned
from lasp.kernels.softmax.mask import Mask, Span, tiles
from lasp.kernels.softmax.operators import CpuFlash, Operator, Plain
from tests.attention import AttentionProblem, largest_error, make_attention, solve_attention

DOCUMENTS = (0, 1, 1, 9, 26, 27, 37)
MASKS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "documents": {"cu_seqlens": DOCUMENTS},
    "documents bidirectional": {"cu_seqlens": DOCUMENTS, "causal": False},
    "documents window": {"cu_seqlens": DOCUMENTS, "window": 4},
}
CUTS = {"whole": (0, 37), "pieces": (0, 1, 9, 20, 37)}
OPERATORS: dict[str, Callable[[float | None], Operator]] = {
    "flash": lambda softcap: CpuFlash() if softcap is None else Plain(softcap),
    "plain": lambda softcap: Plain(softcap, rows=3),
}


@pytest.fixture(params=[(512, 128), (4, 3)], ids=["one tile", "small tiles"])
def tile_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles larger and smaller than the problems of these tests."""
    for name, size in zip(("ROWS", "SHORT"), request.param, strict=True):
        monkeypatch.setattr(mask, name, size)
    tiles.cache_clear()
    yield
    tiles.cache_clear()


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    make = OPERATORS[request.param]
    monkeypatch.setattr(blocks, "softmax_operator", lambda k, v, masked, softcap: make(softcap))
    return request.param


def attend_in_blocks(problem: AttentionProblem, cuts: tuple[int, ...]) -> Tensor:
    """The output of blocks of queries over blocks of keys, last block of keys first."""
    return solve_in_blocks(problem, cuts)["output"]


def solve_in_blocks(problem: AttentionProblem, cuts: tuple[int, ...], backward: bool = False) -> dict[str, Tensor]:
    """The output, and all gradients where `backward` asks for them, of blocks of queries over blocks of keys: what the
    ranks of a ring compute, last block of keys first."""
    q, k, v = (problem.inputs[name] for name in "qkv")
    output, lse = empty_attention(q, v)
    attention = BlockAttention(mask_of(problem), q.shape[3] ** -0.5, problem.options.get("softcap"))
    spans = [Span(*pair) for pair in pairwise(cuts)]
    blocks = []
    for span in reversed(spans):
        part = slice(*span)
        shown = None if problem.key_mask is None else problem.key_mask[:, part]
        blocks.append(Keys(span, k[:, part], v[:, part], shown))
    queries = Queries(Span(0, q.shape[1]), q, output, lse)
    for rows in spans:
        for keys in blocks:
            attention.attend(queries.part(rows, rows.start), keys)
    if not backward:
        return {"output": output}
    output = output.to(v.dtype)
    queries = Queries(Span(0, q.shape[1]), q, output, lse)
    dq, dk, dv = (torch.zeros_like(x, dtype=compute_dtype(x)) for x in (q, k, v))
    for rows in spans:
        for keys in blocks:
            grads = dq[:, slice(*rows)], dk[:, slice(*keys.span)], dv[:, slice(*keys.span)]
            attention.gradients(queries.part(rows, rows.start), problem.grad[:, slice(*rows)], keys, grads)
    return {"output": output, "dq": dq.to(q.dtype), "dk": dk.to(k.dtype), "dv": dv.to(v.dtype)}


def mask_of(problem: AttentionProblem) -> Mask:
    options = problem.options
    bounds = tuple(options.get("cu_seqlens", (0, problem.inputs["q"].shape[1])))
    return Mask(bounds, options.get("causal", True), options.get("window"))


@pytest.mark.usefixtures("tile_sizes", "operator")
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("extra", [{}, {"key_mask": True, "softcap": 2.0}, {"key_mask": True, "dims": (4, 8)}], ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
def test_blocks(options: dict, extra: dict, cuts: tuple[int, ...]) -> None:
    problem = make_attention(**options, **extra)
    found = {"output": attend_in_blocks(problem, cuts)}
    assert largest_error(found, {"output": solve_attention(problem)["output"]}) < 1e-12


@pytest.mark.usefixtures("tile_sizes", "operator")
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("extra", [{}, {"sinks": True}, {"key_mask": True}, {"softcap": 2.0}], ids=str)
def test_gradients(options: dict, extra: dict) -> None:
    problem = make_attention(**options, **extra)
    assert largest_error(solve_attention(problem, lasp.softmax_attention), solve_attention(problem)) < 1e-12


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("heads", [(8, 2, 2), (4, 1, 1), (3, 3, 1), (2, 4, 1)])
@pytest.mark.parametrize("dims", [(6, 6), (3, 8), (8, 1)])
def test_heads_and_dims(heads: tuple[int, int, int], dims: tuple[int, int]) -> None:
    problem = make_attention(heads=heads, dims=dims)
    assert largest_error(solve_attention(problem, lasp.softmax_attention), solve_attention(problem)) < 1e-12


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("keys_hidden", [False, True])
def test_tiles_cover_what_is_seen(options: dict, cuts: tuple[int, ...], keys_hidden: bool) -> None:
    """Every pair that is seen lies in one tile, and tiles without a mask of their own hold nothing else."""
    rule = mask_of(make_attention(**options))
    covered = torch.zeros(37, 37, dtype=torch.int)
    seen = torch.tensor([[rule.visible(i).start <= j < rule.visible(i).stop for j in range(37)] for i in range(37)])
    for rows in pairwise(cuts):
        for keys in pairwise(cuts):
            for tile in tiles(rule, Span(*rows), Span(*keys), keys_hidden):
                block = (slice(*tile.rows), slice(*tile.keys))
                covered[block] += 1
                assert tile.kind != "full" or seen[block].all()
                assert tile.kind != "causal" or (tile.rows == tile.keys and not keys_hidden)
                assert tile.kind != "masked" or tile.rows.length <= mask.ROWS
            assert rule.shows(Span(*rows), Span(*keys)) == bool(seen[slice(*rows), slice(*keys)].any())
    assert (covered[seen] == 1).all()
    assert covered.max() == 1


def test_long_sequences_need_few_tiles_and_small_masks() -> None:
    """A sequence of 64Ki tokens: no mask for causal attention, narrow ones along the border of a window."""
    whole = Span(0, 65536)
    assert [tile.kind for tile in tiles(Mask(whole), whole, whole)] == ["causal"]
    assert [tile.kind for tile in tiles(Mask(whole, causal=False), whole, whole)] == ["full"]
    assert tiles(Mask(whole), Span(0, 4096), Span(4096, 8192)) == ()
    for rule in (Mask(whole, window=4096), Mask(whole, window=100), Mask((*range(0, 65536, 30), 65536))):
        found = tiles(rule, whole, whole)
        masked = [tile for tile in found if tile.kind == "masked"]
        assert all(tile.rows.length <= mask.ROWS and tile.keys.length <= 2 * mask.ROWS for tile in masked)
        assert len(found) <= 3 * whole.length / mask.ROWS + 1


@pytest.mark.parametrize(
    ("options", "rows", "keys", "kind"),
    [
        ({}, (0, 40), (0, 40), "causal"),
        ({"causal": False}, (0, 40), (0, 40), "full"),
        ({}, (20, 40), (0, 20), "full"),
        ({}, (20, 40), (0, 40), None),  # two tiles
        ({"bounds": (0, 7, 40)}, (0, 40), (0, 40), None),
        ({"window": 9}, (0, 40), (0, 40), None),
        ({}, (0, 20), (20, 40), None),  # nothing is seen
    ],
)
def test_what_is_one_tile_is_computed_at_once(options: dict, rows: tuple, keys: tuple, kind: str | None) -> None:
    attention = BlockAttention(Mask(**{"bounds": (0, 40)} | options), 1.0)
    k = torch.zeros(1, keys[1] - keys[0], 2, 4)
    found = attention.as_one(Span(*rows), Keys(Span(*keys), k, k))
    assert (None if found is None else found[1].causal) == {None: None, "causal": True, "full": False}[kind]
    hidden = torch.ones(k.shape[:2], dtype=torch.bool)
    assert attention.as_one(Span(*rows), Keys(Span(*keys), k, k, hidden)) is None


def test_rows_that_see_nothing() -> None:
    """Output 0, lse -inf, no NaN; a sink is then all that they see."""
    problem = make_attention(sinks=True)
    q, k, v = (problem.inputs[name].requires_grad_() for name in "qkv")
    hidden = torch.zeros(2, 37, dtype=torch.bool)
    for sinks in (None, problem.inputs["sinks"].requires_grad_()):
        output = lasp.softmax_attention(q, k, v, sinks=sinks, key_mask=hidden)
        assert (output == 0).all()
        for x in torch.autograd.grad(output, [x for x in (q, k, v, sinks) if x is not None], problem.grad):
            assert (x == 0).all()
    output, lse = empty_attention(q, v)
    merge(output, lse, output.clone(), lse.clone())
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    merge_sinks(output, lse, problem.inputs["sinks"].detach())
    assert (output == 0).all()
    torch.testing.assert_close(lse, problem.inputs["sinks"].detach().expand_as(lse))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"cu_seqlens": (0, 3, 37)}], ids=str)
def test_a_sink_that_takes_nothing(options: dict) -> None:
    """A sink of -inf is none at all, also for a query whose keys are all hidden."""
    problem = make_attention(sinks=True, heads=(4, 2, 2), **options)
    problem.inputs["sinks"][::2] = -torch.inf
    hidden = torch.ones(problem.grad.shape[:2], dtype=torch.bool)
    hidden[:, :5] = hidden[0, 30:] = False
    problem = dataclasses.replace(problem, key_mask=hidden)
    found = solve_attention(problem, lasp.softmax_attention)
    assert (found["output"][:, :3] == 0).all()
    assert (found["dsinks"][::2] == 0).all()
    assert largest_error(found, solve_attention(problem)) < 1e-12


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"softcap": 2.0, "window": 9}, {"softcap": 5.0, "sinks": True}, {}], ids=str
)
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_autocast_changes_nothing(options: dict, where: str) -> None:
    """Both directions compute in the dtype of their inputs: gradients belong to the output."""
    problem = make_attention(**options, dtype=torch.float32)
    inputs = {name: x.requires_grad_() for name, x in problem.inputs.items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and where != "backward"):
            output = lasp.softmax_attention(**inputs, **problem.options)
        assert output.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled and where != "forward"):
            results.append((output, *torch.autograd.grad(output, list(inputs.values()), problem.grad)))
    for plain, under_autocast in zip(*results, strict=True):
        assert torch.equal(plain, under_autocast)


def test_bf16_in_eight_blocks() -> None:
    """Merging and sums of gradients in fp32: at most twice the error of bf16 attention over all keys at once."""
    problem = make_attention(512, heads=(4, 4, 4), dims=(32, 32), dtype=torch.bfloat16)
    inputs = [problem.inputs[name].transpose(1, 2).detach().requires_grad_() for name in "qkv"]
    output = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    grads = torch.autograd.grad(output, inputs, problem.grad.transpose(1, 2))
    once = {name: x.transpose(1, 2) for name, x in zip(("output", "dq", "dk", "dv"), (output, *grads), strict=True)}
    in_blocks = solve_in_blocks(problem, tuple(range(0, 513, 64)), backward=True)
    expected = solve_attention(problem)
    for found in (in_blocks, solve_attention(problem, lasp.softmax_attention)):
        for name, value in expected.items():
            limit = 2 * largest_error({name: once[name]}, {name: value})
            assert largest_error({name: found[name]}, {name: value}) <= limit, name


def test_fp32() -> None:
    problem = make_attention(300, heads=(8, 2, 2), dims=(64, 64), dtype=torch.float32)
    assert largest_error(solve_attention(problem, lasp.softmax_attention), solve_attention(problem)) < 2e-6


def test_what_cuda_loads_is_aligned() -> None:
    """Rows of 16 bytes of half precision: what is so already is not copied."""
    large = torch.arange(2 * 6 * 4 * 16, dtype=torch.bfloat16).view(2, 6, 4, 16)
    for x in (large, large[:, 1:3], large[:, :, 1:], large[..., 8:], large.expand(2, 6, 4, 16)):
        assert aligned(x) is x
    for x in (large[..., 1:9], large.mT, large[..., ::2], large.flatten()[3:-5].view(2, 5, 2, 38)[..., :16]):
        copy = aligned(x)
        assert copy.is_contiguous()
        assert copy.storage_offset() == 0
        assert torch.equal(copy, x)
