"""Adapters added to the weights that they stand around."""

from pathlib import Path
from typing import Any

import torch

from lasp.train.checkpoints.export import read_weights
from lasp.train.checkpoints.manifest import Manifest
from lasp.train.run import Run


def merge_adapters(run: Run, checkpoint: Path) -> Path:
    """Write the model of a run with what a checkpoint's adapters add to its weights into `merged` in the output folder,
    and its tokenizer: on one rank."""
    folder = Path(run.config.output) / "merged"
    model: Any = run.model.build(run.config.seed, torch.float32)
    model.load_state_dict(read_weights(Manifest.read(checkpoint)), strict=False)
    model.merge_and_unload().save_pretrained(folder)
    run.tokenizer.save(folder)
    return folder
