"""Engines: one file for each way in which parameters, gradients and optimizer state lie on the ranks."""

from collections.abc import Callable

from lasp.train.config import TrainConfig
from lasp.train.engines.ddp import Replicated, Synced
from lasp.train.engines.engine import Built, Engine
from lasp.train.engines.fsdp2 import FullySharded
from lasp.train.engines.zero import Zero, check_deepspeed
from lasp.train.ranks import Ranks

__all__ = ["Built", "Engine", "check_engine", "hands_out", "start_engine"]


def check_engine(config: TrainConfig) -> None:
    """ValueError where the library of `config.engine` is not installed."""
    if config.engine.startswith("zero"):
        check_deepspeed()


def hands_out(config: TrainConfig) -> bool:
    """Whether the engine gives each rank its share of weights that the main rank alone has read or drawn."""
    return config.engine in ("fsdp2", "zero3")


def start_engine(built: Built, config: TrainConfig, ranks: Ranks) -> Engine:
    """The engine that `config.engine` names, holding a model that is the same on every rank, and its optimizer."""
    engines: dict[str, Callable[..., Engine]] = {"ddp": Replicated if config.tp == 1 else Synced, "fsdp2": FullySharded}
    return engines.get(config.engine, Zero)(built, config, ranks)
