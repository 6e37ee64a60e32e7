"""ShardedTrainer: the Trainer of transformers, with every sequence cut over ranks."""

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from lasp.parallel.collator import ShardedCollator
from lasp.parallel.group import SequenceGroup
from lasp.wrap.parallelize import base_model
from lasp.wrap.wiring import WIRING


class ShardedTrainer(Trainer):
    """Trains a model of `lasp.parallelize(model, group)` as one process would; takes what `Trainer` takes.

    A step is of dp x the batch size per device: ranks of a group share it. The losses it reports are the true ones, but
    where dp > 1 does not divide the last batch of an evaluation: that counts as in any data-parallel `Trainer`. For the
    gradients nothing is needed: `Trainer` multiplies the loss by the number of ranks before DDP divides by it, and
    `num_items_in_batch` counts the targets of all ranks.

    Raises ValueError for a model that is not parallelised over the group; for what would see or count a rank's part
    alone (compute_metrics, compute_loss_func, label smoothing, average_tokens_across_devices=False); and for data sets
    without random access, which one rank would read for all.
    """

    def __init__(self, *args: Any, group: SequenceGroup, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option, used in self._options_of_a_part():
            if used:
                raise ValueError(f"{option} would see a rank's part of each sequence; the loss is of the whole")
        wiring = getattr(base_model(self.model), WIRING, None)
        if wiring is None or wiring.group != group:
            raise ValueError(
                "the model is not parallelised over this group: lasp.parallelize(model, group) comes first"
            )
        self.group = group
        self.data_collator: Any = ShardedCollator(group, self.data_collator)
        self.args.prediction_loss_only = True

    def _options_of_a_part(self) -> list[tuple[str, bool]]:
        return [
            ("compute_metrics", self.compute_metrics is not None),
            ("compute_loss_func", self.compute_loss_func is not None),
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("average_tokens_across_devices=False", not self.args.average_tokens_across_devices),
        ]

    def get_train_dataloader(self) -> DataLoader:
        return self._deal_out(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._deal_out(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self._deal_out(super().get_test_dataloader(test_dataset))

    def _deal_out(self, loader: DataLoader) -> DataLoader:
        """Deal out batches over groups: accelerate deals them out over all ranks."""
        world, size = self.args.world_size, self.group.size
        if world > 1:
            batches: Any = loader.batch_sampler
            if getattr(batches, "num_processes", None) != world:
                raise ValueError(
                    f"the batches of a {type(loader).__name__} cannot be dealt out over {world} ranks anew"
                )
            batches.num_processes, batches.process_index = world // size, self.args.process_index // size
            # A last batch that is smaller is filled up where another group would have none.
            batches.even_batches &= world > size
        return loader

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The gradient as `Trainer` scales it; the value such that its mean over the ranks is the true loss."""
        if num_items_in_batch is None:
            raise ValueError("the batch needs labels, and the model must take num_items_in_batch")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss - (1 - 1 / self.group.size) * loss.detach()
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self._gather_losses
        return super().evaluation_loop(*args, **kwargs)

    def _gather_losses(self, losses: Tensor) -> Tensor:
        """One loss per sequence [dp x batch] from each rank's [batch]; samples that filled up the last batch go."""
        losses = self.accelerator.gather(losses).view(-1, self.group.size, len(losses))[:, 0].flatten()
        state = self.accelerator.gradient_state
        return losses[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else losses
