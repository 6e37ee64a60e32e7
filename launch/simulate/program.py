"""What every rank does in a step, one thing after another: it computes, takes part in exchanges, and waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lasp.parallel.traffic import Letter

Seconds = float | tuple[float, ...]  # of every rank, or of each


class Exchange(NamedTuple):
    """letters, collectives, relay and final: as of `lasp.parallel.traffic.Play`."""

    name: str
    letters: Sequence[Letter] = ()
    collectives: Sequence[float] = ()
    relay: Callable[[float], float] = lambda size: 0.0
    final: Callable[[int], float] = lambda rank: 0.0


class Compute(NamedTuple):
    """So many seconds of one kind of work."""

    name: str
    seconds: Seconds

    def of(self, rank: int) -> float:
        """Those of a rank."""
        return self.seconds[rank] if isinstance(self.seconds, tuple) else self.seconds


class Start(NamedTuple):
    """A rank has what it gives to an exchange, by its place in the program, and goes on."""

    exchange: int


class Wait(NamedTuple):
    """It needs what an exchange brings."""

    exchange: int


Operation = Compute | Start | Wait


@dataclass
class Program:
    """The same for all ranks, but for the seconds."""

    operations: list[Operation] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)

    def compute(self, name: str, seconds: Seconds) -> None:
        """Some work, if it is any."""
        if seconds if isinstance(seconds, float | int) else any(seconds):
            self.operations.append(Compute(name, seconds))

    def start(self, exchange: Exchange) -> Wait:
        """Take part in an exchange; what to append where it is needed."""
        self.exchanges.append(exchange)
        self.operations.append(Start(len(self.exchanges) - 1))
        return Wait(len(self.exchanges) - 1)

    def wait(self, wait: Wait) -> None:
        """Need it here."""
        self.operations.append(wait)


# A step ------------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One exchange of a mixer: seconds of a rank ahead of it, and of what it does while that travels."""

    ahead: Seconds
    exchange: Exchange | None
    beside: Seconds = 0.0


class Pass(NamedTuple):
    """A layer one way. before, after: token-wise work; stages: of its mixer, and what is left when all has arrived."""

    before: float
    stages: tuple[Stage, ...]
    behind: Seconds = 0.0
    after: float = 0.0


class Layer(NamedTuple):
    """kind: of its mixer. gradients: the exchange of its parameters' gradients, which is not waited for at once."""

    kind: str
    forward: Pass
    backward: Pass
    gradients: Exchange | None = None


class Step(NamedTuple):
    """A training step: layers, first one first; logits and loss; the optimizer; and what is neither.

    repeat: micro-batches, the gradients of the last of which travel.
    """

    layers: Sequence[Layer]
    logits: float = 0.0
    optimizer: float = 0.0
    rest: float = 0.0
    gradients: Exchange | None = None  # of what is in no layer, or of all where nothing hides them
    repeat: int = 1

    def program(self) -> Program:
        """What every rank does."""
        program, waits = Program(), list[Wait]()
        for last in (number == self.repeat - 1 for number in range(self.repeat)):
            for layer in self.layers:
                _add(program, layer.kind, layer.forward)
            program.compute("logits", self.logits)
            for layer in reversed(self.layers):
                _add(program, layer.kind, layer.backward)
                waits += _started(program, layer.gradients, last)
        waits += _started(program, self.gradients, True)
        for wait in waits:
            program.wait(wait)
        program.compute("optimizer", self.optimizer)
        program.compute("rest", self.rest)
        return program


def _started(program: Program, gradients: Exchange | None, last: bool) -> Iterator[Wait]:
    if gradients is not None and last:
        yield program.start(gradients)


def _add(program: Program, kind: str, way: Pass) -> None:
    program.compute("matmul", way.before)
    for stage in way.stages:
        program.compute(kind, stage.ahead)
        wait = None if stage.exchange is None else program.start(stage.exchange)
        program.compute(kind, stage.beside)
        if wait is not None:
            program.wait(wait)
    program.compute(kind, way.behind)
    program.compute("matmul", way.after)
