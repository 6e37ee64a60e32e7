"""A tiny training in a folder of its own, and what it leaves there."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

TINY = """
output = "{folder}/run"
steps = {steps}
save_every = 5
timeout = 10
device = "cpu"
[model]
num_hidden_layers = 1
hidden_size = 16
intermediate_size = 16
num_attention_heads = 1
[data]
source = "{folder}/text.txt"
seq_len = 33
"""


def prepared(folder: Path, steps: int) -> Path:
    """A folder with tiny.toml, which describes a run of so many steps."""
    folder.mkdir(exist_ok=True)
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    (folder / "tiny.toml").write_text(TINY.format(folder=folder, steps=steps))
    return folder


def say(figures: str) -> None:
    """What was measured, for who runs this with -s."""
    sys.stdout.write(f"{figures}\n")


def state(folder: Path, step: int) -> dict[str, str]:
    """Checksums of what a checkpoint holds, but of the configuration, which names the folder."""
    manifest = json.loads((folder / "run" / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_text())
    found = {name: entry["sha256"] for name, entry in manifest["files"].items() if name != "run.json"}
    assert len(found) >= 3, found
    return found


def losses(folder: Path) -> list[float]:
    """Of all steps in its metrics."""
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> int:
    """How many steps there are in its metrics."""
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_until(holds: Callable[[], bool], seconds: float = 300) -> None:
    """Until something holds; AssertionError where it takes too long."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
