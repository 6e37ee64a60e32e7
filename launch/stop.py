"""Being told to stop: by a signal, or because a limit of time is over."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What tells a training to save and leave: Ctrl-C, most schedulers, and Slurm's `--signal=USR1@300`."""


class Stop:
    """Whether this process was told to stop. limit: seconds from now after which it is, None for no such limit."""

    def __init__(self, limit: float | None = None) -> None:
        self.end = None if limit is None else time.monotonic() + limit
        self.reason = ""

    def __call__(self) -> bool:
        if not self.reason and self.end is not None and time.monotonic() >= self.end:
            self.reason = "the time limit"
        return bool(self.reason)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take each of `SIGNALS` as a word, once: a second SIGINT or SIGTERM does what it did before."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]

        def hear(number: int, _: object) -> None:
            self.reason = self.reason or signal.Signals(number).name
            for other in heard:
                if other != signal.SIGUSR1:
                    signal.signal(other, before[other])

        for number in heard:
            signal.signal(number, hear)
        try:
            yield
        finally:
            for number in heard:
                signal.signal(number, before[number])
