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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.train.config import TrainConfig

_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = re.compile(rf"\.{_NAME.pattern}\.\d+")
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
        there = f"{str(folder)!r} already holds {len(present)} checkpoints, the last {present[-1].name}"
        if resumed is None:
            raise ValueError(f'{there}: choose another output, resume = "latest", or overwrite = true')
        raise ValueError(f"{there}: to go on from {resumed.name}, choose another output, or remove those after it")
    return resumed


def check_checkpoint(path: Path, config: LinearLlamaConfig) -> None:
    """ValueError, naming what differs, when a checkpoint is not of a model with this configuration."""
    written = _read_json(path / "config.json")
    # The file leaves out what has its default value; the class knows those, but would call any model its own.
    known = _read(path / "config.json", lambda _: LinearLlamaConfig.from_dict(written).to_dict())
    saved = {**known, "model_type": written.get("model_type")}
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
    _delete_partial(path.parent)
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

    Nothing is loaded before all of it was compared, names, shapes and dtypes. ValueError when a file cannot be read,
    and, naming what differs, when the checkpoint is of another model, another optimizer or another step.
    """
    check_checkpoint(path, model.config)
    parameters = dict(model.named_parameters())  # a tied weight is listed once, under the name it is saved by
    weights = _read(path / "model.safetensors", load_file)
    _compare(path / "model.safetensors", weights, parameters)
    # weights_only: a checkpoint is data, and loading one must never run code.
    training = _read(path / "training.pt", lambda file: torch.load(file, map_location="cpu", weights_only=True))
    state = _optimizer_state(path / "training.pt", training, optimizer)
    _put(weights, parameters)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return checkpoint_step(path)


def delete_checkpoints(output: str | Path) -> None:
    """Remove the checkpoints of an output folder, complete or not; whatever else lies there stays."""
    _delete_partial(checkpoint_folder(output))
    for path in list_checkpoints(checkpoint_folder(output)):
        shutil.rmtree(path)


def _delete_partial(folder: Path) -> None:
    """Remove what a process that was killed while saving has left; the next one may have the same number."""
    for path in folder.glob(".step-*"):
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path)


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """What a file of a checkpoint holds. ValueError, naming the file, for whatever is wrong with it."""
    if not path.is_file():  # a FIFO would wait, a device has no end
        raise ValueError(f"{str(path)!r} of the checkpoint is missing, or no file")
    try:
        return reader(path)
    except Exception as error:  # every library has its own ways to reject what it reads
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {str(path)!r} of the checkpoint: {told}") from error


def _read_json(path: Path) -> dict[str, Any]:
    content = _read(path, lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} of the checkpoint is not a JSON object")
    return content


def _optimizer_state(path: Path, training: Any, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """The state of every parameter by its number, as AdamW keeps it, from what `path` held.

    The optimizer writes as many numbers as its parameters have, whatever tensors it was given. So each is compared with
    the one that AdamW makes itself, and copied. The settings of the groups are not the file's but the run's.
    """
    groups = optimizer.state_dict()["param_groups"]
    try:
        step = int(training["step"])
        numbers = [[int(number) for number in group["params"]] for group in training["optimizer"]["param_groups"]]
        state = training["optimizer"]["state"].items()
        saved = {f"{number}.{name}": value for number, entries in state for name, value in entries.items()}
    except Exception as error:  # what was written may be anything
        raise ValueError(f"{str(path)!r} is not the training state of a checkpoint") from error
    if step != checkpoint_step(path.parent):
        raise ValueError(f"{str(path)!r} is of step {step}, its folder of step {checkpoint_step(path.parent)}")
    if numbers != [group["params"] for group in groups]:
        raise ValueError(f"{str(path)!r} is of another optimizer: its groups hold other parameters")
    own = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own[number] = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        own[number]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    flat = {f"{number}.{name}": value for number, entries in own.items() for name, value in entries.items()}
    _compare(path, saved, flat)
    _put(saved, flat)
    return own


def _compare(path: Path, found: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """ValueError, naming the first that differ, unless a file has tensors of these names, shapes and dtypes."""
    there, here = ({name: _described(value) for name, value in of.items()} for of in (found, expected))
    if differing := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
        told = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in differing[:3])
        raise ValueError(f"{str(path)!r} is of another model or dtype: {len(differing)} tensors differ: {told}")


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout is not torch.strided or value.is_meta:
        return f"{value.layout} on {value.device}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


@torch.no_grad()
def _put(found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Copy tensors into those of the same names, which keep their places in memory and their ties."""
    for name, value in own.items():
        value.copy_(found[name])
