"""Every Triton kernel compiled ahead of time, without a GPU: registers, stack and shared memory on each kind of card.

What is compiled is what a training step of each mixer launches: the step runs here on a few tokens, and its launches
are written down instead of made. A kernel whose registers do not suffice keeps the rest on its stack.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lasp.kernels import backend
from lasp.kernels.gpu import tuning
from lasp.launch.bench.kernels import Shape
from lasp.launch.bench.mixers import MIXERS, Mixer
from lasp.launch.bench.table import markdown

SHARED_LIMITS = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that a block may have, by compute capability (CUDA C++ Programming Guide, table of features)."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


def add_options(parser: argparse._ActionsContainer) -> None:
    """What is compiled, and for what."""
    parser.add_argument("--archs", type=int, nargs="+", default=list(SHARED_LIMITS), choices=list(SHARED_LIMITS))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="of keys and values")
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=list(MIXERS))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What each kernel takes, for each mixer that has one of its own."""
    import triton

    kernels: list[dict[str, Any]] = []
    for dtype, dim in itertools.product(options.dtypes, options.dims):
        seen: set[Launch] = set()
        for name in options.mixers:
            steps = [step_launches(MIXERS[name], dim, DTYPES[dtype], arch) for arch in options.archs]
            for launches in zip(*steps, strict=True):  # the same kernel, as each card has it
                if launches[0] not in seen:
                    seen.add(launches[0])
                    print(f"compiling {launches[0].name} of {name}, {dtype}, D = {dim}", file=sys.stderr, flush=True)
                    found = {str(arch): one.compile(arch) for arch, one in zip(options.archs, launches, strict=True)}
                    kernels.append(
                        {"kernel": launches[0].name, "mixer": name, "dtype": dtype, "dim": dim, "archs": found}
                    )
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return {"versions": versions, "kernels": kernels}


def show(figures: dict[str, Any]) -> None:
    """A table in Markdown, and whether anything is beyond its limit."""
    print(table(figures))
    bad = [kernel for kernel in figures["kernels"] if beyond(kernel)]
    print(f"\n{len(figures['kernels'])} kernels, of which {len(bad)} spill, take too much memory or do not compile")
    for kernel in bad:
        print(f"{kernel['kernel']} of {kernel['mixer']}, {kernel['dtype']}, D = {kernel['dim']}: {beyond(kernel)}")


def table(figures: dict[str, Any]) -> str:
    """By card: channels of keys x of values to a tile, warps, registers, shared memory, and stack if there is any."""
    archs = list(figures["kernels"][0]["archs"])
    rows = []
    for kernel in figures["kernels"]:
        what = [kernel[name] for name in ("kernel", "mixer", "dtype", "dim")]
        rows.append([*what, *map(_cell, kernel["archs"].values())])
    return markdown(["kernel", "mixer", "dtype", "D", *(f"sm_{arch}" for arch in archs)], rows)


def _cell(used: dict[str, Any]) -> str:
    if "error" in used:
        return "does not compile"
    spilled = f", {used['stack']} B spilled" if used["stack"] else ""
    shared = f"{used['shared'] / 1024:.0f} KiB"
    return f"{used['tile']}, {used['warps']} warps: {used['registers']} regs, {shared}{spilled}"


def beyond(kernel: dict[str, Any]) -> dict[str, str]:
    """What is wrong on which card: a kernel spills, has too little shared memory or does not compile."""
    found = {}
    for arch, used in kernel["archs"].items():
        if "error" in used:
            found[arch] = used["error"]
        elif used["stack"] or used["shared"] > SHARED_LIMITS[int(arch)] * 1024:
            found[arch] = _cell(used)
    return found


# Launches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as far as it decides what is compiled.

    types: of the arguments that are no constants; aligned: those of them that are multiples of 16. options: of Triton.
    """

    kernel: Any
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self, arch: int) -> dict[str, Any]:
        """Registers to a thread, bytes of stack to a thread and of shared memory to a block; or what went wrong."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = dict(self.types) | {name: "constexpr" for name, _ in self.constants}
        signature = {name: signature[name] for name in self.kernel.arg_names}
        places = {name: place for place, name in enumerate(self.kernel.arg_names)}
        aligned = {(places[name],): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, signature, dict(self.constants), aligned)
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(self.options))
        except Exception as error:  # of any kind: the compiler's own, or its assembler's
            return {"error": _reason(error)}
        sizes, options = dict(self.constants), dict(self.options)
        tile = "x".join(str(sizes[name]) for name in ("BK", "BV") if name in sizes)
        cut = {"tile": tile, "warps": options["num_warps"], "stages": options["num_stages"]}
        return cut | resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def _reason(error: BaseException) -> str:
    """What went wrong innermost, which is where Triton says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack of a compiled kernel, as NVIDIA's cuobjdump, which Triton brings along, reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack": int(found[2])}


LONG, PROCESSORS = 2048, 132
"""Tokens, and programs that a card runs at once: enough for segments that are joined."""


def step_launches(mixer: Mixer, dim: int, dtype: torch.dtype, arch: int) -> list[Launch]:
    """What forward and backward launch with the default tilings, from an initial state and to a final one."""
    inputs = [x.requires_grad_() for x in mixer.inputs(Shape(tokens=LONG, heads=16, dim=dim), "cpu", dtype)]
    launches: list[Launch] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(tuning, measured=dict, in_use={}, architecture=lambda: arch))
        stack.enter_context(mock.patch.object(backend, "check_kernels"))
        stack.enter_context(mock.patch("lasp.kernels.gpu.recurrence.processors", return_value=PROCESSORS))
        stack.enter_context(_written_down(launches.append))
        state = torch.zeros(1, 16, dim, dim, requires_grad=True)
        output, final = mixer.ours(*inputs, backend="triton", initial_state=state, output_final_state=True)
        torch.autograd.grad((output, final), (*inputs, state), (output, final))
    return list(dict.fromkeys(launches))


@contextmanager
def _written_down(write: Callable[[Launch], None]) -> Iterator[None]:
    """Launches are told to `write`, and not made."""
    from triton.runtime import JITFunction

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **rest: Any) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        ones = {name: 1 for name, x in named.items() if isinstance(x, int) and x == 1}  # constants, to Triton
        types = tuple((name, _type(x)) for name, x in named.items() if name not in ones)
        aligned = tuple(name for name, x in named.items() if isinstance(x, Tensor) or x % 16 == 0)
        constants = ones | {name: value for name, value in rest.items() if name in kernel.arg_names}
        options = {name: value for name, value in rest.items() if name not in kernel.arg_names}
        write(Launch(kernel, types, aligned, tuple(constants.items()), tuple(options.items())))

    with mock.patch.object(JITFunction, "run", run):
        yield


def _type(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"
