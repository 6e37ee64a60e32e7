"""Where differentiation lives: a kernel family joined to a scan over ranks (LASP-2, arXiv:2502.07563).

    forward                                        backward
      states     kernel, from an empty memory        adjoint       kernel, from no later gradient
      start      the scan of maps (A, U)             start         the reverse scan of (A^T, dU)
      inside     kernel, while the scan travels      grad_outputs  kernel, while the scan travels
      wait       the state that enters each run      wait          the gradient that enters each run's end
      read_out   kernel                              grad_states   kernel

One exchange forward, one backward. The true states are saved, never exchanged again. Where nothing travels, the kernel
runs the same stages at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.chain import Chain
from lasp.kernels.inputs import Inputs
from lasp.kernels.once import once_differentiable
from lasp.kernels.precision import exact
from lasp.kernels.recurrence import Recurrence
from lasp.kernels.segment import Segment
from lasp.parallel import collectives
from lasp.parallel.call import Turn
from lasp.parallel.exchange import Direction, enter_ends, enter_runs, exchange_of, given_back
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import Affine
from lasp.parallel.scan import Scan
from lasp.parallel.work import count_recurrence


@dataclass(frozen=True)
class Call:
    """Everything about one call that is not a tensor.

    plan: waits for the ranks' agreement and returns the plan; nothing is sent before. turn: which call it is. final:
    return final states.
    """

    recurrence: Recurrence
    plan: Callable[[], Plan]
    turn: Turn
    scan: Scan
    final: bool

    @property
    def group(self) -> SequenceGroup | None:
        """The ranks that share the sequence; None where this one holds all of it."""
        return self.turn.group

    @property
    def alone(self) -> bool:
        """Whether this rank holds the whole sequence: nothing travels, and every run begins a document."""
        return self.group is None


def causal_recurrence(call: Call, initial_state: Tensor | None, inputs: Any) -> tuple[Tensor, Tensor | None]:
    """Run a causal recurrence over the whole sequence.

    inputs: of the kind that the recurrence takes. initial_state [documents, B, H, K, V] or None. Returns the local
    output [B, T, Ho, V] and, when the call asks for them, the final states [documents, B, H, K, V], the same on every
    rank.
    """
    trained = _trained(initial_state, *inputs)
    count_recurrence(call.recurrence, inputs)
    with _exact(inputs):
        output, final = _CausalRecurrence.apply(call, trained, initial_state, *inputs)
    return output, final if call.final else None


class _CausalRecurrence(torch.autograd.Function):
    """
    inputs     q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V], gates; initial_state [documents, B, H, K, V]
    outputs    output [B, T, Ho, V], final states [documents, B, H, K, V]
    forward    one scan of [H, K, V] per link; one all-reduce of the final states if asked for
    backward   one reverse scan of [H, K, V] per link; one all-reduce of the final states' gradient if they were given
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, trained: bool, initial_state: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        recurrence, kept = call.recurrence, None
        inputs = recurrence.kind(*tensors)
        if call.group is None:
            plan = call.plan()
            output, chain = recurrence.forward(inputs, initial_states(plan, initial_state))
            final = share_final(call, plan, chain.leaving(), "forward") if call.final else None
        else:
            with call.turn.forward():
                chain = recurrence.states(inputs)
                plan = call.plan()
                initial = initial_states(plan, initial_state)
                maps = [_link_map(link, plan, chain, initial) for link in plan.own_links]
                monoid = _affine(recurrence, inputs)
                ctx.exchange = exchange_of(call.scan, plan, call.group, maps[0], monoid, trained)
                flight = ctx.exchange.start(maps, monoid)
                inside = recurrence.inside(inputs, chain)
                arrived, kept = flight.wait()
                chain.enter(enter_runs(plan, arrived, initial))
                output = recurrence.read_out(inputs, chain, inside)
                final = share_final(call, plan, chain.leaving(), "forward") if call.final else None
        _save(ctx, call, plan, initial_state, inputs, chain, kept)
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call, plan, recurrence = ctx.call, ctx.plan, ctx.call.recurrence
        inputs, entered, kept = _saved(ctx)
        with _exact(inputs), call.turn.backward():
            ends = ends_grad(call, plan, grad_final)
            if call.alone:
                grads, starts = recurrence.backward(inputs, grad, entered, ends)
            else:
                adjoint = recurrence.adjoint(inputs, grad, entered)
                maps = [_link_adjoint(link, plan, adjoint, ends) for link in plan.own_links]
                flight = ctx.exchange.start_back(maps, _affine(recurrence, inputs), kept)
                total = recurrence.grad_outputs(inputs, grad, entered)
                adjoint.enter(enter_ends(plan, flight.wait().states, ends))
                grads, starts = recurrence.grad_states(inputs, entered, adjoint, total), adjoint.leaving()
        begins = [start if run.reset else None for run, start in zip(plan.runs, starts, strict=True)]
        return None, None, initial_grad(plan, begins, starts[0]) if ctx.has_initial else None, *grads


def _affine(recurrence: Recurrence, inputs: Any) -> Affine:
    """The maps of a recurrence, whose transfers follow from the plan where its gates do not differ between tokens."""
    rule = recurrence.transfer_rule(inputs)
    return Affine() if rule is None else Affine(lambda link: rule(link.length))


def _trained(*tensors: Tensor | None) -> bool:
    """Whether a call of these will be differentiated."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _exact(inputs: Any) -> AbstractContextManager[object]:
    """Keep autocast away: states, decays and sums are in fp32 or fp64 whatever surrounds the call."""
    return exact(inputs[0])


def _save(
    ctx: Any, call: Call, plan: Plan, initial_state: Tensor | None, inputs: Any, chain: Chain, kept: Tensor | None
) -> None:
    """Keep what backward needs; tensors through autograd, so that checkpointing and offloading see them."""
    ctx.call, ctx.plan, ctx.has_initial = call, plan, initial_state is not None
    ctx.save_for_backward(*inputs, kept, *chain.tensors())


def _saved(ctx: Any) -> tuple[Any, Chain, Tensor | None]:
    """The inputs, the true states of the forward pass, and what its scan kept."""
    kind, tensors = ctx.call.recurrence.kind, ctx.saved_tensors
    count = len(kind._fields)
    inputs = kind(*tensors[:count])
    return inputs, ctx.call.recurrence.restore(inputs, tensors[count + 1 :]), tensors[count]


# Runs and links -----------------------------------------------------------------------------------------------------


def initial_states(plan: Plan, initial_state: Tensor | None) -> list[Tensor | None]:
    """The initial state of each run's document."""
    return [None if initial_state is None else initial_state[run.document] for run in plan.runs]


def _link_map(link: Link, plan: Plan, chain: Chain, initial: list[Tensor | None]) -> Segment:
    """What a link does to the state that enters it: its last run decides, since all but the first begin anew."""
    run = plan.runs_of(link)[-1]
    segment, start = chain.segment(run), initial[run] if plan.runs[run].reset else None
    return segment if start is None else Segment(segment.transfer, segment(start))


def _link_adjoint(link: Link, plan: Plan, adjoint: Chain, ends: list[Tensor | None]) -> Segment:
    """What a link does to the gradient of the state that leaves it: its first run decides."""
    run = plan.runs_of(link)[0]
    segment, end = adjoint.segment(run), ends[run]
    state = segment.state if end is None else segment(end)
    return Segment(segment.transfer, given_back(plan, link, state))


def share_final(call: Call, plan: Plan, states: list[Tensor], phase: str) -> Tensor:
    """The states at the ends of all documents [documents, B, H, K, V], on every rank."""
    own = {run.document: state for run, state in zip(plan.runs, states, strict=True) if run.last}
    nothing = torch.zeros_like(states[0])
    shared = torch.stack([own.get(document, nothing) for document in range(plan.documents)])
    return shared if call.group is None else collectives.all_reduce(shared, call.group.process_group, phase).wait()


def ends_grad(call: Call, plan: Plan, grad_final: Tensor | None) -> list[Tensor | None]:
    """The gradient of the final state where a document ends in one of this rank's runs, summed over the ranks."""
    if not call.final:
        return [None] * len(plan.runs)
    assert grad_final is not None, "autograd materialises the gradient of a returned final state"
    if call.group is not None:
        grad_final = collectives.all_reduce(
            grad_final.clone(memory_format=torch.contiguous_format), call.group.process_group, "backward"
        ).wait()
    return [grad_final[run.document] if run.last else None for run in plan.runs]


def initial_grad(plan: Plan, parts: list[Tensor | None], like: Tensor) -> Tensor:
    """This rank's part of the gradient of the initial states, from what each run gives to its document's."""
    grad = like.new_zeros(plan.documents, *like.shape)
    for run, part in zip(plan.runs, parts, strict=True):
        if part is not None:
            grad[run.document] += part
    return grad


# Without mask -------------------------------------------------------------------------------------------------------


def bidirectional_recurrence(call: Call, initial_state: Tensor | None, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """Every token reads the state at its document's end (LASP-2, arXiv:2502.07563, algorithm 1). No decay.

    Arguments and results as in `causal_recurrence`.
    """
    count_recurrence(call.recurrence, inputs)
    with _exact(inputs):
        output, final = _BidirectionalRecurrence.apply(call, initial_state, *inputs)
    return output, final if call.final else None


class _BidirectionalRecurrence(torch.autograd.Function):
    """
    inputs     q [B, T, Hq, K], k [B, T, Hk, K], v [B, T, Hv, V]; initial_state [documents, B, H, K, V]
    outputs    output [B, T, Ho, V], final states [documents, B, H, K, V]
    forward    one document: one all-reduce of [H, K, V]; more: a scan and a reverse scan. Final states: one all-reduce
    backward   the same of the gradients
    """

    @staticmethod
    def forward(ctx: Any, call: Call, initial_state: Tensor | None, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        recurrence = call.recurrence
        inputs = recurrence.kind(*tensors)
        with call.turn.forward():
            chain = recurrence.states(inputs)
            plan = call.plan()
            totals = _document_totals(call, plan, chain.leaving(), "forward")
            if initial_state is not None:
                totals = [total + initial_state[run.document] for run, total in zip(plan.runs, totals, strict=True)]
            chain.fill(totals)
            output = recurrence.read_out(inputs, chain, recurrence.inside(inputs, chain))
            final = share_final(call, plan, totals, "forward") if call.final else None
        _save(ctx, call, plan, initial_state, inputs, chain, None)
        return output, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
        call, plan, recurrence = ctx.call, ctx.plan, ctx.call.recurrence
        inputs, entered, _ = _saved(ctx)
        with _exact(inputs), call.turn.backward():
            adjoint = recurrence.adjoint(inputs, grad, entered)
            ends = ends_grad(call, plan, grad_final)
            own = [start if end is None else start + end for start, end in zip(adjoint.leaving(), ends, strict=True)]
            initial = initial_grad(plan, list(own), own[0]) if ctx.has_initial else None
            adjoint.fill(_document_totals(call, plan, own, "backward"))
            total = recurrence.grad_outputs(inputs, grad, entered)
            grads = recurrence.grad_states(inputs, entered, adjoint, total)
        return None, initial, *grads


def _document_totals(call: Call, plan: Plan, own: list[Tensor], phase: str) -> list[Tensor]:
    """For each run the sum of `own` [B, H, K, V] over all runs of its document, on all ranks."""
    if plan.documents == 1:
        total = torch.stack(own).sum(0)
        if call.group is not None:
            total = collectives.all_reduce(total, call.group.process_group, phase).wait()
        return [total] * len(own)
    if call.group is None:
        return own
    one = torch.ones_like(own[0][..., :1, :1])
    monoid = Affine(lambda link: one)
    exchange = exchange_of(call.scan, plan, call.group, Segment(one, own[0]), monoid, keeps=False)
    nothing: list[Tensor | None] = [None] * len(own)
    totals = list(own)
    ahead = [own[plan.runs_of(link)[-1]] for link in plan.own_links]
    back = [given_back(plan, link, own[plan.runs_of(link)[0]]) for link in plan.own_links]
    for reverse, states, enter in ((False, ahead, enter_runs), (True, back, enter_ends)):
        maps = [Segment(one, state) for state in states]
        flight = exchange.start(maps, monoid, Direction(phase, reverse))
        entering = enter(plan, flight.wait().states, nothing)
        totals = [total if more is None else total + more for total, more in zip(totals, entering, strict=True)]
    return totals
