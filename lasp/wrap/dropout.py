"""Dropout whose masks belong to the tokens, wherever these lie: the same on any number of ranks.

Ranks start from the same seed, so that what they draw alike (layers, samples) is alike; torch's dropout would then give
the k-th token of every rank the same mask. Here the global generator gives one number per call, which activation
checkpointing brings back; 64 positions share a seed: that number, and which 64 they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lasp.parallel.cut import Cut
from lasp.parallel.untraced import outside
from lasp.wrap.swap import Function, calls, is_swapped, rebind_telling, swap, undecorated
from lasp.wrap.wiring import OUTSIDE, WIRING, Wiring

PER_SEED = 64  # positions


@outside
def dropout(wiring: Wiring, x: Tensor, p: float, training: bool) -> Tensor:
    """`torch.nn.functional.dropout` of this rank's tokens: x is [B, T, ...], or [B·T, ...] as routers flatten it.

    What has no such shape (the tokens of one expert) gets a mask of this rank's own.
    """
    if not training or p == 0 or not x.numel():
        return x
    dropped = _dropped(wiring, _seed(), x, p)
    return x.masked_fill(dropped, 0) / (1 - p if p < 1 else 1)


def _dropped(wiring: Wiring, seed: int, x: Tensor, p: float) -> Tensor:
    forward = wiring.running
    if forward is None:  # the mask of the tokens, and again the same one where a layer is repeated
        raise ValueError(OUTSIDE)
    tokens = forward.cut.tokens
    if x.dim() > 2 and x.shape[1] == tokens:
        return _by_position(forward.cut, seed, x, p)
    if x.dim() == 2 and x.shape[0] == forward.sequences * tokens:
        return _by_position(forward.cut, seed, x.unflatten(0, (forward.sequences, -1)), p).flatten(0, 1)
    rank = 0 if wiring.group is None else wiring.group.rank
    return _draw(seed + rank, x.shape, x.device) < p


def _by_position(cut: Cut, seed: int, x: Tensor, p: float) -> Tensor:
    """Which numbers of x [B, T, ...] are 0."""
    shape = (x.shape[0], PER_SEED, *x.shape[2:])
    drawn = [
        _draw(seed + number, shape, x.device)[:, start - number * PER_SEED : stop - number * PER_SEED] < p
        for number, start, stop in _by_seed(cut)
    ]
    return torch.cat(drawn, 1)


def _by_seed(cut: Cut) -> Iterator[tuple[int, int, int]]:
    """This rank's tokens that share a seed: its number, their start and stop."""
    for start, stop in cut.parts:
        borders = range((start // PER_SEED + 1) * PER_SEED, stop, PER_SEED)
        for a, b in pairwise((start, *borders, stop)):
            if a < b:
                yield a // PER_SEED, a, b


def _draw(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def drops(method: Function) -> bool:
    """Whether a method of a model calls `nn.functional.dropout` itself."""
    return {"nn", "functional", "dropout"} <= set(undecorated(method).__code__.co_names)


def functional(
    wiring: Wiring, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:  # under the names of `nn.functional.dropout`
    return dropout(wiring, input, p, training)


def swap_randomness(module: nn.Module) -> None:
    """Let a module drop by position; a router's noise is drawn by a generator of this rank's own."""
    if type(module) is nn.Dropout:
        swap(module, "forward", _drop)
    for method, original, _ in calls(module, {"nn": None}):
        if drops(original) and not is_swapped(module, method):
            swap(module, method, rebind_telling(original, {"nn.functional.dropout": functional}, _wiring_of))
    if any("jitter" in name and isinstance(value, float) for name, value in vars(module).items()):
        swap(module, "forward", _with_own_noise(type(module).forward))


def swap_joined(modules: Iterable[nn.Module], wiring: Wiring) -> None:
    """Dropout that has joined a model since it was wired (LoRA)."""
    for module in modules:
        if type(module) is nn.Dropout and vars(module).get(WIRING) is not wiring:
            module.__dict__[WIRING] = wiring
            swap_randomness(module)


def _wiring_of(module: nn.Module, *_: Any) -> Wiring:
    wiring: Wiring = getattr(module, WIRING)
    return wiring


def _drop(module: Any, x: Tensor) -> Tensor:
    return dropout(_wiring_of(module), x, module.p, True) if module.training and module.p else x


def _with_own_noise(original: Function) -> Function:
    @torch.compiler.disable
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        group = _wiring_of(self).group
        if not self.training or group is None or group.size == 1:
            return original(self, *args, **kwargs)
        seed = _seed() + group.rank
        devices = {x.device for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_cuda}
        with torch.random.fork_rng(sorted(device.index for device in devices)):
            torch.manual_seed(seed)
            return original(self, *args, **kwargs)

    return run


def _seed() -> int:
    """What the ranks draw alike, and draw again where a layer is repeated in backward."""
    return int(torch.randint(2**62, (), device="cpu"))
