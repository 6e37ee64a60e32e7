"""torch.compile, fake and meta tensors, and selective checkpointing get what an eager call gives.

Every operation of one device without documents is one graph; over ranks and with documents the graph breaks around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lasp
from lasp.functional import delta_product, logcumsumexp
from lasp.layers import MIXERS

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("error:.*lru_cache"),  # Dynamo warns of what it may get wrong
]

HEADS, K, V = 2, 6, 4
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Nothing that another test has compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tokens(length: int, *gates: str, heads: tuple[int, int, int] = (HEADS,) * 3, state: int = 0) -> Inputs:
    """q, k, v and gates of a recurrence; state: how many initial states."""
    rng = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    (hq, hk, hv), most = heads, max(heads[1:])
    shapes = {"head": (most,), "token": (1, length, most), "channel": (1, length, most, K)}
    given = {"q": normal(1, length, hq, K), "k": F.normalize(normal(1, length, hk, K), dim=-1)}
    given["v"] = normal(1, length, hv, V)
    for gate in {*gates} & {*shapes}:
        given["log_decay"] = -normal(*shapes[gate]).abs()
    if "beta" in gates:
        given["beta"] = normal(1, length, most).sigmoid()
    if "steps" in gates:
        given |= {name: given[name].unsqueeze(2).repeat_interleave(2, 2) for name in ("k", "v", "beta")}
    return given | ({"initial_state": normal(state, most, K, V)} if state else {})


def channels(length: int, *, state: bool = False) -> Inputs:
    """Inputs of a convolution."""
    rng = torch.Generator().manual_seed(length)
    shapes = {"x": (1, length, 5), "weight": (5, 4), "bias": (5,)} | ({"initial_state": (1, 5, 3)} if state else {})
    return {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}


def logits(length: int) -> Inputs:
    return {"x": channels(length)["x"]}


# An operation with its options, and what makes its inputs for a length.
Case = tuple[Callable[..., Any], Callable[[int], Inputs]]
FINAL = {"output_final_state": True}
CASES: dict[str, Case] = {
    "linear": (lasp.linear_attention, tokens),
    "linear per head": (lasp.linear_attention, lambda n: tokens(n, "head", heads=(4, 2, 1))),
    "linear per token": (partial(lasp.linear_attention, **FINAL), lambda n: tokens(n, "token", state=1)),
    "linear per channel": (partial(lasp.linear_attention, chunk_size=16), lambda n: tokens(n, "channel")),
    "linear unmasked": (partial(lasp.linear_attention, causal=False, **FINAL), lambda n: tokens(n, state=1)),
    "delta": (lasp.delta_rule, lambda n: tokens(n, "beta", heads=(2, 2, 4))),
    "delta per token": (partial(lasp.delta_rule, **FINAL), lambda n: tokens(n, "beta", "token", state=1)),
    "delta per channel": (lasp.delta_rule, lambda n: tokens(n, "beta", "channel")),
    "delta product": (delta_product, lambda n: tokens(n, "beta", "token", "steps")),
    "convolution": (partial(lasp.causal_conv1d, activation="silu", **FINAL), lambda n: channels(n, state=True)),
    "logcumsumexp": (partial(logcumsumexp, exclusive=True, **FINAL), logits),
}
cases = pytest.mark.parametrize("case", CASES)


def results(call: Callable[..., Any], inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, and the gradients of a sum of them that no two entries have the same weight in."""
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = call(**given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((x * torch.arange(x.numel(), dtype=x.dtype, device=x.device).view(x.shape).cos()).sum() for x in outputs)
    grads = torch.autograd.grad(loss, list(given.values()))
    return {f"output {i}": x for i, x in enumerate(outputs)} | dict(zip(given, grads, strict=True))


def same(seen: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(seen, expected, rtol=1e-11, atol=1e-11)


# torch.compile

QUICK = ("linear per token", "linear unmasked", "delta per channel", "convolution")


def quick(case: str) -> Any:
    return case if case in QUICK else pytest.param(case, marks=pytest.mark.slow)


def check_compiled(case: str, backend: str) -> None:
    call, make = CASES[case]
    compiled = torch.compile(call, backend=backend, fullgraph=True, dynamic=True)
    for length in (70, 37, 129):
        same(results(compiled, make(length)), results(call, make(length)))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**make(37)), call(**make(37)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", list(map(quick, CASES)))
def test_an_operation_is_one_graph_for_all_lengths(case: str) -> None:
    check_compiled(case, "aot_eager")


@pytest.mark.slow
@cases
def test_compiled_to_machine_code(case: str) -> None:
    check_compiled(case, "inductor")


@pytest.mark.parametrize("case", ["linear per token", "linear unmasked", "delta"])
@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_documents_break_the_graph(case: str, kind: Callable[[list[int]], Any]) -> None:
    """Other bounds with every call, which are neither wrong nor compiled each."""
    call, make = CASES[case]
    compiled = torch.compile(lambda **given: call(**given), backend="aot_eager")
    for bounds in ([0, 70], [0, 9, 37], [0, 9, 9, 37], [0, 33, 36]):
        inputs = make(bounds[-1])
        if "initial_state" in inputs:
            inputs["initial_state"] = inputs["initial_state"].repeat(len(bounds) - 1, 1, 1, 1)
        documents = {"cu_seqlens": kind(bounds)}
        same(results(partial(compiled, **documents), inputs), results(partial(call, **documents), inputs))


def model_of(mixer: str) -> Any:
    models = pytest.importorskip("lasp.models")
    torch.manual_seed(0)
    fields = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = models.LinearLlamaConfig(**fields, num_hidden_layers=1, pattern=[mixer], initializer_range=0.3)
    return models.LinearLlamaForCausalLM(config).double()


def trained(call: Callable[..., Any], model: Any, length: int) -> dict[str, Tensor]:
    """Logits, loss, and the gradients of all parameters."""
    ids = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(length))
    model.zero_grad()
    output = call(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return grads | {"logits": output.logits, "loss": output.loss}


def check_model(backend: str, mixer: str) -> None:
    model = model_of(mixer)
    compiled = torch.compile(model, backend=backend)
    for length in (33, 70):  # of its own, and of any length
        seen, expected = trained(compiled, model, length), trained(model, model, length)
        torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        ids = torch.arange(40)[None]
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_compiled_model(mixer: str) -> None:
    check_model("aot_eager", mixer)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_compiled_to_machine_code(mixer: str) -> None:
    check_model("inductor", mixer)


# Fake and meta tensors


def described(x: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(y.shape, y.dtype) for y in (x if isinstance(x, tuple) else (x,))]


@cases
def test_meta_tensors_have_the_shapes_and_dtypes_of_values(case: str) -> None:
    call, make = CASES[case]
    inputs = {name: x.float() for name, x in make(70).items()}
    on_meta = {name: x.to("meta").requires_grad_() for name, x in inputs.items()}
    seen = call(**on_meta)
    assert described(seen) == described(call(**inputs))
    results(call, on_meta)
    bounds = {} if "unmasked" in case or "head" in case else {"cu_seqlens": [0, 9, 70]}
    if "initial_state" not in inputs:
        assert described(call(**on_meta, **bounds)) == described(call(**inputs, **bounds))


@cases
def test_fake_tensors_have_the_shapes_and_dtypes_of_values(case: str) -> None:
    call, make = CASES[case]
    inputs = {name: x if name == "initial_state" else x.bfloat16() for name, x in make(70).items()}
    expected = described(call(**inputs))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) for name, x in inputs.items()}
        assert described(call(**fake)) == expected
        grads = results(call, fake)
    assert all(grads[name].shape == x.shape for name, x in inputs.items())


@pytest.mark.parametrize("case", ["linear per token", "delta per channel", "linear unmasked"])
def test_fakes_tell_what_operators_return(case: str) -> None:
    """Every operator of these calls: shapes, strides, dtypes, and no memory that it was given."""
    call, make = CASES[case]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op.namespace == "lasp":
                seen.append((op, args))
            return op(*args, **(kwargs or {}))

    with Watch():
        results(call, make(70))
    assert len(seen) == (6 if "unmasked" in case else 2)
    for op, args in seen:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


# Selective checkpointing


def saves(*names: str) -> Callable[..., CheckpointPolicy]:
    """A policy that keeps what operators with these in their names return."""

    def policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = any(name in str(operator) for name in names)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@cases
@pytest.mark.parametrize("names", [("mm",), ("lasp",), ("",)], ids=["products", "ours", "all"])
def test_selective_checkpointing(case: str, names: tuple[str, ...]) -> None:
    call, make = CASES[case]
    contexts = partial(create_selective_checkpoint_contexts, saves(*names))
    inputs = make(70)

    def checkpointed(**given: Tensor) -> Any:
        return checkpoint(
            lambda *x: call(**dict(zip(given, x, strict=True))),
            *given.values(),
            use_reentrant=False,
            context_fn=contexts,
        )

    same(results(checkpointed, inputs), results(call, inputs))
