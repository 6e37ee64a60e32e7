"""ddp: every rank holds the whole model and its optimizer; over tp, all of its own heads."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from lasp.parallel.data_parallel import data_parallel
from lasp.parallel.gradients import sync_gradients
from lasp.train.engines.base import TorchEngine
from lasp.train.engines.engine import Batch


class Replicated(TorchEngine):
    """DistributedDataParallel: one sum of gradients per step, in buckets while backward goes on."""

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        return data_parallel(self.model, self.ranks.sequence, "ddp", reduce_dtype=self.reduce_dtype)

    def _gathering(self, last: bool) -> AbstractContextManager[Any]:
        gathering: AbstractContextManager[Any] = nullcontext() if last else self.module.no_sync()
        return gathering

    def _own_norm(self, parameter: Any) -> Tensor | None:
        """Of this rank's own gradient, before the sum."""
        norm: Tensor | None = self.module.own_norms.get(parameter)
        return norm


class Synced(TorchEngine):
    """The same for DTensors, which DistributedDataParallel does not take: one sum of gradients after backward."""

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        return self.model

    def backward(self, batch: Batch, last: bool) -> Tensor:
        loss = super().backward(batch, last)
        if last:
            sync_gradients(self.model, self.ranks.sequence)
        return loss
