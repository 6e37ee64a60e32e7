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
    "a layer raises on one rank",
}


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.api}: {case.name}")
def test_a_mistake_of_one_rank(case: Case) -> None:
    outcome, reports = try_case(case)
    if case.name in UNSEEN:
        assert outcome in ("raised", "hang", "wait"), reports
    elif case.expects == "mistake":
        assert outcome in ("refused", "raised"), reports
    else:
        assert outcome == case.expects, reports


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.api}: {case.name}")
def test_no_mistake(case: Case) -> None:
    """What is refused in a case is the mistake alone: without it, all is well."""
    outcome, reports = try_case(case._replace(run=lambda group, _: case.run(group, False), expects="harmless"))
    assert outcome == "harmless", reports
