"""Attention transfer: linearised layers learn to do as the softmax layers did, which are frozen.

One forward serves all of them: each attends to what the softmax layers before it made of the tokens, passes on what its
own softmax attention does, and is told how far it is from that (LoLCATs, arXiv:2410.10254, 3.2).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lasp.linearize.attention import Errors
from lasp.linearize.convert import forget, learn
from lasp.linearize.methods import FAST
from lasp.parallel import collectives
from lasp.parallel.gradients import sync_gradients
from lasp.train.config import OptimizerConfig
from lasp.train.data.batches import all_rows
from lasp.train.files import replaced
from lasp.train.optimizer import learning_rate
from lasp.train.ranks import Ranks
from lasp.train.run import Run


@dataclass(frozen=True)
class Measured:
    """What is held out, under a linearised model."""

    teacher: float
    """Loss in nats per token with the layers that it had."""

    loss: float
    """Loss in nats per token with those that it has."""

    errors: dict[int, float]
    """Of each linearised layer the squared error of its attention's output, as a share of the output's own square."""


@torch.no_grad()
def measure(model: Any, run: Run, ranks: Ranks) -> Measured:
    """The same on every rank, which all call this."""
    model.eval()
    sums = _Sums()
    try:
        teacher = _loss(model, run, ranks, learn(model), sums)
        forget(model)
        loss = _loss(model, run, ranks, None, sums)
    finally:
        forget(model)
    return Measured(teacher, loss, sums.shares(ranks))


def transfer(
    model: Any,
    run: Run,
    ranks: Ranks,
    optimizer: OptimizerConfig,
    state: Path,
    stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> bool:
    """Train what was added to a parallelised model for `run.config.steps` steps; whether it came to the last.

    state: a file from which it goes on, where there is one; written when it is told to stop, and every so many steps.
    """
    trained = {name: p for name, p in model.named_parameters() if ".linearized." in name}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    adam = torch.optim.AdamW(_groups(trained), lr=optimizer.lr, betas=optimizer.betas, weight_decay=0.0)
    done = ranks.together(lambda: _load(state, trained, adam))
    config, source = run.config, run.open_source(ranks)
    model.eval()
    while done < config.steps:
        for group in adam.param_groups:
            group["lr"] = group["times"] * learning_rate(done, config.steps, optimizer)
        loss = _step(model, ranks, source.read(done))
        sync_gradients(model, ranks.sequence)
        adam.step()
        adam.zero_grad()
        done += 1
        if done == config.steps or done % 10 == 0:
            tell(f"attention transfer: step {done} of {config.steps}, error {_everywhere(ranks, loss).item():.4g}")
        stopped = ranks.any(stop())
        if ranks.is_main and (stopped or done == config.steps or done % (config.save_every or config.steps) == 0):
            _save(state, trained, adam, done)
        if stopped and done < config.steps:
            return False
    return True


def _groups(trained: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Parameters by how many times the learning rate they have."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in trained.items():
        groups.setdefault(FAST.get(name.rpartition(".")[2], 1.0), []).append(parameter)
    return [{"params": own, "times": times} for times, own in sorted(groups.items())]


def _step(model: Any, ranks: Ranks, batches: list[Any]) -> Tensor:
    """Gradients of the next batch; this rank's part of the sum over layers of the errors' shares."""
    inner, total = getattr(model, model.base_model_prefix), torch.zeros((), device=ranks.device)
    errors = learn(model)
    try:
        for batch in batches:
            given = {n: x for n, x in ranks.place(batch).items() if n not in ("labels", "shift_labels")}
            inner(**given)
            powers = torch.stack([errors.powers[layer] for layer in sorted(errors.powers)])
            if ranks.sequence.size > 1:  # every layer counts as much, whatever its size
                powers = collectives.all_reduce(powers, ranks.sequence.process_group, "forward").wait()
            squares = torch.stack([errors.squares[layer] for layer in sorted(errors.squares)])
            loss = (squares / powers.clamp(min=1e-12)).sum() / (len(batches) * len(squares))
            loss.backward()
            total += loss.detach() / ranks.dp_size
    finally:
        forget(model)
    return total


def _loss(model: Any, run: Run, ranks: Ranks, errors: Errors | None, sums: "_Sums") -> float:
    targets, total = 0, torch.zeros((), dtype=torch.float64, device=ranks.device)
    for data in run.validation:
        for batch in all_rows(data, run.share(ranks), run.config.validation.sequences):
            targets += batch.targets
            total += model(**ranks.place(batch), num_items_in_batch=1).loss
            if errors is not None:
                sums.add(errors)
    return ranks.mean(total) * ranks.dp_size / ranks.total(targets)


class _Sums:
    """Squared errors and squares of every layer, over batches."""

    def __init__(self) -> None:
        self.squares: dict[int, Tensor] = {}
        self.powers: dict[int, Tensor] = {}

    def add(self, errors: Errors) -> None:
        for own, new in ((self.squares, errors.squares), (self.powers, errors.powers)):
            for layer, x in new.items():
                own[layer] = own.get(layer, torch.zeros_like(x, dtype=torch.float64)) + x

    def shares(self, ranks: Ranks) -> dict[int, float]:
        layers = sorted(self.squares)
        both = torch.stack([torch.stack([x[layer] for layer in layers]) for x in (self.squares, self.powers)])
        squares, powers = _everywhere(ranks, both)
        return dict(zip(layers, (squares / powers).tolist(), strict=True))


def _everywhere(ranks: Ranks, x: Tensor) -> Tensor:
    """The sum over all ranks."""
    if ranks.everyone.size == 1:
        return x
    return collectives.all_reduce(x.clone(), ranks.everyone.process_group, "control").wait()


def _save(path: Path, trained: dict[str, Tensor], adam: torch.optim.Optimizer, done: int) -> None:
    weights = {name: x.detach().cpu() for name, x in trained.items()}
    with replaced(path) as partial:
        torch.save({"step": done, "weights": weights, "optimizer": adam.state_dict()}, partial)


@torch.no_grad()
def _load(path: Path, trained: dict[str, Tensor], adam: torch.optim.Optimizer) -> int:
    """The steps behind a file's state; 0 where there is no file. ValueError, naming it, where it cannot be read."""
    if not os.path.lexists(path):
        return 0
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
        if found["weights"].keys() != trained.keys():
            raise ValueError("it is of another model")
        for name, x in trained.items():
            x.copy_(found["weights"][name])
        adam.load_state_dict(found["optimizer"])
        return int(found["step"])
    except Exception as error:  # what was written may be anything
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot go on from {str(path)!r}: {told}") from error
