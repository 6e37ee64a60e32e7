"""Running log-sum-exp over ranks: the scan of a stabiliser, whose maps are not affine (`z -> logaddexp(z, u)`).

A row [B, ...] per link crosses in each direction. LightNet divides its keys by what it yields, and is an ordinary
linear attention after that; so would be any gate that depends on a running sum or maximum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lasp.kernels.logcumsumexp import LogSum, ratio, running, suffix_sums
from lasp.kernels.once import once_differentiable
from lasp.kernels.segment import Segment
from lasp.parallel.call import Turn
from lasp.parallel.exchange import enter_ends, enter_runs, exchange_of, given_back
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import LogSums
from lasp.parallel.scan import Scan


def running_sums(plan: Plan, turn: Turn, scan: Scan, x: Tensor, initial: Tensor) -> list[Tensor]:
    """Of each run what enters it and what that is after each token, [B, run + 1, ...].

    x [B, T, ...] of this rank's tokens; initial [documents, B, ...], -inf where nothing came before.
    """
    trained = torch.is_grad_enabled() and (x.requires_grad or initial.requires_grad)
    rows: Tensor = _LogCumSumExp.apply(plan, turn, scan, trained, x, initial)
    return list(rows.split([run.length + 1 for run in plan.runs], 1))


class _LogCumSumExp(torch.autograd.Function):
    """
    inputs     x [B, T, ...]; initial [documents, B, ...]
    outputs    the rows of all runs, one behind the other: [B, T + runs, ...]
    forward    one scan of the sums of links, a row [B, ...] each
    backward   one reverse scan of the gradients of what entered them, of the same size
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, turn: Turn, scan: Scan, trained: bool, x: Tensor, initial: Tensor) -> Tensor:
        parts = [x[:, run.offset : run.offset + run.length] for run in plan.runs]
        starts: list[Tensor | None] = [initial[run.document].unsqueeze(-1) for run in plan.runs]
        arrived: list[Tensor | None] = [None] * len(plan.own_links)
        kept = None
        if turn.group is not None:
            with turn.forward():
                maps = [_link_map(link, plan, parts, starts) for link in plan.own_links]
                ctx.exchange = exchange_of(scan, plan, turn.group, maps[0], LogSums(), trained)
                arrived, kept = ctx.exchange.start(maps, LogSums()).wait()
        nothing = torch.full_like(initial[0], -torch.inf)
        entering = [nothing if z is None else z.squeeze(-1) for z in enter_runs(plan, arrived, starts)]
        result = torch.cat([running(part, z) for part, z in zip(parts, entering, strict=True)], 1)
        ctx.plan, ctx.turn = plan, turn
        ctx.save_for_backward(x, initial, result, kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, turn, (x, initial, result, kept) = ctx.plan, ctx.turn, ctx.saved_tensors
        sizes = [run.length + 1 for run in plan.runs]
        rows = result.split(sizes, 1)
        grads = [suffix_sums(*pair) for pair in zip(grad.split(sizes, 1), rows, strict=True)]
        if turn.group is not None:
            with turn.backward():
                maps = [_link_adjoint(link, plan, rows, grads) for link in plan.own_links]
                arrived = ctx.exchange.start_back(maps, LogSums(), kept).wait().states
            for i, later in enumerate(enter_ends(plan, arrived, [None] * len(plan.runs))):
                if later is not None:
                    grads[i] = grads[i] + ratio(rows[i], rows[i][:, -1:]) * later.squeeze(-1).unsqueeze(1)
        grad_x, grad_initial = torch.zeros_like(x), torch.zeros_like(initial)
        for run, z, total in zip(plan.runs, rows, grads, strict=True):
            tokens = slice(run.offset, run.offset + run.length)
            grad_x[:, tokens] = ratio(x[:, tokens], z[:, 1:]) * total[:, 1:]
            if run.reset:
                grad_initial[run.document] += total[:, 0]
        return None, None, None, None, grad_x, grad_initial


def _link_map(link: Link, plan: Plan, parts: list[Tensor], starts: list[Tensor | None]) -> LogSum:
    """What a link adds to the sum that enters it: its last run, with its document's start if that is in it."""
    run = plan.runs_of(link)[-1]
    own, start = LogSum(parts[run].logsumexp(1).unsqueeze(-1)), starts[run] if plan.runs[run].reset else None
    return own if start is None else LogSum(own(start))


def _link_adjoint(link: Link, plan: Plan, rows: tuple[Tensor, ...], grads: list[Tensor]) -> Segment:
    """What a link does to the gradient of what leaves it: its first run decides."""
    run = plan.runs_of(link)[0]
    transfer = ratio(rows[run][:, 0], rows[run][:, -1])
    return Segment(transfer.unsqueeze(-1), given_back(plan, link, grads[run][:, 0].unsqueeze(-1)))
