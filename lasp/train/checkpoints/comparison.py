"""Whether a checkpoint is of this model and this run: compared before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lasp.train.checkpoints.manifest import read_json
from lasp.train.config import TrainConfig

RUN = "run.json"
# What transformers writes into config.json about itself rather than about the model.
_BOOKKEEPING = {"transformers_version", "architectures", "_name_or_path", "dtype"}


def check_checkpoint(path: Path, model: Any, config: TrainConfig) -> list[str]:
    """ValueError, naming what differs, when a checkpoint is not of a model with this configuration, or when the run
    that wrote it had other data or other mathematics and `config.allow_change` is not set. Returns what else differs.
    """
    if not config.lora.rank:  # adapters are compared tensor by tensor
        _check_model(path, model)
    before = read_json(path, RUN)
    before.pop("read", None)  # compared when the ranks are known
    changed = changes(before, asdict(config))
    deciding = [told for name, told in changed.items() if not _is_free(name)]
    if deciding and not config.allow_change:
        raise ValueError(
            f"the run that wrote {str(path)!r} was another: {'; '.join(deciding)}; --allow-change goes on nevertheless"
        )
    return list(changed.values())


def _check_model(path: Path, config: Any) -> None:
    written = read_json(path, "config.json")
    # The file leaves out what has its default value; the class knows those, but would call any model its own.
    try:
        known = type(config).from_pretrained(path).to_dict()  # which alone knows how infinite numbers were written
    except Exception as error:  # transformers has its own ways to reject what it reads
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {str(path / 'config.json')!r} of the checkpoint: {told}") from error
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
    "output", "overwrite", "resume", "allow_change", "steps", "save_every", "save_minutes", "keep_last",
    "keep_every", "async_save", "time_limit", "timeout", "skips", "drift_every", "restarts", "engine", "fsdp2",
    "compile", "lora.merge", "reduce_dtype", "device", "sp", "dp", "tp", "elastic", "layout", "accumulation",
    "data.batch_size", "data.cache", "validation.every", "validation.sequences", "validation.source", "memory",
    "sample", "log_every", "tracker", "profile",
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


def check_read(path: Path, now: Mapping[str, Any], allow_change: bool) -> None:
    """ValueError when the run that wrote a checkpoint would not have read in a step what this one reads."""
    before = read_json(path, RUN).get("read")
    before = before if isinstance(before, dict) else {}
    differing = [f"{name} were {before.get(name)!r} and are {n!r}" for name, n in now.items() if before.get(name) != n]
    if differing and not allow_change:
        raise ValueError(
            f"the run that wrote {str(path)!r} read something else: {'; '.join(differing)}; "
            "--allow-change goes on nevertheless"
        )
