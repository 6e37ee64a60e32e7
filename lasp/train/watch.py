"""Watch: all that people look at of a run. Its main rank shows and writes it; the others only log their warnings."""

import logging
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lasp.parallel.collectives import is_lost_peer
from lasp.train.log import logged
from lasp.train.metrics import MetricsFile, StepMetrics
from lasp.train.plot import draw
from lasp.train.progress import TrainingProgress, line, show
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from lasp.train.status import Status
from lasp.train.tracker import tracking


class Watch:
    """The terminal, and in the output folder log.txt, metrics.jsonl, loss.png, status.json and what a tracker keeps."""

    def __init__(self, run: Run, ranks: Ranks, steps_done: int) -> None:
        self._config, self._ranks, self._done = run.config, ranks, steps_done
        self.folder = Path(run.config.output)
        self.metrics, self.plot = self.folder / "metrics.jsonl", self.folder / "loss.png"
        self._undrawn = False

    def __enter__(self) -> Self:
        config, main = self._config, self._ranks.is_main
        with ExitStack() as stack:
            self._log = stack.enter_context(logged(self.folder / "log.txt", self._ranks.everyone.rank))
            if main:
                self._place = os.open(self.folder, os.O_RDONLY)
                stack.callback(os.close, self._place)
                self._file = stack.enter_context(MetricsFile(self.metrics, self._done))
                self._track = stack.enter_context(tracking(config, self._ranks.device.type == "cpu"))
                self._shown = stack.enter_context(TrainingProgress(config.steps, self._done, enabled=True))
                self._steps = self._file.kept
                self._end("running")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._stack:
            if isinstance(error, Exception) and self._ranks.is_main and self._is_replaced():
                raise ValueError(self._gone) from error
            told = "" if error is None else f"{type(error).__name__}: {error}".removesuffix(": ")
            if told:
                self._log(f"ended by {told}")
            if self._ranks.is_main and not self._is_replaced() and not is_lost_peer(error):
                word = "done" if self._done >= self._config.steps else "stopped"
                with suppress(*([OSError] if told else [])):  # a disk that is full is told by the error itself
                    self._end("failed" if told else word, told)

    def say(self, lines: list[str]) -> None:
        """Show and log some lines, on the main rank."""
        show(lines)
        for text in lines:
            self._log(text)

    def step(self, metrics: StepMetrics) -> None:
        """Take note of a step that is done. ValueError where the output folder is not the one of the run's begin."""
        self._done = metrics.step
        if not self._ranks.is_main:
            return
        if self._is_replaced():
            raise ValueError(self._gone)
        self._file.write(metrics)
        self._steps.append(metrics)
        self._shown.update(metrics)
        if metrics.seconds is not None or metrics.validation:
            self._log(f"step {metrics.step}/{self._config.steps}  {line(metrics)}")
            self._track(metrics)

    def kept(self, step: int) -> None:
        """Take note, on the main rank, that the state after a step is kept."""
        self._log(f"checkpoint of step {step}")

    def draw(self) -> None:
        """Draw the losses so far, on the main rank. Where there can be no picture, a warning says so once."""
        if not self._ranks.is_main:
            return
        try:
            draw({self.folder.name: self._steps}, self.plot)
        except Exception as error:  # of the disk, or one of matplotlib's many
            if not self._undrawn:
                told = (str(error) or type(error).__name__).splitlines()[0]
                logging.getLogger(__name__).warning("cannot draw %r: %s", str(self.plot), told)
            self._undrawn = True

    @property
    def _gone(self) -> str:
        return (
            f"the output folder {str(self.folder)!r} was removed or moved while the run was at work; it may be another "
            "run's by now"
        )

    def _is_replaced(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._place), os.stat(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # a file system that is away for a moment
            return False

    def _end(self, word: str, told: str = "") -> None:
        Status(word, self._config.steps, told).write(self.folder)
