"""status.json: how a run stands, or how it ended, in its output folder."""

import json
from pathlib import Path
from typing import NamedTuple

WORDS = ("running", "done", "stopped", "failed")


class Status(NamedTuple):
    """How a run stands."""

    word: str
    """One of `WORDS`. Where it says "running" and nobody holds the folder, the run was killed."""

    steps: int
    """Steps that the run is to have in all."""

    told: str = ""
    """What ended it, where it failed."""

    def write(self, folder: Path) -> None:
        """Put it in the place of what the folder has."""
        partial = folder / ".status.json"
        partial.write_text(json.dumps(self._asdict()) + "\n", encoding="utf-8")
        partial.replace(folder / "status.json")


def read_status(folder: Path) -> Status | None:
    """What a folder says; None where it says nothing that can be read."""
    try:
        found = Status(**json.loads((folder / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return found if found.word in WORDS and isinstance(found.steps, int) else None
