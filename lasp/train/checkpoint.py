"""Checkpoints: one folder per step, complete from the moment it has its name.

checkpoints/step-000150/
    config.json, model.safetensors   the model, as `from_pretrained` reads it; adapters as peft reads them
    tokenizer.json, …                the tokenizer, as AutoTokenizer reads it
    training.pt                      what the optimizer keeps of each parameter, and the number of steps done
    run.json                         the configuration of the run, which one that continues it is compared with
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lasp.models import LinearLlamaConfig
from lasp.train.config import TrainConfig
from lasp.train.engines.base import tensors_of
from lasp.train.engines.engine import Engine, State
from lasp.train.ranks import Ranks

if TYPE_CHECKING:
    from lasp.train.run import Run

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


def check_checkpoint(path: Path, model: Any, config: TrainConfig) -> list[str]:
    """ValueError, naming what differs, when a checkpoint is not of a model with this configuration, or when the run
    that wrote it had other data or other mathematics and `config.allow_change` is not set. Returns what else differs.
    """
    if not config.lora.rank:  # adapters are compared tensor by tensor
        _check_model(path, model)
    before = _read_json(path / "run.json")
    before.pop("read", None)  # compared when the ranks are known
    changed = changes(before, asdict(config))
    deciding = [told for name, told in changed.items() if not _is_free(name)]
    if deciding and not config.allow_change:
        raise ValueError(
            f"the run that wrote {str(path)!r} was another: {'; '.join(deciding)}; --allow-change goes on nevertheless"
        )
    return list(changed.values())


def _check_model(path: Path, config: Any) -> None:
    written = _read_json(path / "config.json")
    # The file leaves out what has its default value; the class knows those, but would call any model its own.
    known = _read(path / "config.json", lambda _: type(config).from_dict(written).to_dict())
    saved = {**known, "model_type": written.get("model_type")}
    expected = config.to_dict()
    differing = [
        f"{key} is {saved.get(key)!r} there and {expected.get(key)!r} here"
        for key in sorted((saved.keys() | expected.keys()) - _BOOKKEEPING)
        if saved.get(key) != expected.get(key) and not key.startswith("_")
    ]
    if differing:
        raise ValueError(f"checkpoint {str(path)!r} is of another model: {'; '.join(differing)}")


# What says where and how long a run is, who computes it and what is told of it: neither its data nor its mathematics.
_FREE = (
    "output", "overwrite", "resume", "allow_change", "steps", "save_every", "time_limit", "engine", "reduce_dtype",
    "device", "sp", "dp", "layout", "accumulation", "data.batch_size", "data.cache", "validation.every",
    "validation.sequences", "validation.source", "memory", "sample",
)  # fmt: skip


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in _FREE)


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """What a run's configuration says otherwise than that of the run it continues, by the fields' names."""
    found: dict[str, str] = {}
    for name in sorted(before.keys() | now.keys()):
        one, two = (json.loads(json.dumps(of.get(name))) for of in (before, now))
        if isinstance(one, dict) and isinstance(two, dict) and not prefix:
            found |= changes(one, two, f"{name}.")
        elif one != two:
            found[prefix + name] = f"{prefix}{name} was {one!r} and is {two!r}"
    return found


class Checkpointer(Protocol):
    """Keeps the states of a run. All ranks call every method together."""

    def save(self, step: int, engine: Engine) -> None:
        """Keep the state after `step` steps."""

    def load(self, path: Path, engine: Engine) -> int:
        """Put a state into an engine that has done nothing; returns the steps behind it. ValueError, on every rank,
        when it cannot be read or is of something else; then nothing of it was loaded."""


@dataclass(frozen=True)
class Folders:
    """A folder per state, written by the main rank and read by all."""

    run: "Run"
    """Says where, and is written down beside each state."""

    ranks: Ranks
    """Who takes part."""

    def save(self, step: int, engine: Engine) -> None:
        state = engine.state()
        if self.ranks.is_main:
            _write(self.run, self.run.batch(self.ranks), step, engine.model, state)
        self.ranks.barrier()

    def load(self, path: Path, engine: Engine) -> int:
        self.ranks.together(lambda: self._check(path))
        state = self.ranks.together(lambda: _read_state(path, engine.model))
        self.ranks.together(lambda: engine.load(state, str(path)))
        return checkpoint_step(path)

    def _check(self, path: Path) -> None:
        """ValueError for a checkpoint of another model or run, and when a step would not read what it would have read
        there."""
        check_checkpoint(path, self.run.model.config, self.run.config)
        before = _read_json(path / "run.json").get("read") or {}
        now = {"sequences of a step": self.run.batch(self.ranks), "tokens": self.run.tokens}
        told = [f"{name} were {before.get(name)!r} and are {value!r}" for name, value in now.items()]
        differing = [line for line, (name, value) in zip(told, now.items(), strict=True) if before.get(name) != value]
        if differing and not self.run.config.allow_change:
            raise ValueError(
                f"the run that wrote {str(path)!r} read something else: {'; '.join(differing)}; "
                "--allow-change goes on nevertheless"
            )


def _write(run: "Run", batch: int, step: int, model: Any, state: State) -> None:
    path = checkpoint_path(run.config.output, step)
    _delete_partial(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial, state_dict=state.weights)
        run.tokenizer.save(partial)
        torch.save({"step": step, "optimizer": state.optimizer}, partial / "training.pt")
        read = {"sequences of a step": batch, "tokens": run.tokens}
        told = json.dumps({**asdict(run.config), "read": read}, indent=2)
        (partial / "run.json").write_text(told + "\n", encoding="utf-8")
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _read_state(path: Path, model: Any) -> State:
    """What a checkpoint holds, looked at as far as that needs no engine."""
    # weights_only: a checkpoint is data, and loading one must never run code.
    training = _read(path / "training.pt", lambda file: torch.load(file, map_location="cpu", weights_only=True))
    return State(_read_weights(path, model), _optimizer_state(path / "training.pt", training))


def _read_weights(path: Path, model: Any) -> dict[str, Tensor]:
    """The weights by the names that they have in the model."""
    if hasattr(model, "peft_config"):  # which leaves the adapters' name out of theirs
        names = {name.replace(".default.", "."): name for name, _ in model.named_parameters()}
        saved: dict[str, Tensor] = _read(path / "adapter_model.safetensors", load_file)
        return {names.get(name, name): value for name, value in saved.items()}
    if isinstance(model.config, LinearLlamaConfig):
        return _read(path / "model.safetensors", load_file)
    # Families may store weights otherwise than their modules hold them.
    read = AutoModelForCausalLM.from_pretrained
    return tensors_of(_read(path / "config.json", lambda file: read(file.parent, dtype="auto")))


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


def _optimizer_state(path: Path, training: Any) -> dict[str, dict[str, Tensor]]:
    """What `path` held of each parameter. The settings of the optimizer are not the file's but the run's."""
    try:
        step = int(training["step"])
        state = {str(name): dict(kept.items()) for name, kept in training["optimizer"].items()}
    except Exception as error:  # what was written may be anything
        raise ValueError(f"{str(path)!r} is not the training state of a checkpoint") from error
    if step != checkpoint_step(path.parent):
        raise ValueError(f"{str(path)!r} is of step {step}, its folder of step {checkpoint_step(path.parent)}")
    return state
