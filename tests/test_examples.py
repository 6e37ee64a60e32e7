"""Every example, as its first lines say it is run: the loss falls, and is the same on both ranks."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("*.py"))}


LINES = {"dpo.py": 60}
SOLO = {"dpo.py"}  # those that run on one rank too


def losses(name: str, ranks: int, folder: Path) -> list[list[str]]:
    """What each rank says of its epochs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, EXAMPLES[name]], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return [re.findall(rf"rank {rank}, epoch \d+: loss (\d+\.\d+)", done.stdout) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", EXAMPLES)
def test_runs_on_two_ranks(name: str, tmp_path: Path) -> None:
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert f"torchrun --nproc-per-node 2 examples/{name}" in text
    assert len(text.splitlines()) < LINES.get(name, 40)
    for package in ("peft", "accelerate"):
        if package in text and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    one, two = losses(name, 2, tmp_path)
    assert one == two
    assert float(one[-1]) < float(one[0]) - 0.5
    if name in SOLO:
        assert losses(name, 1, tmp_path) == [one]
