"""Data x sequence parallel, 2 x 2: the curve of one process, whoever reduces the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

import lasp
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from tests.hf_models import make

pytestmark = pytest.mark.mpi
IDS = torch.randint(97, (5, 2, 37), generator=torch.Generator().manual_seed(0))  # five steps of two sequences
Backward = Callable[[Tensor], Any]
KINDS = ["plain", "checkpointing", "ddp", "fsdp2"]
CASES = [
    *product(["LinearLlama", "qwen3_5"], KINDS),
    ("qwen3_5", "accelerate"),
    ("qwen3_5 with LoRA", "plain"),
    ("LinearLlama", "fsdp2, less memory"),
    pytest.param("qwen3_5 with LoRA", "fsdp2, less memory", marks=pytest.mark.slow),
    pytest.param("qwen3_5", "ddp, less memory", marks=pytest.mark.slow),
    *(pytest.param("bamba", kind, marks=pytest.mark.slow) for kind in KINDS),
    *(pytest.param("qwen3_5 with LoRA", kind, marks=pytest.mark.slow) for kind in KINDS[1:]),
]


def build(name: str) -> Any:
    """A model in fp64, the same on every rank."""
    if name == "LinearLlama":
        torch.manual_seed(0)
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = LinearLlamaConfig(**sizes, num_attention_heads=4, pattern=["gla", "softmax"])
        return LinearLlamaForCausalLM(config).double()
    if name == "qwen3_5 with LoRA":
        peft = pytest.importorskip("peft")
        adapters = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return peft.get_peft_model(make("qwen3_5"), adapters).double()
    return make(name)


@pytest.fixture(scope="module")
def group(mesh_of) -> lasp.SequenceGroup:
    return lasp.SequenceGroup.from_mesh(mesh_of(sp=2))


def curve(model: nn.Module, loss_of: Callable[[Tensor], Tensor], backward: Backward) -> list[Any]:
    """Losses and gradient norms of five steps, clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for ids in IDS:
        loss = loss_of(ids)
        optimizer.zero_grad()
        backward(loss)
        norm = lasp.clip_grad_norm_(model, 0.5)
        optimizer.step()
        seen.append((loss.item(), norm.item()))
    return seen


def distribute(model: Any, group: lasp.SequenceGroup, kind: str) -> tuple[nn.Module, Backward]:
    """What to call in the model's place, and what to do with its loss."""
    kind, less, _ = kind.partition(", less memory")
    if less:
        model = lasp.checkpoint_activations(lasp.tile_mlp(lasp.fuse_loss(model), tokens=5), offload=True)
    if kind in ("ddp", "fsdp2"):
        return lasp.data_parallel(model, group, kind), Tensor.backward
    if kind == "accelerate":
        accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
        return accelerator.prepare(model), lambda loss: accelerator.backward(group.size * loss)
    if kind == "checkpointing":
        model.activation_checkpointing_enable()

    def backward(loss: Tensor) -> None:
        loss.backward()
        lasp.sync_gradients(model, group)

    return model, backward


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_has_the_curve_of_one_process(world, once, group: lasp.SequenceGroup, name: str, kind: str) -> None:
    model = build(name)
    own = copy.deepcopy(model)

    def whole_loss(ids: Tensor) -> Tensor:  # transformers would compute it in fp32
        return lasp.cross_entropy(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])

    expected, trained = once(lambda: (curve(model, whole_loss, Tensor.backward), list(model.parameters())))
    options = {"group": group} if name == "LinearLlama" else {}
    own = own if options else lasp.parallelize(own, group)
    parallel, backward = distribute(own, group, kind)
    replica = slice(world.rank // 2, world.rank // 2 + 1)

    def loss_of(ids: Tensor) -> Tensor:
        batch = {"input_ids": ids[replica], "labels": ids[replica]}
        return parallel(**lasp.shard_batch(batch, group), **options).loss

    seen = curve(own, loss_of, backward)
    losses = torch.tensor(world.allgather([loss for loss, _ in seen]), dtype=torch.float64)
    assert torch.equal(losses[0::2], losses[1::2])  # the ranks of a sequence know its loss
    assert losses.mean(0).tolist() == pytest.approx([loss for loss, _ in expected], abs=1e-9)
    assert [norm for _, norm in seen] == pytest.approx([norm for _, norm in expected], abs=1e-9)
    for parameter, right in zip(own.parameters(), trained, strict=True):
        whole = parameter.full_tensor() if "fsdp2" in kind else parameter
        torch.testing.assert_close(whole, right, rtol=0, atol=1e-9)
    if "fsdp2" in kind:
        held = sum(parameter.to_local().numel() for parameter in own.parameters())
        assert held < 0.3 * sum(parameter.numel() for parameter in model.parameters())


class Layer(nn.Module):
    """What every token passes, and an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.expert = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, routed: bool) -> Tensor:
        return self.dense(x) + (self.expert(x) if routed else 0)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor, routed: bool) -> Tensor:
        return self.layers[1](self.layers[0](x, True), routed).square().sum()


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="torch before 2.13")
def test_an_expert_that_some_ranks_miss_is_reduced_by_all(world, group: lasp.SequenceGroup) -> None:
    inputs = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))
    whole, own = Mixture(), lasp.data_parallel(Mixture(), group, "fsdp2")
    (sum(whole(x, rank == 3) for rank, x in enumerate(inputs)) / 2).backward()
    own(inputs[world.rank], world.rank == 3).backward()
    for parameter, expected in zip(own.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)


@pytest.mark.parametrize("name", ["LinearLlama", "qwen3_5"])
def test_a_sharded_model_is_saved_whole(group, world, tmp_path, name):
    from transformers import AutoModelForCausalLM

    folder = Path(world.bcast(str(tmp_path))) / "saved"
    model = lasp.data_parallel(lasp.parallelize(build(name), group), group, "fsdp2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    lasp.save_pretrained(model, folder)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for (path, found), expected in zip(read.named_parameters(), build(name).parameters(), strict=True):
        torch.testing.assert_close(found, expected + 1.0, rtol=0, atol=1e-12, msg=path)
    with pytest.raises(ValueError, match=r"cannot save to .*\(rank 0 of 4\)"):
        lasp.save_pretrained(model, folder / "config.json" / "under a file")
