"""Running maximum over ranks: the scan of a stabiliser, ahead of an ordinary recurrence (mLSTM, arXiv:2405.04517).

A number per head and link crosses, and the sum of its decays. Nothing is differentiated: what is divided by a
stabiliser and multiplied by it again does not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp.kernels.maximum import Highest, running
from lasp.parallel.call import Turn
from lasp.parallel.exchange import enter_runs, exchange_of
from lasp.parallel.layout import Link, Plan
from lasp.parallel.monoid import Maxima
from lasp.parallel.scan import Scan


@torch.no_grad()
def running_maxima(plan: Plan, turn: Turn, scan: Scan, x: Tensor, decay: Tensor, initial: Tensor) -> list[Tensor]:
    """Of each run what enters it and what that is after each token, [B, run + 1, H].

    x, decay [B, T, H] of this rank's tokens; initial [documents, B, H], -inf where nothing came before.
    """
    tokens = [slice(run.offset, run.offset + run.length) for run in plan.runs]
    parts = [(x[:, own], decay[:, own]) for own in tokens]
    nothing = torch.full_like(initial[0], -torch.inf)
    starts: list[Tensor | None] = [initial[run.document].unsqueeze(-1) for run in plan.runs]
    arrived: list[Tensor | None] = [None] * len(plan.own_links)
    if turn.group is not None:
        with turn.forward():
            maps = [_link_map(link, plan, parts, nothing, starts) for link in plan.own_links]
            arrived = exchange_of(scan, plan, turn.group, maps[0], Maxima(), False).start(maps, Maxima()).wait().states
    entering = [nothing if m is None else m.squeeze(-1) for m in enter_runs(plan, arrived, starts)]
    return [running(x, decay, m) for (x, decay), m in zip(parts, entering, strict=True)]


def _link_map(
    link: Link, plan: Plan, parts: list[tuple[Tensor, Tensor]], nothing: Tensor, starts: list[Tensor | None]
) -> Highest:
    """What a link makes of the maximum that enters it: its last run, with its document's start if that is in it."""
    run = plan.runs_of(link)[-1]
    x, decay = parts[run]
    own = Highest(decay.sum(1).unsqueeze(-1), running(x, decay, nothing)[:, -1].unsqueeze(-1))
    start = starts[run] if plan.runs[run].reset else None
    return own if start is None else Highest(own.decay, own(start))
