"""Memory outside the mixers: of the loss, and the longest sequence that trains in so many GiB per rank, lever by lever.

Ranks are gloo processes of this machine, in fp32 with AdamW. What they hold until the first layer has its gradients is
affine in their tokens: what is measured at two lengths gives the longest one, and with --train a length on either side
of it is trained as well. What follows (the embedding's gradient, the sum over ranks) takes hundreds of MB at any
length: more than short sequences do before it, less than long ones. Where checkpoints are offloaded they go to a file
in memory in the place of a GPU's host, and are not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import lasp
from lasp.kernels import head
from lasp.launch.bench.resident import begin_peak, status
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import machine

LEVERS = ("plain", "fused loss", "checkpoints", "tiles", "offload")
SIZES: dict[str, Any] = {
    "vocab_size": 50304, "hidden_size": 320, "intermediate_size": 832, "num_hidden_layers": 12,
    "num_attention_heads": 5, "mixer": "gated_deltanet", "pattern": "LLLN", "tie_word_embeddings": True,
}  # fmt: skip
# Freed tensors go back to the system at once, and what a process holds is what is in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how large it is."""
    parser.add_argument("--part", choices=["loss", "lengths"], nargs="+", default=["loss", "lengths"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--levers", choices=LEVERS, nargs="+", default=[*LEVERS], help="the last one of those in turn")
    parser.add_argument("--gib", type=float, default=4.0, help="of each rank")
    parser.add_argument("--tokens", type=int, nargs=2, default=[4096, 6144], help="of each rank, where it is measured")
    parser.add_argument("--train", action="store_true", help="98 %% and 103 %% of what follows as well")
    parser.add_argument(
        "--tile", type=int, default=512, help="tokens of a tile of an MLP or of logits, not over --tokens"
    )
    parser.add_argument("--loss", type=int, nargs=3, default=[131072, 8192, 256], metavar=("V", "T", "D"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of the loss; the two peaks of each lever and number of ranks, and the longest sequence that follows."""
    found: dict[str, Any] = {"machine": machine(1), "gib": options.gib, "loss": {}, "cells": []}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__, "lasp.models"])  # what takes seconds, once
    with mock.patch.dict(os.environ, ENVIRONMENT):
        if "loss" in options.part:
            found["shape"] = options.loss
            for kind in ("fused", "plain"):
                with processes.Pool(1) as pool:
                    found["loss"][kind] = pool.apply(_loss_bytes, (kind, *options.loss))
        for ranks in options.ranks if "lengths" in options.part else ():
            for lever in options.levers:
                measured = [_peaks(ranks, lever, tokens, options.tile) for tokens in options.tokens]
                peaks, whole = (list(kind) for kind in zip(*measured, strict=True))
                cell = {"ranks": ranks, "lever": lever, "tokens": options.tokens, "peaks": peaks, "whole": whole}
                cell["longest"] = longest = _longest(options, peaks, ranks)
                if options.train and longest >= 100 * ranks:
                    around = [longest * percent // (100 * ranks) for percent in (98, 103)]
                    cell["trained"] = [(t, _peaks(ranks, lever, t, options.tile)[1]) for t in around]
                found["cells"].append(cell)
    return found


def _longest(options: argparse.Namespace, peaks: list[int], ranks: int) -> int:
    """Tokens of the whole sequence."""
    slope = (peaks[1] - peaks[0]) / (options.tokens[1] - options.tokens[0])
    return int(ranks * (options.tokens[0] + (options.gib * 2**30 - peaks[0]) / slope))


def show(figures: dict[str, Any]) -> None:
    """Two tables."""
    if figures["loss"]:
        vocabulary, tokens, dim = figures["shape"]
        print(f"loss, forward and backward: vocabulary {vocabulary}, {tokens} tokens, hidden {dim}, fp32")
        print(
            markdown(["", "MB over inputs and gradients"], [[k, f"{v / 1e6:.0f}"] for k, v in figures["loss"].items()])
        )
    if figures["cells"]:
        ranks = sorted({cell["ranks"] for cell in figures["cells"]})
        levers = list(dict.fromkeys(cell["lever"] for cell in figures["cells"]))
        longest = {(cell["lever"], cell["ranks"]): cell["longest"] for cell in figures["cells"]}
        print(f"longest sequence in {figures['gib']} GiB per rank")
        headings = ["levers", *(f"{n} ranks" if n > 1 else "1 rank" for n in ranks)]
        print(markdown(headings, [[lever, *(longest[lever, n] for n in ranks)] for lever in levers]))
        for cell in figures["cells"]:
            for tokens, peak in cell.get("trained", ()):
                print(f"{cell['lever']}, trained on {cell['ranks']} x {tokens} tokens: {peak / 2**30:.3f} GiB per rank")
    told = figures["machine"]
    print(f"\n{told['chip']}, torch {told['torch']}, gloo")


# The loss -----------------------------------------------------------------------------------------------------------


def _loss_bytes(kind: str, vocabulary: int, tokens: int, dim: int) -> int:
    """What a forward and backward add to a process that has the inputs, without the gradients that they leave."""
    torch.set_num_threads(1)

    def inputs(vocabulary: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = torch.randn(tokens, dim), torch.randn(vocabulary, dim)
        return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (tokens,))

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
        if kind == "fused":
            lasp.linear_cross_entropy(hidden, weight, labels).backward()
        else:
            lasp.cross_entropy(hidden @ weight.T, labels).backward()

    run(*inputs(64, 64))  # the libraries' own buffers
    given = inputs(vocabulary, tokens)
    before = begin_peak()
    run(*given)
    return status("VmHWM") - before - sum(x.nbytes for x in given[:2])


# Lengths ------------------------------------------------------------------------------------------------------------


def _peaks(ranks: int, lever: str, tokens: int, tile: int) -> tuple[int, int]:
    """The most memory of any rank, until the first layer has its gradients, and in a whole training step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (ranks, folder, lever, tokens, tile), nprocs=ranks, start_method="forkserver")
        told = [file.read_text(encoding="ascii").split() for file in Path(folder).glob("peak*")]
        layers, whole = (max(map(int, kind)) for kind in zip(*told, strict=True))
        return layers, whole


def _rank(rank: int, ranks: int, folder: str, lever: str, tokens: int, tile: int) -> None:
    torch.set_num_threads(1)
    head.TOKENS = tile
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(minutes=30)
    )
    group = lasp.SequenceGroup.from_group()
    model, optimizer = _model(group, lever, tile)
    _backward(model, group, 64 * ranks)  # the libraries' buffers
    optimizer.step()  # its states, which outlive a step
    optimizer.zero_grad(set_to_none=False)  # the gradients are there from the beginning, as in accumulation
    peaks: list[int] = []

    def watch(_: Any, __: Any, embedded: Tensor) -> None:
        embedded.register_hook(lambda _: peaks.append(_held()))

    model.get_input_embeddings().register_forward_hook(watch)
    begin_peak()
    _backward(model, group, tokens * ranks)
    Path(folder, f"peak{rank}").write_text(f"{peaks[0]} {_held()}", encoding="ascii")
    lasp.shutdown()


def _held() -> int:
    """The most so far; the libraries are no tensors."""
    return status("VmHWM") - status("RssFile")


def _model(group: lasp.SequenceGroup, lever: str, tile: int) -> tuple[Any, torch.optim.Optimizer]:
    """With this lever, and all those before it."""
    from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM

    torch.manual_seed(0)
    model = lasp.parallelize(LinearLlamaForCausalLM(LinearLlamaConfig(**SIZES)).train(), group)
    levers = {
        "plain": lambda: None,
        "fused loss": lambda: lasp.fuse_loss(model),
        "checkpoints": lambda: lasp.checkpoint_activations(model, offload=lever == "offload"),
        "tiles": lambda: lasp.tile_mlp(model, tile),
    }
    for pull in [*levers.values()][: LEVERS.index(lever) + 1]:
        pull()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def _backward(model: Any, group: lasp.SequenceGroup, tokens: int) -> None:
    """All of a training step that depends on its tokens."""
    ids = torch.randint(SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(1))
    with mock.patch("lasp.memory.checkpoints.save_on_cpu", _save_in_files):
        model(**lasp.shard_batch({"input_ids": ids, "labels": ids}, group)).loss.backward()
    lasp.sync_gradients(model, group)


@contextmanager
def _save_in_files(pin_memory: bool) -> Iterator[None]:
    """`save_on_cpu` of a machine whose CPU is the device: elsewhere is where no page is this process's."""

    def pack(x: Tensor) -> tuple[Any, np.dtype, torch.Size]:
        array = x.detach().contiguous().numpy()
        file = tempfile.TemporaryFile(dir="/dev/shm", buffering=0)  # noqa: SIM115 (as long as it is kept)
        array.tofile(file)
        return file, array.dtype, x.shape

    def unpack(saved: tuple[Any, np.dtype, torch.Size]) -> Tensor:
        file, dtype, shape = saved
        file.seek(0)
        return torch.from_numpy(np.fromfile(file, dtype)).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
