"""status.json: how a run stands, or how it ended, in its output folder."""

import json
from pathlib import Path
from typing import NamedTuple

from lasp.train.files import regular, replaced

WORDS = ("running", "done", "stopped", "failed")
_LIMIT = 1 << 20


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
        with replaced(folder / "status.json") as partial:
            partial.write_text(json.dumps(self._asdict()) + "\n", encoding="utf-8")


def read_status(folder: Path) -> Status | None:
    """What a folder says; None where it says nothing that can be read."""
    try:
        with open(folder / "status.json", encoding="utf-8", opener=regular) as file:
            found = Status(**json.loads(file.read(_LIMIT)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    known = found.word in WORDS and isinstance(found.steps, int) and isinstance(found.told, str)
    return found if known else None
