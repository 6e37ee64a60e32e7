"""Profile: a trace of some steps, for chrome://tracing or ui.perfetto.dev."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function


class Profile:
    """Traces some steps of this rank into a file."""

    def __init__(self, steps: range, path: Path, device: torch.device) -> None:
        self._steps, self._path = steps, path
        gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._activities = [ProfilerActivity.CPU, *gpu]
        self._running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step: traced where it was asked for."""
        if number not in self._steps:
            yield
            return
        if self._running is None:
            self._running = profile(activities=self._activities)
            self._running.start()
        with record_function(f"lasp::step {number}"):
            yield
        if number == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write down what was traced so far."""
        running, self._running = self._running, None
        if running is not None:
            running.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(self._path))
