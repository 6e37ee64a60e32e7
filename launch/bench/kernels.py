"""The decay kernel with one gate per token: ours and transformers' PyTorch fallback of Mamba-2.

Forward and backward, fp32. Times are medians of interleaved rounds in one process; peak memory is taken in a fresh
process per contestant, since memory once touched stays.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lasp
from lasp.launch.bench.timing import Contestant, interleave, machine

OURS = "lasp linear_attention"


@dataclass(frozen=True)
class Shape:
    """B batches of T tokens, H heads of dim D (= K = V), fp32."""

    batch: int = 1
    tokens: int = 8192
    heads: int = 4
    dim: int = 128

    def flops(self, chunk: int) -> int:
        """Multiplications and additions in the matrix products of forward and backward, with one gate per token.

        Per token and head there are 7 products of a chunk's length with a dim (2 forward, 5 backward) and 6 of two dims
        (2 and 4). The empty halves of the triangles count: they are computed.
        """
        return 2 * self.batch * self.tokens * self.heads * (7 * chunk * self.dim + 6 * self.dim**2)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The shape, and how many threads."""
    parser.add_argument("--tokens", type=int, default=Shape.tokens)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--dim", type=int, default=Shape.dim)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of ours and of the peer at its best chunk size, and what they amount to."""
    torch.set_num_threads(options.threads)
    shape = Shape(tokens=options.tokens, heads=options.heads, dim=options.dim)
    peers = {f"transformers mamba2_chunk_scan, chunk {chunk}": chunk for chunk in (64, 128, 256)}
    contestants = {OURS: _ours(shape)} | {name: _peer(shape, chunk) for name, chunk in peers.items()}
    seconds = interleave(contestants, options.repeat)
    best = min(peers, key=seconds.__getitem__)
    memory = {name: _peak_memory(name, shape, options.threads) for name in (OURS, best)}
    peak = _matmul_flops()
    return {
        "machine": machine(options.threads),
        "shape": vars(shape),
        "seconds": seconds,
        "peak_bytes": memory,
        "matmul_gflops": peak / 1e9,
        "share_of_matmul_peak": shape.flops(chunk=64) / seconds[OURS] / peak,
        "times_faster": seconds[best] / seconds[OURS],
        "share_of_memory": memory[OURS] / memory[best],
        "best_peer": best,
    }


# Contestants --------------------------------------------------------------------------------------------------------


def _inputs(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """q, k, v and log_decay, and the gradient of the output."""
    rng = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.tokens, shape.heads, shape.dim)
    q, k, v, grad = (torch.randn(*size, generator=rng) for _ in range(4))
    log_decay = -0.1 * torch.rand(*size[:3], generator=rng)
    return [x.requires_grad_() for x in (q, k, v, log_decay)], grad


def _ours(shape: Shape) -> Contestant:
    (q, k, v, log_decay), grad = _inputs(shape)

    def run() -> None:
        output = lasp.linear_attention(q, k, v, log_decay, scale=1.0)
        assert isinstance(output, Tensor)
        torch.autograd.grad(output, (q, k, v, log_decay), grad)

    return run


def _peer(shape: Shape, chunk: int) -> Contestant:
    """The same in Mamba-2's terms: C = q, B = k, A = -1, dt = -log_decay, which also multiplies the values."""
    from transformers.models.mamba2 import modeling_mamba2

    scan = getattr(modeling_mamba2.mamba2_chunk_scan, "__wrapped__", modeling_mamba2.mamba2_chunk_scan)
    (q, k, v, log_decay), grad = _inputs(shape)
    one = -torch.ones(shape.heads)

    def run() -> None:
        output = scan(v, -log_decay, one, k, q, chunk)
        torch.autograd.grad(output, (q, k, v, log_decay), grad)

    return run


# Memory and machine -------------------------------------------------------------------------------------------------


def _peak_memory(name: str, shape: Shape, threads: int) -> int:
    """Bytes that one run of a contestant adds to a fresh process, at most."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (name, shape, threads))


def _measure_memory(name: str, shape: Shape, threads: int) -> int:
    torch.set_num_threads(threads)
    chunk = name.rsplit(" ", 1)[-1]
    run = _peer(shape, int(chunk)) if chunk.isdigit() else _ours(shape)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the threads and the library's own buffers
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # begin a new peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _matmul_flops(size: int = 2048) -> float:
    """What this machine's matrix product reaches in fp32, in operations per second."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def run() -> None:
        torch.mm(a, b)

    seconds = interleave({"matmul": run}, 9)["matmul"]
    return 2 * size**3 / seconds


def show(figures: dict[str, Any]) -> None:
    """The table, and what it amounts to."""
    shape = figures["shape"]
    title = "forward + backward, " + ", ".join(f"{name} {value}" for name, value in shape.items()) + ", fp32"
    table = Table(title=title)
    for heading in ("contestant", "seconds", "peak MB"):
        table.add_column(heading, justify="left" if heading == "contestant" else "right")
    for name, seconds in figures["seconds"].items():
        peak = figures["peak_bytes"].get(name)
        table.add_row(name, f"{seconds:.3f}", "" if peak is None else f"{peak / 1e6:.0f}")
    console = Console()
    console.print(table)
    told = figures["machine"]
    console.print(
        f"lasp is {figures['times_faster']:.2f} times faster than {figures['best_peer']} and takes "
        f"{figures['share_of_memory']:.2f} of its memory; {figures['share_of_matmul_peak']:.0%} of the "
        f"{figures['matmul_gflops']:.0f} GFLOP/s of this machine's matrix product "
        f"({told['chip']}, {told['threads']} threads, torch {told['torch']})."
    )
