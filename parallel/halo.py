"""Halos: the few tokens ahead of each of this rank's runs, from the ranks that hold them.

Who sends what follows from the cut and the documents, integers that all ranks know. A halo ends where its document
begins, and reaches over several ranks where their parts are shorter than it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.kernels.once import once_differentiable
from lasp.kernels.precision import compute_dtype
from lasp.parallel import collectives
from lasp.parallel.call import Turn
from lasp.parallel.cut import Cut
from lasp.parallel.layout import Piece, Plan


class Move(NamedTuple):
    """Consecutive tokens of one rank that stand, in their document, ahead of another piece."""

    source: int
    target: int
    offset: int  # of the first token in the source's local tensor
    length: int
    order: int  # of the piece ahead of which they stand


def halo_moves(pieces: tuple[Piece, ...], bounds: tuple[int, ...] | None, size: int) -> tuple[Move, ...]:
    """What must pass so that every piece knows the `size` tokens ahead of it in its document; in order of position.

    bounds: those of packed documents, None for one.
    """
    bounds = (0, pieces[-1].stop if pieces else 0) if bounds is None else bounds
    stops = [piece.stop for piece in pieces]
    moves = []
    for piece in pieces:
        if piece.start == piece.stop:
            continue
        first = max(bounds[bisect_right(bounds, piece.start) - 1], piece.start - size)
        for other in pieces[bisect_right(stops, first) : piece.order]:
            start = max(first, other.start)
            if start < other.stop:
                offset = other.offset + start - other.start
                moves.append(Move(other.rank, piece.rank, offset, other.stop - start, piece.order))
    return tuple(moves)


@dataclass(frozen=True)
class Halo:
    """The exchange of halos of `size` tokens among the ranks of a group, as one rank takes part in it."""

    plan: Plan
    turn: Turn
    size: int
    moves: tuple[Move, ...]  # to or from this rank

    @classmethod
    def of(cls, turn: Turn, size: int) -> Halo:
        """The halo of a call."""
        cut = turn()
        if turn.group is None:  # nothing passes; torch.compile cannot trace a bisection
            return cls(cut.plan(), turn, size, ())
        return cls(cut.plan(), turn, size, cut.keep(("halo", size), lambda: _own_moves(cut, size)))

    @property
    def sent(self) -> list[Move]:
        return [move for move in self.moves if move.source == self.plan.rank]

    @property
    def received(self) -> list[Move]:
        return [move for move in self.moves if move.target == self.plan.rank]

    def exchange(
        self, outgoing: list[Block], incoming: list[tuple[int, int]], like: Sequence[Tensor], phase: str
    ) -> list[tuple[Tensor, ...]]:
        """Send blocks, and return those of `incoming` (rank, number of tokens): one all-to-all. like: tensors whose
        batch, feature dims and dtype those of the blocks are."""
        if self.turn.group is None:
            return []
        peers = sorted({self.plan.rank, *(b.peer for b in outgoing), *(peer for peer, _ in incoming)})
        nothing = like[0].new_empty(0)
        parts = [
            torch.cat([nothing, *(x.flatten() for b in outgoing if b.peer == peer for x in b.tensors)])
            for peer in peers
        ]
        widths = [x.shape[0] * prod(x.shape[2:]) for x in like]
        sizes = [[n * width for source, n in incoming if source == peer for width in widths] for peer in peers]
        arrived = collectives.all_to_all(parts, [sum(s) for s in sizes], peers, self.turn.process_group, phase).wait()
        found = {p: iter(flat.split(size)) for p, flat, size in zip(peers, arrived, sizes, strict=True)}
        return [tuple(next(found[peer]).view(x.shape[0], n, *x.shape[2:]) for x in like) for peer, n in incoming]


def _own_moves(cut: Cut, size: int) -> tuple[Move, ...]:
    return tuple(m for m in halo_moves(cut.pieces, cut.bounds, size) if cut.rank in (m.source, m.target))


class Block(NamedTuple):
    """Tokens of every tensor on their way to a rank of the group."""

    peer: int
    tensors: Sequence[Tensor]


class _Bring(torch.autograd.Function):
    """
    inputs     tensors [B, T, ...] of this rank's tokens
    outputs    the same, and of each the tokens that this rank's moves bring, [B, n, ...] by position
    forward    one all-to-all of at most `size` tokens of every tensor per piece
    backward   one all-to-all of their gradients, back to the ranks they came from
    """

    @staticmethod
    def forward(ctx: Any, halo: Halo, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.halo = halo
        outgoing = [Block(m.target, [x[:, m.offset : m.offset + m.length] for x in tensors]) for m in halo.sent]
        with halo.turn.forward():
            blocks = halo.exchange(outgoing, [(m.source, m.length) for m in halo.received], tensors, "forward")
        nothing = tuple(x[:, :0] for x in tensors)
        return *(x.view_as(x) for x in tensors), *(torch.cat(parts, 1) for parts in zip(nothing, *blocks, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        halo, count = ctx.halo, len(grads) // 2
        parts = (grad.split([move.length for move in halo.received], 1) for grad in grads[count:])
        outgoing = [Block(m.source, block) for m, *block in zip(halo.received, *parts, strict=True)]
        with halo.turn.backward():
            blocks = halo.exchange(outgoing, [(m.target, m.length) for m in halo.sent], grads[:count], "backward")
        own = tuple(grad.clone() if blocks else grad for grad in grads[:count])
        for move, block in zip(halo.sent, blocks, strict=True):
            for x, part in zip(own, block, strict=True):
                x[:, move.offset : move.offset + move.length] += part
        return None, *own


def bring_halo(
    halo: Halo, tensors: Sequence[Tensor], initial: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Of each tensor [B, T, ...] and each of this rank's runs the `halo.size` tokens ahead of it, [B, size, ...].

    initial: of each tensor what stands ahead of every document, [documents, B, size, ...]; 0 if None. The tensors, of
    one dtype, are returned too and used in place of those given: so every rank takes part on the way back, even one
    that no halo reached. Differentiable in tensors and initial, with one exchange either way.
    """
    passed = _Bring.apply(halo, *tensors)
    count = len(tensors)
    own, brought = list(passed[:count]), passed[count:]
    return own, [_ahead(halo, *given) for given in zip(brought, initial, strict=True)]


def _ahead(halo: Halo, brought: Tensor, initial: Tensor | None) -> list[Tensor]:
    parts = brought.split([move.length for move in halo.received], 1)
    nothing = brought.new_zeros(brought.shape[0], halo.size, *brought.shape[2:])
    pasts = [nothing] * halo.plan.documents if initial is None else initial.unbind()
    found = []
    for run in halo.plan.runs:
        # A run that does not begin its document is the first of its piece.
        arrived = [p for p, m in zip(parts, halo.received, strict=True) if m.order == run.order and not run.reset]
        past = torch.cat([pasts[run.document], *arrived], 1)
        found.append(past[:, past.shape[1] - halo.size :])
    return found


# Final states -------------------------------------------------------------------------------------------------------


def share_ends(halo: Halo, output: Tensor, ends: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What stands at the end of every document [documents, B, size, ...], on every rank, from that of this rank's runs.

    Takes and returns the output of the call, so that every rank comes by on its way back, whichever it used.
    """
    own = {run.document: end for run, end in zip(halo.plan.runs, ends, strict=True) if run.last}
    nothing = torch.zeros_like(ends[0])
    final = torch.stack([own.get(document, nothing) for document in range(halo.plan.documents)])
    if halo.turn.group is None:
        return output, final
    output, shared = _ShareEnds.apply(halo.turn, output, final.to(compute_dtype(final)))
    return output, shared.to(final.dtype)


class _ShareEnds(torch.autograd.Function):
    """
    inputs     output [B, T, ...]; this rank's ends [documents, B, size, ...], 0 where a document ends on another
    outputs    the same output; the ends of all documents
    forward    one all-reduce of the ends
    backward   one all-reduce of their gradients
    """

    @staticmethod
    def forward(ctx: Any, turn: Turn, output: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        ctx.turn = turn
        with turn.forward():
            shared = collectives.all_reduce(ends.clone(), turn.process_group, "forward").wait()
        return output.view_as(output), shared

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_ends: Tensor) -> tuple[None, Tensor, Tensor]:
        total = grad_ends.clone(memory_format=torch.contiguous_format)
        with ctx.turn.backward():
            return None, grad, collectives.all_reduce(total, ctx.turn.process_group, "backward").wait()
