"""A tiny training that several files start."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY = """
output = "{folder}/run"
steps = {steps}
device = "cpu"
[model]
num_hidden_layers = 1
hidden_size = 32
intermediate_size = 32
num_attention_heads = 2
[data]
source = "{folder}/text.txt"
seq_len = 65
"""


@pytest.fixture
def steps() -> int:
    """Of the training; for a file that wants others to say."""
    return 3


@pytest.fixture
def recipe(tmp_path: Path, steps: int) -> str:
    """The configuration's file, beside its text."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    (tmp_path / "tiny.toml").write_text(TINY.format(folder=tmp_path, steps=steps))
    return str(tmp_path / "tiny.toml")
