"""fsdp2: every rank holds its share of parameters, gradients and optimizer state."""

from dataclasses import asdict

from torch import nn

from lasp.parallel.data_parallel import data_parallel
from lasp.parallel.weights import hand_out
from lasp.train.engines.base import TorchEngine


class FullySharded(TorchEngine):
    """PyTorch's `fully_shard`: parameters meet layer by layer. Each micro-batch reduces its gradients, so that no rank
    ever holds those of the whole model."""

    def _prepare(self, weights: nn.Module | None) -> nn.Module:
        ranks, options = self.ranks, {"reduce_dtype": self.reduce_dtype, **asdict(self.config.fsdp2)}
        module = data_parallel(self.model, ranks.sequence, "fsdp2", **options)
        hand_out(module, weights, ranks.everyone, ranks.device, offload=self.config.fsdp2.offload)
        return module
