"""The parity probe: a model on this group against the same model on one device, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp.kernels.arguments import check_integer
from lasp.kernels.precision import exact
from lasp.parallel import collectives
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.gradients import sync_gradients
from lasp.parallel.group import SequenceGroup
from lasp.parallel.sharding import shard, shard_batch
from lasp.wrap.parallelize import base_model, parallelize, unparallelize, use_pytorch
from lasp.wrap.refusal import check_model, check_module
from lasp.wrap.wiring import WIRING

# fp32 parts by 1e-5 over a few layers; a layer that misses the tokens of another rank by 1e-1.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Report:
    """Relative differences, the largest over the ranks, of a sharded from an unsharded training step.

    layers: of the output of every module, in the order in which they finished; gradients: of every parameter.
    """

    loss: float
    logits: float
    layers: dict[str, float]
    gradients: dict[str, float]

    @property
    def exact(self) -> bool:
        """Whether everything agrees to what fp32 allows."""
        errors = [self.loss, self.logits, *self.layers.values(), *self.gradients.values()]
        return all(error < TOLERANCE for error in errors)

    @property
    def first_layer(self) -> str | None:
        """The module whose output is the first to differ."""
        return next((name for name, error in self.layers.items() if not error < TOLERANCE), None)

    def __str__(self) -> str:
        worst = max(self.gradients, key=self.gradients.__getitem__, default="none")
        told = f"loss {self.loss:.1e}, logits {self.logits:.1e}, gradients {self.gradients.get(worst, 0):.1e} ({worst})"
        if self.exact:
            return f"parallel and exact: relative differences of {told}"
        first = self.first_layer
        where = "no layer's output" if first is None else f"first {first}, by {self.layers[first]:.1e}"
        return f"not parallel: {where} differs from one device's; relative differences of {told}"


def verify(model: Any, group: SequenceGroup | None, seq_len: int = 64) -> Report:
    """Compare a training step of a model over the group with one of a single device: outputs, loss, every gradient.

    model: of Hugging Face, parallelised or not, with the same weights on every rank; it is copied and left as it is.
    seq_len: tokens of the random sequence over all ranks. Both copies run in fp32, without dropout, and the one device
    in the model's own PyTorch code, whatever kernels are installed. Returns the report. Raises ValueError, on every
    rank, where anything differs by more than 1e-3 of its largest number, naming the first layer; and whatever
    `parallelize` refuses. Neither autocast around it matters, nor whether gradients are recorded.
    """
    begin_call(group, "verify", lambda: _check_arguments(model, seq_len))()
    with torch.inference_mode(False), torch.enable_grad(), exact(next(model.parameters())):
        return _verify(model, group, seq_len)


def _check_arguments(model: Any, seq_len: int) -> Arguments:
    check_module(model)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters")
    check_integer("seq_len", seq_len, 2)  # a loss needs a token and the next
    return Arguments({"seq_len": seq_len}, 1)


def _verify(model: Any, group: SequenceGroup | None, seq_len: int) -> Report:
    plain, own = copy.deepcopy(model).float(), copy.deepcopy(model).float()
    if hasattr(base_model(model), WIRING):
        unparallelize(plain)
        begin_call(group, "verify", lambda: _check_plain(plain))()
    else:
        parallelize(own, group)
    report = compare(plain, own, group, seq_len)
    if not report.exact:
        raise ValueError(str(report))
    return report


def _check_plain(model: Any) -> Arguments:
    """Refuse what was changed since `parallelize`, before the model runs."""
    check_model(base_model(model))
    return Arguments({}, 1)


class Step(NamedTuple):
    """What a training step made."""

    loss: Tensor
    logits: Tensor
    outputs: dict[str, Tensor]


def compare(plain: Any, own: Any, group: SequenceGroup | None, seq_len: int) -> Report:
    """The report on two copies of a model, `own` wired to the group."""
    use_pytorch(plain)
    device = next(plain.parameters()).device
    vocabulary = plain.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    theirs = _step(plain, {"input_ids": ids, "labels": ids, **_without_cache(plain)}, seq_len)
    # The weights are the same everywhere, or the ranks disagree on this.
    said = {"seq_len": seq_len, "loss on one device": f"{theirs.loss.item():.4e}"}
    begin_call(group, "verify", lambda: Arguments(said, 1))()
    # An encoder of ours restores tokens, and shifts no labels.
    batch = shard_batch({"input_ids": ids, "labels": ids}, group, shift=getattr(plain.config, "causal", True))
    ours = _step(own, batch, batch["input_ids"].shape[1])
    if group is not None:
        sync_gradients(own, group)
    parts = {name: shard(output, group) for name, output in theirs.outputs.items() if name in ours.outputs}
    layers = {name: _difference(ours.outputs[name], part) for name, part in parts.items()}
    gradients = _gradient_differences(own, plain)
    logits = _difference(ours.logits, shard(theirs.logits, group))
    errors = [_difference(ours.loss, theirs.loss), logits, *layers.values(), *gradients.values()]
    worst = iter(_over_ranks(errors, group, device))
    return Report(next(worst), next(worst), dict(zip(layers, worst)), dict(zip(gradients, worst)))  # noqa: B905


def _gradient_differences(own: nn.Module, plain: nn.Module) -> dict[str, float]:
    reference = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    largest = max((float(grad.abs().max()) for grad in reference.values()), default=0.0)
    found = {name: p.grad for name, p in own.named_parameters()}
    # Beside the others some gradients are 0 but for rounding: a key's bias shifts all scores alike.
    return {name: _difference(found[name], grad, floor=1e-2 * largest) for name, grad in reference.items()}


def _without_cache(model: Any) -> dict[str, Any]:
    return {} if getattr(model.config, "use_cache", None) is None else {"use_cache": False}


def _step(model: Any, batch: dict[str, Any], length: int) -> Step:
    """One training step without dropout, and the output of every module that has one per token."""
    model.train()
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)
    balance = {"output_router_logits": True} if hasattr(model.config, "output_router_logits") else {}
    with _recorded(model, length) as outputs:
        result = model(**batch, **balance)
    if result.loss.requires_grad:
        result.loss.backward()
    return Step(result.loss.detach(), result.logits.detach(), outputs)


@contextmanager
def _recorded(model: nn.Module, length: int) -> Iterator[dict[str, Tensor]]:
    """The outputs [B, length, ...] of a model's modules, by name, in the order in which they finish."""
    outputs: dict[str, Tensor] = {}

    def record(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if isinstance(first, Tensor) and first.dim() >= 3 and first.shape[1] == length:
            outputs[name] = first.detach()

    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _difference(found: Tensor | None, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest number expected, or over `floor` if that is larger."""
    if found is None:
        return float("inf")
    if not expected.numel():
        return 0.0
    scale = max(float(expected.abs().max()), floor, torch.finfo(expected.dtype).tiny)
    return float((found - expected).abs().max()) / scale


def _over_ranks(errors: list[float], group: SequenceGroup | None, device: torch.device) -> list[float]:
    own = torch.tensor(errors, dtype=torch.float64, device=device).nan_to_num(nan=torch.inf)
    if group is None or group.size == 1:
        return own.tolist()
    worst: list[float] = collectives.all_gather(own, group.process_group, "control").wait().amax(0).tolist()
    return worst
