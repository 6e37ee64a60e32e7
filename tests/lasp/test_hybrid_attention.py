"""hybrid_attention on one device and on simulated ranks, against every token's weights written out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import lasp
from lasp.functional.hybrid_arguments import HybridState
from lasp.kernels import reference
from lasp.kernels.softmax import window as kernel
from lasp.launch.threads import run
from lasp.parallel.cut import even_lengths
from lasp.parallel.layout import pieces_of
from tests.attention import largest_error
from tests.hybrid import LENGTH, VARIANTS, make, solve

PLACES = {"contiguous": (1, 20, 0, 16), "zigzag": even_lengths(LENGTH, 4, "zigzag")}


@cache
def expected_of(variant: str) -> dict[str, Tensor]:
    inputs, options = make(**VARIANTS[variant])
    return solve(reference.hybrid_attention, inputs, **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_device(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one chunk, as long sequences are computed."""
    monkeypatch.setattr(kernel, "CHUNK", (2, 8))
    monkeypatch.setattr(kernel, "SCORES", 1)
    inputs, options = make(**VARIANTS[variant])
    assert largest_error(solve(lasp.hybrid_attention, inputs, **options), expected_of(variant)) < 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", PLACES)
def test_four_ranks(layout: Any, variant: str) -> None:
    """Ranks shorter than the window, one without tokens, and two pieces to each."""
    inputs, options = make(**VARIANTS[variant])
    lengths, bounds = PLACES[layout], options.pop("cu_seqlens")
    pieces = pieces_of(lengths, layout)

    def rank(group: lasp.SequenceGroup) -> dict[str, Tensor]:
        own = [piece for piece in pieces if piece.rank == group.rank]
        local = {
            n: x if x.dim() == 1 else torch.cat([x[:, p.start : p.stop] for p in own], 1) for n, x in inputs.items()
        }
        return solve(lasp.hybrid_attention, local, **options, cut=lasp.Cut(group, lengths, bounds))

    found = run(4, rank, layout)
    for name, whole in expected_of(variant).items():
        if whole.dim() == 1:  # each rank has its part of the gradient
            assert largest_error({name: sum(part[name] for part in found)}, {name: whole}) < 1e-10
            continue
        for piece in pieces:
            part = found[piece.rank][name][:, piece.offset : piece.offset + piece.stop - piece.start]
            if part.shape[1]:
                assert largest_error({name: part}, {name: whole[:, piece.start : piece.stop]}) < 1e-10, name


@pytest.mark.parametrize("steps", [(37,), (20, 17), (3, 4, *[1] * 30)], ids=["at once", "in two", "word by word"])
def test_it_continues_from_its_state(steps: tuple[int, ...]) -> None:
    inputs, options = make(window=6, factor=True, key_mask=True)
    grad, factor = inputs.pop("grad"), inputs.pop("window_factor")
    expected = reference.hybrid_attention(**inputs, window_factor=factor, **options)
    trained = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    state: HybridState | None = None
    outputs = []
    for parts in zip(*(x.split(steps, 1) for x in inputs.values()), strict=True):
        tokens = dict(zip(inputs, parts, strict=True))
        output, state = lasp.hybrid_attention(
            **tokens, window_factor=factor, window=6, initial_state=state, output_final_state=True
        )
        outputs.append(output)
    found = torch.cat(outputs, 1)
    assert largest_error({"output": found.detach()}, {"output": expected}) < 1e-12
    grads = torch.autograd.grad(found, trained, grad)
    again = torch.autograd.grad(reference.hybrid_attention(**inputs, window_factor=factor, **options), trained, grad)
    for one, other in zip(grads, again, strict=True):
        assert largest_error({"grad": one}, {"grad": other}) < 1e-12


def test_features_that_are_the_exponential_give_softmax_attention() -> None:
    """One query for all tokens, so that a feature of each key can be its exponential."""
    inputs, _ = make(window=4, heads=(2, 2, 2, 2, 2))
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    q = q[:, :1].expand_as(q)
    phi_k = (q * k * 6**-0.5).sum(-1, keepdim=True).exp()
    found = lasp.hybrid_attention(q, k, v, torch.ones_like(phi_k), phi_k, window=4, relative=False)
    assert largest_error({"output": found}, {"output": lasp.softmax_attention(q, k, v)}) < 1e-12


def test_scores_that_no_exponential_holds() -> None:
    for relative in (True, False):
        inputs, options = make(window=4, relative=relative)
        inputs = {name: x.float() for name, x in inputs.items()} | {"q": inputs["q"].float() * 1e3}
        found = solve(lasp.hybrid_attention, inputs, **options)
        assert all(x.isfinite().all() for x in found.values())


def test_states_are_of_one_text_on_one_device() -> None:
    inputs, options = make(window=4)
    inputs.pop("grad")
    rows = {name: x[:1] for name, x in inputs.items()}
    with pytest.raises(ValueError, match="state of one text on one device"):
        lasp.hybrid_attention(**rows, window=4, output_final_state=True, cu_seqlens=[0, 9, LENGTH])
    _, state = lasp.hybrid_attention(**inputs, **options, output_final_state=True)
    with pytest.raises(ValueError, match=r"initial_state.k must be \[2, 5, 2, 6\]"):
        lasp.hybrid_attention(**inputs, window=5, initial_state=state)
