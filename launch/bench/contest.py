"""A choice of `lasp plan` held against all it chose from: every candidate that it thinks fits is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from lasp.launch.bench.case import LAYOUT, METHOD, SCAN, Case, train
from lasp.launch.bench.table import markdown
from lasp.launch.plan.candidate import LEVERS, Candidate, Job, candidates
from lasp.launch.plan.estimate import estimate, ranked
from lasp.launch.simulate.machine import Machine


@dataclass(frozen=True)
class Contest:
    """A training whose layout and levers are to be chosen. seq: tokens of a sequence, of which a step has one for each
    rank; mb: what a rank may hold."""

    model: str
    pattern: str = ""
    ranks: int = 1
    seq: int = 1024
    mb: float = 8000.0

    @property
    def job(self) -> Job:
        return Job(self.seq, self.seq * self.ranks, 1, self.ranks)

    def case(self, candidate: Candidate) -> Case:
        """The training that a candidate stands for."""
        tokens, batches = self.seq // candidate.sp, candidate.repeat(self.job)
        return Case(
            self.model, self.pattern, candidate.levers, candidate.sp, tokens=tokens, dp=candidate.dp, batches=batches
        )

    def candidates(self, on: Machine, repeat: int) -> list[dict[str, Any]]:
        """What those that are planned to fit hold and take, in the order of their plans: trained in turns, of which the
        median counts, all at one pace of the machine: that of the plans, where they know theirs."""
        limited = replace(on, chip=replace(on.chip, memory=1e6 * self.mb))
        footprints = Case(self.model, self.pattern).footprints(on)
        made = candidates(self.job, LAYOUT, [SCAN], [METHOD], ["ddp"], list(LEVERS))
        planned = [estimate(one, self.job, limited, footprints) for one in made]
        found = ranked(one for one in planned if one.fits)
        turns = [[train(self.case(one.candidate), repeat) for one in found] for _ in range(TURNS)]
        seen = [one["pace"] for turn in turns for one in turn]
        pace = limited.among(self.ranks, 1).pace or (median(seen) if seen else 0.0)
        return [
            {
                "candidate": str(one.candidate),
                "planned": one.seconds,
                "seconds": pace * median(turn["seconds"] / turn["pace"] for turn in own),
                "bytes": max(turn["bytes"] for turn in own),
            }
            for one, *own in zip(found, *turns, strict=True)
        ]


CONTESTS = (
    Contest("lightning", "L"),
    Contest("lightning", "L", seq=2048, mb=300),
    Contest("lightning", "N"),
    Contest("gated_deltanet", "LLLN", seq=2048, mb=300),
    Contest("qwen3", seq=2048, mb=300),
    Contest("lightning", "L", ranks=2),
    Contest("lightning", "N", ranks=2),
    Contest("gla", "L", ranks=2, mb=250),
    Contest("gated_deltanet", "LLLN", ranks=2),
    Contest("qwen3", ranks=2, mb=200),
)
TURNS = 2
"""Of each candidate, one after another."""
WORSE = 0.05
"""Than the fastest, what a plan's choice may be to count as right."""


def show(contests: list[dict[str, Any]]) -> None:
    """A line per contest."""
    headings = ["model", "ranks", "tokens", "MB", "chosen", "ms", "fastest", "ms", "slower by, %"]
    rows, near = [], 0
    for contest in contests:
        chosen, fastest = choice(contest)
        if chosen is None or fastest is None:
            continue
        worse = chosen["seconds"] / fastest["seconds"] - 1
        near += worse <= WORSE and chosen["bytes"] <= 1e6 * contest["mb"]
        told = [part for one in (chosen, fastest) for part in (one["candidate"], f"{1e3 * one['seconds']:.0f}")]
        model = f"{contest['model']} {contest['pattern']}".strip()
        rows.append([model, contest["ranks"], contest["seq"], f"{contest['mb']:.0f}", *told, f"{100 * worse:.0f}"])
    print(f"\n{markdown(headings, rows)}")
    print(f"\nthe choice fits and is within {100 * WORSE:.0f} % of the fastest in {near} of {len(contests)}")


def choice(contest: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What a plan takes, and the fastest of those that were measured to fit; None where nothing does."""
    tried = contest["candidates"]
    fit = [one for one in tried if one["bytes"] <= 1e6 * contest["mb"]]
    return next(iter(tried), None), min(fit, key=lambda one: one["seconds"], default=None)
