"""Being told to stop: by a signal, or because a limit of time is over."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What tells a training to save and leave: Ctrl-C, most schedulers, Slurm's `--signal=USR1@300`, and a terminal that is
closed."""


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
        """Take each of `SIGNALS` as a word, once: a second one but SIGUSR1 does what it did before."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        heard = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
        terminals = [number for number in (1, 2) if os.isatty(number)]

        def hear(number: int, _: object) -> None:
            self.reason = self.reason or signal.Signals(number).name
            if number == signal.SIGHUP:
                _fall_silent(terminals)
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


def _fall_silent(terminals: list[int]) -> None:
    """Write nowhere in the place of a terminal that is gone: what is said to it would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)
