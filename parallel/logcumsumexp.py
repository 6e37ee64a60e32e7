"""Running log-sum-exp over ranks: the scan of a stabiliser, whose maps are not affine (`z -> logaddexp(z, u)`).

A row [B, ...] per link crosses in each direction. LightNet divides its keys by what it yields, and is an ordinary
linear attention after that; so would be any gate that depends on a running sum or maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.kernels.logcumsumexp import ratio, running, suffix_sums
from lasp.parallel import collectives
from lasp.parallel.call import Turn
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Link, Plan


class LogCumSumExp(torch.autograd.Function):
    """
    inputs     x [B, T, ...] of this rank's tokens; initial [documents, B, ...], -inf where nothing came before
    outputs    of each run what enters it, and what that is after each token, run after run: [B, T + runs, ...]
    forward    one all-gather of the sums of all links, [links, B, ...] per rank
    backward   one all-gather of the gradients of what entered them, of the same size
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, turn: Turn, x: Tensor, initial: Tensor) -> Tensor:
        parts = [x[:, run.offset : run.offset + run.length] for run in plan.runs]
        sums = []
        for link in plan.own_links:
            last = plan.runs_of(link)[-1]
            run, total = plan.runs[last], parts[last].logsumexp(1)
            sums.append(torch.logaddexp(total, initial[run.document]) if run.reset else total)
        with turn.forward():
            gathered = _gather(sums, plan, turn.group, "forward")
        carries = [torch.full_like(sums[0], -torch.inf)]  # what enters each link, and what leaves the last
        for link, total in zip(plan.links, gathered, strict=True):
            carries.append(total if link.reset else torch.logaddexp(carries[-1], total))
        entering = {run: carries[place] for place, link in enumerate(plan.links) for run in _entered(plan, link)}
        rows = [
            running(part, entering.get(i, initial[run.document]))
            for i, (run, part) in enumerate(zip(plan.runs, parts, strict=True))
        ]
        ctx.plan, ctx.turn = plan, turn
        result = torch.cat(rows, 1)
        ctx.save_for_backward(x, initial, result, torch.stack(carries))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor]:
        plan, (x, initial, result, carries) = ctx.plan, ctx.saved_tensors
        sizes = [run.length + 1 for run in plan.runs]
        rows = result.split(sizes, 1)
        grads = [suffix_sums(*pair) for pair in zip(grad.split(sizes, 1), rows, strict=True)]
        nothing = torch.zeros_like(carries[0])
        sums = [sum((grads[i][:, 0] for i in _entered(plan, link)), nothing) for link in plan.own_links]
        with ctx.turn.backward():
            gathered = _gather(sums, plan, ctx.turn.group, "backward")
        later, arriving = nothing, {}
        for place, total in reversed(list(enumerate(gathered))):
            link = plan.links[place]
            arriving[link] = later
            later = total if link.reset else total + ratio(carries[place], carries[place + 1]) * later
        for link in plan.own_links:
            last = plan.runs_of(link)[-1]
            grads[last] = grads[last] + ratio(rows[last], rows[last][:, -1:]) * arriving[link].unsqueeze(1)
        grad_x, grad_initial = torch.zeros_like(x), torch.zeros_like(initial)
        for run, z, total in zip(plan.runs, rows, grads, strict=True):
            tokens = slice(run.offset, run.offset + run.length)
            grad_x[:, tokens] = ratio(x[:, tokens], z[:, 1:]) * total[:, 1:]
            if run.reset:
                grad_initial[run.document] += total[:, 0]
        return None, None, grad_x, grad_initial


def _entered(plan: Plan, link: Link) -> list[int]:
    """The run of this rank that what enters the link enters: its first, unless a document begins there."""
    if link.rank != plan.rank:
        return []
    return [i for i in plan.runs_of(link)[:1] if not plan.runs[i].reset]


def _gather(own: list[Tensor], plan: Plan, group: SequenceGroup | None, phase: str) -> list[Tensor]:
    """A row of each link, in the order of the chain, from those of this rank's links."""
    if group is None or group.size == 1:
        return [own[link.place] for link in plan.links]
    ranks = collectives.all_gather(torch.stack(own), group.process_group, phase).wait()
    return [ranks[link.rank, link.place] for link in plan.links]
