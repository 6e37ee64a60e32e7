"""The table of mistakes: what the last rank does, where all others do what is right.

A call is described by its arguments and by what the wrong rank changes of them. Sequences have six tokens to a rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import lasp
from lasp.functional import delta_product, logcumsumexp
from lasp.models.config import LinearLlamaConfig
from lasp.models.linear_llama import LinearLlamaForCausalLM
from lasp.models.linear_roberta import LinearRobertaConfig, LinearRobertaModel
from tests.mismatches.runner import Case

Group = lasp.SequenceGroup
Change = Callable[[dict[str, Any]], dict[str, Any]]
T, H, K = 6, 2, 4
VOCABULARY = 50


def changed(
    api: str, call: Callable[..., Any], good: Callable[[], dict[str, Any]], changes: dict[str, Any]
) -> Iterator[Case]:
    """A case per change of the wrong rank: a change, or (a change, what is expected)."""
    for name, given in changes.items():
        change, expects = given if isinstance(given, tuple) else (given, "mistake")

        def run(group: Group, wrong: bool, change: Any = change) -> None:
            arguments = good()
            if wrong:
                arguments |= change(arguments) if callable(change) else change
            call(**({"group": group} | arguments))

        yield Case(api, name, run, expects)


def alike(api: str, name: str, expects: str = "mistake", ranks: int = 2, checks: bool = True) -> Callable[[Any], Case]:
    """A case that is a function of the group and of whether this rank is wrong."""

    def make(run: Callable[[Group, bool], Any]) -> Case:
        case = Case(api, name, run, expects, ranks, checks)
        CASES.append(case)
        return case

    return make


CASES: list[Case] = []


def randn(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options)


# Linear attention ---------------------------------------------------------------------------------------------------

LINEAR = "linear_attention"


def good_linear() -> dict[str, Any]:
    q, k, v = randn(3, 1, T, H, K)
    return {"q": q, "k": k, "v": v, "log_decay": -torch.rand(1, T, H)}


def every(convert: Callable[[Tensor], Any]) -> Change:
    return lambda a: {name: convert(x) if isinstance(x, Tensor) else x for name, x in a.items()}


CASES += changed(
    LINEAR,
    lasp.linear_attention,
    good_linear,
    {
        "batch": every(lambda x: torch.cat([x, x])),
        "a head less": every(lambda x: x[:, :, :1]),
        "key dim": lambda a: {n: a[n][..., :2] for n in "qk"},
        "value dim": lambda a: {"v": a["v"][..., :2]},
        "tokens of k": lambda a: {"k": a["k"][:, :3]},
        "tokens of log_decay": lambda a: {"log_decay": a["log_decay"][:, :3]},
        "heads that do not divide": lambda a: {"q": randn(1, T, 3, K)},
        "f64": every(Tensor.double),
        "bf16": every(Tensor.bfloat16),
        "f16": every(Tensor.half),
        "dtypes mixed": lambda a: {"k": a["k"].double()},
        "integers": lambda a: {n: a[n].long() for n in "qkv"},
        "meta device": every(lambda x: x.to("meta")),
        "k on meta": lambda a: {"k": a["k"].to("meta")},
        "no log_decay": {"log_decay": None},
        "log_decay per channel": lambda a: {"log_decay": -torch.rand(1, T, H, K)},
        "log_decay per head": lambda a: {"log_decay": -torch.rand(H)},
        "log_decay of other values": (lambda a: {"log_decay": a["log_decay"] * 2}, "harmless"),
        "log_decay positive": lambda a: {"log_decay": -a["log_decay"]},
        "log_decay nan": lambda a: {"log_decay": a["log_decay"] * float("nan")},
        "log_decay f64": (lambda a: {"log_decay": a["log_decay"].double()}, "harmless"),
        "scale": {"scale": 2.0},
        "scale nan": {"scale": float("nan")},
        "scale inf": {"scale": float("inf")},
        "scale of text": {"scale": "0.5"},
        "scale its own value": ({"scale": 0.5}, "harmless"),
        "scan ring": {"scan": "ring"},
        "scan gather": {"scan": "gather"},
        "scan unknown": {"scan": "star"},
        "backend unknown": {"backend": "abacus"},
        "backend torch": ({"backend": "torch"}, "harmless"),
        "chunk_size": ({"chunk_size": 2}, "harmless"),
        "chunk_size 0": {"chunk_size": 0},
        "not causal": {"causal": False, "log_decay": None},
        "not causal, with decay": {"causal": False},
        "final state": {"output_final_state": True},
        "initial state": {"initial_state": torch.zeros(1, H, K, K)},
        "initial state of another shape": {"initial_state": torch.zeros(1, H, K, K + 1)},
        "cu_seqlens": {"cu_seqlens": [0, 2 * T]},
        "cu_seqlens, too short": {"cu_seqlens": [0, T]},
        "cu_seqlens that fall": {"cu_seqlens": [0, 9, 7, 12]},
        "requires_grad": lambda a: {"q": a["q"].requires_grad_()},
        "q None": {"q": None},
        "v None": {"v": None},
        "q a list": lambda a: {"q": a["q"].tolist()},
        "q numpy": lambda a: {"q": a["q"].numpy()},
        "fewer dims": lambda a: {"q": a["q"][0]},
        "more tokens": (every(lambda x: torch.cat([x, x], 1)), "harmless"),
        "no tokens": (every(lambda x: x[:, :0]), "harmless"),
        "views": (every(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)), "harmless"),
        "group None": {"group": None},
        "an argument of 5000 letters": {"scan": "x" * 5000},
        "an argument that is no plain value": {"scale": object()},
    },
)  # fmt: skip
CASES += changed(
    LINEAR,
    lasp.linear_attention,
    lambda: (
        good_linear()
        | {"log_decay": -torch.ones(H), "initial_state": torch.zeros(2, H, K, K), "cu_seqlens": [0, 4, 12]}
    ),
    {
        "one bound": {"cu_seqlens": [0, 5, 12]},
        "a document more": {"cu_seqlens": [0, 4, 8, 12], "initial_state": None},
        "log_decay per head, other values": ({"log_decay": -2 * torch.ones(H)}, "values"),
        "one of 20000 bounds": {"cu_seqlens": [0] + [4] * 20000 + [12], "initial_state": None},
    },
)


@alike(LINEAR, "initial state, other values", "values")
def _(group: Group, wrong: bool) -> None:
    lasp.linear_attention(**good_linear(), initial_state=torch.full((1, H, K, K), float(wrong)), group=group)


@alike(LINEAR, "no_grad on one rank")
def _(group: Group, wrong: bool) -> None:
    a = good_linear()
    a["q"].requires_grad_()
    with torch.no_grad() if wrong else contextlib.nullcontext():
        lasp.linear_attention(**a, group=group)


# Order and absence of calls -----------------------------------------------------------------------------------------

ORDER = "order and absence of calls"


def linear(group: Group | None, **options: Any) -> Tensor:
    return lasp.linear_attention(**good_linear() | options, group=group)


def softmax(group: Group | None, **options: Any) -> Tensor:
    return lasp.softmax_attention(*randn(3, 1, T, H, K), group=group, **options)


def backward(group: Group, x: Tensor) -> Tensor:
    return lasp.linear_attention(x, x, x, group=group).sum()


def leaf() -> Tensor:
    return randn(1, T, H, K).requires_grad_()


@alike(ORDER, "two operations swapped")
def _(group: Group, wrong: bool) -> None:
    for call in (softmax, linear) if wrong else (linear, softmax):
        call(group)


@alike(ORDER, "two scans swapped")
def _(group: Group, wrong: bool) -> None:
    for scan in ("ring", "gather") if wrong else ("gather", "ring"):
        linear(group, scan=scan)


@alike(ORDER, "two dtypes swapped")
def _(group: Group, wrong: bool) -> None:
    for dtype in (torch.float32, torch.float64)[:: -1 if wrong else 1]:
        linear(group, **{n: x.to(dtype) for n, x in good_linear().items()})


@alike(ORDER, "two same-shaped calls swapped", "values")
def _(group: Group, wrong: bool) -> None:
    calls = [good_linear() for _ in range(2)]
    for a in calls[::-1] if wrong else calls:
        lasp.linear_attention(**a, group=group)


@alike(ORDER, "another operation at the same time")
def _(group: Group, wrong: bool) -> None:
    softmax(group) if wrong else linear(group)


@alike(ORDER, "a call skipped, another operation follows")
def _(group: Group, wrong: bool) -> None:
    if not wrong:
        linear(group)
    softmax(group)


@alike(ORDER, "a call skipped, a loss follows")
def _(group: Group, wrong: bool) -> None:
    if not wrong:
        linear(group)
    lasp.cross_entropy(randn(1, T, 5), torch.zeros(1, T, dtype=torch.long), group=group)


@alike(ORDER, "a call skipped, sync_gradients follows")
def _(group: Group, wrong: bool) -> None:
    model = nn.Linear(4, 4)
    model(randn(2, 4)).sum().backward()
    if not wrong:
        linear(group)
    lasp.sync_gradients(model, group)


@alike(ORDER, "a call skipped, then a barrier")
def _(group: Group, wrong: bool) -> None:
    if not wrong:
        linear(group)
    dist.barrier()


@alike(ORDER, "a loop once less")
def _(group: Group, wrong: bool) -> None:
    for _i in range(2 if wrong else 3):
        linear(group)


@alike(ORDER, "a call made twice, another operation follows")
def _(group: Group, wrong: bool) -> None:
    for _i in range(2 if wrong else 1):
        linear(group)
    softmax(group)


@alike(ORDER, "group=None on one rank, another call follows")
def _(group: Group, wrong: bool) -> None:
    linear(None if wrong else group)
    softmax(group)


@alike(ORDER, "an exception caught between two calls")
def _(group: Group, wrong: bool) -> None:
    linear(group)
    with contextlib.suppress(RuntimeError):
        if wrong:
            raise RuntimeError
        linear(group)
    softmax(group)


@alike(ORDER, "KeyboardInterrupt between two calls")
def _(group: Group, wrong: bool) -> None:
    linear(group)
    if wrong:
        raise KeyboardInterrupt
    linear(group)


@alike(ORDER, "MemoryError in the middle of a call, and another call")
def _(group: Group, wrong: bool) -> None:
    from lasp.kernels.portable.recurrence import PortableRecurrence

    if wrong:
        states = PortableRecurrence.states

        def fail(*_: Any) -> None:
            raise MemoryError

        PortableRecurrence.states = fail
        with contextlib.suppress(MemoryError):
            linear(group)
        PortableRecurrence.states = states
    linear(group)


@alike(ORDER, "a rank that sleeps")
def _(group: Group, wrong: bool) -> None:
    if wrong:
        time.sleep(30)
    linear(group)


@alike(ORDER, "a rank that comes late", "harmless")
def _(group: Group, wrong: bool) -> None:
    if wrong:
        time.sleep(1)
    linear(group)


@alike(ORDER, "backward in another order")
def _(group: Group, wrong: bool) -> None:
    losses = [backward(group, leaf()) for _ in range(2)]
    for loss in losses[::-1] if wrong else losses:
        loss.backward()


@alike(ORDER, "backward in another order, non-reentrant checkpointing")
def _(group: Group, wrong: bool) -> None:
    losses = [checkpoint(backward, group, leaf(), use_reentrant=False) for _ in range(2)]
    for loss in losses[::-1] if wrong else losses:
        loss.backward()


@alike(ORDER, "backward in another order, reentrant checkpointing", "values")
def _(group: Group, wrong: bool) -> None:
    losses = [checkpoint(backward, group, leaf(), use_reentrant=True) for _ in range(2)]
    for loss in losses[::-1] if wrong else losses:
        loss.backward()


def back_with_a_cut(group: Group, wrong: bool) -> None:
    cut = group.cut(T * group.size)
    losses = [lasp.linear_attention(x, x, x, cut=cut).sum() for x in (leaf(), leaf())]
    for loss in losses[::-1] if wrong else losses:
        loss.backward()


@alike(ORDER, "backward in another order with a cut, a batch follows")
def _(group: Group, wrong: bool) -> None:
    back_with_a_cut(group, wrong)
    group.cut(T * group.size)


@alike(ORDER, "backward in another order with a cut, sync_gradients follows")
def _(group: Group, wrong: bool) -> None:
    back_with_a_cut(group, wrong)
    lasp.sync_gradients(nn.Linear(4, 4), group)


@alike(ORDER, "backward in another order with a cut, nothing follows")
def _(group: Group, wrong: bool) -> None:
    back_with_a_cut(group, wrong)


@alike(ORDER, "backward on one rank, then a forward")
def _(group: Group, wrong: bool) -> None:
    loss = backward(group, leaf())
    if wrong:
        loss.backward()
    linear(group)


@alike(ORDER, "backward on one rank, then nothing")
def _(group: Group, wrong: bool) -> None:
    loss = backward(group, leaf())
    if wrong:
        loss.backward()


@alike(ORDER, "a loss that reaches the first of two layers only")
def _(group: Group, wrong: bool) -> None:
    first = lasp.linear_attention(*[leaf()] * 3, group=group)
    second = lasp.linear_attention(first, first, first, group=group)
    (first if wrong else second).sum().backward()


@alike(ORDER, "a loss that misses the output, a forward follows")
def _(group: Group, wrong: bool) -> None:
    x = leaf()
    loss = backward(group, x)
    (x.sum() if wrong else loss).backward()
    linear(group)


@alike(ORDER, "backward twice on one rank, a forward follows")
def _(group: Group, wrong: bool) -> None:
    loss = backward(group, leaf())
    for _i in range(2 if wrong else 1):
        loss.backward(retain_graph=True)
    linear(group)


@alike(ORDER, "two groups of the same ranks swapped")
def _(group: Group, wrong: bool) -> None:
    other = Group.from_group()
    for one in (other, group) if wrong else (group, other):
        linear(one)


@alike(ORDER, "autocast on one rank, bf16 inputs made by it")
def _(group: Group, wrong: bool) -> None:
    layer = nn.Linear(K, K)
    with torch.autocast("cpu", torch.bfloat16, enabled=wrong):
        x = layer(randn(1, T, H, K))
    lasp.linear_attention(x, x, x, group=group)


# Delta rules and the running sum ------------------------------------------------------------------------------------

DELTA = "delta_rule, delta_product, logcumsumexp"


def good_delta() -> dict[str, Any]:
    q, v = randn(2, 1, T, H, K)
    return {"q": q, "k": nn.functional.normalize(randn(1, T, H, K), dim=-1), "v": v, "beta": torch.rand(1, T, H)}


def good_product() -> dict[str, Any]:
    k = nn.functional.normalize(randn(1, T, 2, H, K), dim=-1)
    return {"q": randn(1, T, H, K), "k": k, "v": randn(1, T, 2, H, K), "beta": torch.rand(1, T, 2, H)}


CASES += changed(
    DELTA,
    lasp.delta_rule,
    good_delta,
    {
        "beta None": {"beta": None},
        "beta of 3": lambda a: {"beta": a["beta"] + 2},
        "beta of fewer heads": lambda a: {"beta": a["beta"][:, :, :1]},
        "keys not normalised": lambda a: {"k": 9 * a["k"]},
        "log_decay": {"log_decay": -torch.ones(1, T, H)},
        "f64": every(Tensor.double),
        "scan": {"scan": "ring"},
        "meta device": every(lambda x: x.to("meta")),
    },
)
CASES += changed(
    DELTA,
    delta_product,
    good_product,
    {
        "q None": {"q": None},
        "k None": {"k": None},
        "one step": lambda a: {n: a[n][:, :, :1] for n in ("k", "v", "beta")},
    },
)
CASES += changed(
    DELTA,
    logcumsumexp,
    lambda: {"x": randn(1, T, H)},
    {
        "channels": lambda a: {"x": a["x"][..., :1]},
        "exclusive": {"exclusive": True},
        "scan": {"scan": "ring"},
        "tokens": (lambda a: {"x": a["x"][:, :3]}, "harmless"),
    },
)

# Softmax attention --------------------------------------------------------------------------------------------------

SOFTMAX = "softmax_attention"


def good_softmax(method: str) -> Callable[[], dict[str, Any]]:
    return lambda: dict(zip("qkv", randn(3, 1, T, H, K), strict=True)) | {"method": method}


for METHOD in ("ring", "gather", "ulysses"):
    CASES += changed(
        SOFTMAX,
        lasp.softmax_attention,
        good_softmax(METHOD),
        {
            f"{METHOD}, heads of keys": lambda a: {n: a[n][:, :, :1] for n in "kv"},
            f"{METHOD}, value dim": lambda a: {"v": a["v"][..., :2]},
            f"{METHOD}, f64": every(Tensor.double),
            f"{METHOD}, window": {"window": 3},
            f"{METHOD}, key_mask": {"key_mask": torch.ones(1, T, dtype=torch.bool)},
            f"{METHOD}, not causal": {"causal": False},
            f"{METHOD}, more tokens": (every(lambda x: torch.cat([x, x], 1)), "harmless"),
        },
    )
CASES += changed(
    SOFTMAX,
    lasp.softmax_attention,
    good_softmax("ring"),
    {
        "method": {"method": "gather"},
        "method unknown": {"method": "star"},
        "method auto": {"method": "auto"},
        "window 0": {"window": 0},
        "softcap": {"softcap": 20.0},
        "softcap -1": {"softcap": -1.0},
        "sinks": {"sinks": torch.zeros(H)},
        "scale its own value": ({"scale": 0.5}, "harmless"),
        "meta device": every(lambda x: x.to("meta")),
        "requires_grad": lambda a: {"v": a["v"].requires_grad_()},
        "cu_seqlens": {"cu_seqlens": [0, 2 * T]},
    },
)


@alike(SOFTMAX, "sinks, other values", "values")
def _(group: Group, wrong: bool) -> None:
    softmax(group, sinks=torch.full((H,), float(wrong)))


# Convolution --------------------------------------------------------------------------------------------------------

CONV = "causal_conv1d"


def good_conv() -> dict[str, Any]:
    return {"x": randn(1, T, 4), "weight": randn(4, 3)}


CASES += changed(
    CONV,
    lasp.causal_conv1d,
    good_conv,
    {
        "channels": lambda a: {n: x[..., :2] if n == "x" else x[:2] for n, x in a.items()},
        "width": {"weight": torch.ones(4, 4)},
        "weight of other channels": {"weight": torch.ones(3, 3)},
        "bias": {"bias": torch.zeros(4)},
        "activation": {"activation": "silu"},
        "activation unknown": {"activation": "gelu"},
        "f64": every(Tensor.double),
        "batch": lambda a: {"x": torch.cat([a["x"]] * 2)},
        "final state": {"output_final_state": True},
        "initial state": {"initial_state": torch.zeros(1, 4, 2)},
        "tokens": (lambda a: {"x": a["x"][:, :3]}, "harmless"),
        "no tokens": (lambda a: {"x": a["x"][:, :0]}, "harmless"),
    },
)

# Losses -------------------------------------------------------------------------------------------------------------

LOSS = "cross_entropy"


def good_loss() -> dict[str, Any]:
    return {"logits": randn(1, T, 9).requires_grad_(), "labels": torch.zeros(1, T, dtype=torch.long)}


CASES += changed(
    LOSS,
    lasp.cross_entropy,
    good_loss,
    {
        "vocabulary": {"logits": torch.zeros(1, T, 8, requires_grad=True)},
        "f64": {"logits": torch.zeros(1, T, 9, dtype=torch.float64, requires_grad=True)},
        "labels too large": {"labels": torch.full((1, T), 9)},
        "labels int32": {"labels": torch.zeros(1, T, dtype=torch.int32)},
        "labels of another shape": {"labels": torch.zeros(1, T - 1, dtype=torch.long)},
        "labels None": {"labels": None},
        "ignore_index": {"ignore_index": 0},
        "num_items": {"num_items": 5},
        "no gradient": {"logits": torch.zeros(1, T, 9)},
        "meta device": {"logits": torch.zeros(1, T, 9, device="meta", requires_grad=True)},
        "all ignored": ({"labels": torch.full((1, T), -100)}, "harmless"),
        "fewer tokens": (lambda a: {"logits": a["logits"][:, :2], "labels": a["labels"][:, :2]}, "harmless"),
    },
)

# Cutting ------------------------------------------------------------------------------------------------------------

CUT = "shard, unshard, shard_batch, ShardedCollator"


def batch(wrong: bool, **options: Any) -> dict[str, Any]:
    ids = torch.arange(2 * T).view(1, -1) % 7
    return {"input_ids": ids, "labels": ids} | (options if wrong else {})


CASES += changed(
    CUT,
    lasp.unshard,
    lambda: {"x": randn(1, T, 3)},
    {
        "unshard, width": lambda a: {"x": a["x"][..., :2]},
        "unshard, f64": lambda a: {"x": a["x"].double()},
        "unshard, dim 0": {"dim": 0},
        "unshard, dim -2 for 1": ({"dim": -2}, "harmless"),
        "unshard, dim 5": {"dim": 5},
        "unshard, meta": lambda a: {"x": a["x"].to("meta")},
    },
)
for NAME, OPTIONS in {
    "other samples": {"input_ids": torch.ones(1, 2 * T, dtype=torch.long)},
    "other labels": {"labels": torch.ones(1, 2 * T, dtype=torch.long)},
    "longer": {n: torch.ones(1, 3 * T, dtype=torch.long) for n in ("input_ids", "labels")},
    "no labels": {"labels": None},
    "cu_seqlens": {"cu_seqlens": [0, 3, 2 * T]},
    "an unknown key": {"pixels": 0},
}.items():

    @alike(CUT, f"shard_batch, {NAME}")
    def _(group: Group, wrong: bool, options: Any = OPTIONS) -> None:
        lasp.shard_batch(batch(wrong, **options), group)


@alike(CUT, "ShardedCollator, other samples")
def _(group: Group, wrong: bool) -> None:
    lasp.ShardedCollator(group)([{"input_ids": torch.arange(12) + wrong, "labels": torch.arange(12)}])


@alike(CUT, "a loader one batch shorter, a loss follows")
def _(group: Group, wrong: bool) -> None:
    for _i in range(1 if wrong else 2):
        lasp.shard_batch(batch(False), group)
    lasp.cross_entropy(**good_loss(), group=group)


@alike(CUT, "shard, whole tensors of other lengths", "values")
def _(group: Group, wrong: bool) -> None:
    lasp.linear_attention(*[lasp.shard(randn(1, 12 + 4 * wrong, H, K), group)] * 3, group=group)


# Meshes and groups --------------------------------------------------------------------------------------------------

MESH = "init_mesh, from_mesh, from_group"


def mesh_of(good: dict[str, int], bad: dict[str, Any]) -> Callable[[Group, bool], Any]:
    return lambda group, wrong: lasp.init_mesh(**(good | bad if wrong else good), device="cpu")


def group_of(**options: Any) -> Callable[[Group, bool], Any]:
    return lambda group, wrong: Group.from_mesh(lasp.init_mesh(sp=2, device="cpu"), **(options if wrong else {}))


CASES += [
    Case(MESH, "sp 3 of 2 ranks", mesh_of({"sp": 2}, {"sp": 3})),
    Case(MESH, "sp 1 against 2", mesh_of({"sp": 2}, {"sp": 1})),
    Case(MESH, "sp 4 against sp 2 x dp 2", mesh_of({"sp": 4}, {"sp": 2, "dp": 2}), ranks=4),
    Case(MESH, "an axis of 0", mesh_of({"sp": 2}, {"sp": 0})),
    Case(MESH, "an unknown axis", group_of(axis="seq")),
    Case(MESH, "another layout", group_of(layout="zigzag")),
    Case(MESH, "an unknown layout", group_of(layout="spiral")),
    Case(MESH, "without checks", group_of(checks=False)),
    Case(MESH, "heads", group_of(heads=2)),
    Case(MESH, "heads that do not divide", group_of(heads=3)),
    Case(
        MESH,
        "from_group on one rank, a call follows",
        lambda g, wrong: (Group.from_group() if wrong else None, linear(g)),
    ),
    Case(MESH, "init_mesh on one rank", lambda g, wrong: lasp.init_mesh(sp=2, device="cpu") if wrong else None),
]

# Gradients ----------------------------------------------------------------------------------------------------------

SYNC = "sync_gradients"


def with_gradients(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    return model


def layers(count: int, width: int = 4) -> nn.Module:
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(count)])


def matrices(*shapes: tuple[int, ...]) -> nn.Module:
    return nn.ParameterList([torch.zeros(shape) for shape in shapes])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "order of two matrices": (lambda: matrices((4, 6), (6, 4)), lambda: matrices((6, 4), (4, 6))),
    "bf16 against f16": (lambda: layers(1).bfloat16(), lambda: layers(1).half()),
    "f64": (lambda: layers(1), lambda: layers(1).double()),
    "a layer more": (lambda: layers(2), lambda: layers(3)),
    "a wider layer": (lambda: layers(1), lambda: layers(1, 8)),
    "a layer frozen": (lambda: layers(2), lambda: nn.Sequential(layers(1), layers(1).requires_grad_(False))),
    "another layer frozen": (
        lambda: nn.Sequential(layers(1), layers(1).requires_grad_(False)),
        lambda: nn.Sequential(layers(1).requires_grad_(False), layers(1)),
    ),
    "an empty model": (lambda: layers(1), nn.Sequential),
    "meta device": (lambda: layers(1), lambda: layers(1).to("meta")),
}
for NAME, PAIR in MODELS.items():

    @alike(SYNC, NAME)
    def _(group: Group, wrong: bool, pair: Any = PAIR) -> None:
        lasp.sync_gradients(with_gradients(pair[wrong]()), group)


@alike(SYNC, "f64 gradients of one parameter")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(matrices((4, 6), (6, 4)))
    if wrong:
        model[1] = nn.Parameter(model[1].double())
        model[1].grad = torch.ones_like(model[1])
    lasp.sync_gradients(model, group)


@alike(SYNC, "None for the model")
def _(group: Group, wrong: bool) -> None:
    lasp.sync_gradients(None if wrong else with_gradients(layers(1)), group)


@alike(SYNC, "a sparse gradient")
def _(group: Group, wrong: bool) -> None:
    table = nn.Embedding(10, 4, sparse=wrong)
    table(torch.tensor([1, 2])).sum().backward()
    lasp.sync_gradients(table, group)


@alike(SYNC, "NaN on one rank", "values")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(layers(1))
    model[0].weight.grad *= float("nan") if wrong else 1
    lasp.sync_gradients(model, group)


@alike(SYNC, "no gradient on one rank", "harmless")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(layers(1))
    if wrong:
        model[0].bias.grad = None
    lasp.sync_gradients(model, group)


@alike(SYNC, "called twice, a call follows")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(layers(1))
    for _i in range(2 if wrong else 1):
        lasp.sync_gradients(model, group)
    linear(group)


@alike(SYNC, "skipped, a call follows")
def _(group: Group, wrong: bool) -> None:
    if not wrong:
        lasp.sync_gradients(with_gradients(layers(1)), group)
    linear(group)


@alike(SYNC, "dp 2 x sp 2, a layer more", ranks=4)
def _(group: Group, wrong: bool) -> None:
    own = Group.from_mesh(lasp.init_mesh(sp=2, device="cpu"))
    lasp.sync_gradients(with_gradients(layers(3 if wrong else 2)), own)


@alike(SYNC, "one of two sequences is wrong", ranks=4)
def _(group: Group, wrong: bool) -> None:
    own = Group.from_mesh(lasp.init_mesh(sp=2, device="cpu"))
    linear(own, scale=2.0 if wrong else None)
    lasp.sync_gradients(with_gradients(layers(1)), own)


CLIP = "clip_grad_norm_"


def clip(group: Group | None, model: Any = None, max_norm: Any = 1.0) -> None:
    lasp.clip_grad_norm_(with_gradients(layers(1)) if model is None else model, max_norm, group)


@alike(CLIP, "NaN on one rank")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(layers(1))
    model[0].weight.grad *= float("nan") if wrong else 1
    clip(group, model)


@alike(CLIP, "inf on one rank")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(layers(1))
    model[0].weight.grad *= float("inf") if wrong else 1
    clip(group, model)


@alike(CLIP, "gradients not reduced")
def _(group: Group, wrong: bool) -> None:
    model = with_gradients(layers(1))
    model[0].weight.grad *= 3 if wrong else 1
    clip(group, model)


@alike(CLIP, "max_norm, other values")
def _(group: Group, wrong: bool) -> None:
    clip(group, max_norm=2.0 if wrong else 1.0)


@alike(CLIP, "text for max_norm")
def _(group: Group, wrong: bool) -> None:
    clip(group, max_norm="1" if wrong else 1.0)


@alike(CLIP, "no parameters on one rank")
def _(group: Group, wrong: bool) -> None:
    clip(group, [] if wrong else None)


@alike(CLIP, "group on one rank only, a call follows")
def _(group: Group, wrong: bool) -> None:
    clip(None if wrong else group)
    linear(group)


PARALLEL = "data_parallel"


def train(model: nn.Module) -> None:
    model(randn(2, 4)).sum().backward()


@alike(PARALLEL, "ddp against fsdp2")
def _(group: Group, wrong: bool) -> None:
    train(lasp.data_parallel(layers(1), group, "fsdp2" if wrong else "ddp"))


@alike(PARALLEL, "an unknown kind on one rank")
def _(group: Group, wrong: bool) -> None:
    train(lasp.data_parallel(layers(1), group, "zero" if wrong else "ddp"))


for KIND in ("ddp", "fsdp2"):
    for NAME in ("a layer more", "a wider layer"):

        @alike(PARALLEL, f"{KIND}, {NAME}")
        def _(group: Group, wrong: bool, kind: str = KIND, name: str = NAME) -> None:
            train(lasp.data_parallel(MODELS[name][wrong](), group, kind))


@alike(PARALLEL, "ddp, the forward skipped, a call follows")
def _(group: Group, wrong: bool) -> None:
    model = lasp.data_parallel(layers(1), group)
    if not wrong:
        train(model)
    linear(group)


@alike(PARALLEL, "ddp, an unused parameter on one rank, a call follows")
def _(group: Group, wrong: bool) -> None:
    model = lasp.data_parallel(layers(2), group)
    (model.module[0] if wrong else model)(randn(2, 4)).sum().backward()
    linear(group)


@alike(PARALLEL, "fsdp2, weights of another seed")
def _(group: Group, wrong: bool) -> None:
    torch.manual_seed(int(wrong))
    train(lasp.data_parallel(layers(1), group, "fsdp2"))


@alike(PARALLEL, "ddp, weights of another seed", "harmless")
def _(group: Group, wrong: bool) -> None:
    torch.manual_seed(int(wrong))
    train(lasp.data_parallel(layers(1), group))


# Wrapped models -----------------------------------------------------------------------------------------------------

WRAP = "parallelize, verify"


def llama(**options: Any) -> LlamaForCausalLM:
    config = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**config | {"num_attention_heads": 2} | options))


def without_cut(group: Group) -> dict[str, Any]:
    """A batch on which the ranks agree in the model; behind a cut each rank finds its own mistakes alone."""
    own = lasp.shard_batch(batch(False), group)
    del own["cut"]
    return own


def forward(model: Any, group: Group, **options: Any) -> Tensor:
    loss: Tensor = model(**without_cut(group) | options).loss
    loss.backward()
    return loss


def model_case(name: str, expects: str = "mistake", **options: Any) -> None:
    """The wrong rank's model is made otherwise."""

    @alike(WRAP, name, expects)
    def _(group: Group, wrong: bool) -> None:
        forward(lasp.parallelize(llama(**(options if wrong else {})), group), group)


model_case("a layer more", num_hidden_layers=2)
model_case("wider", hidden_size=32)
model_case("more heads", num_attention_heads=4)
model_case("fewer key heads", num_key_value_heads=1)
model_case("another vocabulary", vocab_size=60)
model_case("wider MLP", intermediate_size=32)


def input_case(name: str, change: Callable[[dict[str, Any]], dict[str, Any]], expects: str = "mistake") -> None:
    """The wrong rank gives its model other inputs."""

    @alike(WRAP, name, expects)
    def _(group: Group, wrong: bool) -> None:
        model = lasp.parallelize(llama(), group)
        own = without_cut(group)
        model(**own | (change(own) if wrong else {})).loss.backward()


input_case("an attention_mask", lambda b: {"attention_mask": torch.ones_like(b["input_ids"])})
input_case("no labels", lambda b: {"labels": None, "shift_labels": None})
input_case("labels without shift_labels", lambda b: {"shift_labels": None})
input_case("other positions", lambda b: {"position_ids": b["position_ids"] + 1})
input_case("no tokens", lambda b: {n: x[:, :0] for n, x in b.items() if isinstance(x, Tensor)})
input_case("a cache", lambda b: {"past_key_values": 1})
input_case("an id beyond the vocabulary", lambda b: {"input_ids": b["input_ids"] + 100})
input_case("num_items_in_batch", lambda b: {"num_items_in_batch": 3})


@alike(WRAP, "an fp64 model")
def _(group: Group, wrong: bool) -> None:
    model = lasp.parallelize(llama(), group)
    forward(model.double() if wrong else model, group)


@alike(WRAP, "an unknown method")
def _(group: Group, wrong: bool) -> None:
    forward(lasp.parallelize(llama(), group, attention="star" if wrong else "auto"), group)


@alike(WRAP, "another method")
def _(group: Group, wrong: bool) -> None:
    forward(lasp.parallelize(llama(), group, attention="gather" if wrong else "ring"), group)


@alike(WRAP, "group=None on one rank")
def _(group: Group, wrong: bool) -> None:
    forward(lasp.parallelize(llama(), None if wrong else group), group)


@alike(WRAP, "not parallelised on one rank")
def _(group: Group, wrong: bool) -> None:
    model = llama()
    if not wrong:
        lasp.parallelize(model, group)
    own = without_cut(group)
    model(input_ids=own["input_ids"], **({} if wrong else {k: v for k, v in own.items() if k != "input_ids"}))
    lasp.cross_entropy(**good_loss(), group=group)


@alike(WRAP, "the forward skipped, another batch follows")
def _(group: Group, wrong: bool) -> None:
    model = lasp.parallelize(llama(), group)
    own = without_cut(group)
    if not wrong:
        model(**own)
    lasp.shard_batch(batch(False), group)


@alike(WRAP, "generate on one rank")
def _(group: Group, wrong: bool) -> None:
    model = lasp.parallelize(llama(), group)
    if wrong:
        model.generate(torch.ones(1, 3, dtype=torch.long))
    forward(model, group)


@alike(WRAP, "a layer raises on one rank")
def _(group: Group, wrong: bool) -> None:
    model = lasp.parallelize(llama(), group)

    def fail(*_: Any) -> None:
        raise RuntimeError("a layer")

    if wrong:
        model.model.layers[0].mlp.register_forward_hook(fail)
    forward(model, group)


@alike(WRAP, "no_grad on one rank")
def _(group: Group, wrong: bool) -> None:
    model = lasp.parallelize(llama(), group)
    own = without_cut(group)
    with torch.no_grad() if wrong else contextlib.nullcontext():
        model(**own)


@alike(WRAP, "verify, other weights")
def _(group: Group, wrong: bool) -> None:
    torch.manual_seed(int(wrong))
    lasp.verify(llama(), group)


@alike(WRAP, "verify, another length")
def _(group: Group, wrong: bool) -> None:
    lasp.verify(llama(), group, seq_len=32 if wrong else 64)


# Our own models -----------------------------------------------------------------------------------------------------

OWN = "Linear-Llama3, Linear-RoBERTa's base"
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def own_model(name: str, expects: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    """The wrong rank's Linear-Llama3 is made otherwise."""

    @alike(OWN, name, expects)
    def _(group: Group, wrong: bool) -> None:
        torch.manual_seed(0)
        options = {"pattern": "L", "num_hidden_layers": 1} | (bad if wrong else good)
        torch.manual_seed(options.pop("seed", 0))
        model = LinearLlamaForCausalLM(LinearLlamaConfig(**SIZES, **options))
        lasp_batch = lasp.shard_batch(batch(False), group)
        model(**lasp_batch, group=group).loss.backward()


own_model("another mixer", "mistake", {"mixer": "gla"}, {"mixer": "retention"})
own_model("a layer more", "mistake", {}, {"num_hidden_layers": 2})
own_model(
    "another pattern", "mistake", {"num_hidden_layers": 2, "pattern": "LN"}, {"num_hidden_layers": 2, "pattern": "NL"}
)
own_model("mixers that differ in decay", "mistake", {"mixer": "retention"}, {"mixer": "lightning"})
own_model("weights of another seed", "values", {}, {"seed": 1})


@alike(OWN, "RoBERTa, another width")
def _(group: Group, wrong: bool) -> None:
    model = LinearRobertaModel(LinearRobertaConfig(**SIZES | {"hidden_size": 32 if wrong else 16}, num_hidden_layers=1))
    model(input_ids=lasp.shard_batch({"input_ids": batch(False)["input_ids"]}, group)["input_ids"], group=group)
