"""Tracker: TensorBoard, W&B, trackio and their like, as accelerate knows them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lasp.train.config import TrainConfig
from lasp.train.metrics import StepMetrics

Log = Callable[[StepMetrics], None]


def check_tracker(name: str | None) -> None:
    """ValueError for a tracker that accelerate does not know, or whose package is not installed."""
    if name is None:
        return
    if find_spec("accelerate") is None:
        raise ValueError(f'tracker = "{name}" needs accelerate: pip install accelerate')
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, LoggerType, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f'tracker must be one of {", ".join(sorted(LOGGER_TYPE_TO_CLASS))}, got "{name}"')
    installed = {str(known) for known in get_available_trackers()}
    if name in LoggerType.list() and name not in installed:
        raise ValueError(f'tracker = "{name}" needs its package: pip install {name}')


@contextmanager
def tracking(config: TrainConfig, cpu: bool) -> Iterator[Log]:
    """What steps are told, on the main rank; nothing where `config.tracker` is None."""
    if config.tracker is None:
        yield lambda metrics: None
        return
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=cpu)  # which the trackers ask whether they are the main process
    kind, folder = LOGGER_TYPE_TO_CLASS[config.tracker], Path(config.output)
    where = [str(folder / "tracker")] if kind.requires_logging_directory else []
    tracker = kind(folder.name, *where)
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(_plain(asdict(config)))
    try:
        yield lambda metrics: tracker.log(_numbers(metrics), step=metrics.step)
    finally:
        tracker.finish()


def _numbers(metrics: StepMetrics) -> dict[str, float]:
    told = {name: value for name, value in asdict(metrics).items() if isinstance(value, int | float)}
    del told["step"]
    return told | {f"validation/{source}": loss for source, loss in (metrics.validation or {}).items()}


def _plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as all trackers take them: names with dots, and numbers or texts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _plain(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
