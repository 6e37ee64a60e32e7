"""Softmax attention over ranks: our methods and layouts, and the ring of ring-attention-pytorch.

Ranks are gloo processes of this machine. Forward and backward, causal, fp32; times are medians of interleaved rounds,
each as long as its slowest rank.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lasp
from lasp.launch.bench.timing import Contestant, compared, interleave, machine
from lasp.parallel import collectives
from lasp.parallel.layout import Layout
from lasp.parallel.methods import Method

OURS: dict[str, tuple[Method, Layout]] = {
    "lasp ring, zigzag": ("ring", "zigzag"),
    "lasp ring, contiguous": ("ring", "contiguous"),
    "lasp gather, zigzag": ("gather", "zigzag"),
    "lasp ulysses, contiguous": ("ulysses", "contiguous"),
}
# Its stripes balance the causal mask as our zigzag does.
PEERS = {"ring-attention-pytorch ring": False, "ring-attention-pytorch striped": True}
BUCKET = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    """The shape, and the numbers of ranks."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=8192, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of every contestant at every number of ranks."""
    cores = torch.get_num_threads()
    runs = {}
    for ranks in options.ranks:
        shape = (1, options.tokens // ranks, options.heads, options.dim)
        with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
            found = manager.dict()
            arguments = (ranks, max(1, cores // ranks), f"file://{folder}/store", shape, options.repeat, found)
            mp.spawn(_rank, arguments, nprocs=ranks)
            seconds = dict(found)
        peer = min(PEERS, key=seconds.__getitem__)
        ring = seconds["lasp ring, zigzag"]
        runs[str(ranks)] = {
            "seconds": seconds,
            "best_peer": peer,
            "times_faster": seconds[peer] / ring,
            "contiguous_over_zigzag": seconds["lasp ring, contiguous"] / ring,
        }
    whole = {"tokens": options.tokens, "heads": options.heads, "dim": options.dim}
    return {"machine": machine(cores), "shape": whole, "ranks": runs}


def show(figures: dict[str, Any]) -> None:
    """The table, and the two ratios that matter."""
    shape = ", ".join(f"{name} {value}" for name, value in figures["shape"].items())
    table = Table(title=f"causal attention, forward + backward, {shape}, fp32: seconds")
    table.add_column("contestant")
    for ranks in figures["ranks"]:
        table.add_column(f"{ranks} ranks", justify="right")
    for name in (*OURS, *PEERS):
        table.add_row(name, *(f"{run['seconds'][name]:.3f}" for run in figures["ranks"].values()))
    console = Console()
    console.print(table)
    for ranks, run in figures["ranks"].items():
        console.print(
            f"{ranks} ranks: our ring on zigzag is {compared(run['times_faster'], run['best_peer'])} and "
            f"{compared(run['contiguous_over_zigzag'], 'on contiguous')}"
        )
    told = figures["machine"]
    console.print(f"{told['chip']}, {told['threads']} threads in all, torch {told['torch']}, gloo")


def _rank(rank: int, ranks: int, threads: int, store: str, shape: tuple[int, ...], repeat: int, found: Any) -> None:
    """One rank of a run; rank 0 tells what it measured."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(minutes=5))
    rng = torch.Generator().manual_seed(rank)
    q, k, v, grad = (torch.randn(*shape, generator=rng) for _ in range(4))
    tensors = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad)
    contestants = {name: _ours(tensors, *how) for name, how in OURS.items()}
    contestants |= {name: _peer(tensors, striped, ranks) for name, striped in PEERS.items()}
    seconds = interleave(contestants, repeat, lambda: collectives.barrier(None))
    if rank == 0:
        found.update(seconds)
    lasp.shutdown()


def _ours(tensors: tuple[Tensor, ...], method: Method, layout: Layout) -> Contestant:
    group = lasp.SequenceGroup.from_group(layout=layout)
    q, k, v, grad = tensors

    def run() -> None:
        output = lasp.softmax_attention(q, k, v, group=group, method=method)
        torch.autograd.grad(output, (q, k, v), grad)

    return run


def _peer(tensors: tuple[Tensor, ...], striped: bool, ranks: int) -> Contestant:
    """PyPI's ring-attention-pytorch, its plain PyTorch kernel: the one that runs on CPU."""
    from ring_attention_pytorch.ring_flash_attention import ring_flash_attn

    q, k, v, grad = tensors
    bucket = min(BUCKET, q.shape[1])

    def run() -> None:
        output = ring_flash_attn(
            q, k, v, causal=True, bucket_size=bucket, ring_reduce_col=True, striped_ring_attn=striped, ring_size=ranks
        )
        torch.autograd.grad(output, (q, k, v), grad)

    return run
