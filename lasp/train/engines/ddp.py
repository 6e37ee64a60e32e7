"""ddp: every rank holds the whole model and its optimizer."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from lasp.parallel.data_parallel import data_parallel
from lasp.train.engines.base import TorchEngine


class Replicated(TorchEngine):
    """DistributedDataParallel: one sum of gradients per step, in buckets while backward goes on."""

    def _prepare(self) -> nn.Module:
        return data_parallel(self.model, self.ranks.sequence, "ddp", reduce_dtype=self.reduce_dtype)

    def _gathering(self, last: bool) -> AbstractContextManager[Any]:
        gathering: AbstractContextManager[Any] = nullcontext() if last else self.module.no_sync()
        return gathering
