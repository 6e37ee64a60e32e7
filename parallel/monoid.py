"""What a scan needs to know of the maps that it carries: how they act, what is sent of them, how they run backwards.

    Affine     S -> A·S + U                 the memory of every recurrence, and gradients
    LogSums    z -> log(exp(z) + exp(u))    running sums of exponentials
    Maxima     m -> max(m + f, u)           running maxima, which have no way back

Backwards every map is affine: the gradient `dS_out` of what leaves a link gives `A^T·dS_out + dU` to what enters it,
where A is the derivative of its map there, its transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol, Self

from torch import Tensor

from lasp.kernels.logcumsumexp import LogSum, ratio
from lasp.kernels.maximum import Highest
from lasp.kernels.segment import Segment, compose, transpose
from lasp.parallel.layout import Link


class Map(Protocol):
    """What a stretch of links does to the state that enters it."""

    @property
    def state(self) -> Tensor:
        """What leaves where nothing enters."""
        ...

    @property
    def dim(self) -> int:
        """Of a state, the dim along which it may be cut into blocks that do not meet."""
        ...

    def __call__(self, incoming: Tensor) -> Tensor:
        """What leaves."""
        ...

    def then(self, later: Self) -> Self:
        """This stretch and a later one, as one."""
        ...

    def block(self, index: int, blocks: int) -> Self:
        """What it does to one of so many blocks of a state."""
        ...


class Monoid(Protocol):
    """One kind of maps."""

    def transfer_sent(self, own: Any) -> Tensor | None:
        """What must be sent of a map beside its state."""
        ...

    def unpack(self, links: Sequence[Link], state: Tensor, transfer: Tensor | None = None) -> Map:
        """The map of consecutive links, in the order of the scan, that another rank sent; transfer: where it came."""
        ...

    def kept(self, own: Any, entering: Callable[[], Tensor]) -> Tensor | None:
        """The transfer of a link that the way back will need, from its map and what enters it; None if it is known."""
        ...

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        """The maps of gradients. kept: the transfers that the scan forward found."""
        ...


@dataclass(frozen=True)
class Affine:
    """Maps `S -> A·S + U`. rule: the A of any link through which something passes; None where A must be sent, but for
    those links of which it was `told`."""

    rule: Callable[[Link], Tensor] | None = None
    told: Mapping[Link, Tensor] = field(default_factory=dict)

    def transfer_sent(self, own: Segment) -> Tensor | None:
        return own.transfer if self.rule is None else None

    def unpack(self, links: Sequence[Link], state: Tensor, transfer: Tensor | None = None) -> Segment:
        if transfer is None:
            known = map(self.rule or self.told.__getitem__, links)
            transfer = reduce(lambda first, later: compose(later, first), known)
        return Segment(transfer, state)

    def kept(self, own: Segment, entering: Callable[[], Tensor]) -> Tensor | None:
        return own.transfer if self.rule is None else None

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        rule = self.rule
        back = None if rule is None else lambda link: transpose(rule(link))
        return Affine(back, {link: transpose(transfer) for link, transfer in kept.items()})


@dataclass(frozen=True)
class LogSums:
    """Maps `z -> log(exp(z) + exp(u))` in every channel, of states [..., 1]."""

    def transfer_sent(self, own: LogSum) -> Tensor | None:
        return None

    def unpack(self, links: Sequence[Link], state: Tensor, transfer: Tensor | None = None) -> LogSum:
        return LogSum(state)

    def kept(self, own: LogSum, entering: Callable[[], Tensor]) -> Tensor | None:
        z = entering()
        return ratio(z, own(z))

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        return Affine(None, kept)


@dataclass(frozen=True)
class Maxima:
    """Maps `m -> max(m + decay, u)` in every head, of states [..., 1]."""

    def transfer_sent(self, own: Highest) -> Tensor | None:
        return own.decay

    def unpack(self, links: Sequence[Link], state: Tensor, transfer: Tensor | None = None) -> Highest:
        assert transfer is not None, "sent with every map"
        return Highest(transfer, state)

    def kept(self, own: Highest, entering: Callable[[], Tensor]) -> Tensor | None:
        return None

    def adjoint(self, kept: Mapping[Link, Tensor]) -> Affine:
        raise NotImplementedError("a stabiliser has no gradient")
