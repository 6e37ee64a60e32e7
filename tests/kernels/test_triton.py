"""The Triton kernels, through Triton's interpreter: both families against PyTorch in fp64, forwards and backwards."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import lasp
import tests.interpreter  # noqa: F401 - mends Triton's interpreter
from lasp.kernels.gpu import recurrence, table
from lasp.kernels.gpu.operators import Setting, carry

pytestmark = pytest.mark.timeout(120)


class Case(NamedTuple):
    """A call: its kind of gates ("", "constant", "head", "channel"), sizes, and what else it is given."""

    gates: str
    delta: bool = False
    batch: int = 1
    tokens: int = 37
    heads: tuple[int, int, int] = (1, 1, 1)  # of q, k and v
    dims: tuple[int, int] = (16, 16)
    documents: tuple[int, ...] | None = None
    decay: float = 1.0  # of the strongest gate, in nats
    chunk_size: int | None = 16
    causal: bool = True
    dtype: torch.dtype = torch.float32


def arguments(case: Case) -> dict[str, Tensor]:
    """What is differentiated, in the dtype of the case."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    tokens, (hq, hk, hv), (key, value) = (case.batch, case.tokens), case.heads, case.dims
    heads = max(hk, hv)
    shapes = {"constant": (heads,), "head": (*tokens, heads), "channel": (*tokens, hk, key)}
    made = {"q": normal(*tokens, hq, key), "k": normal(*tokens, hk, key), "v": normal(*tokens, hv, value)}
    if case.gates:
        made["log_decay"] = -case.decay * torch.rand(shapes[case.gates], generator=generator)
    if case.delta:
        made["k"] = torch.nn.functional.normalize(made["k"], dim=-1)
        made["beta"] = 2 * torch.rand(*tokens, hv, generator=generator)
    documents = case.batch if case.documents is None else len(case.documents) - 1
    made["initial_state"] = normal(documents, heads, key, value)
    return {name: x.to(case.dtype) if name in "qkv" else x for name, x in made.items()}


def results(case: Case, given: dict[str, Tensor], backend: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Output, final state and every gradient."""
    inputs = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in given.items()}
    call = lasp.delta_rule if case.delta else lasp.linear_attention
    options = {"cu_seqlens": case.documents, "output_final_state": True, "backend": backend}
    options |= {} if case.delta else {"causal": case.causal}
    options |= {"chunk_size": case.chunk_size} if backend == "triton" else {}
    output, final = call(**inputs, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (output, final)]
    loss = sum((x.double() * weight).sum() for x, weight in zip((output, final), weights, strict=True))
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"output": output, "final": final} | dict(zip(inputs, grads, strict=True))


def error(seen: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    return ((seen.double() - expected).norm() / expected.norm()).item()


def check_against_fp64(case: Case, tolerance: float = 1e-4) -> None:
    given = arguments(case)
    expected = results(case, given, "torch", torch.float64)
    seen = results(case, given, "triton", None)
    for name, value in expected.items():
        assert seen[name].dtype == (case.dtype if name in ("output", *"qkv") else torch.float32)
        if value.norm() > 1e-12:  # else a state that has been forgotten
            assert error(seen[name], value) < tolerance, name


@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
@pytest.mark.parametrize("gates", ["", "constant", "head", "channel"])
def test_has_the_results_of_fp64(gates: str, delta: bool) -> None:
    if delta and gates == "constant":
        with pytest.raises(ValueError, match="log_decay"):
            check_against_fp64(Case(gates, delta))
        return
    check_against_fp64(Case(gates, delta, batch=2, tokens=21))
    if gates == "head" or not delta:  # whose interpreter takes its time
        check_against_fp64(Case(gates, delta, tokens=70, chunk_size=None))


CASES = [
    Case("head", heads=(4, 1, 2), dims=(20, 24)),
    Case("head", documents=(0, 7, 7, 26, 37)),
    Case("channel", decay=50.0),
]
MORE_CASES = [
    Case("head", heads=(2, 1, 2)),
    Case("head", heads=(4, 2, 2)),
    Case("channel", heads=(1, 1, 2)),
    Case("channel", dims=(72, 17)),
    Case("head", dims=(17, 72)),
    Case("channel", documents=(0, 30, 37)),
    Case("head", decay=50.0),
    Case("head", decay=0.0),
]


@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
@pytest.mark.parametrize("case", CASES + [pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES], ids=str)
def test_heads_dims_documents_and_decays(case: Case, delta: bool) -> None:
    check_against_fp64(case._replace(delta=delta))


def test_more_channels_than_a_tile_in_blocks() -> None:
    """Based's Taylor map has 273."""
    check_against_fp64(Case("", dims=(273, 16), tokens=20))


@pytest.mark.parametrize("documents", [None, (0, 30, 30, 37)])
def test_without_a_mask(documents: tuple[int, ...] | None) -> None:
    check_against_fp64(Case("", causal=False, documents=documents, heads=(2, 1, 2), chunk_size=None))


@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
@pytest.mark.parametrize(
    ("gates", "documents"),
    [("head", (0, 90, 90, 112)), *(pytest.param(g, None, marks=pytest.mark.slow) for g in ("", "head", "channel"))],
)
def test_segments_are_carried_side_by_side(
    monkeypatch: pytest.MonkeyPatch, gates: str, documents: tuple[int, ...] | None, delta: bool
) -> None:
    """A card of many processors cuts runs into segments of its own."""
    monkeypatch.setattr(table, "LEAST_CHUNKS", 2)
    monkeypatch.setattr(recurrence, "processors", lambda device: 64)
    check_against_fp64(Case(gates, delta, tokens=112, documents=documents))


@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
@pytest.mark.parametrize("gates", ["", "head", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_short_inputs_err_at_most_twice_as_much_as_pytorch(gates: str, delta: bool, dtype: torch.dtype) -> None:
    """PyTorch's backend computes in fp32 and rounds what it returns; what is in fp32 is compared as if rounded."""
    case = Case(gates, delta, tokens=130, dims=(64, 64), dtype=dtype, chunk_size=None)
    given = arguments(case)
    expected = results(case, given, "torch", torch.float64)
    pytorch, seen = results(case, given, "torch", None), results(case, given, "triton", None)
    for name, value in expected.items():
        allowed = max(error(pytorch[name], value), error(value.to(dtype), value))
        assert error(seen[name], value) < 2 * allowed, name


def test_refuses_what_it_has_no_tiles_for() -> None:
    x = torch.zeros(1, 4, 1, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes float32, bfloat16 and float16, got"):
        lasp.linear_attention(x, x, x, backend="triton")
    x = torch.zeros(1, 4, 1, 257)
    with pytest.raises(ValueError, match="got 128; 'torch' takes any"):
        lasp.linear_attention(x, x, x, backend="triton", chunk_size=128)
    with pytest.raises(ValueError, match="at most 256 channels of keys in the delta rule, got 257"):
        lasp.delta_rule(x, x, x, torch.zeros(1, 4, 1), backend="triton")


def test_refuses_more_heads_than_a_grid_has_places_for() -> None:
    x = torch.zeros(512, 1, 128, 16)
    with pytest.raises(ValueError, match="at most 65535 heads x batch, got 65536"):
        lasp.linear_attention(x, x, x, backend="triton")


def test_the_fake_of_what_tokens_write_has_its_dtype() -> None:
    """Values in fp32 beside keys in bf16, which the calls that are compiled above do not have."""
    k, v = torch.randn(1, 32, 1, 16).bfloat16(), torch.randn(1, 32, 1, 16)
    table_ = table.device_table(((0, 32),), 16, True, 1, 1, k.device)
    setting = Setting(None, table_.chunks, table_.segments, 1, 1.0, 16, causal=True, strict=False, trained=False)
    flat = (k, v, k, None, *setting, 16, True, False)
    torch.library.opcheck(torch.ops.lasp.carry.default, flat, test_utils="test_faketensor")
    assert carry(k, v, k, None, setting, 16, True, False)[1].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
@pytest.mark.parametrize("delta", [False, True], ids=["decay", "delta"])
def test_compiles_without_a_graph_break(delta: bool) -> None:
    given = {name: x.requires_grad_() for name, x in arguments(Case("head", delta)).items()}
    call = lasp.delta_rule if delta else lasp.linear_attention

    def loss(inputs: dict[str, Tensor]) -> Tensor:
        return call(**inputs, backend="triton", chunk_size=16).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for tokens in (37, 20):
        inputs = {name: x.detach()[:, : tokens if name != "initial_state" else None] for name, x in given.items()}
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        expected = torch.autograd.grad(loss(inputs), list(inputs.values()))
        seen = torch.autograd.grad(compiled(inputs), list(inputs.values()))
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
