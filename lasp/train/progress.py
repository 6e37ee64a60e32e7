"""What a run shows while it runs: a bar on a terminal, a line now and then elsewhere."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lasp.train.metrics import StepMetrics

_SECONDS_BETWEEN_LINES = 10.0


class _Console(Console):
    """A console whose reader may go away (`lasp train ... | head`), or whose disk may be full: the run goes on, and
    nothing more is shown."""

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            logging.getLogger(__name__).warning("cannot write to the standard output: %s", error.strerror)
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


def show(lines: list[str]) -> None:
    """Show some lines before the first step."""
    console = _Console()
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


class TrainingProgress:
    """Step, loss, tokens per second and time left of a run; silent when not `enabled` (ranks other than the first)."""

    def __init__(self, steps: int, steps_done: int, enabled: bool, console: Console | None = None) -> None:
        self._console = console or _Console(quiet=not enabled)
        self._steps = steps
        self._done_before = steps_done
        self._started = time.monotonic()
        self._shown = -float("inf")
        columns = [TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")]
        self._bar = Progress(*columns, console=self._console, disable=not (enabled and self._console.is_terminal))
        self._task = self._bar.add_task("starting", total=steps, completed=steps_done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, metrics: StepMetrics) -> None:
        """Show a step that is done."""
        now = time.monotonic()
        left = (now - self._started) / (metrics.step - self._done_before) * (self._steps - metrics.step)
        pace, ends = f"{metrics.tokens_per_second:,.0f} tokens/s", f"{_clock(left)} left"
        self._bar.update(self._task, completed=metrics.step, description=f"{losses(metrics)}  {pace}  {ends}")
        text = f"{losses(metrics)}  norm {metrics.grad_norm:.3g}  lr {metrics.lr:.3g}  {pace}  {ends}"
        due = now - self._shown >= _SECONDS_BETWEEN_LINES or metrics.step == self._steps
        if due and not self._console.is_terminal:
            self._shown = now
            self._console.print(f"step {metrics.step}/{self._steps}  {text}", highlight=False, soft_wrap=True)


def losses(metrics: StepMetrics) -> str:
    """The loss of a step, and of what is held out, source by source."""
    held = [f"held out {loss:.3f}" for loss in (metrics.validation or {}).values()]
    return "  ".join([f"loss {metrics.loss:.3f}", *held])


def line(metrics: StepMetrics) -> str:
    """All that is known of a step, with units."""
    told = [losses(metrics), f"norm {metrics.grad_norm:.3g}", f"lr {metrics.lr:.3g}"]
    told.append(f"{metrics.tokens_per_second:,.0f} tokens/s")
    known: list[tuple[float | None, Callable[[float], str]]] = [
        (metrics.tokens_per_second_per_rank, lambda x: f"{x:,.0f} a rank"),
        (metrics.tokens, lambda x: f"{x:,.0f} tokens in all"),
        (metrics.seconds, lambda x: f"{x:.3g} s a step"),
        (metrics.waited, lambda x: f"waited {x:.3g} s for exchanges"),
        (metrics.data, lambda x: f"{x:.3g} s for data"),
        (metrics.received, lambda x: f"received {x / 1e6:.3g} MB"),
        (metrics.flops_per_second, lambda x: f"{x / 1e12:.3g} TFLOP/s a rank"),
        (metrics.mfu, lambda x: f"MFU {x:.1%}"),
        (metrics.memory, lambda x: f"memory {x / 1e9:.3g} GB"),
    ]
    told += [text(value) for value, text in known if value is not None]
    if metrics.slowest_rank is not None and metrics.slowest_by:
        told.append(f"rank {metrics.slowest_rank} slowest by {metrics.slowest_by:.3g} s")
    return "  ".join(told)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
