"""Gradients of ranks whose models, calls or meshes are not what one would think: right, or refused by every rank."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lasp

pytestmark = pytest.mark.mpi
WRONG_RANK = 2  # of the second sequence of two


@pytest.fixture(scope="module")
def group(mesh_of) -> lasp.SequenceGroup:
    return lasp.SequenceGroup.from_mesh(mesh_of(sp=2))


def layers(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers from width to width, the same on every rank, each gradient filled with its parameter's height."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(widths))).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, parameter.shape[0])
    return model


def refused_by_all(world, message: str, call: Callable[[], Any]) -> None:
    """Every rank raises the same ValueError, one line that says `message`."""
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(set(world.allgather(str(caught.value)))) == 1


def swapped() -> nn.Module:
    model = layers(4, 4, 4)
    return nn.Sequential(*reversed(model))


def frozen(place: int) -> nn.Module:
    model = layers(4, 4, 4)
    model[place].requires_grad_(False)
    model.zero_grad()
    return model


def renamed() -> nn.Module:
    return nn.ModuleDict({"a": layers(4, 4, 4)})


def moved() -> nn.Module:
    model = layers(4, 4, 4)
    model[0].to("meta")
    model[1].to("meta")
    return model


# What WRONG_RANK has where the others have layers(4, 4, 4), and what is said of it.
OTHER_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "a layer more": (
        lambda: layers(4, 4, 4, 4),
        "ranks disagree on parameter 4: rank 0: none, rank 1: none, rank 2: 2.w",
    ),
    "a layer less": (lambda: layers(4, 4), "parameter 2: rank 0: 1.weight [4, 4] torch.float32 on cpu"),
    "wider": (lambda: layers(4, 5, 4), "parameter 0: rank 0: 0.weight [4, 4]"),
    "half": (lambda: layers(4, 4, 4, dtype=torch.bfloat16), "rank 2: 0.weight [4, 4] torch.bfloat16 on cpu, rank 3"),
    "double": (lambda: layers(4, 4, 4, dtype=torch.float64), "rank 2: 0.weight [4, 4] torch.float64 on cpu, rank 3"),
    "another layer frozen": (lambda: frozen(1), "rank 2: 1.weight [4, 4] torch.float32 on cpu, frozen"),
    "no name alike": (renamed, "rank 2: a.0.weight"),
    "on no device": (moved, "rank 2: 0.weight [4, 4] torch.float32 on meta"),
    "empty": (nn.Identity, "Identity has no parameters (rank 2 of 4)"),
    "none": (lambda: None, "model must be a torch.nn.Module, got NoneType (rank 2 of 4)"),
    "parameters": (lambda: list(layers(4, 4, 4).parameters()), "model must be a torch.nn.Module, got list (rank 2"),
}


@pytest.mark.parametrize("wrong", OTHER_MODELS)
def test_ranks_with_other_models_are_told_which_parameter(world, group, wrong: str) -> None:
    make, message = OTHER_MODELS[wrong]
    model = make() if world.rank == WRONG_RANK else layers(4, 4, 4)
    for operation in (lasp.sync_gradients, lasp.data_parallel):
        refused_by_all(world, message, lambda operation=operation: operation(model, group))
    lasp.sync_gradients(layers(4, 4, 4), group)  # the ranks are still together


def test_the_order_of_equal_sizes_counts(world, group) -> None:
    shapes = [(6, 4), (4, 6)][:: -1 if world.rank == WRONG_RANK else 1]
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    refused_by_all(world, "parameter 0: rank 0: 0 [6, 4] torch.float32", lambda: lasp.sync_gradients(model, group))


@pytest.mark.parametrize("kind", [None, "fsdp2"])
@pytest.mark.parametrize("spoil", ["seed", "one bit", "a frozen weight"])
def test_models_of_other_values_are_refused_at_first(world, group, kind: str | None, spoil: str) -> None:
    def model() -> nn.Module:
        return frozen(0) if spoil == "a frozen weight" else layers(4, 4, 4)

    own = model()
    if world.rank == WRONG_RANK and spoil == "seed":
        torch.manual_seed(7)
        own = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    elif world.rank == WRONG_RANK:
        own[0].weight.data[1, 2].nextafter_(torch.tensor(9.0))
    names = "0.weight, 0.bias, 1.weight, 1.bias differ" if spoil == "seed" else "0.weight differs"
    message = f"the ranks hold other models: {names} on rank 2 from rank 0's"

    def call(model: nn.Module) -> Any:
        return lasp.data_parallel(model, group, kind) if kind else lasp.sync_gradients(model, group)

    refused_by_all(world, message, lambda: call(own))
    call(model())


def test_ddp_sends_the_values_of_rank_0(world, group) -> None:
    torch.manual_seed(world.rank)
    model = nn.Linear(3, 3)
    lasp.data_parallel(model, group)
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.Linear(3, 3).weight)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["ddp", "fsdp2"], "ranks disagree on kind: rank 0: ddp, rank 1: ddp, rank 2: fsdp2, rank 3: ddp"),
        (["fsdp2", "ddp2"], "kind must be one of ddp, fsdp2, got 'ddp2'; did you mean 'ddp'? (rank 2 of 4)"),
        (["ddp", ["ddp"]], "kind must be one of ddp, fsdp2, got ['ddp'] (rank 2 of 4)"),
    ],
)
def test_kinds_that_differ_are_refused(world, group, kinds: list[Any], message: str) -> None:
    kind = kinds[world.rank == WRONG_RANK]
    refused_by_all(world, message, lambda: lasp.data_parallel(nn.Linear(2, 2), group, kind))


@pytest.mark.parametrize(
    ("model", "max_norm", "message"),
    [
        (None, 2.0, "ranks disagree on max_norm: rank 0: 1.0, rank 1: 1.0, rank 2: 2.0"),
        (None, "1", "max_norm must be a number of at least 0, got '1' (rank 2 of 4)"),
        (None, math.nan, "max_norm must be a number of at least 0, got nan (rank 2 of 4)"),
        (None, -1, "max_norm must be a number of at least 0, got -1 (rank 2 of 4)"),
        ([], 1.0, "there is no parameter to clip (a generator is empty after its first use) (rank 2 of 4)"),
        (nn.Identity(), 1.0, "there is no parameter to clip"),
        ([{"params": []}], 1.0, "model must be a torch.nn.Module or its parameters, got dict (rank 2 of 4)"),
        (7, 1.0, "TypeError"),
    ],
)
def test_clipping_is_agreed_on(world, group, model: Any, max_norm: Any, message: str) -> None:
    own = layers(4, 4)
    lasp.sync_gradients(own, group)
    if world.rank == WRONG_RANK:
        refused_by_all(world, message, lambda: lasp.clip_grad_norm_(own if model is None else model, max_norm, group))
    else:
        refused_by_all(world, message, lambda: lasp.clip_grad_norm_(own, 1.0, group))


@pytest.mark.parametrize(("wrong", "told"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "inf")])
def test_unfinite_gradients_of_one_rank_are_told(world, group, wrong: float, told: str) -> None:
    model = layers(4, 4, 4)
    if world.rank == WRONG_RANK:
        model[1].weight.grad[0, 0] = wrong
    refused_by_all(world, f", {told}, ", lambda: lasp.clip_grad_norm_(model, 1.0, group))
    with pytest.warns(RuntimeWarning, match=r"of rank 2 \(first 1.weight\) are nan or inf") as warned:
        lasp.sync_gradients(model, group)
    assert [w.filename for w in warned] == [__file__]
    assert not lasp.clip_grad_norm_(model, 1.0, group).isfinite()  # of every rank alike, for the loop to judge


def test_a_sum_that_overflows_is_told(world, group) -> None:
    model = layers(4, 4, dtype=torch.float16)
    model[0].bias.grad.fill_(40000)
    with pytest.warns(RuntimeWarning, match="of every rank are finite, and their sum is nan or inf"):
        lasp.sync_gradients(model, group)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_norm_of_halves_has_the_digits_of_fp32(world, group, dtype: torch.dtype) -> None:
    model = nn.Linear(301, 301, bias=False).to(dtype)
    model.weight.grad = torch.full_like(model.weight, 256)
    norm = lasp.clip_grad_norm_(model, 1e9, group)
    assert norm.item() == 301 * 256  # fp16 ends at 65504, bf16 would round to 76800


# --- once per optimizer step ------------------------------------------------------------------------------------------


def step(model: nn.Module, group: lasp.SequenceGroup) -> float:
    """A backward over 2 of a sequence's 4 tokens: the gradient of a weight of 1 is 4 after the sum."""
    model(torch.ones(2, 1)).sum().backward()
    return model.weight.grad.item()


def ones() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    return model


AGAIN = "the gradients of weight hold a sum over the ranks already: lasp.sync_gradients comes once per optimizer step"


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_accumulation_is_summed_once(world, group, steps: int) -> None:
    model = ones()
    for _ in range(steps):
        step(model, group)
    lasp.sync_gradients(model, group)
    assert model.weight.grad.item() == 4 * steps
    step(model, group)
    refused_by_all(world, AGAIN, lambda: lasp.sync_gradients(model, group))


@pytest.mark.parametrize("between", ["nothing", "clip", "scale", "zero one rank"])
def test_a_second_sum_is_refused(world, group, between: str) -> None:
    model = ones()
    step(model, group)
    lasp.sync_gradients(model, group)
    if between == "clip":
        lasp.clip_grad_norm_(model, 0.5, group)
    elif between == "scale":
        model.weight.grad.mul_(0.5)
    elif between == "zero one rank" and world.rank == WRONG_RANK:
        model.zero_grad()
    refused_by_all(world, AGAIN, lambda: lasp.sync_gradients(model, group))


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.5),
    "momentum": lambda parameters: torch.optim.SGD(parameters, 0.5, momentum=0.9, weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True, maximize=True),
}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "by hand", "none"])
def test_steps_follow_steps(world, group, optimizer: str, to_none: bool) -> None:
    model = ones()
    own = OPTIMIZERS[optimizer](model.parameters()) if optimizer in OPTIMIZERS else None
    for _ in range(3):
        for micro in range(2):
            assert step(model, group) == 2 * (micro + 1)  # zeroed before
        lasp.sync_gradients(model, group)
        assert model.weight.grad.item() == 8
        lasp.clip_grad_norm_(model, 1.0, group)
        if own is not None:
            own.step()
            own.zero_grad(set_to_none=to_none)
            continue
        if optimizer == "by hand":
            model.weight.data -= 0.1 * model.weight.grad.data
        model.weight.grad = None if to_none else model.weight.grad.data.zero_()


def test_a_rank_that_misses_a_parameter_keeps_its_zeros(world, group) -> None:
    model = nn.ModuleList([ones(), ones()])
    for _ in range(3):
        step(model[0], group)
        if world.rank != WRONG_RANK:
            step(model[1], group)
        lasp.sync_gradients(model, group)
        assert [layer.weight.grad.item() for layer in model] == [4, 3]
        model.zero_grad(set_to_none=False)


def test_copies_and_pickles_are_models_of_their_own(world, group) -> None:
    model = ones()
    step(model, group)
    lasp.sync_gradients(model, group)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.zero_grad()
        if world.rank == WRONG_RANK:
            other.weight.data += 1
        step(other, group)
        refused_by_all(world, "weight differs on rank 2", lambda other=other: lasp.sync_gradients(other, group))


def test_a_gradient_with_a_graph_is_refused(world, group) -> None:
    model = ones()
    model(torch.ones(2, 1)).square().sum().backward(create_graph=True)
    refused_by_all(world, "weight has gradients with a graph", lambda: lasp.sync_gradients(model, group))
    model.zero_grad()


# --- what reduces gradients already -----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["wrapper", "inside", "a part", "own wrapper", "fsdp2"])
def test_a_model_whose_backward_reduces_is_refused(world, group, given: str) -> None:
    model = layers(4, 4, 4)
    model.zero_grad()
    if given == "own wrapper":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = lasp.data_parallel(model, group, "fsdp2" if given == "fsdp2" else "ddp")
    asked = {"inside": model, "a part": model[1]}.get(given, wrapped)
    wrapped(torch.ones(2, 4)).sum().backward()
    for call in (lasp.sync_gradients, lasp.data_parallel):
        refused_by_all(world, "whose backward reduces its gradients by itself", lambda call=call: call(asked, group))


def test_a_model_whose_wrapper_is_gone_is_free(world, group) -> None:
    model = ones()
    wrapped = lasp.data_parallel(model, group)
    assert step(wrapped.module, group) == 2  # DDP reduces what went through its own forward
    del wrapped
    model.zero_grad()
    step(model, group)
    lasp.sync_gradients(model, group)
    assert model.weight.grad.item() == 4


# --- kinds of tensors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [WRONG_RANK], [0, 1]])
def test_sparse_gradients_are_refused(world, group, ranks: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 4)})
    if world.rank in ranks:
        model["head"](model["table"](torch.tensor([1, 2]))).sum().backward()
    refused_by_all(world, "table.weight has sparse gradients", lambda: lasp.sync_gradients(model, group))
    refused_by_all(world, "has sparse gradients", lambda: lasp.clip_grad_norm_(model, 1.0, group))
    for kind in ("ddp", "fsdp2"):
        refused_by_all(
            world, "table: gradients are reduced dense", lambda kind=kind: lasp.data_parallel(model, group, kind)
        )


class Mixer(nn.Module):
    """A layer that keeps one parameter in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.proj = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x * self.A_log.exp().to(x.dtype))


@pytest.mark.parametrize("named", ["layers.0.A_log", "A_log", "none"])
def test_units_of_two_dtypes_are_refused_by_name(world, group, named: str) -> None:
    torch.manual_seed(0)
    if named == "layers.0.A_log":
        model: nn.Module = nn.ModuleDict({"layers": nn.ModuleList([Mixer(), nn.Linear(4, 4).bfloat16()])})
    elif named == "A_log":
        model = Mixer()
    else:  # a unit of its own, and a frozen one: FSDP2 takes both
        model = nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleList([nn.Linear(4, 4).bfloat16(), Mixer()]))
        model[1][1].A_log.requires_grad_(False)
        lasp.data_parallel(model, group, "fsdp2")
        y = model[1][1](model[1][0](model[0][0](torch.ones(2, 4)).bfloat16()))
        y.sum().backward()
        assert lasp.clip_grad_norm_(model, 1.0, group) > 0
        return
    message = f"of another than most: {named} (torch.float32)"
    refused_by_all(world, message, lambda: lasp.data_parallel(model, group, "fsdp2"))
    lasp.data_parallel(model, group, "ddp")


def tensor_parallel(mesh: Any) -> nn.Module:
    model = mixed()
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return model


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)).double()


X = torch.randn(1, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_tensor_parallelism_beside_sequence_parallelism(world, mesh_of, kind: str) -> None:
    mesh = mesh_of(sp=2, tp=2)
    group = lasp.SequenceGroup.from_mesh(mesh)
    model, whole = tensor_parallel(mesh), mixed()
    if kind == "fsdp2":
        lasp.data_parallel(model, group, kind)
    for max_norm in (1e9, 0.1):
        whole.zero_grad()
        model.zero_grad()
        whole(X).pow(3).sum().backward()
        model(lasp.shard(X, group)).pow(3).sum().backward()
        if kind == "plain":
            lasp.sync_gradients(model, group)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        torch.testing.assert_close(lasp.clip_grad_norm_(model, max_norm, group), expected)
        for own, right in zip(model.parameters(), whole.parameters(), strict=True):
            found = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
            torch.testing.assert_close(found, right.grad, rtol=1e-12, atol=1e-12)
    if kind == "plain":
        refused_by_all(world, "ddp takes no DTensors (0.weight, 0.bias", lambda: lasp.data_parallel(model, group))


def test_a_model_cut_over_the_replicas_is_refused(world, own_groups) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sp", "tensor"))
    group = lasp.SequenceGroup.from_mesh(mesh)
    model = mixed()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()})
    message = "0.weight is a DTensor over axes ('tensor',) of ranks that share sequences or are replicas"
    for call in (lasp.sync_gradients, lasp.data_parallel):
        with pytest.raises(ValueError) as caught:
            call(model, group)
        assert message in str(caught.value)


# --- meshes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axes", "replicas", "kinds"),
    [
        ((2, 2), ("data", "sp"), [[0, 1], [2, 3]], [None, "ddp", "fsdp2"]),
        ((2, 2), ("sp", "dp"), [[0, 2], [1, 3]], [None, "ddp", "fsdp2"]),
        ((2, 2, 1), ("replica", "shard", "sp"), [[0], [1], [2], [3]], [None]),
        ((1, 2, 2), ("replica", "sp", "shard"), [[0, 2], [1, 3]], [None, "ddp"]),
        ((2, 2), ("sp", "tp"), [[0, 2]], [None, "fsdp2"]),
        ((2, 2), ("sp", "pp"), [[0, 2]], [None]),
    ],
)
def test_every_axis_but_those_of_the_model_holds_replicas(
    world, own_groups, shape: tuple[int, ...], axes: tuple[str, ...], replicas: list[list[int]], kinds: list[Any]
) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
    if len(replicas) * len(replicas[0]) < 4 and world.rank % 2:  # the other ranks of the model's axis
        replicas = [[rank + 1 for rank in sequence] for sequence in replicas]
    inputs = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    whole = nn.Linear(5, 2).double()
    model = copy.deepcopy(whole)
    ranks = [rank for sequence in replicas for rank in sequence]
    (sum(whole(inputs[rank]).square().sum() for rank in ranks) / len(replicas)).backward()
    for given in (mesh, mesh["sp"]):  # one axis of it knows the others
        group = lasp.SequenceGroup.from_mesh(given)
        for kind in kinds:
            own = copy.deepcopy(model)
            called = lasp.data_parallel(own, group, kind) if kind else own
            called(inputs[world.rank]).square().sum().backward()
            if not kind:
                lasp.sync_gradients(own, group)
            for parameter, right in zip(own.parameters(), whole.parameters(), strict=True):
                found = parameter.grad.full_tensor() if kind == "fsdp2" else parameter.grad
                torch.testing.assert_close(found, right.grad, rtol=1e-13, atol=1e-13)
