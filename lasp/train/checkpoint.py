"""Checkpoints: one folder per step, complete from the moment it has its name.

checkpoints/step-000150/
    config.json, model.safetensors   the model, as `from_pretrained` reads it
    training.pt                      optimizer state and the number of steps done
    run.json                         the configuration of the run, for the reader
"""

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.train.config import TrainConfig

_NAME = re.compile(r"step-(\d{6,})")
# What transformers writes into config.json about itself rather than about the model.
_BOOKKEEPING = {"transformers_version", "architectures", "_name_or_path", "dtype"}


def checkpoint_folder(output: str | Path) -> Path:
    """Where a run with this output folder keeps its checkpoints."""
    return Path(output) / "checkpoints"


def checkpoint_path(output: str | Path, step: int) -> Path:
    """The folder of the checkpoint that is written after `step` steps."""
    return checkpoint_folder(output) / f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """How many steps a checkpoint has behind it; ValueError when its folder is not named after them."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{str(path)!r} is not a checkpoint: its name is not of the form step-000150")
    return int(match[1])


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint that `config.resume` asks for; None to start from scratch.

    ValueError when it does not exist, or when a new run would mix its checkpoints with those of another.
    """
    folder = checkpoint_folder(config.output)
    present = list_checkpoints(folder)
    if config.resume == "latest":
        return present[-1] if present else None
    if config.resume is not None and not (Path(config.resume) / "training.pt").is_file():
        raise ValueError(f"resume = {config.resume!r} is not a checkpoint: it holds no training.pt")
    resumed = Path(config.resume).resolve() if config.resume is not None else None
    if present and present[-1].resolve() != resumed and not config.overwrite:
        raise ValueError(
            f"{str(folder)!r} already holds {len(present)} checkpoints, the last {present[-1].name}: "
            'choose another output, resume = "latest", or overwrite = true'
        )
    return resumed


def check_checkpoint(path: Path, config: LinearLlamaConfig) -> None:
    """ValueError, naming what differs, when a checkpoint is not of a model with this configuration."""
    written = _read_json(path / "config.json")
    # The file leaves out what has its default value; the class knows those, but would call any model its own.
    saved = {**LinearLlamaConfig.from_dict(written).to_dict(), "model_type": written.get("model_type")}
    expected = config.to_dict()
    differing = [
        f"{key} is {saved.get(key)!r} there and {expected.get(key)!r} here"
        for key in sorted((saved.keys() | expected.keys()) - _BOOKKEEPING)
        if saved.get(key) != expected.get(key)
    ]
    if differing:
        raise ValueError(f"checkpoint {str(path)!r} is of another model: {'; '.join(differing)}")


def save_checkpoint(
    config: TrainConfig, step: int, model: LinearLlamaForCausalLM, optimizer: torch.optim.Optimizer
) -> Path:
    """Write the state after `step` steps and return its folder. One rank calls this; its peers hold the same values."""
    path = checkpoint_path(config.output, step)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        torch.save({"step": step, "optimizer": optimizer.state_dict()}, partial / "training.pt")
        (partial / "run.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def load_checkpoint(path: Path, model: LinearLlamaForCausalLM, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint's state into a model of its configuration and that model's optimizer; return the steps done.

    ValueError when the checkpoint is of another model, naming the fields or the parameters that differ.
    """
    check_checkpoint(path, model.config)
    _load_weights(path / "model.safetensors", model)
    # weights_only: a checkpoint is data, and loading one must never run code.
    training = torch.load(path / "training.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(training["optimizer"])
    return int(training["step"])


def delete_checkpoints(output: str | Path) -> None:
    """Remove the complete checkpoints of an output folder; whatever else lies there stays."""
    for path in list_checkpoints(checkpoint_folder(output)):
        shutil.rmtree(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {str(path)!r} of the checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} of the checkpoint is not a JSON object")
    return content


@torch.no_grad()
def _load_weights(path: Path, model: LinearLlamaForCausalLM) -> None:
    """Copy tensors into the model's own parameters, which keep their dtype and their ties."""
    parameters = dict(model.named_parameters())  # a tied weight is listed once, under the name it is saved by
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        if differing:
            described = "; ".join(f"{n} is {shapes.get(n)} there and {expected.get(n)} here" for n in differing[:5])
            raise ValueError(f"{str(path)!r} is of another model: {len(differing)} parameters differ: {described}")
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(name))
