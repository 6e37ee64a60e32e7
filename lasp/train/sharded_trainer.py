"""ShardedTrainer: the Trainer of transformers, with every sequence cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from accelerate.data_loader import IterableDatasetShard
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from lasp.parallel.batch import AGREEMENT
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.collator import ShardedCollator
from lasp.parallel.group import SequenceGroup
from lasp.parallel.sharding import settle
from lasp.wrap.parallelize import base_model
from lasp.wrap.wiring import WIRING

# What another trainer computes there, it computes from a rank's part of each sequence.
_COMPUTES = ("compute_loss", "prediction_step", "training_step", "evaluation_loop", "get_batch_samples")
# Arguments that decide how many batches of which samples a rank asks for.
_SHARED = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps",
    "num_train_epochs", "seed", "data_seed", "dataloader_num_workers", "dataloader_drop_last",
)  # fmt: skip


_NO_LABELS = (
    "the batch has no labels: they are in the data set's rows, or the data_collator makes them of input_ids "
    "(DataCollatorForLanguageModeling(tokenizer, mlm=False), lasp.PackingCollator)"
)


class ShardedTrainer(Trainer):
    """Trains a model of `lasp.parallelize(model, group)` as one process would; takes what `Trainer` takes.

    A step is of dp x the batch size per device: ranks of a group share it. The losses it reports are the true ones, but
    where dp > 1 does not divide the last batch of an evaluation: that counts as in any data-parallel `Trainer`. For the
    gradients nothing is needed: `Trainer` multiplies the loss by the number of ranks before DDP divides by it, and
    `num_items_in_batch` counts the targets of all ranks. Evaluation and `predict` give losses, no predictions.

    A data set without random access is read on every rank, which takes the samples of its group and skips the others.

    Raises ValueError for a model that is not parallelised over the group; for what would see or count a rank's part
    alone (compute_metrics, compute_loss_func, label smoothing, NEFTune, average_tokens_across_devices=False, other
    trainers in the class, batches that one rank reads for all); for FSDP and DeepSpeed of TrainingArguments, which were
    not compared with one process; and for batches without labels.
    """

    def __init__(self, *args: Any, group: SequenceGroup, **kwargs: Any) -> None:
        begin_call(group, "ShardedTrainer, its class", lambda: _check_class(type(self), group))()
        super().__init__(*args, **kwargs)
        self.group = group
        begin_call(group, "ShardedTrainer", self._check_arguments)()
        self.data_collator: Any = ShardedCollator(group, self.data_collator)
        self.args.prediction_loss_only = True
        self.accelerator.dataloader_config.dispatch_batches = False

    def _check_arguments(self) -> Arguments:
        for option, used in self._options_of_a_part():
            if used:
                raise ValueError(f"{option} would see a rank's part of each sequence; the loss is of the whole")
        for option, used in self._options_untested():
            if used:
                raise ValueError(f"ShardedTrainer takes no {option}: it was not compared with one process")
        wiring = getattr(base_model(self.model), WIRING, None)
        if wiring is None or wiring.group != self.group:
            raise ValueError(
                "the model is not parallelised over this group: lasp.parallelize(model, group) comes first"
            )
        return Arguments({name: str(getattr(self.args, name)) for name in _SHARED}, 1)

    def _options_of_a_part(self) -> list[tuple[str, bool]]:
        return [
            ("compute_metrics", self.compute_metrics is not None),
            ("compute_loss_func", self.compute_loss_func is not None),
            ("label_smoothing_factor", self.args.label_smoothing_factor != 0),
            ("neftune_noise_alpha", self.args.neftune_noise_alpha is not None),
            ("average_tokens_across_devices=False", not self.args.average_tokens_across_devices),
        ]

    def _options_untested(self) -> list[tuple[str, bool]]:
        config = self.args.accelerator_config
        return [
            ('fsdp (use lasp.data_parallel(model, group, "fsdp2"))', bool(self.args.fsdp) or self.is_fsdp_enabled),
            ("deepspeed", bool(self.args.deepspeed) or self.is_deepspeed_enabled),
            ("parallelism_config", self.args.parallelism_config is not None),
            ("use_liger_kernel", self.args.use_liger_kernel),
            ("split_batches", config.split_batches),
            ("dispatch_batches=True (every rank reads its own)", bool(config.dispatch_batches)),
        ]

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        stream = isinstance(dataset, IterableDataset) and hasattr(dataset, "n_shards")
        return self._deal_out(super()._get_dataloader(_Stream(dataset) if stream else dataset, *args, **kwargs))

    def _deal_out(self, loader: DataLoader) -> DataLoader:
        """Deal out batches over groups: accelerate deals them out over all ranks."""
        world, size = self.args.world_size, self.group.size
        if world > 1:
            stream = isinstance(loader.dataset, IterableDatasetShard)
            share: Any = loader.dataset if stream else loader.batch_sampler
            if getattr(share, "num_processes", None) != world:
                raise ValueError(
                    f"the batches of a {type(loader).__name__} cannot be dealt out over {world} ranks anew"
                )
            share.num_processes, share.process_index = world // size, self.args.process_index // size
            # A last batch that is smaller is filled up where another group would have none.
            if stream:
                share.batch_size = share.batch_size if world > size else 1
            else:
                share.even_batches &= world > size
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return super().get_batch_samples(map(self._agreed, epoch_iterator), *args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "labels" not in self._agreed(inputs):
            raise ValueError(_NO_LABELS)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _agreed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch that a worker process made, compared before all ranks count its targets."""
        settle(batch.pop(AGREEMENT, None), self.group)
        return batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The gradient as `Trainer` scales it; the value such that its mean over the ranks is the true loss."""
        if "labels" not in inputs:
            raise ValueError(_NO_LABELS)
        if num_items_in_batch is None:
            raise ValueError(f"{type(base_model(self.model)).__name__} must take num_items_in_batch, and does not")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss - (1 - 1 / self.group.size) * loss.detach()
        return (loss, outputs) if return_outputs else loss

    def get_total_train_batch_size(self, *args: Any) -> int:
        """Ranks of a group share their samples."""
        return int(super().get_total_train_batch_size(*args)) // self.group.size

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self._gather_losses
        return super().evaluation_loop(*args, **kwargs)

    def _gather_losses(self, losses: Tensor) -> Tensor:
        """One loss per sequence [dp x batch] from each rank's [batch]; samples that filled up the last batch go."""
        losses = self.accelerator.gather(losses).view(-1, self.group.size, len(losses))[:, 0].flatten()
        state = self.accelerator.gradient_state
        return losses[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else losses


class _Stream(IterableDataset):
    """A stream in shards, which accelerate would deal out over all ranks by itself."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _check_class(trainer: type, group: SequenceGroup) -> Arguments:
    """Raises ValueError for a class that computes otherwise, and for groups whose ranks are not neighbours."""
    for other in trainer.__mro__:
        computes = _COMPUTES[:2] if issubclass(other, ShardedTrainer) else _COMPUTES
        if other not in (ShardedTrainer, Trainer) and (names := [name for name in computes if name in vars(other)]):
            raise ValueError(
                f"{other.__name__}.{names[0]} would see a rank's part of each sequence: ShardedTrainer extends Trainer "
                "alone"
            )
    ranks = dist.get_process_group_ranks(group.process_group)
    if ranks != list(range(ranks[0], ranks[0] + len(ranks))) or ranks[0] % len(ranks):
        raise ValueError(f"the ranks of a sequence must be neighbours, as lasp.init_mesh makes them, got {ranks}")
    return Arguments({}, 1)
