"""How a rank meets the keys and values of the others: passed around a ring, or gathered at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lasp.kernels.named import named
from lasp.kernels.precision import compute_dtype
from lasp.kernels.softmax.blocks import Keys
from lasp.kernels.softmax.mask import Span
from lasp.parallel import collectives
from lasp.parallel.collectives import Message, Pending
from lasp.parallel.layout import Piece
from lasp.parallel.rotation import Rotation, Route

Messages = dict[Route, Tensor]
# The first argument tells which of the heads a block holds; backward adds to its dk [B, N, H, K] and dv [B, N, H, V].
Visit = Callable[[slice, Keys], None]
VisitBack = Callable[[slice, Keys, Tensor, Tensor], None]

# Messages are not split into shorter ones: their kernels and their latency would cost more than their memory.
LEAST_MESSAGE = 2**25  # bytes, of gradients


class KeyExchange(Protocol):
    """Brings blocks of keys. The keys given and kept are in local order, and their span tells nothing."""

    def forward(self, keys: Keys, visit: Visit) -> Keys:
        """Visit every block that this rank needs, given its own keys; returns what backward needs."""
        ...

    def backward(self, kept: Keys, visit: VisitBack) -> tuple[Tensor, Tensor]:
        """Visit the blocks again; returns the gradients of this rank's own keys and values in the compute dtype."""
        ...


def span(piece: Piece) -> Span:
    """The tokens of a piece."""
    return Span(piece.start, piece.stop)


@dataclass(frozen=True)
class _Packing:
    """The shape of keys and values in flat messages. mask: 1 where a key mask travels with them, else 0."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    mask: int

    @classmethod
    def of(cls, keys: Keys) -> _Packing:
        batch, _, heads, key_dim = keys.k.shape
        return cls(batch, heads, key_dim, keys.v.shape[3], int(keys.mask is not None))

    @property
    def gradients(self) -> _Packing:
        """Gradients travel without a mask."""
        return replace(self, mask=0)

    def numel(self, piece: Piece) -> int:
        return self.batch * (piece.stop - piece.start) * (self.heads * (self.key_dim + self.value_dim) + self.mask)

    def pack(self, keys: Keys) -> Tensor:
        parts = [keys.k, keys.v] if keys.mask is None else [keys.k, keys.v, keys.mask.to(keys.k.dtype)]
        return torch.cat([part.flatten() for part in parts])

    def unpack(self, message: Tensor, piece: Piece) -> Keys:
        """Views of the message."""
        rows = (self.batch, piece.stop - piece.start)
        sizes = [rows[0] * rows[1] * n for n in (self.heads * self.key_dim, self.heads * self.value_dim, self.mask)]
        k, v, mask = message.split(sizes)
        shown = mask.view(rows).bool() if self.mask else None
        return Keys(span(piece), k.view(*rows, self.heads, -1), v.view(*rows, self.heads, -1), shown)


def _local(keys: Keys, piece: Piece) -> Keys:
    """The keys of one of this rank's pieces."""
    rows = slice(piece.offset, piece.offset + piece.stop - piece.start)
    mask = None if keys.mask is None else keys.mask[:, rows]
    return Keys(span(piece), keys.k[:, rows], keys.v[:, rows], mask)


def _add_home(home: Keys, rank: int, flat: _Packing, arrived: Messages) -> Messages:
    """Add those gradients that are of this rank's own keys to them; returns the others."""
    for route in [route for route in arrived if route.piece.rank == rank]:
        own, found = _local(home, route.piece), flat.unpack(arrived.pop(route), route.piece)
        own.k.add_(found.k)
        own.v.add_(found.v)
    return arrived


# Ring ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """Keys pass from neighbour to neighbour; the next are in flight while a rank computes with those it has.

    Every piece is a message of its own and goes no further than it is needed. Alone, a rank is a ring without hops.
    peers: the ranks in the group of those on the ring; rank: this one's place among them.
    """

    rotation: Rotation
    peers: Sequence[int]
    rank: int
    group: dist.ProcessGroup | None

    def forward(self, keys: Keys, visit: Visit) -> Keys:
        for heads in self._head_groups(keys):
            some = keys.heads(heads)
            packing = _Packing.of(some)
            if self.rotation.hops:
                collectives.record("ring", "forward", self._key_bytes(packing, keys.k), self.rotation.hops)
            for _, blocks in self._turns(some, packing):
                while blocks:  # what was visited makes room for the hop after the next
                    visit(heads, blocks.popitem()[1])
        return keys

    def backward(self, kept: Keys, visit: VisitBack) -> tuple[Tensor, Tensor]:
        home = Keys(kept.span, *(torch.zeros_like(x, dtype=compute_dtype(x)) for x in (kept.k, kept.v)))
        passing = Pending[Messages]([], {})
        for heads in self._head_groups(kept):
            passing = self._backward(kept.heads(heads), home.heads(heads), partial(visit, heads), passing)
        passing.wait()
        return home.k, home.v

    def _backward(
        self, keys: Keys, home: Keys, visit: Callable[[Keys, Tensor, Tensor], None], passing: Pending[Messages]
    ) -> Pending[Messages]:
        """All hops with some of the heads. passing: the gradients that are still in flight, before as after."""
        packing = _Packing.of(keys)
        flat = packing.gradients
        if self.rotation.hops:
            num_bytes = self._key_bytes(packing, keys.k) + self._gradient_bytes(flat, home.k.dtype)
            collectives.record("ring", "backward", num_bytes, self.rotation.hops + 1)
        for hop, blocks in self._turns(keys, packing):
            sums: Messages = {}
            for route, block in blocks.items():
                into = _local(home, route.piece)
                if hop >= max(route.first, 1):
                    sums[route] = home.k.new_zeros(flat.numel(route.piece))
                    into = flat.unpack(sums[route], route.piece)
                elif hop:
                    continue  # on its way to a rank that needs it
                visit(block, into.k, into.v)
            arrived = passing.wait()
            while arrived:  # what was added makes room for the next
                route, gradient = arrived.popitem()
                sums[route] += gradient
            passing = self._pass_gradients(sums, flat, home, hop)
        return passing

    def _head_groups(self, keys: Keys) -> list[slice]:
        """The heads that are passed around together, the same on all ranks and in both passes.

        Backward, a rank of a ring of two holds four messages at once: its own keys that leave, the other's that arrive,
        and gradients of the heads before both ways. On a longer ring it is five: keys that it computes with and passes
        on, the next, the sums of their gradients, and gradients both ways. A quarter of the heads and four fifths of
        that take no more memory together than one rank's keys and values (in fp32), on however many ranks, where there
        are eight heads or more; fewer cannot be split as finely.
        """
        heads = keys.k.shape[2]
        if not self.rotation.hops:
            return [slice(0, heads)]
        together = heads // 4 if self.rotation.hops == 1 else heads // 4 * 4 // 5
        head = self._mean_tokens * keys.k.shape[0] * (keys.k.shape[3] + keys.v.shape[3])
        least = int(LEAST_MESSAGE / max(head * compute_dtype(keys.k).itemsize, 1))
        count = ceil(heads / max(together, least, 1))
        return [slice(i * heads // count, (i + 1) * heads // count) for i in range(count)]

    @property
    def _mean_tokens(self) -> float:
        """Per rank, the same on all."""
        return sum(r.piece.stop - r.piece.start for own in self.rotation.routes for r in own) / self.rotation.ranks

    def _turns(self, keys: Keys, packing: _Packing) -> Iterator[tuple[int, dict[Route, Keys]]]:
        """The blocks that this rank holds after each hop, while the next hop is in flight."""
        blocks = {route: _local(keys, route.piece) for route in self.rotation.routes[self.rank]}
        messages = {route: packing.pack(block) for route, block in blocks.items() if route.last}
        for hop in range(self.rotation.hops + 1):
            arriving = self._pass_keys(messages, packing, keys.k, hop)
            yield hop, blocks
            messages = arriving.wait()
            blocks = {route: packing.unpack(message, route.piece) for route, message in messages.items()}

    def _pass_keys(self, messages: Messages, packing: _Packing, like: Tensor, hop: int) -> Pending[Messages]:
        """Start the next hop: send on what is needed further on, receive as much."""
        buffers = {r: like.new_empty(packing.numel(r.piece)) for r in self.rotation.held(self.rank, hop + 1)}
        outgoing = [Message(x, self._holder(r, hop + 1), _key_tag(r)) for r, x in messages.items() if r.last > hop]
        incoming = [Message(x, self._holder(r, hop), _key_tag(r)) for r, x in buffers.items()]
        with named("ring keys"):
            return collectives.rotate(outgoing, incoming, self.group, buffers)

    def _pass_gradients(self, sums: Messages, flat: _Packing, home: Keys, hop: int) -> Pending[Messages]:
        """Start sending the gradients of others' keys after them, or home where no rank follows that needs the keys.
        What comes home is added there when it is waited for."""
        outgoing = []
        for route, x in sums.items():
            to = self._holder(route, 0 if hop == route.last else hop + 1)
            outgoing.append(Message(x, to, _gradient_tag(route)))
        buffers = {r: home.k.new_empty(flat.numel(r.piece)) for r in self.rotation.returning(self.rank, hop)}
        incoming = [Message(x, self._holder(r, hop), _gradient_tag(r)) for r, x in buffers.items()]
        with named("ring gradients"):
            arriving = collectives.rotate(outgoing, incoming, self.group, buffers)
        return Pending([arriving], buffers, partial(_add_home, home, self.rank, flat))

    def _holder(self, route: Route, hop: int) -> int:
        """The rank in the group that holds a route's keys after `hop` hops."""
        return self.peers[route.holder(hop, self.rotation.ranks)]

    def _key_bytes(self, packing: _Packing, like: Tensor) -> int:
        hops = range(1, self.rotation.hops + 1)
        received = sum(packing.numel(r.piece) for hop in hops for r in self.rotation.held(self.rank, hop))
        return received * like.element_size()

    def _gradient_bytes(self, flat: _Packing, dtype: torch.dtype) -> int:
        hops = range(1, self.rotation.hops + 1)
        received = sum(flat.numel(r.piece) for hop in hops for r in self.rotation.returning(self.rank, hop))
        return received * dtype.itemsize


def _key_tag(route: Route) -> int:
    return 2 * route.piece.order


def _gradient_tag(route: Route) -> int:
    return 2 * route.piece.order + 1


# Gather -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gather:
    """One all-gather brings all keys of the sequence as one block (LASP-2H, arXiv:2502.07563, section 3.4).

    pieces: of all ranks, by position; lengths: the ranks' numbers of tokens.
    """

    pieces: tuple[Piece, ...]
    lengths: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup

    def forward(self, keys: Keys, visit: Visit) -> Keys:
        parts = [keys.k.flatten(2), keys.v.flatten(2)]
        if keys.mask is not None:
            parts.append(keys.mask.unsqueeze(-1).to(keys.k.dtype))
        rows = torch.cat(parts, -1).transpose(0, 1)
        sent = pad(rows, (0, 0, 0, 0, 0, max(self.lengths) - rows.shape[0]))
        ranks = collectives.all_gather(sent, self.group, "forward").wait()
        whole = torch.cat([ranks[p.rank, p.offset : p.offset + p.stop - p.start] for p in self.pieces]).transpose(0, 1)
        k, v, mask = whole.split([parts[0].shape[-1], parts[1].shape[-1], len(parts) - 2], -1)
        shown = None if keys.mask is None else mask.squeeze(-1).bool()
        heads = (keys.k.shape[2], -1)
        block = Keys(Span(0, sum(self.lengths)), k.unflatten(-1, heads), v.unflatten(-1, heads), shown)
        visit(slice(0, block.k.shape[2]), block)
        return block

    def backward(self, kept: Keys, visit: VisitBack) -> tuple[Tensor, Tensor]:
        dk, dv = (torch.zeros_like(x, dtype=compute_dtype(x)) for x in (kept.k, kept.v))
        visit(slice(0, dk.shape[2]), kept._replace(span=Span(0, sum(self.lengths))), dk, dv)
        whole = torch.cat([dk.flatten(2), dv.flatten(2)], -1).transpose(0, 1)
        ranks = whole.new_zeros(len(self.lengths), max(self.lengths), *whole.shape[1:])
        for p in self.pieces:
            ranks[p.rank, p.offset : p.offset + p.stop - p.start] = whole[p.start : p.stop]
        own = collectives.reduce_scatter(ranks, self.group, "backward").wait()[: self.lengths[self.rank]]
        heads = (kept.k.shape[2], -1)
        own_k, own_v = own.transpose(0, 1).split([dk.shape[2] * dk.shape[3], dv.shape[2] * dv.shape[3]], -1)
        return own_k.unflatten(-1, heads), own_v.unflatten(-1, heads)
