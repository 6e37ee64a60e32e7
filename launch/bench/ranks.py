"""The ranks of a benchmark: a script on each, whose last line of output is what it found, as JSON.

They end with the process that started them, however that ends, and when the first of them fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lasp.launch import rank as entry

_POLL = 0.05
# Only the standard library is there before the rank is tied, and no `lasp`: the rank may be of another checkout.
_TIED = "import runpy, sys; runpy.run_path(sys.argv[1])['tie'](int(sys.argv[2])); del sys.argv[:3]; "
_TIED += "runpy.run_path(sys.argv[0], run_name='__main__')"


class Start(NamedTuple):
    """How a rank is started: the arguments of its script, what its environment has beside ours, and a command that runs
    the whole."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = {}
    within: Sequence[str] = ()


def run(script: str, starts: Sequence[Start]) -> list[dict[str, Any]]:
    """What each rank found, {} where it says nothing. RuntimeError, with the exit codes of all, where one failed."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f"rank-{rank}" for rank in range(len(starts))]
        ranks: list[subprocess.Popen] = []
        try:
            for start, output in zip(starts, outputs, strict=True):
                ranks.append(_start(script, start, output))
            while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
                time.sleep(_POLL)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(codes):
            raise RuntimeError(f"a rank failed, and ended the others: exit codes {codes}, None of who was at work")
        lines = [output.read_text(encoding="utf-8").splitlines() for output in outputs]
        return [json.loads(own[-1]) if own else {} for own in lines]


def _start(script: str, start: Start, output: Path) -> subprocess.Popen:
    tied = [sys.executable, "-P", "-c", _TIED, entry.__file__, str(os.getpid()), script]
    with output.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            [*start.within, *tied, *start.arguments], env={**os.environ, **start.environment}, stdout=file
        )
