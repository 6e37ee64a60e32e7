"""What a model holds, computes and sends on one rank: its own modules, run without values over a few tokens.

Memory at each moment, work and bytes are affine in a rank's tokens and, where maps are gathered, in the number
of ranks; attention's work is quadratic. So a few short runs tell of any length.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lasp
from lasp.kernels import head
from lasp.launch.plan.alone import alone
from lasp.launch.plan.moments import Moments
from lasp.launch.plan.tally import Effort, Tally, Where, mapped
from lasp.memory.parts import layers_of, mixers_of
from lasp.parallel.collectives import Record
from lasp.parallel.layout import Layout
from lasp.parallel.methods import Method
from lasp.parallel.scan import ScanName
from lasp.parallel.wires import Wires
from lasp.train.config import MemoryConfig, OptimizerConfig, OptimizerName
from lasp.train.model import ModelPlan, pull
from lasp.train.optimizer import build_optimizers

SHORT = 128
"""Tokens of a rank in the shortest run: some chunks of a recurrence."""


class Setting(NamedTuple):
    """How a model is run: everything but the length and the number of ranks."""

    model: ModelPlan
    levers: MemoryConfig
    layout: Layout
    scan: ScanName
    method: Method
    dtype: str  # of the computation, as of `lasp train`
    wires: Wires
    optimizer: OptimizerName = "adamw"


class Parameters(NamedTuple):
    """Bytes of a model's parameters: all, those that are trained, and those of its largest unit of FSDP2; of its
    buffers, and of what the optimizer keeps between steps."""

    all: int
    trained: int
    unit: int
    buffers: int
    optimizer: int


@dataclass(frozen=True)
class Run:
    """One run, or what follows of any other."""

    moments: Moments
    effort: dict[Where, Effort]
    made: dict[Where, list[float]]  # bytes of each new tensor
    mixing: dict[str, float]
    sent: dict[tuple[str, str], tuple[float, float]]  # bytes and steps, by operation and phase
    kinds: tuple[str, ...]  # of the mixers, layer by layer
    softmax: frozenset[str]  # those kinds that are softmax attention
    parameters: Parameters


class Footprints:
    """The runs of one model, each made once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._known: dict[tuple[Any, ...], Run] = {}

    def of(
        self, ranks: int, tokens: int, rank: int, levers: MemoryConfig | None = None, method: Method = "ring"
    ) -> Run:
        """What a rank of so many has of a step of one sequence, of which it holds so many tokens. rank: the first (0)
        or the last (-1)."""
        setting = self.setting._replace(levers=levers or self.setting.levers, method=method)
        least = max(SHORT, setting.levers.mlp_tile or 0, head.TOKENS if setting.levers.fuse_loss else 0)
        if tokens <= 2 * least:
            return self._by_ranks(setting, ranks, tokens, rank)
        short, long = (self._by_ranks(setting, ranks, number, rank) for number in (least, 2 * least))
        return _extended(short, long, (tokens - least) / least, tokens / least)

    def _by_ranks(self, setting: Setting, ranks: int, tokens: int, rank: int) -> Run:
        if ranks <= 4:
            return self._sample(setting, ranks, tokens, rank)
        key = setting.levers, setting.method, setting.scan, ranks, tokens, "last" if rank else "first"
        if key not in self._known:
            two, four = (self._sample(setting, number, tokens, rank) for number in (2, 4))
            far = _extended(two, four, (ranks - 2) / 2, None)
            mixing = _per_rank(four.mixing, two.mixing, ranks)
            self._known[key] = replace(far, effort=four.effort, made=four.made, mixing=mixing)
        return self._known[key]

    def _sample(self, setting: Setting, ranks: int, tokens: int, rank: int) -> Run:
        key = setting.levers, setting.method, setting.scan, ranks, tokens, rank % ranks
        if key not in self._known:
            self._known[key] = sample(setting, ranks, tokens, rank % ranks)
        return self._known[key]


def _per_rank(four: dict[str, float], two: dict[str, float], ranks: int) -> dict[str, float]:
    """A rank's tokens meet all before them: with as many tokens each, work grows with the ranks."""
    return {kind: flops + (flops - two[kind]) / 2 * (ranks - 4) for kind, flops in four.items()}


def _extended(short: Run, long: Run, times: float, square: float | None) -> Run:
    """What follows `times` beyond the first of two runs, of which the second is one beyond it. square: how many times
    as long as the first, for what grows so."""

    def line(one: float, two: float) -> float:
        return max(one + (two - one) * times, 0.0)

    effort, made = {}, {}
    for place in short.effort.keys() & long.effort.keys():
        one, two = (run.made.get(place, []) for run in (short, long))
        if len(one) == len(two):
            made[place] = [line(*sizes) for sizes in zip(one, two, strict=True)]
        else:  # of more tiles, all of one size
            made[place] = [line(mapped(one), mapped(two))]
        a, b, fresh = short.effort[place], long.effort[place], mapped(made[place])
        effort[place] = Effort(line(a.flops, b.flops), line(a.half, b.half), line(a.bytes, b.bytes), a.calls, fresh)
    sent = {
        key: (line(short.sent[key][0], long.sent[key][0]), line(short.sent[key][1], long.sent[key][1]))
        for key in short.sent.keys() & long.sent.keys()
    }
    mixing = dict(short.mixing)
    if square is not None:
        for kind, flops in short.mixing.items():
            curve = (long.mixing[kind] - 2 * flops) / 2
            mixing[kind] = (flops - curve) * square + curve * square**2
    moments = short.moments.beyond(long.moments, times)
    return replace(short, moments=moments, effort=effort, made=made, mixing=mixing, sent=sent)


def sample(setting: Setting, ranks: int, tokens: int, rank: int = 0) -> Run:
    """One run."""
    with (
        warnings.catch_warnings(action="ignore"),  # of autocast on a CPU, which stands for a GPU here
        alone(ranks, rank, setting.layout, setting.wires, None) as group,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model = _cast(setting.model.fresh(), torch.float64 if setting.dtype == "float64" else torch.float32).train()
        model = lasp.parallelize(model, group, attention=setting.method, scan=setting.scan)
        model = pull(model, setting.levers)
        named, kinds = named_parts(model)
        tally = Tally()
        tally.know(model)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        batch = {"input_ids": ids, "labels": ids, "shift_labels": ids, "cut": group.cut(tokens * ranks)}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bfloat16")
        with lasp.traffic() as ledger, tally, tally.places(named):
            with autocast:
                loss = model(**batch, num_items_in_batch=tokens * ranks).loss
            loss.backward()
            del loss
        parameters = _parameters(model, _optimized(model, setting.optimizer, tally))
    return Run(
        Moments.of(tally.moments),
        dict(tally.effort),
        {where: [*map(float, sizes)] for where, sizes in tally.made.items()},
        dict(tally.mixing),
        _sums(ledger.records),
        kinds,
        frozenset(tally.softmax),
        parameters,
    )


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """The model with floating-point parameters of one dtype, tied ones together: `nn.Module.to` swaps what a tensor
    without values cannot."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_floating_point() and parameter.dtype != dtype:
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
                setattr(module, name, made[parameter])
    return model


def _sums(records: list[Record]) -> dict[tuple[str, str], tuple[float, float]]:
    found: dict[tuple[str, str], tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for record in records:
        size, steps = found[record.op, record.phase]
        found[record.op, record.phase] = size + record.bytes, steps + record.steps
    return dict(found)


def named_parts(model: Any) -> tuple[dict[nn.Module, str], tuple[str, ...]]:
    """The modules whose memory and work are told apart, and the kind of each layer's mixer."""
    named: dict[nn.Module, str] = {}
    kinds = []
    for layer in layers_of(model):
        mixers = mixers_of(layer)
        kinds.append(_kind(mixers[0]) if mixers else "none")
        named |= {mixer: _kind(mixer) for mixer in mixers}
        within = {part for mixer in mixers for part in mixer.modules()}
        named |= {child: "mlp and norms" for child in layer.children() if child not in within}
    embedding = model.get_input_embeddings()
    return named | ({} if embedding is None else {embedding: "embedding"}), tuple(kinds)


def _kind(mixer: nn.Module) -> str:
    return type(mixer).__name__


def _optimized(model: Any, name: OptimizerName, tally: Tally) -> int:
    """Make a step, and return the bytes that an optimizer keeps between steps."""
    optimizers = build_optimizers(model, OptimizerConfig(name=name))
    with _Ones():
        for optimizer in optimizers:
            optimizer.step()  # makes what it keeps, which has an item of its own
    states = [own for optimizer in optimizers for state in optimizer.state.values() for own in state.values()]
    kept = [tensor for tensor in states if isinstance(tensor, torch.Tensor)]
    tally.leave_out(kept)
    with tally.within("optimizer"), _Ones():
        for optimizer in optimizers:
            optimizer.step()
    return sum(tensor.nbytes for tensor in kept)


class _Ones(TorchDispatchMode):
    """Numbers that an optimizer reads of its tensors are 1: none decides a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1.0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


def _parameters(model: Any, optimizer: int) -> Parameters:
    every = {id(p): p for p in model.parameters()}.values()
    trained = sum(p.nbytes for p in every if p.requires_grad)
    units = [sum(p.nbytes for p in layer.parameters()) for layer in layers_of(model)]
    whole = sum(p.nbytes for p in every)
    buffers = sum(b.nbytes for b in model.buffers())
    return Parameters(whole, trained, max([*units, whole - sum(units)]), buffers, optimizer)
