"""The training loop."""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lasp.parallel.parameters import find_difference, replicated
from lasp.train.checkpoints.checkpointer import Checkpointer, Folders
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_path, list_checkpoints
from lasp.train.checkpoints.retention import Retention
from lasp.train.data.batches import all_rows
from lasp.train.engines import start_engine
from lasp.train.engines.engine import Engine
from lasp.train.merge import merge_adapters
from lasp.train.meter import Meter
from lasp.train.metrics import StepMetrics
from lasp.train.optimizer import learning_rate
from lasp.train.progress import show
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from lasp.train.screen import describe
from lasp.train.source import Source
from lasp.train.status import Status
from lasp.train.unfinite import blame
from lasp.train.watch import Watch
from lasp.train.watchdog import Watchdog


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

    skipped: int = 0
    """How many steps in a row, up to now, were not finite."""

    at: Callable[[str], None] = lambda work: None
    """Told what is done next, each time."""

    saved: Callable[[], None] = lambda: None
    """Called when a state was saved, or is being written in the background."""

    kept: Callable[[int], None] = lambda step: None
    """Called with the steps behind a state when that is there for good, on the main rank, in any thread."""

    say: Callable[[list[str]], None] = show
    """Told what people should know, on the main rank."""

    meter: Meter = field(init=False)
    """What the steps take."""

    def __post_init__(self) -> None:
        self.meter = Meter(self.run, self.ranks, self.engine.model)

    @classmethod
    def start(cls, run: Run, ranks: Ranks) -> "Trainer":
        """A trainer at the beginning of a run, or where its checkpoint left off."""
        # What dropout draws: alike along a sequence, and something else in each replica. Processes start with any seed.
        torch.manual_seed((run.config.seed + ranks.dp_rank) % (1 << 64))
        engine = start_engine(ranks.together(lambda: run.build_model(ranks)), run.config, ranks)
        checkpoints = Folders(run, ranks)
        done = 0 if run.checkpoint is None else checkpoints.load(run.checkpoint, engine)
        return cls(run, ranks, run.open_source(ranks), engine, checkpoints, done)

    def step(self) -> StepMetrics:
        """Train on the next batch.

        A step whose loss or gradients are not finite changes neither parameters nor optimizer, on any rank.
        FloatingPointError, on every rank, after `config.skips` of these in a row.
        """
        config = self.run.config
        lr = learning_rate(self.steps_done, config.steps, config.optimizer)
        with self.meter.step(self.steps_done + 1):
            loss = self._backward()
            norm = self.engine.update(lr, config.optimizer.clip, skip=not math.isfinite(loss))
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        if not finite:
            self._tell_skipped(loss, norm)
        self.steps_done += 1
        pace = self.meter.tokens_per_second
        return StepMetrics(self.steps_done, loss, lr, norm, pace, skipped=self.skipped or None)

    def _tell_skipped(self, loss: float, norm: float) -> None:
        """Say on whom it lay that a step was skipped; FloatingPointError where there were too many of them."""
        told = f"step {self.steps_done + 1}: loss {loss}, gradient norm {norm}: " + blame(self.engine, self.ranks)
        if self.skipped > self.run.config.skips:
            raise FloatingPointError(f"{told}; {self.skipped} such steps in a row, skips = {self.run.config.skips}")
        if self.ranks.is_main:
            self.say([f"{told}; skipped"])

    def validate(self) -> dict[str, float]:
        """The mean loss of all targets that are held out, source by source, the same on every rank."""
        found = {}
        for data in self.run.validation:
            targets, total = 0, torch.zeros((), dtype=torch.float64, device=self.ranks.device)
            for batch in all_rows(data, self.run.share(self.ranks), self.run.config.validation.sequences):
                self.at(f"a batch of what is held out after step {self.steps_done}")
                targets += batch.targets
                total += self.engine.evaluate({**self.ranks.place(batch), "num_items_in_batch": 1})
            found[data.corpus.source] = self.ranks.mean(total) * self.ranks.dp_size / self.ranks.total(targets)
        return found

    def _backward(self) -> float:
        """Gradients of the next batch; returns its mean loss over all targets of all ranks, the same on every rank."""
        with self.meter.reading():
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
        config, stopped, saved = self.run.config, False, time.monotonic()
        while self.steps_done < config.steps and not stopped:
            self.at(f"step {self.steps_done + 1}")
            try:
                result = self.step()
                if config.drift_every and self._due(config.drift_every) and self.ranks.everyone.size > 1:
                    self._compare_replicas()
                if self.run.validation and self._due(config.validation.every):
                    result = replace(result, validation=self.validate())
            except ValueError as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{error} (ValueError at {Path(place.filename).name}:{place.lineno})"
                raise StepError(f"step {self.steps_done + 1}: {told}") from error
            if self._due(config.log_every):
                result = replace(result, **self.meter.totals(self.steps_done))
            yield result
            late = 0 < 60 * config.save_minutes <= time.monotonic() - saved
            stopped, late = self.ranks.any_of(stop is not None and stop(), late)
            if stopped or late or self._due(config.save_every or config.steps):
                self.at(f"the checkpoint of step {self.steps_done}")
                last = stopped or self.steps_done == config.steps
                self.checkpoints.save(self.steps_done, self.engine, last, self.kept)
                saved = time.monotonic()
                self.saved()

    def _compare_replicas(self) -> None:
        """StepError, on every rank, where the ranks hold other values of what they should hold alike."""
        replicas = self.ranks.sequence.replicas
        told = find_difference(replicas, replicated(self.engine.model, replicas))
        if self.ranks.any(bool(told)):  # those of another tp index hold other parameters
            told = told or "ranks of another tp index say which"
            raise StepError(f"after step {self.steps_done} the ranks hold other models: {told}")

    def _due(self, every: int) -> bool:
        return self.steps_done % every == 0 or self.steps_done == self.run.config.steps


def train(
    run: Run, ranks: Ranks, stop: Callable[[], bool] | None = None, end: Callable[[str], None] | None = None
) -> Summary:
    """Train a prepared run, until its last step or until `stop()` is true on a rank. All ranks call this together.

    Rank 0 shows progress and writes metrics, the plot and checkpoints into the output folder. A resumed run continues
    exactly as if it had not been interrupted. end: given, a watchdog calls it where a step takes too long.
    """
    trainer = Trainer.start(run, ranks)
    if ranks.is_main and run.config.overwrite:
        _delete_checkpoints(run)
    losses: list[float] = []
    validation: dict[str, float] = {}
    with ExitStack() as stack:
        stack.callback(trainer.meter.close)
        if end is not None:
            trainer.at = stack.enter_context(Watchdog(run.config.timeout, ranks.everyone, end)).at
        watch = stack.enter_context(Watch(run, ranks, trainer.steps_done))
        trainer.kept, trainer.saved, trainer.say = watch.kept, watch.draw, watch.say
        stack.enter_context(_settled(trainer.checkpoints))
        if ranks.is_main:
            watch.say(describe(run, ranks, trainer.engine.model))
        for result in trainer.rest(stop):
            losses.append(result.loss)
            validation = result.validation or {}
            watch.step(result)
    done = trainer.steps_done
    checkpoint = checkpoint_path(run.config.output, done)
    if ranks.is_main and run.config.lora.merge and done == run.config.steps:
        merge_adapters(run, checkpoint)
    return Summary(losses, validation, watch.metrics, watch.plot, checkpoint, done < run.config.steps)


def _delete_checkpoints(run: Run) -> None:
    """Delete those of an output folder, complete or not; whatever else lies there stays."""
    retention, folder = Retention(run.config), checkpoint_folder(run.config.output)
    retention.delete_leftovers(folder)
    for path in list_checkpoints(folder):
        retention.delete(path)


@contextmanager
def _settled(checkpoints: Checkpointer) -> Iterator[None]:
    """Where the block fails, see first that what is written in the background is there, or gone."""
    try:
        yield
    except OSError:
        checkpoints.close()  # which raises its own: a disk that has no room for a line has none for a checkpoint either
        raise
    except (Exception, SystemExit):
        with suppress(Exception):  # the first error is the one to tell
            checkpoints.close()
        raise


def conclude(run: Run) -> Path:
    """Do what comes after the last checkpoint of a run, which it may have been killed before: on one rank, for a run
    that is over. Returns that checkpoint."""
    folder = Path(run.config.output)
    checkpoint = checkpoint_path(folder, run.config.steps)
    if run.config.lora.merge:
        merge_adapters(run, checkpoint)
    Status("done", run.config.steps).write(folder)
    return checkpoint
