"""Every case of the table comes out as docs/reliability.md says."""

from __future__ import annotations

import pytest

from tests.mismatches.cases import CASES
from tests.mismatches.runner import Case, try_case

# What cannot be seen: nothing of it reaches the others before they wait for it. And torch's own (DDP).
UNSEEN = {
    "a call skipped, then a barrier",
    "KeyboardInterrupt between two calls",
    "MemoryError in the middle of a call, and another call",
    "a rank that sleeps",
    "one of two sequences is wrong",
    "ddp, the forward skipped, a call follows",
    "ddp, an unused parameter on one rank, a call follows",
    "an id beyond the vocabulary",
    "an unknown method",
    "group=None on one rank",
    "generate on one rank",
    "a layer raises on one rank",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.api}: {case.name}")
def test_a_mistake_of_one_rank(case: Case) -> None:
    outcome, reports = try_case(case)
    if case.expects == "mistake" and case.name not in UNSEEN:
        assert outcome in ("refused", "raised"), reports
    else:
        assert outcome in (case.expects, "raised", "hang", "wait"), reports
