"""Methods of softmax attention over ranks: which fit a call, what each sends, and the one that `method="auto"` takes.

    ring           keys hop from rank to rank as far as they are needed, and their gradients after them and home
    gather         every rank is sent all keys; their gradients are summed where they belong
    ulysses        heads are dealt out to all ranks, and outputs dealt back
    ulysses_ring   the same among the h neighbours of a group with heads=h, and rings of the rest

Integers alone: a method is rounds of parcels, the way there and back, which `cost.py` prices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import gcd
from typing import Literal, NamedTuple, get_args

from lasp.kernels.arguments import check_choice
from lasp.kernels.softmax.mask import Mask, Span
from lasp.parallel.cost import WORTH, Parcel, Round, announce, rounds_seconds
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Piece, joined_pieces
from lasp.parallel.remembered import remembered
from lasp.parallel.rotation import Rotation, make_rotation
from lasp.parallel.schedule import EVERYONE

Method = Literal["auto", "ring", "gather", "ulysses", "ulysses_ring"]
METHODS: tuple[Method, ...] = get_args(Method)


class Shapes(NamedTuple):
    """What a token has on every rank.

    query_heads, key_heads: how many, keys being shared; item, sum_item: bytes of an element, and of one of a gradient
    that is summed; key_mask: whether keys have one.
    """

    batch: int
    query_heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    item: int
    sum_item: int
    key_mask: bool


def check_method(name: str, group: SequenceGroup | None, query_heads: int) -> None:
    """Raises ValueError when there is no method of that name, or it does not fit the group or the number of heads."""
    check_choice("method", name, METHODS)
    if name == "ulysses_ring" and group is not None and group.heads == 1 and group.size > 1:
        raise ValueError("method 'ulysses_ring' needs a group made with heads=h, the ranks that exchange heads")
    exchanging = members(name, group)
    if query_heads % exchanging:
        raise ValueError(
            f"method {name!r} deals out heads to {exchanging} ranks, which must divide their number, got {query_heads} "
            "query heads; 'ring' and 'gather' take any number, 'ulysses_ring' a multiple of the group's heads=h"
        )


def members(method: str, group: SequenceGroup | None) -> int:
    """How many neighbouring ranks exchange heads."""
    return 1 if group is None else {"ulysses": group.size, "ulysses_ring": group.heads}.get(method, 1)


def copies(members: int, key_heads: int) -> int:
    """How often each head of keys is sent: every rank needs at least one, that its queries share."""
    return members // gcd(members, key_heads)


@remembered
def rotation_of(pieces: tuple[Piece, ...], ranks: int, mask: Mask) -> Rotation:
    """How far each piece's keys must travel under a mask."""

    def needs(own: Piece, other: Piece) -> bool:
        return mask.shows(Span(own.start, own.stop), Span(other.start, other.stop))

    return make_rotation(pieces, ranks, needs)


# The choice ---------------------------------------------------------------------------------------------------------


def choose(cut: Cut, mask: Mask, shapes: Shapes) -> str:
    """The method whose exchanges there and back take least over the group's wires; told once at INFO.

    A ring unless another takes a tenth less: its hops hide behind what the ranks compute. A gather, which keeps all
    keys, where these have no more heads together than a rank's queries.
    """
    if cut.group is None or cut.group.size == 1:
        return "ring"
    group = cut.group
    found = {method: _seconds(method, cut, mask, shapes) for method in _candidates(group, shapes)}
    best = min(found, key=found.__getitem__)
    chosen = best if found[best] < WORTH * found["ring"] else "ring"
    announce('method="auto"', chosen, f"{group.size} ranks and {shapes.batch} x {max(cut.lengths)} tokens each", found)
    return chosen


def _candidates(group: SequenceGroup, shapes: Shapes) -> Iterator[str]:
    yield "ring"
    if group.size * shapes.key_heads <= shapes.query_heads:
        yield "gather"
    if shapes.query_heads % group.size == 0:
        yield "ulysses"
    if 1 < group.heads < group.size and shapes.query_heads % group.heads == 0:
        yield "ulysses_ring"


def _seconds(method: str, cut: Cut, mask: Mask, shapes: Shapes) -> float:
    assert cut.group is not None, "one rank chooses nothing"
    return sum(
        rounds_seconds(way, cut.size, cut.group.wires, cut.group.node_size) for way in rounds(method, cut, mask, shapes)
    )


# What is sent -------------------------------------------------------------------------------------------------------


def rounds(method: str, cut: Cut, mask: Mask, shapes: Shapes) -> tuple[list[Round], list[Round]]:
    """What the ranks send by a method, on the way there and on the way back, the same on every rank."""
    if method == "gather":
        return _gathered(cut, shapes)
    together = members(method, cut.group)
    pieces = joined_pieces(cut.pieces, together)
    rotation = rotation_of(pieces, cut.size // together, mask)
    heads = shapes.key_heads * copies(together, shapes.key_heads) // together
    there, back = _turned(rotation, together, shapes._replace(key_heads=heads))
    if together == 1:
        return there, back
    dealt_there, dealt_back = _dealt(cut.lengths, together, shapes._replace(key_heads=heads))
    return [*dealt_there[:-1], *there, dealt_there[-1]], [dealt_back[0], *back, dealt_back[1]]


def _gathered(cut: Cut, shapes: Shapes) -> tuple[list[Round], list[Round]]:
    """All ranks send as much as the longest."""
    rows, channels = shapes.batch * max(cut.lengths), shapes.key_heads * (shapes.key_dim + shapes.value_dim)
    sizes = rows * (channels + shapes.key_mask) * shapes.item, rows * channels * shapes.sum_item
    there, back = ([tuple(Parcel(rank, EVERYONE, size) for rank in range(cut.size))] for size in sizes)
    return there, back


def _turned(rotation: Rotation, together: int, shapes: Shapes) -> tuple[list[Round], list[Round]]:
    """Hops of keys, and back the same with gradients behind them: on as many rings at once as ranks exchange heads."""
    channels = shapes.key_heads * (shapes.key_dim + shapes.value_dim)
    key, gradient = (channels + shapes.key_mask) * shapes.item, channels * shapes.sum_item
    keys = [list(_hop(rotation, hop, key * shapes.batch)) for hop in range(1, rotation.hops + 1)]
    gradients = [list(_home(rotation, hop, gradient * shapes.batch)) for hop in range(1, rotation.hops + 1)]
    back = [one + other for one, other in zip([*keys, []], [[], *gradients], strict=True)] if keys else []
    return [_on_each(parcels, together) for parcels in keys], [_on_each(parcels, together) for parcels in back]


def _hop(rotation: Rotation, hop: int, size: int) -> Iterator[Parcel]:
    """Keys on their way to who holds them after a hop; size: bytes of a token's."""
    for rank in range(rotation.ranks):
        for route in rotation.held(rank, hop):
            tokens = route.piece.stop - route.piece.start
            yield Parcel(route.holder(hop - 1, rotation.ranks), rank, tokens * size)


def _home(rotation: Rotation, hop: int, size: int) -> Iterator[Parcel]:
    """Gradients that leave their ranks after the computation of a hop."""
    for rank in range(rotation.ranks):
        for route in rotation.returning(rank, hop):
            tokens = route.piece.stop - route.piece.start
            yield Parcel(route.holder(hop, rotation.ranks), rank, tokens * size)


def _on_each(parcels: Iterable[Parcel], together: int) -> Round:
    return tuple(
        Parcel(p.source * together + member, p.target * together + member, p.bytes)
        for p in parcels
        for member in range(together)
    )


def _dealt(lengths: tuple[int, ...], together: int, shapes: Shapes) -> tuple[list[Round], list[Round]]:
    """Tokens dealt out as heads and outputs dealt back; the way back, gradients of outputs out and of the rest back."""
    heads = shapes.query_heads // together
    inputs = heads * shapes.key_dim + shapes.key_heads * (shapes.key_dim + shapes.value_dim)
    outputs = heads * shapes.value_dim

    def deal(size: int, out: bool) -> Round:
        """Each of the members sends tokens of its own to the others, or those of the others back."""
        return tuple(
            Parcel(one, other, shapes.batch * lengths[one if out else other] * size)
            for one in range(len(lengths))
            for other in range(one // together * together, one // together * together + together)
            if other != one
        )

    there = [deal(inputs * shapes.item, True), deal(outputs * shapes.item, False)]
    if shapes.key_mask:
        there.insert(1, deal(1, True))
    return there, [deal(outputs * shapes.item, True), deal(inputs * shapes.item, False)]
