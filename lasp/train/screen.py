"""The first screen: what is about to be trained, on what, and by whom."""

from typing import Any

import torch

from lasp.kernels.backend import backend_report
from lasp.train.checkpoints.comparison import check_checkpoint
from lasp.train.data.batches import Data
from lasp.train.ranks import Ranks
from lasp.train.run import Run


def describe(run: Run, ranks: Ranks, model: Any) -> list[str]:
    """A line each for the data, the model, the ranks, the engine and the kernels, and for what a resume changes."""
    config, size = run.config, ranks.everyone.size
    batch, total = run.batch(ranks), sum(run.config.data.mixture.values())
    lines = []
    for data, weight in zip(run.training, config.data.mixture.values(), strict=True):
        epochs = config.steps * batch * weight / total / len(data.rows)
        lines.append(f"data      {_data(data, config.data.packing)}; {epochs:.2f} epochs in {config.steps:,} steps")
    lines += [f"held out  {_data(data, config.data.packing)}" for data in run.validation]
    parameters, trained = _count(model)
    kind = type(model.get_base_model() if config.lora.rank else model).__name__.removeprefix("FSDP")
    lines.append(f"model     {kind}, {parameters:,} parameters, {trained:,} of them trained, {config.dtype}")
    lines.append(
        f"ranks     {size}: dp {ranks.dp_size} x sp {ranks.sequence.size}{f' x tp {config.tp}' * (config.tp > 1)} on "
        f"{ranks.device.type}, {config.layout}; a "
        f"step of {batch} sequences = {batch * config.data.seq_len:,} tokens in {config.accumulation} micro-batches"
    )
    optimizer = config.optimizer
    lines.append(
        f"engine    {config.engine}; {optimizer.name}, {optimizer.schedule} from {optimizer.lr:g} to "
        f"{optimizer.min_lr:g}"
    )
    kernels = backend_report(ranks.device, getattr(torch, config.dtype))
    lines.append(f"kernels   recurrences {kernels.decay}; softmax {kernels.softmax}")
    if run.checkpoint is not None:
        changed = check_checkpoint(run.checkpoint, run.model.config, config)
        lines.append(f"resumes   {run.checkpoint}; {'; '.join(changed) or 'nothing was changed'}")
    return lines


def _data(data: Data, packing: str) -> str:
    corpus = data.corpus
    return (
        f"{corpus.source}: a corpus of {len(corpus.documents):,} documents, {corpus.tokens:,} tokens; "
        f"{len(data.rows):,} sequences of {data.seq_len:,} ({packing})"
    )


def _count(model: Any) -> tuple[int, int]:
    """Parameters, and those that are trained; of the whole model where a rank holds a share."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
