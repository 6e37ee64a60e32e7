"""What is held at each moment of a program, and what that says of longer ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

Kind = tuple[str, str]  # a place in the model, and an operation
Items = dict[str, int]  # bytes by what they are for


@dataclass(frozen=True)
class Moments:
    """One after the other. kinds: of each; bytes: [moments, items]."""

    kinds: tuple[Kind, ...]
    items: tuple[str, ...]
    bytes: Any

    @classmethod
    def of(cls, told: Sequence[tuple[Kind, Items]]) -> Self:
        """From what a tally has seen."""
        items = tuple(sorted({item for _, held in told for item in held}))
        rows = [[held.get(item, 0) for item in items] for _, held in told]
        return cls(tuple(kind for kind, _ in told), items, np.array(rows, dtype=float))

    def beyond(self, long: Self, times: float) -> Self:
        """What follows `times` beyond these, where `long` is one beyond.

        The same moment of both programs is affine in their length. The most of all moments is not, nor that of a kind:
        the gradients at the end of a short backward are more than what its beginning holds, and less in a long one.
        """
        pairs = np.array([*self._paired(long)])
        items = tuple(sorted({*self.items, *long.items}))
        one, two = self._over(items)[pairs[:, 0]], long._over(items)[pairs[:, 1]]
        kinds = tuple(self.kinds[place] for place in pairs[:, 0])
        return type(self)(kinds, items, np.maximum(one + (two - one) * times, 0))

    def most(self, resident: Callable[[str], float]) -> dict[str, float]:
        """The items of the moment at which most is held; resident: the share of an item that stays on this rank."""
        held = self.bytes * np.array([resident(item) for item in self.items])
        best = held[held.sum(1).argmax()]
        return {item: float(size) for item, size in zip(self.items, best, strict=True) if size}

    def _paired(self, other: Self) -> Iterator[tuple[int, int]]:
        """The same moments of two programs: the n-th of a kind, or the most of it where one has more of them."""
        mine, theirs = self._by_kind(), other._by_kind()
        for kind in (kind for kind in mine if kind in theirs):
            one, two = mine[kind], theirs[kind]
            if len(one) == len(two):
                yield from zip(one, two, strict=True)
            else:
                yield self._largest(one), other._largest(two)

    def _by_kind(self) -> dict[Kind, list[int]]:
        found: dict[Kind, list[int]] = defaultdict(list)
        for place, kind in enumerate(self.kinds):
            found[kind].append(place)
        return found

    def _largest(self, places: list[int]) -> int:
        return places[int(self.bytes[places].sum(1).argmax())]

    def _over(self, items: tuple[str, ...]) -> Any:
        whole = np.zeros((len(self.kinds), len(items)))
        whole[:, [items.index(item) for item in self.items]] = self.bytes
        return whole
