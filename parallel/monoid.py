"""What a scan needs to know of the maps that it carries: how they act, what is sent of them, how they run backwards.

    Affine     S -> A·S + U                 the memory of every recurrence, and gradients
    LogSums    z -> log(exp(z) + exp(u))    running sums of exponentials

Backwards every map is affine: the gradient `dS_out` of what leaves a link gives `A^T·dS_out + dU` to what enters it,
where A is the derivative of its map there, its transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lasp.kernels.logcumsumexp import LogSum, ratio
from lasp.kernels.segment import Segment, transpose
from lasp.parallel.layout import Link

Sent = Mapping[Link, Sequence[Tensor]]  # what was sent of each link's map, in the order of a scan


class Map(Protocol):
    """What a link does to the state that enters it."""

    @property
    def state(self) -> Tensor:
        """What leaves the link where nothing enters it."""
        ...

    def __call__(self, incoming: Tensor) -> Tensor:
        """What leaves it."""
        ...


class Monoid(Protocol):
    """One kind of maps."""

    def pack(self, own: Any) -> list[Tensor]:
        """What another rank must be sent of a map, its state first."""
        ...

    def unpack(self, link: Link, parts: Sequence[Tensor]) -> Map:
        """The map of a link that another rank packed."""
        ...

    def transfers(self, links: Sequence[Link], sent: Sent) -> list[Tensor]:
        """The transfers of some links, in the order of the chain; none if they need not be kept."""
        ...

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        """The maps of gradients. kept: the transfers that the scan forward found."""
        ...


def fold(sent: Sent, maps: Mapping[Link, Map]) -> Iterator[tuple[Link, Tensor | None]]:
    """Each link with the state that enters it, None where nothing does. maps: of the links that let something pass."""
    entering: Tensor | None = None
    for link, (state, *_) in sent.items():
        yield link, entering
        entering = state if entering is None or link not in maps else maps[link](entering)


@dataclass(frozen=True)
class Affine:
    """Maps `S -> A·S + U`. transfer: the A of any link through which something passes; None where A must be sent."""

    transfer: Callable[[Link], Tensor] | None = None

    def pack(self, own: Segment) -> list[Tensor]:
        return [own.state, own.transfer] if self.transfer is None else [own.state]

    def unpack(self, link: Link, parts: Sequence[Tensor]) -> Segment:
        return Segment(parts[1] if self.transfer is None else self.transfer(link), parts[0])

    def transfers(self, links: Sequence[Link], sent: Sent) -> list[Tensor]:
        return [sent[link][1] for link in links] if self.transfer is None else []

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        known = self.transfer or kept.__getitem__
        return Affine(lambda link: transpose(known(link)))


@dataclass(frozen=True)
class LogSums:
    """Maps `z -> log(exp(z) + exp(u))` in every channel, of states [..., 1]."""

    def pack(self, own: LogSum) -> list[Tensor]:
        return [own.state]

    def unpack(self, link: Link, parts: Sequence[Tensor]) -> LogSum:
        return LogSum(parts[0])

    def transfers(self, links: Sequence[Link], sent: Sent) -> list[Tensor]:
        maps = {link: self.unpack(link, parts) for link, parts in sent.items() if not link.reset}
        return [ratio(z, maps[link](z)) for link, z in fold(sent, maps) if z is not None and link in links]

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        return Affine(kept.__getitem__)
