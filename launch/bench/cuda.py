"""Our Triton kernels on one GPU, beside flash-linear-attention, FlashAttention and what the card can do at most.

First every mixer is checked on a short sequence against PyTorch in fp64. Then it is timed in bf16, forward without and
with backward, by the GPU's own clock: medians. The floor of memory is the time in which this card copies the bytes that
must move, that of arithmetic the time in which it does the operations as one large product. At last ours and the peer's
take turns, mixer by mixer: the peer compiles hundreds of variants of its kernels to choose from, which takes minutes,
and Triton keeps the choice on disk. What the minutes do not suffice for is left out, and is quick in the next run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from lasp.launch.bench.kernels import Shape
from lasp.launch.bench.mixers import MIXERS, Mixer, has_peer
from lasp.launch.bench.table import markdown
from lasp.launch.bench.timing import Contestant, TimeIsUp, card_seconds, interleave, time_limit

SHAPES = (
    Shape(1, 32768, 32, 128),  # first what matters most: the time may not suffice for all
    Shape(1, 131072, 8, 128),
    Shape(1, 8192, 16, 128),
    Shape(1, 8192, 32, 128),
    Shape(8, 2048, 16, 128),
)
CHECKED = Shape(1, 1008, 32, 128)  # takes the kernels that are compiled for the first above
TOLERANCE = 1e-2
"""Root mean square of an error over that of the value, in bf16: outputs and gradients."""

Turn = TypeVar("Turn", bound=tuple[Any, ...])
Result = TypeVar("Result")

PASSES = ("forward", "forward and backward")


def add_options(parser: argparse._ActionsContainer) -> None:
    """How long it may take."""
    parser.add_argument("--minutes", type=float, default=7, help="the peer stops then, and ours begin nothing new")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Errors, seconds and shares of the floors; what the minutes do not suffice for is left out, and listed."""
    end, used = time.monotonic() + 60 * options.minutes, card()
    checks = {name: check(MIXERS[name], CHECKED, "cuda") for name in options.mixers}
    ceilings = measure_ceilings()
    timed: dict[tuple[str, Shape], dict[str, Any]] = {}
    left_out = []
    for shape, name in itertools.product(SHAPES, (*options.mixers, "softmax")):
        if time.monotonic() > end:
            left_out.append([name, vars(shape)])
            continue
        try:
            if name == "softmax":
                timed[name, shape] = row(name, shape, time_attention(shape, options.repeat))
            else:
                timed[name, shape] = time_mixer(MIXERS[name], shape, options.repeat, ceilings)
        except Exception as error:  # also a late one, after which the card may do nothing more: keep what there is
            timed[name, shape] = row(name, shape, {_owner(name): reason(error)})
    if has_peer():
        mixers = [(MIXERS[name], shape) for name, shape in timed if name != "softmax"]
        compare = partial(compare_mixer, repeat=options.repeat, ceilings=ceilings, checks=checks)
        compared = until(end, mixers, compare)
        timed |= {(one["mixer"], shape): one for (_, shape), one in compared.items()}
        left_out += [[f"fla's {mixer.name}", vars(shape)] for mixer, shape in mixers if (mixer, shape) not in compared]
    return {"card": used, "ceilings": ceilings, "checks": checks, "rows": list(timed.values()), "left_out": left_out}


def until(end: float, turns: Sequence[Turn], take: Callable[..., Result]) -> dict[Turn, Result]:
    """What taking each turn returns; at the end of time, in `time.monotonic` seconds, the one that goes on is cut off.

    Backward passes run in this thread meanwhile, since in another nothing could stop them. A turn that fails is told.
    """
    found: dict[Turn, Result] = {}
    with torch.autograd.set_multithreading_enabled(False):
        for turn in turns:
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                with time_limit(left):
                    found[turn] = take(*turn)
            except TimeIsUp:
                break
            except Exception as error:
                print(f"{turn}: {reason(error)}", file=sys.stderr, flush=True)
    return found


def compare_mixer(
    mixer: Mixer, shape: Shape, repeat: int, ceilings: dict[str, float], checks: dict[str, Any]
) -> dict[str, Any]:
    """The peer's errors, which go to `checks` if they are not there, and both libraries' times."""
    errors = checks[mixer.name]["errors"]
    if "fla" not in errors:
        errors["fla"] = find_errors(mixer, CHECKED, "cuda", mixer.theirs)
    return time_mixer(mixer, shape, repeat, ceilings, mixer.theirs)


def card() -> dict[str, str]:
    """What a figure must be read with."""
    import triton

    found = {"chip": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    if has_peer():
        import fla

        found["flash-linear-attention"] = fla.__version__
    return found


# Correctness --------------------------------------------------------------------------------------------------------


def check(mixer: Mixer, shape: Shape, device: str, backend: str = "triton") -> dict[str, Any]:
    """Our relative errors, and whether they are small."""
    errors = find_errors(mixer, shape, device, partial(mixer.ours, backend=backend))
    return {"errors": {"lasp": errors}, "passed": not isinstance(errors, str) and max(errors) < TOLERANCE}


def find_errors(mixer: Mixer, shape: Shape, device: str, run: Callable[..., Tensor]) -> list[float] | str:
    """Relative errors of output and gradients against PyTorch in fp64, from the same inputs; a text if `run` fails."""
    inputs = mixer.inputs(shape, device)
    exact = _results(partial(mixer.ours, backend="torch"), [x.double() for x in inputs], mixer)
    try:
        found = _results(run, inputs, mixer)
        return [relative_error(*pair) for pair in zip(found, exact, strict=True)]
    except Exception as error:  # a contestant that fails is a line of the table
        return reason(error)


def reason(error: Exception) -> str:
    """What went wrong, in one line of a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _results(run: Callable[..., Tensor], inputs: list[Tensor], mixer: Mixer) -> list[Tensor]:
    """The output, and the gradients of what is trained."""
    inputs = [x.detach().clone() for x in inputs]
    trained = [x.requires_grad_() for x in mixer.trained(inputs)]
    output = run(*inputs)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output, *torch.autograd.grad(output, trained, grad)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact value; infinite where anything is not a number."""
    error = ((found.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")


# Time ---------------------------------------------------------------------------------------------------------------


def measure_ceilings() -> dict[str, float]:
    """Bytes per second, read and written, of a copy of 2 GiB, and operations per second of a bf16 product of 8192."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    contestants: dict[str, Contestant] = {
        "copy": lambda: _ignore(target.copy_(source)),
        "product": lambda: _ignore(a @ b),
    }
    seconds = interleave(contestants, 9, clock=card_seconds)
    return {"bytes": 2 * source.nbytes / seconds["copy"], "operations": 2 * 8192**3 / seconds["product"]}


def _ignore(result: Tensor) -> None:
    """A contestant returns nothing."""


def time_mixer(
    mixer: Mixer, shape: Shape, repeat: int, ceilings: dict[str, float], theirs: Callable[..., Tensor] | None = None
) -> dict[str, Any]:
    """Our seconds and a peer's, and the shares that the two floors have of ours."""
    inputs = mixer.inputs(shape, "cuda")
    functions: dict[str, Callable[..., Tensor]] = {"lasp": partial(mixer.ours, backend="triton")}
    if theirs is not None:
        functions["fla"] = theirs
    found = row(mixer.name, shape, time_passes(functions, inputs, mixer.trained(inputs), repeat))
    found["shares"] = shares(mixer, shape, inputs, found["seconds"]["lasp"], ceilings)
    return found


def time_attention(shape: Shape, repeat: int) -> dict[str, Any]:
    """FlashAttention as PyTorch has it, causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [x.transpose(1, 2) for x in MIXERS["basic"].inputs(shape, "cuda")]
    return time_passes({"flash attention": attention}, inputs, inputs, repeat)


def time_passes(
    functions: dict[str, Callable[..., Tensor]],
    inputs: list[Tensor],
    trained: list[Tensor],
    repeat: int,
    clock: Callable[[Contestant], float] = card_seconds,
) -> dict[str, Any]:
    """Seconds by contestant and pass; a text in place of those of one that fails."""
    for x in trained:
        x.requires_grad_()
    seconds: dict[str, Any] = {}
    runs: dict[tuple[str, str], Contestant] = {}
    for name, function in functions.items():
        both = {
            "forward": partial(_forward, function, inputs),
            "forward and backward": partial(_forward_backward, function, inputs, trained),
        }
        try:
            for run in both.values():
                clock(run)  # which waits for the card, and for what it has to say
        except Exception as error:  # a contestant that fails is a line of the table
            seconds[name] = reason(error)
        else:
            runs |= {(name, what): run for what, run in both.items()}
            seconds[name] = {}
    for (name, what), median in interleave(runs, repeat, clock=clock).items():
        seconds[name][what] = median
    return seconds


def _forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    with torch.no_grad():
        function(*inputs)


def _forward_backward(function: Callable[..., Tensor], inputs: list[Tensor], trained: list[Tensor]) -> None:
    output = function(*inputs)
    torch.autograd.grad(output, trained, output.detach())


def row(name: str, shape: Shape, seconds: dict[str, Any]) -> dict[str, Any]:
    """A line of the table as it is written to the file."""
    return {"mixer": name, "shape": vars(shape), "seconds": seconds}


def shares(
    mixer: Mixer, shape: Shape, inputs: list[Tensor], seconds: dict[str, float] | str, ceilings: dict[str, float]
) -> dict[str, dict[str, float]]:
    """The shares that the floors of memory and of arithmetic have of a time, by pass."""
    if isinstance(seconds, str):
        return {}
    return {
        what: {
            "memory": mixer.traffic(inputs, what != "forward") / ceilings["bytes"] / took,
            "arithmetic": mixer.operations(shape, what != "forward") / ceilings["operations"] / took,
        }
        for what, took in seconds.items()
    }


# The tables ---------------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    """Errors, then milliseconds; what was left out; what the card can do."""
    names = ["mixer", "passed", "worst error of lasp", "of fla"]
    print(markdown(names, [_check_line(name, found) for name, found in figures["checks"].items()]), end="\n\n")
    heads = ["forward, ms", "fla", "with backward, ms", "fla", "fla's speed, times", "memory floor", "arithmetic floor"]
    print(markdown(["B, T, H, D", "mixer", *heads], map(_time_line, figures["rows"])))
    for name, shape in figures["left_out"]:
        print(f"not measured: {name} at {_numbers(shape)}")
    told, most = figures["card"], figures["ceilings"]
    print(", ".join(f"{name} {value}" for name, value in told.items()))
    print(f"a copy moves {most['bytes'] / 1e12:.2f} TB/s, a product does {most['operations'] / 1e12:.0f} TFLOP/s")


def _check_line(name: str, found: dict[str, Any]) -> list[object]:
    ours, theirs = (found["errors"].get(who) for who in ("lasp", "fla"))
    return [name, "yes" if found["passed"] else "NO", *(_worst(errors) for errors in (ours, theirs))]


def _worst(errors: list[float] | str | None) -> str | None:
    return f"{max(errors):.1e}" if isinstance(errors, list) else errors


def _time_line(one: dict[str, Any]) -> list[object]:
    """Milliseconds of both passes; how much faster, and the shares of the floors, with backward."""
    both = [_pick(one["seconds"].get(who), what) for what in PASSES for who in (_owner(one["mixer"]), "fla")]
    ours, theirs = both[2:]
    faster = f"{theirs / ours:.2f}" if isinstance(ours, float) and isinstance(theirs, float) else None
    floors = one.get("shares", {}).get(PASSES[1], {})
    percents = (f"{floors[name]:.0%}" if name in floors else None for name in ("memory", "arithmetic"))
    return [_numbers(one["shape"]), one["mixer"], *map(_milliseconds, both), faster, *percents]


def _owner(name: str) -> str:
    return "flash attention" if name == "softmax" else "lasp"


def _pick(seconds: dict[str, float] | str | None, what: str) -> float | str | None:
    return seconds.get(what) if isinstance(seconds, dict) else seconds


def _milliseconds(seconds: float | str | None) -> str | None:
    return f"{1e3 * seconds:.3f}" if isinstance(seconds, float) else seconds


def _numbers(shape: dict[str, int]) -> str:
    return ", ".join(str(shape[name]) for name in ("batch", "tokens", "heads", "dim"))
