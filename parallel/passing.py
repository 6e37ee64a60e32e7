"""A recurrence that no scan can hold, passed from rank to rank: each waits for the state of the one before.

The ranks work at the same time on different sequences of the batch, as in a pipeline: W ranks take B + W - 1 turns for
B sequences. What travels is one state per sequence and link, forward, and its gradient back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.once import once_differentiable
from lasp.kernels.precision import exact
from lasp.kernels.recomputed import Recomputed, RecomputedChain
from lasp.parallel import collectives
from lasp.parallel.layout import Link, Plan
from lasp.parallel.linear import Call, ends_grad, initial_grad, initial_states, share_final


def passed_recurrence(call: Call, initial_state: Tensor | None, inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Run a recurrence of any kind over the whole sequence. Arguments and results as in `causal_recurrence`."""
    with exact(inputs[0]):
        output, final = _Passed.apply(call, initial_state, *inputs)
    return output, final if call.final else None


class _Passed(torch.autograd.Function):
    """
    inputs     those of the recurrence; initial_state [documents, B, H, K, V]
    outputs    output [B, T, H, V], final states [documents, B, H, K, V]
    forward    a message per sequence from each link to the next; one all-reduce of the final states if asked for
    backward   the same of gradients, from the last link to the first
    """

    @staticmethod
    def forward(ctx: Any, call: Call, initial_state: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        inputs = call.recurrence.kind(*tensors)
        with call.turn.forward():
            passage = _Passage(call, call.plan(), inputs)
            output, states, ends = passage.forward(initial_states(passage.plan, initial_state))
            final = share_final(call, passage.plan, ends, "forward") if call.final else None
        ctx.call, ctx.plan, ctx.has_initial = call, passage.plan, initial_state is not None
        ctx.save_for_backward(*inputs, *states)
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call, plan = ctx.call, ctx.plan
        kind = call.recurrence.kind
        count = len(kind._fields)
        with exact(grad), call.turn.backward():
            passage = _Passage(call, plan, kind(*ctx.saved_tensors[:count]))
            grads, starts = passage.backward(grad, ctx.saved_tensors[count:], ends_grad(call, plan, grad_final))
        begins = [start if run.reset else None for run, start in zip(plan.runs, starts, strict=True)]
        return None, initial_grad(plan, begins, starts[0]) if ctx.has_initial else None, *grads


class _Passage:
    """One rank's part of a pass over all links, in either direction."""

    def __init__(self, call: Call, plan: Plan, inputs: Any) -> None:
        assert isinstance(call.recurrence, Recomputed), "whose chunks may be anything"
        self.recurrence, self.plan, self.inputs = call.recurrence, plan, inputs
        self.group, self.place = call.turn.process_group, {link.order: i for i, link in enumerate(plan.links)}
        self.batch = inputs[0].shape[0]
        self.kept: dict[tuple[int, int], Tensor] = {}  # from one of this rank's links to its other one
        self.pending: list[collectives.Pending[Tensor]] = []
        self.empty = self.recurrence.empty(self._part(0, slice(0, 0)))
        self.received = 0

    def forward(self, initial: list[Tensor | None]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The output, the states between chunks of each run [chunks, B, H, K, V], and those after each run."""
        output, runs = self.recurrence.new_output(self.inputs), self.plan.runs
        states: list[list[Tensor]] = [[] for _ in runs]
        ends: list[list[Tensor]] = [[] for _ in runs]
        for link, row in self._turns():
            state = self._receive(link, row, -1)
            for run in self.plan.runs_of(link):
                own = slice(runs[run].offset, runs[run].offset + runs[run].length)
                start = initial[run]
                if runs[run].reset:
                    state = None if start is None else start[row : row + 1]
                output[row : row + 1, own], chain = self._over(run).forward(self._part(row, own), [state])
                (state,) = chain.leaving()
                assert chain.states is not None, "it has been passed"
                states[run].append(chain.states)
                ends[run].append(state)
            self._send(link, row, 1, state)
        self._finish("forward")
        return output, [torch.cat(rows, 1) for rows in states], [torch.cat(rows) for rows in ends]

    def backward(self, grad: Tensor, states: tuple[Tensor, ...], ends: list[Tensor | None]) -> tuple[Any, list[Tensor]]:
        """Gradients of the inputs, and of the state entering each run."""
        runs, fixed = self.plan.runs, [name in self.recurrence.fixed for name in self.inputs._fields]
        totals = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in self.inputs]
        starts: list[list[Tensor]] = [[] for _ in runs]
        for link, row in self._turns(reverse=True):
            later = self._receive(link, row, 1)
            for run in reversed(self.plan.runs_of(link)):
                own = slice(runs[run].offset, runs[run].offset + runs[run].length)
                end = ends[run]
                if runs[run].last:
                    later = None if end is None else end[row : row + 1]
                chain = RecomputedChain(self.recurrence, None, states[run][:, row : row + 1])
                part, rows = self._part(row, own), slice(row, row + 1)
                found, (later,) = self._over(run).backward(part, grad[rows, own], chain, [later])
                for total, new, whole in zip(totals, found, fixed, strict=True):
                    if whole:
                        total += new
                    else:
                        total[rows, own] = new
                starts[run].append(later)
            self._send(link, row, -1, later)
        self._finish("backward")
        grads = type(self.inputs)(*(t.to(x.dtype) for t, x in zip(totals, self.inputs, strict=True)))
        return grads, [torch.cat(rows) for rows in starts]

    def _turns(self, reverse: bool = False) -> Iterator[tuple[Link, int]]:
        """This rank's links in order, each for all sequences."""
        links = sorted(self.plan.own_links, key=lambda link: link.order, reverse=reverse)
        return ((link, row) for link in links for row in range(self.batch))

    def _over(self, run: int) -> Recomputed:
        return replace(self.recurrence, runs=((0, self.plan.runs[run].length),))

    def _part(self, row: int, tokens: slice) -> Any:
        named = zip(self.inputs._fields, self.inputs, strict=True)
        fixed = self.recurrence.fixed
        return type(self.inputs)(*(x if name in fixed else x[row : row + 1, tokens] for name, x in named))

    # Messages ---------------------------------------------------------------------------------------------------------

    def _beside(self, link: Link, step: int) -> Link | None:
        """The link before or behind, if something passes between them."""
        place = self.place[link.order]
        later = place + max(step, 0)
        if not 0 < later < len(self.plan.links) or self.plan.links[later].opens:
            return None
        return self.plan.links[place + step]

    def _receive(self, link: Link, row: int, step: int) -> Tensor | None:
        source = self._beside(link, step)
        if source is None:
            return None
        if source.rank == link.rank:
            return self.kept.pop((source.order, row))
        buffer = torch.empty_like(self.empty)
        self.received += buffer.nbytes
        return collectives.receive(buffer, source.rank, self.group, self._tag(link, row)).wait()

    def _send(self, link: Link, row: int, step: int, state: Tensor | None) -> None:
        target = self._beside(link, step)
        if target is None:
            return
        state = self.empty if state is None else state
        if target.rank == link.rank:
            self.kept[link.order, row] = state
        else:
            self.pending.append(collectives.send(state, target.rank, self.group, self._tag(target, row)))

    def _tag(self, target: Link, row: int) -> int:
        return (self.place[target.order] * self.batch + row) % 32_000

    def _finish(self, phase: str) -> None:
        for pending in self.pending:
            pending.wait()
        collectives.record("pass", phase, self.received, self.batch + len(self.plan.links) - 2)
