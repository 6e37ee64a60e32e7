"""Staging: the copy of a state that is written while training changes the state."""

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor


class Copies:
    """Copies of one state after another on the CPU, in the same memory: new memory takes longer than copying."""

    def __init__(self) -> None:
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._copy: dict[str, Tensor] = {}

    def of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as it is now, until another's copy is asked for."""
        if _layout(state) == _layout(self._copy):
            for copy, value in zip(_local(self._copy), _local(state), strict=True):
                copy.copy_(value)
        else:
            self._copy = self._stager.stage(state)  # type: ignore[assignment]  # no future without a thread
        return self._copy

    def close(self) -> None:
        """Let go of the memory."""
        self._copy = {}
        self._stager.close()


def _layout(state: dict[str, Tensor]) -> list[tuple[str, type[Tensor], torch.Size, torch.dtype]]:
    parts = zip(state.items(), _local(state), strict=True)
    return [(name, type(value), part.shape, part.dtype) for (name, value), part in parts]


def _local(state: dict[str, Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor."""
    return [value.to_local() if isinstance(value, DTensor) else value for value in state.values()]
