"""The training loop."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lasp.models import LinearLlamaForCausalLM
from lasp.train.batches import Batches
from lasp.train.checkpoint import checkpoint_path, delete_checkpoints, load_checkpoint, save_checkpoint
from lasp.train.config import TrainConfig
from lasp.train.corpus import open_corpus
from lasp.train.metrics import MetricsFile, StepMetrics, plot_loss, read_metrics
from lasp.train.optimizer import build_optimizer, learning_rate, set_learning_rate
from lasp.train.progress import TrainingProgress
from lasp.train.ranks import Ranks
from lasp.train.run import Run

_WEIGHT_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


class StepError(Exception):
    """A rank failed in a step, for a reason that no setting explains: all that could be wrong there was checked."""


@dataclass(frozen=True)
class Summary:
    """What a finished training leaves behind, the same on every rank."""

    losses: list[float]
    """Loss of each step that was trained, in nats per token; those before a resumed checkpoint are not among them."""

    metrics: Path
    """One JSON line per step, those before a resumed checkpoint included."""

    plot: Path
    """Picture of the loss."""

    checkpoint: Path
    """Folder of the last checkpoint."""


@dataclass
class Trainer:
    """A model, its data and its optimizer: one training step after another."""

    config: TrainConfig
    """The run's settings."""

    ranks: Ranks
    """This process's place among the ranks."""

    batches: Batches
    """What this rank reads."""

    model: LinearLlamaForCausalLM
    """The model itself, as a checkpoint holds it."""

    parallel: nn.Module
    """The same model; its backward pass also reduces the gradients over the ranks."""

    optimizer: torch.optim.Optimizer
    """Of the model's parameters."""

    steps_done: int = 0
    """Steps behind the state of model and optimizer."""

    @classmethod
    def start(cls, run: Run, ranks: Ranks) -> "Trainer":
        """A trainer at the beginning of a run, or where its checkpoint left off."""
        config = run.config
        model = _initial_model(run).to(ranks.device, _WEIGHT_DTYPES[config.dtype])
        optimizer = build_optimizer(model, config.optimizer)
        path = run.checkpoint
        done = 0 if path is None else ranks.together(lambda: load_checkpoint(path, model, optimizer))
        batches = Batches(
            open_corpus(run.corpus),
            config.data.seq_len,
            ranks.sequence.slices(config.data.seq_len),
            config.data.batch_size,
            ranks.dp_rank,
            ranks.dp_size,
            config.seed,
        )
        return cls(config, ranks, batches, model.train(), ranks.parallel(model), optimizer, done)

    def step(self) -> StepMetrics:
        """Train on the next batch.

        FloatingPointError, on every rank and with the parameters untouched, when the loss or a gradient is not finite.
        """
        config, started = self.config, time.perf_counter()
        lr = learning_rate(self.steps_done, config.steps, config.optimizer)
        set_learning_rate(self.optimizer, lr)
        loss = self._backward()
        # The reduced gradients are the same everywhere, and so is their norm: ranks agree without another exchange.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(f"step {self.steps_done + 1}: loss {loss}, gradient norm {norm}: cannot go on")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        tokens = config.data.batch_size * self.ranks.dp_size * config.data.seq_len
        return StepMetrics(self.steps_done, loss, lr, norm, tokens / (time.perf_counter() - started))

    def _backward(self) -> float:
        """Gradients of the next batch; returns the loss of the whole batch, the same on every rank."""
        device = self.ranks.device
        batch = {name: tensor.to(device) for name, tensor in self.batches.read(self.steps_done).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            cut = self.ranks.sequence.cut(self.config.data.seq_len)
            loss = self.parallel(**batch, cut=cut).loss
        loss.backward()
        return self.ranks.mean(loss.detach())

    def save(self) -> None:
        """Rank 0 writes a checkpoint, the others wait for it."""
        if self.ranks.is_main:
            save_checkpoint(self.config, self.steps_done, self.model, self.optimizer)
        self.ranks.barrier()

    def rest(self) -> Iterator[StepMetrics]:
        """Train and save until the run is over, one step per item. A ValueError of a step becomes a StepError."""
        every = self.config.save_every or self.config.steps
        while self.steps_done < self.config.steps:
            try:
                result = self.step()
            except ValueError as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{error} (ValueError at {Path(place.filename).name}:{place.lineno})"
                raise StepError(f"step {self.steps_done + 1}: {told}") from error
            yield result
            if self.steps_done % every == 0 or self.steps_done == self.config.steps:
                self.save()


def train(run: Run, ranks: Ranks) -> Summary:
    """Train a prepared run. All ranks call this together.

    Rank 0 shows progress and writes metrics, the plot and checkpoints into the output folder. A resumed run continues
    exactly as if it had not been interrupted.
    """
    trainer = Trainer.start(run, ranks)
    if ranks.is_main and run.config.overwrite:
        delete_checkpoints(run.config.output)
    metrics, losses = Path(run.config.output) / "metrics.jsonl", []
    with ExitStack() as stack:
        record = stack.enter_context(MetricsFile(metrics, trainer.steps_done)) if ranks.is_main else None
        shown = stack.enter_context(TrainingProgress(run.config.steps, trainer.steps_done, enabled=ranks.is_main))
        for result in trainer.rest():
            losses.append(result.loss)
            shown.update(result)
            if record is not None:
                record.write(result)
    plot = metrics.with_name("loss.png")
    if ranks.is_main:
        plot_loss(read_metrics(metrics), plot)
    return Summary(losses, metrics, plot, checkpoint_path(run.config.output, run.config.steps))


def _initial_model(run: Run) -> LinearLlamaForCausalLM:
    """The model before its first step, the same on every rank and for every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        return LinearLlamaForCausalLM(run.model)
