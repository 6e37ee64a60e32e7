"""The training loop."""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lasp.train.checkpoints.checkpointer import Checkpointer, Folders
from lasp.train.checkpoints.folders import checkpoint_path, delete_checkpoints
from lasp.train.data.batches import all_rows
from lasp.train.engines import start_engine
from lasp.train.engines.engine import Engine
from lasp.train.metrics import MetricsFile, StepMetrics, plot_loss, read_metrics
from lasp.train.optimizer import learning_rate
from lasp.train.progress import TrainingProgress, show
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from lasp.train.screen import describe
from lasp.train.source import Source


class StepError(Exception):
    """A rank failed in a step, for a reason that no setting explains: all that could be wrong there was checked."""


@dataclass(frozen=True)
class Summary:
    """What a finished training leaves behind, the same on every rank."""

    losses: list[float]
    """Loss of each step that was trained, in nats per token; those before a resumed checkpoint are not among them."""

    validation: dict[str, float]
    """Mean loss of what is held out after the last step, source by source."""

    metrics: Path
    """One JSON line per step, those before a resumed checkpoint included."""

    plot: Path
    """Picture of the loss."""

    checkpoint: Path
    """Folder of the last checkpoint."""

    stopped: bool = False
    """Whether the run was told to stop before its last step."""


@dataclass
class Trainer:
    """An engine and its data: one training step after another."""

    run: Run
    """What was asked for."""

    ranks: Ranks
    """This process's place among the ranks."""

    source: Source
    """What this rank reads."""

    engine: Engine
    """The model and its optimizer."""

    checkpoints: Checkpointer
    """Where states are kept."""

    steps_done: int = 0
    """Steps behind the state of the engine."""

    @classmethod
    def start(cls, run: Run, ranks: Ranks) -> "Trainer":
        """A trainer at the beginning of a run, or where its checkpoint left off."""
        engine = start_engine(ranks.together(lambda: run.build_model(ranks)), run.config, ranks)
        checkpoints = Folders(run, ranks)
        done = 0 if run.checkpoint is None else checkpoints.load(run.checkpoint, engine)
        return cls(run, ranks, run.open_source(ranks), engine, checkpoints, done)

    def step(self) -> StepMetrics:
        """Train on the next batch.

        FloatingPointError, on every rank and with the parameters untouched, when the loss or a gradient is not finite.
        """
        config, started = self.run.config, time.perf_counter()
        lr = learning_rate(self.steps_done, config.steps, config.optimizer)
        loss = self._backward()
        norm = self.engine.update(lr, config.optimizer.clip) if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.steps_done + 1}: loss {loss}, gradient norm {norm}: cannot go on")
        self.steps_done += 1
        tokens = self.run.batch(self.ranks) * config.data.seq_len
        return StepMetrics(self.steps_done, loss, lr, norm, tokens / (time.perf_counter() - started))

    def validate(self) -> dict[str, float]:
        """The mean loss of all targets that are held out, source by source, the same on every rank."""
        found = {}
        for data in self.run.validation:
            targets, total = 0, torch.zeros((), dtype=torch.float64, device=self.ranks.device)
            for batch in all_rows(data, self.run.share(self.ranks), self.run.config.validation.sequences):
                targets += batch.targets
                total += self.engine.evaluate({**self.ranks.place(batch), "num_items_in_batch": 1})
            found[data.corpus.source] = self.ranks.mean(total) * self.ranks.dp_size / self.ranks.total(targets)
        return found

    def _backward(self) -> float:
        """Gradients of the next batch; returns its mean loss over all targets of all ranks, the same on every rank."""
        batches = self.source.read(self.steps_done)
        # The mean over dp of sums over sp: divided by this, they add up to the mean over the targets of the step.
        targets = self.ranks.total(sum(batch.targets for batch in batches)) / self.ranks.dp_size
        if not targets:
            raise ValueError("no token of the batch has a target: larger batches hold more documents")
        losses = []
        for number, batch in enumerate(batches):
            inputs = {**self.ranks.place(batch), "num_items_in_batch": targets}
            losses.append(self.engine.backward(inputs, last=number == len(batches) - 1))
        return self.ranks.mean(torch.stack(losses).sum())

    def rest(self, stop: Callable[[], bool] | None = None) -> Iterator[StepMetrics]:
        """Train and save until the run is over, one step per item. A ValueError of a step becomes a StepError.

        stop: asked after every step; where a rank says yes, all save and leave.
        """
        config, stopped = self.run.config, False
        while self.steps_done < config.steps and not stopped:
            try:
                result = self.step()
                if self.run.validation and self._due(config.validation.every):
                    result = replace(result, validation=self.validate())
            except ValueError as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{error} (ValueError at {Path(place.filename).name}:{place.lineno})"
                raise StepError(f"step {self.steps_done + 1}: {told}") from error
            yield result
            stopped = stop is not None and self.ranks.any(stop())
            if stopped or self._due(config.save_every or config.steps):
                self.checkpoints.save(self.steps_done, self.engine, stopped or self.steps_done == config.steps)

    def _due(self, every: int) -> bool:
        return self.steps_done % every == 0 or self.steps_done == self.run.config.steps


def train(run: Run, ranks: Ranks, stop: Callable[[], bool] | None = None) -> Summary:
    """Train a prepared run, until its last step or until `stop()` is true on a rank. All ranks call this together.

    Rank 0 shows progress and writes metrics, the plot and checkpoints into the output folder. A resumed run continues
    exactly as if it had not been interrupted.
    """
    trainer = Trainer.start(run, ranks)
    if ranks.is_main:
        show(describe(run, ranks, trainer.engine.model))
    if ranks.is_main and run.config.overwrite:
        delete_checkpoints(run.config.output)
    metrics, results = Path(run.config.output) / "metrics.jsonl", []
    with ExitStack() as stack:
        record = stack.enter_context(MetricsFile(metrics, trainer.steps_done)) if ranks.is_main else None
        shown = stack.enter_context(TrainingProgress(run.config.steps, trainer.steps_done, enabled=ranks.is_main))
        for result in trainer.rest(stop):
            results.append(result)
            shown.update(result)
            if record is not None:
                record.write(result)
    plot = metrics.with_name("loss.png")
    if ranks.is_main:
        plot_loss(read_metrics(metrics), plot)
    validation = results[-1].validation or {}
    losses = [result.loss for result in results]
    done = trainer.steps_done
    checkpoint = checkpoint_path(run.config.output, done)
    return Summary(losses, validation, metrics, plot, checkpoint, done < run.config.steps)
