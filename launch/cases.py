"""What `lasp verify --simulate` compares: operations by every scan and method, and all mixers, in fp64.

Each is a module that runs on one device and on ranks that are threads of this process: outputs, gradients of what is
cut, and gradients of what every rank has, which add up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lasp
from lasp.launch.threads import run
from lasp.layers import MIXERS
from lasp.parallel.cut import Cut
from lasp.parallel.layout import Layout
from lasp.parallel.scan import SCANS, Heads
from lasp.parallel.sharding import shard

TOLERANCE = 1e-9
"""fp64 parts by 1e-13 over some operations; a layer that misses the tokens of another rank by 1e-1."""

DIM, WIDTH = 4, 16


class Step(NamedTuple):
    """What one rank makes of a case. tokens: the gradients of what is cut; fixed: of parameters."""

    output: Tensor
    tokens: dict[str, Tensor]
    fixed: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A module, called with its inputs [B, T, ...] by name and a cut."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]

    def step(self, cut: Cut | None) -> Step:
        """Forward and backward of this rank's part, by a copy of the module."""
        module = copy.deepcopy(self.module)
        cut_inputs = {name: x if cut is None else shard(x, cut=cut) for name, x in self.inputs.items()}
        own = {name: x.detach().requires_grad_() for name, x in cut_inputs.items()}
        output = module(**own, cut=cut)
        output.sin().sum().backward()
        fixed = {name: _gradient(p) for name, p in module.named_parameters()}
        return Step(output.detach(), {name: _gradient(x) for name, x in own.items()}, fixed)


class Verdict(NamedTuple):
    """How far ranks are off one device, relative to the largest number."""

    case: str
    output: float
    gradients: dict[str, float]

    @property
    def exact(self) -> bool:
        return all(error < TOLERANCE for error in (self.output, *self.gradients.values()))

    def __str__(self) -> str:
        worst = max(self.gradients, key=self.gradients.__getitem__)
        said = "parallel and exact" if self.exact else "not parallel"
        errors = f"output {self.output:.1e}, gradients {self.gradients[worst]:.1e} ({worst})"
        return f"{self.case}: {said}: relative differences of {errors}"


def compare(case: Case, ranks: int, seq_len: int, layout: Layout) -> Verdict:
    """A case on so many ranks against one device."""
    whole = case.step(None)

    def rank(group: lasp.SequenceGroup) -> tuple[Step, Step]:
        cut = group.cut(seq_len)
        tokens = {name: shard(x, cut=cut) for name, x in whole.tokens.items()}
        return case.step(cut), Step(shard(whole.output, cut=cut), tokens, {})

    parts = run(ranks, rank, layout, node_size=_node_size(ranks))
    summed = {name: torch.stack([own.fixed[name] for own, _ in parts]).sum(0) for name in whole.fixed}
    gradients = {name: _off(summed[name], whole.fixed[name], whole.fixed) for name in whole.fixed}
    for name, gradient in whole.tokens.items():
        scale = {name: gradient}
        gradients[name] = max(_off(own.tokens[name], wanted.tokens[name], scale) for own, wanted in parts)
    output = max(_off(own.output, wanted.output, {"output": whole.output}) for own, wanted in parts)
    return Verdict(case.name, output, gradients)


def _node_size(ranks: int) -> int:
    """As many nodes as ranks in each, or more."""
    return max(size for size in range(1, ranks + 1) if ranks % size == 0 and size * size <= ranks)


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _off(found: Tensor, wanted: Tensor, beside: dict[str, Tensor]) -> float:
    """The largest difference, over the largest number of these: some gradients are 0 but for rounding."""
    if not wanted.numel():
        return 0.0
    scale = max(float(x.abs().max()) for x in beside.values())
    return float((found - wanted).abs().max().nan_to_num(torch.inf)) / max(scale, torch.finfo(torch.float64).tiny)


# Which there are ----------------------------------------------------------------------------------------------------


class _Operation(nn.Module):
    """An operation of `lasp.functional` with its options, and the inputs that are of no token as parameters."""

    def __init__(self, call: Callable[..., Tensor], fixed: dict[str, Tensor], **options: Any) -> None:
        super().__init__()
        self.call, self.options = call, options
        for name, x in fixed.items():
            self.register_parameter(name, nn.Parameter(x))

    def forward(self, cut: Cut | None, **inputs: Tensor) -> Tensor:
        return self.call(**inputs, **dict(self.named_parameters()), **self.options, cut=cut)


class _Layer(nn.Module):
    """A mixer without what it keeps of the past."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, cut: Cut | None, x: Tensor) -> Tensor:
        output: Tensor = self.mixer(x, cut=cut)[0]
        return output


def cases(ranks: int, seq_len: int) -> Iterator[Case]:
    """All of them. A scan meets transfers of each kind: known by all ranks, short ones, and matrices."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def tokens(heads: int, *names: str) -> dict[str, Tensor]:
        return {name: normal(1, seq_len, heads, DIM) for name in names}

    for scan in (*SCANS, Heads.name):
        heads = ranks if scan == Heads.name else 2
        shape = (1, seq_len, heads)
        known = {"log_decay": -torch.rand(heads, generator=rng, dtype=torch.float64)}
        yield Case(
            f"linear_attention, decay per head, scan {scan}",
            _Operation(lasp.linear_attention, known, scan=scan),
            tokens(heads, "q", "k", "v"),
        )
        gates = {"log_decay": -torch.rand(*shape, DIM, generator=rng, dtype=torch.float64)}
        yield Case(
            f"linear_attention, decay per channel, scan {scan}",
            _Operation(lasp.linear_attention, {}, scan=scan),
            tokens(heads, "q", "k", "v") | gates,
        )
        yield Case(
            f"delta_rule, decay per token, scan {scan}",
            _Operation(_delta_rule, {}, scan=scan),
            tokens(heads, "q", "k", "v") | {"beta": normal(*shape), "log_decay": -normal(*shape).abs()},
        )
    for method in ("ring", "gather", "ulysses"):
        heads = ranks if method == "ulysses" else 2
        attention = _Operation(lasp.softmax_attention, {}, method=method)
        yield Case(f"softmax_attention, method {method}", attention, tokens(heads, "q", "k", "v"))
    yield Case(
        "causal_conv1d", _Operation(lasp.causal_conv1d, {"weight": normal(WIDTH, 4)}), {"x": normal(1, seq_len, WIDTH)}
    )
    for name, kind in MIXERS.items():
        torch.manual_seed(0)
        yield Case(f"mixer {name}", _Layer(kind(WIDTH, 2).double()), {"x": normal(1, seq_len, WIDTH)})


def _delta_rule(k: Tensor, beta: Tensor, **inputs: Any) -> Tensor:
    """With keys of length 1, and betas between 0 and 1."""
    output: Tensor = lasp.delta_rule(k=nn.functional.normalize(k, dim=-1), beta=beta.sigmoid(), **inputs)
    return output
