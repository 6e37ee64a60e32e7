"""Recurrences on one device: ours, and transformers' PyTorch fallbacks of the same.

Forward and backward, fp32. Times are medians of interleaved rounds in one process; peak memory is taken in a fresh
process per contestant, since memory once touched stays.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lasp
from lasp.launch.bench.resident import begin_peak, status
from lasp.launch.bench.timing import Contestant, compared, interleave, machine

OURS = "lasp"


@dataclass(frozen=True)
class Shape:
    """B batches of T tokens, H heads of dim D (= K = V)."""

    batch: int = 1
    tokens: int = 8192
    heads: int = 4
    dim: int = 128


@dataclass(frozen=True)
class Recurrence:
    """One recurrence as two libraries have it.

    inputs: makes the tensors to differentiate; ours, peer: the output from them, the peer's also from a chunk size.
    """

    name: str
    inputs: Callable[[Shape], list[Tensor]]
    ours: Callable[..., Any]
    peer_name: str
    peer: Callable[..., Tensor]
    chunks: tuple[int, ...]
    flops: Callable[[Shape], int] | None = None
    most_rounds: int | None = None  # for a peer that takes a minute

    @property
    def peers(self) -> dict[str, int]:
        """The peer at each of its chunk sizes."""
        return {f"{self.peer_name}, chunk {chunk}": chunk for chunk in self.chunks}

    def contestant(self, name: str, shape: Shape) -> Contestant:
        """Forward and backward of ours or of a peer."""
        inputs = [x.requires_grad_() for x in self.inputs(shape)]
        grad = torch.randn(shape.batch, shape.tokens, shape.heads, shape.dim, generator=_rng(1))

        def run() -> None:
            output = self.ours(*inputs) if name == OURS else self.peer(*inputs, self.peers[name])
            torch.autograd.grad(output, inputs, grad)

        return run


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which recurrences, their shape, and how many threads."""
    parser.add_argument("--recurrences", nargs="+", default=list(RECURRENCES), choices=list(RECURRENCES))
    parser.add_argument("--tokens", type=int, default=Shape.tokens)
    parser.add_argument("--heads", type=int, default=Shape.heads)
    parser.add_argument("--dim", type=int, default=Shape.dim)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: Triton's kernels instead")
    parser.add_argument("--compile-only", action="store_true", help="compile Triton's kernels instead; needs no GPU")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of ours and of the peer at its best chunk size, for each recurrence."""
    torch.set_num_threads(options.threads)
    shape = Shape(tokens=options.tokens, heads=options.heads, dim=options.dim)
    peak = _matmul_flops()
    return {
        "machine": machine(options.threads),
        "shape": vars(shape),
        "matmul_gflops": peak / 1e9,
        "recurrences": {
            name: _compare(RECURRENCES[name], shape, options.repeat, peak, options.threads)
            for name in options.recurrences
        },
    }


def _compare(recurrence: Recurrence, shape: Shape, repeat: int, peak: float, threads: int) -> dict[str, Any]:
    contestants = {name: recurrence.contestant(name, shape) for name in (OURS, *recurrence.peers)}
    rounds = repeat if recurrence.most_rounds is None else min(repeat, recurrence.most_rounds)
    seconds = interleave(contestants, rounds, warm=recurrence.most_rounds is None)
    best = min(recurrence.peers, key=seconds.__getitem__)
    memory = {name: _peak_memory(name, recurrence.name, shape, threads) for name in (OURS, best)}
    share = None if recurrence.flops is None else recurrence.flops(shape) / seconds[OURS] / peak
    return {
        "seconds": seconds,
        "rounds": rounds,
        "peak_bytes": memory,
        "share_of_matmul_peak": share,
        "times_faster": seconds[best] / seconds[OURS],
        "share_of_memory": memory[OURS] / memory[best],
        "best_peer": best,
    }


# Recurrences --------------------------------------------------------------------------------------------------------


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _decay_inputs(shape: Shape) -> list[Tensor]:
    """q, k, v and one gate per token."""
    size, rng = (shape.batch, shape.tokens, shape.heads, shape.dim), _rng(0)
    q, k, v = (torch.randn(*size, generator=rng) for _ in range(3))
    return [q, k, v, -0.1 * torch.rand(*size[:3], generator=rng)]


def _delta_inputs(shape: Shape, channels: bool = False) -> list[Tensor]:
    """q, k of length 1, v, beta in [0, 1], and one gate per token, or one per channel."""
    q, k, v, log_decay = _decay_inputs(shape)
    beta = torch.rand(*log_decay.shape, generator=_rng(2))
    if channels:
        log_decay = -0.1 * torch.rand(*k.shape, generator=_rng(3))
    return [q, torch.nn.functional.normalize(k, dim=-1), v, beta, log_decay]


def _mamba2(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    """In Mamba-2's terms: C = q, B = k, A = -1, dt = -log_decay, which also multiplies the values."""
    from transformers.models.mamba2 import modeling_mamba2

    scan = _plain(modeling_mamba2.mamba2_chunk_scan)
    output: Tensor = scan(v, -log_decay, -torch.ones(q.shape[2]), k, q, chunk)
    return output


def _gated_deltanet(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next

    rule = _plain(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    output: Tensor = rule(q, k, v, log_decay, beta, chunk_size=chunk)[0]
    return output


def _kda(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, chunk: int) -> Tensor:
    from transformers.models.kimi_linear import modeling_kimi_linear

    rule = _plain(modeling_kimi_linear.chunk_kimi_delta_attention)
    output: Tensor = rule(q, k, v, log_decay, beta, chunk_size=chunk)[0]
    return output


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, where transformers wraps it to look for a faster one."""
    plain: Callable[..., Any] = getattr(function, "__wrapped__", function)
    return plain


def _decay_flops(shape: Shape, chunk: int = 64) -> int:
    """Multiplications and additions in the matrix products of forward and backward, with one gate per token.

    Per token and head there are 7 products of a chunk's length with a dim (2 forward, 5 backward) and 6 of two dims (2
    and 4). The empty halves of the triangles count: they are computed.
    """
    return 2 * shape.batch * shape.tokens * shape.heads * (7 * chunk * shape.dim + 6 * shape.dim**2)


RECURRENCES = {
    recurrence.name: recurrence
    for recurrence in (
        Recurrence(
            "linear_attention",
            _decay_inputs,
            partial(lasp.linear_attention, scale=1.0),
            "transformers mamba2_chunk_scan",
            _mamba2,
            (64, 128, 256),
            _decay_flops,
        ),
        Recurrence(
            "gated_deltanet",
            _delta_inputs,
            lasp.delta_rule,
            "transformers torch_chunk_gated_delta_rule",
            _gated_deltanet,
            (32, 64, 128),
        ),
        Recurrence(
            "kda",
            partial(_delta_inputs, channels=True),
            lasp.delta_rule,
            "transformers chunk_kimi_delta_attention",
            _kda,
            (64,),
            most_rounds=1,
        ),
    )
}


# Memory and machine -------------------------------------------------------------------------------------------------


def _peak_memory(name: str, recurrence: str, shape: Shape, threads: int) -> int:
    """Bytes that one run of a contestant adds to a fresh process, at most."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (name, recurrence, shape, threads))


def _measure_memory(name: str, recurrence: str, shape: Shape, threads: int) -> int:
    torch.set_num_threads(threads)
    run = RECURRENCES[recurrence].contestant(name, shape)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the threads and the library's own buffers
    before = begin_peak()
    run()
    return status("VmHWM") - before


def _matmul_flops(size: int = 2048) -> float:
    """What this machine's matrix product reaches in fp32, in operations per second."""
    a, b = torch.randn(size, size), torch.randn(size, size)

    def run() -> None:
        torch.mm(a, b)

    seconds = interleave({"matmul": run}, 9)["matmul"]
    return 2 * size**3 / seconds


def show(figures: dict[str, Any]) -> None:
    """A table per recurrence, and what it amounts to."""
    shape = ", ".join(f"{name} {value}" for name, value in figures["shape"].items())
    console = Console()
    for name, found in figures["recurrences"].items():
        table = Table(title=f"{name}, forward + backward, {shape}, fp32")
        for heading in ("contestant", "seconds", "peak MB"):
            table.add_column(heading, justify="left" if heading == "contestant" else "right")
        for contestant, seconds in found["seconds"].items():
            peak = found["peak_bytes"].get(contestant)
            table.add_row(contestant, f"{seconds:.3f}", "" if peak is None else f"{peak / 1e6:.0f}")
        console.print(table)
        console.print(
            f"lasp is {compared(found['times_faster'], found['best_peer'])} and takes "
            f"{found['share_of_memory']:.2f} of its memory."
        )
        if found["share_of_matmul_peak"] is not None:
            console.print(
                f"It reaches {found['share_of_matmul_peak']:.0%} of the {figures['matmul_gflops']:.0f} GFLOP/s of this "
                "machine's matrix product."
            )
    told = figures["machine"]
    console.print(f"{told['chip']}, {told['threads']} threads, torch {told['torch']}")
