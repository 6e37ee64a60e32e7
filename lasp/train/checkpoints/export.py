"""A model in the files of Hugging Face, from a checkpoint of any number of ranks."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from lasp.train.checkpoints.comparison import RUN
from lasp.train.checkpoints.manifest import FILE, Manifest, read_json
from lasp.train.checkpoints.reader import read_index, read_into
from lasp.train.checkpoints.writer import FOLDER
from lasp.train.config import LoraConfig
from lasp.train.model import ModelPlan


def export(checkpoint: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a checkpoint into a new folder, for `from_pretrained`; adapters for peft.

    ValueError for a checkpoint that is damaged, and for a folder that holds something, or is a link.
    """
    folder = folder.absolute()
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} exists already: export into a new folder")
    manifest = Manifest.read(checkpoint).check()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in manifest.files:
            if not name.startswith(f"{FOLDER}/") and name not in (RUN, FILE):
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint / name, partial / name)
        write_model(_plan(checkpoint), read_weights(manifest), partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_weights(manifest: Manifest) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, by the names that the model has for them."""
    index = {name: saved for name, saved in read_index(manifest).items() if ": " not in name}
    weights = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in index.items()}
    read_into(weights, index, manifest)
    return weights


def write_model(plan: ModelPlan, weights: dict[str, Tensor], folder: Path) -> None:
    """Write a model as its family writes it, or its adapters as peft does."""
    dtype = next(value.dtype for value in weights.values() if value.is_floating_point())
    plan.skeleton(dtype).save_pretrained(folder, state_dict=weights)


def _plan(checkpoint: Path) -> ModelPlan:
    """The model of a checkpoint. ValueError where its files do not describe one."""
    run = read_json(checkpoint, RUN)
    try:
        lora, name = LoraConfig(**run["lora"]), run["model"].get("name")
        config: Any = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # what was written may be anything
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(checkpoint)!r} does not say what model it is of: {told}") from error
    config._name_or_path = name or ""
    return ModelPlan(config, None, lora)
