"""Metrics of a run: one JSON line per step."""

import json
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lasp.train.files import NO_FILE, regular, replaced

_NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens_per_second")  # without which a line is no step


@dataclass(frozen=True)
class StepMetrics:
    """What is recorded of one step."""

    step: int
    """Steps done, 1 after the first."""

    loss: float
    """Cross-entropy in nats per token, the mean over the whole batch, before the step's update."""

    lr: float
    """Learning rate of the step."""

    grad_norm: float
    """Global norm of the gradients, before clipping."""

    tokens_per_second: float
    """Tokens of the whole batch per second of this step."""

    skipped: int | None = None
    """How many steps in a row, this one included, had a loss or gradients that were not finite, and changed nothing."""

    validation: dict[str, float] | None = None
    """Mean loss of what is held out, source by source, after the step's update; None where it was not asked for."""

    tokens: int | None = None
    """Tokens up to this step, of steps as large as this one. This and all below is known every `log_every` steps: means
    over the steps since the last time, None elsewhere."""

    seconds: float | None = None
    """Of a step, on the rank that took longest."""

    tokens_per_second_per_rank: float | None = None
    """Tokens of the whole batch per second and rank."""

    flops_per_second: float | None = None
    """Model FLOP/s of a rank: the operations of the mathematics, forward and backward, without what is recomputed."""

    mfu: float | None = None
    """`flops_per_second` as a share of what the chip can do; None where that is not known."""

    memory: int | None = None
    """Bytes, on the rank that has most: of a GPU the peak of what tensors take since the last time, of a CPU the
    largest size that the process ever had."""

    received: float | None = None
    """Bytes that a rank received in a step, the mean over the ranks; None where DeepSpeed exchanges."""

    waited: float | None = None
    """Seconds of a step in which a rank waited for exchanges and did nothing else, the mean over the ranks; None where
    DeepSpeed exchanges."""

    data: float | None = None
    """Seconds of a step in which the data was waited for, on the rank that waited longest."""

    slowest_rank: int | None = None
    """The rank that took longest without what it waited for others."""

    slowest_by: float | None = None
    """Seconds by which it took longer than the median of all ranks."""


class MetricsFile:
    """A JSON-lines file of steps, open for writing. What a resumed run will do again is dropped from it first."""

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        self.kept = [metrics for metrics in read_metrics(path) if metrics.step <= steps_done] if steps_done else []
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            partial.write_text("".join(_line(metrics) for metrics in self.kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # each line was flushed, or `write` has told why not
            self._file.close()

    def write(self, metrics: StepMetrics) -> None:
        """Append one step, readable by others at once. OSError, naming the file, where that cannot be done."""
        try:
            self._file.write(_line(metrics))
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file.name) from error


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps in a metrics file, none when there is no such file. OSError where it cannot be read.

    A last line that was cut short is left out; so are lines that are no step, with one warning for all of them: it is a
    record, and no run depends on it.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", opener=regular) as file:
            lines = file.readlines()
    except OSError as error:
        if error.errno in NO_FILE:
            return []
        raise OSError(error.errno, error.strerror, str(path)) from error
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                found.append(_step(line))
            except (ValueError, TypeError, OverflowError, RecursionError) as error:
                bad.append(f"line {number} is no step of a run: {error}")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        warnings.warn(f"{str(path)!r}, {bad[0]}{more}", stacklevel=2)
    return found


def _step(line: str) -> StepMetrics:
    told = json.loads(line)
    if not isinstance(told, dict):
        raise TypeError(f"it is a {type(told).__name__}")
    known = {name: told[name] for name in StepMetrics.__dataclass_fields__ if told.get(name) is not None}
    if lacking := [name for name in _NUMBERS if name not in known]:
        raise TypeError(f"it has no {', '.join(lacking)}")
    held = known.get("validation", {})
    numbers = [value for name, value in known.items() if name != "validation"]
    if not isinstance(held, dict) or not all(map(_is_number, (*numbers, *held.values()))):
        raise TypeError("a value of it is of another kind")
    return StepMetrics(**known)


def _is_number(value: object) -> bool:
    """OverflowError for a whole number so large that it cannot be drawn."""
    return isinstance(value, int | float) and isinstance(float(value), float)


def _line(metrics: StepMetrics) -> str:
    told = {name: value for name, value in asdict(metrics).items() if value is not None}
    return json.dumps(told) + "\n"
