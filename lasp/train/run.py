"""A run that was checked as far as one process can check it: what remains is to train."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from lasp.models.tensor_parallel import check_heads, share_heads
from lasp.parallel.group import SequenceGroup
from lasp.parallel.parameters import some
from lasp.train.checkpoints.comparison import check_checkpoint
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_step
from lasp.train.checkpoints.manifest import Manifest
from lasp.train.checkpoints.search import find_checkpoint
from lasp.train.config import TrainConfig
from lasp.train.data.batches import Batches, Data, Share, shares
from lasp.train.data.corpus import Corpus, build_corpus
from lasp.train.data.packing import PACKINGS, held_out
from lasp.train.data.tokenizer import Tokenizer, load_tokenizer
from lasp.train.engines import Built, check_engine, hands_out
from lasp.train.model import ModelPlan, compile_layers, pull
from lasp.train.ranks import Ranks, agree_on_config
from lasp.train.tracker import check_tracker
from lasp.wrap.parallelize import parallelize

_WEIGHT_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}

Tell = Callable[[str], None]
"""Says how far the building of a corpus is."""


@dataclass(frozen=True)
class Run:
    """A configuration and what it names: tokens on disk, the model, the checkpoint to start from."""

    config: TrainConfig
    """What the user asked for."""

    tokenizer: Tokenizer
    """Turns the corpora into tokens, and what the model writes into text."""

    training: tuple[Data, ...]
    """What is trained on, source by source."""

    validation: tuple[Data, ...]
    """What is held out, source by source."""

    model: ModelPlan
    """The model."""

    checkpoint: Path | None
    """Where to resume, None to start from scratch."""

    @classmethod
    def prepare(cls, config: TrainConfig, tell: Tell | None = None, look: bool = True) -> Self:
        """Check everything that needs no other rank, and tokenize the corpora unless that was done before.

        tell: given by the process that does so for others, which also reads the tokens once to compare their checksum.
        look: whether to compare the checksums of the checkpoint; another rank does where this one does not.
        ValueError for a model that cannot be, an engine or a tracker that is not there, an unreadable or too short
        corpus, a checkpoint that is missing, of another model or leaves no step to do (but for the newest one, which
        may be that of the last step), and for an output folder that holds another run or cannot be written.
        """
        try:
            return cls._prepare(config, tell, look)
        except OSError as error:  # of a file that cannot be looked at: the user can put it right
            raise ValueError(str(error)) from error

    @classmethod
    def _prepare(cls, config: TrainConfig, tell: Tell | None, look: bool) -> Self:
        check_engine(config)
        check_tracker(config.tracker)
        tokenizer = load_tokenizer(config.tokenizer)
        model = ModelPlan.make(config.model, config.lora, tokenizer)
        if config.tp > 1:
            check_heads(model.config, config.tp)
        _check_output(Path(config.output))
        checkpoint = find_checkpoint(config, tell or logging.getLogger(__name__).warning, look)
        if checkpoint is not None:
            check_checkpoint(checkpoint, model.config, config)
            _check_steps(checkpoint, config)
        training, validation = prepare_data(config, tokenizer, tell)
        return cls(config, tokenizer, training, validation, model, checkpoint)

    @classmethod
    def prepare_together(cls, config: TrainConfig, everyone: SequenceGroup, tell: Tell | None = None) -> Self:
        """`prepare` on all ranks, which all raise the same ValueError when one of them cannot, or when they differ.

        Rank 0 is first, so that ranks on one machine find the tokens that it has written. The others wait for as long
        as it takes: no collective does.
        """
        agree_on_config(everyone, config)
        with everyone.first("preparing the run") as first:
            run, error = cls._attempt(config, tell) if first else (None, None)
        everyone.agree("preparing the run on rank 0", {}, error).wait()
        if everyone.rank != 0:
            run, error = cls._attempt(config, None, look=False)
        everyone.agree("preparing the run", run._fingerprint() if run else {}, error).wait()
        assert run is not None  # or there was an error, and everyone has raised it
        return run

    def build_model(self, ranks: Ranks) -> Built:
        """The model before its first step, its sequences cut over sp, its heads over tp. All ranks call it.

        Where the engine hands out the weights, the main rank alone reads or draws them, and the others wait for as long
        as it takes.
        """
        dtype, shared = _WEIGHT_DTYPES[self.config.dtype], hands_out(self.config)
        with ranks.everyone.first("making the model") if shared else nullcontext(True) as own:
            whole, error = self._attempt_model(dtype) if own else (None, None)
        ranks.everyone.agree("making the model", {}, error).wait()
        model = self._wire(self.model.skeleton(dtype) if shared else whole, ranks)
        return Built(model, whole if shared else None)

    def _attempt_model(self, dtype: torch.dtype) -> tuple[Any, str | None]:
        try:
            whole = self.model.build(self.config.seed, dtype)
            if hands_out(self.config):
                _check_alike(whole, self.model.skeleton(dtype))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the others wait for a word
            return None, str(error) or type(error).__name__
        return whole, None

    def _wire(self, model: Any, ranks: Ranks) -> Any:
        if not hands_out(self.config):
            model = model.to(ranks.device)
        model = parallelize(model, ranks.sequence)
        if self.config.tp > 1:
            model = share_heads(model, ranks.mesh["tp"])
        model = pull(model, self.config.memory)
        return compile_layers(model) if self.config.compile else model

    @property
    def is_over(self) -> bool:
        """Whether the checkpoint to start from is that of its last step."""
        return self.checkpoint is not None and checkpoint_step(self.checkpoint) == self.config.steps

    def share(self, ranks: Ranks) -> Share:
        """What a rank reads of any rows."""
        return Share(ranks.sequence.slices, self.config.data.batch_size, ranks.dp_rank, ranks.dp_size)

    def batch(self, ranks: Ranks) -> int:
        """Sequences of a step, of all ranks."""
        return ranks.dp_size * self.config.accumulation * self.config.data.batch_size

    def open_source(self, ranks: Ranks) -> Batches:
        """What a rank trains on."""
        weights = self.config.data.mixture.values()
        mixture = list(zip(self.training, weights, strict=True))
        return Batches(mixture, self.share(ranks), self.config.accumulation, self.config.seed)

    @property
    def tokens(self) -> str:
        """A checksum of the tokens that are trained on."""
        told = [data.corpus.checksum for data in self.training]
        return hashlib.sha256(" ".join(told).encode()).hexdigest()[:16]

    @classmethod
    def _attempt(cls, config: TrainConfig, tell: Tell | None, look: bool = True) -> tuple[Self | None, str | None]:
        """The run, or why there is none."""
        try:
            return cls.prepare(config, tell, look), None
        except ValueError as error:
            return None, str(error)

    def _fingerprint(self) -> dict[str, str | int | None]:
        """What must be the same on every rank, in short."""
        return {
            "tokens (by their checksum)": self.tokens,
            "held out": " ".join(data.corpus.checksum for data in self.validation),
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
            "its manifest": Manifest.read(self.checkpoint).sha256[:8] if self.checkpoint else None,
        }


def prepare_data(
    config: TrainConfig, tokenizer: Tokenizer, tell: Tell | None
) -> tuple[tuple[Data, ...], tuple[Data, ...]]:
    """What is trained on and what is held out. ValueError, naming the source, for what is too short."""
    data, held = config.data, config.validation
    if len(data.mixture) > 1:
        shares(tuple(data.mixture.values()))
    corpora = [_build(source, config, tokenizer, tell) for source in data.mixture]
    training, validation = [], []
    for corpus in corpora:
        out = held_out(corpus.hashes, held.fraction)
        training.append(_laid(corpus, ~out, config))
        if held.fraction:
            validation.append(_laid(corpus, out, config, held=True))
    if held.source is not None:
        corpus = _build(held.source, config, tokenizer, tell)
        validation.append(_laid(corpus, np.ones(len(corpus.hashes), bool), config, held=True))
    return tuple(training), tuple(validation)


def _build(source: str, config: TrainConfig, tokenizer: Tokenizer, tell: Tell | None) -> Corpus:
    folder = Path(config.data.cache or Path(config.output) / "tokens")

    def told(done: int, shards: int) -> None:
        if tell is not None and shards > 1:
            tell(f"tokenizing {source}: {done} of {shards} shards")

    corpus = build_corpus(source, config.data.field, tokenizer, config.tokenizer, folder, told)
    if tell is not None:
        corpus.check()
    return corpus


def _laid(corpus: Corpus, chosen: np.ndarray, config: TrainConfig, held: bool = False) -> Data:
    data = config.data
    documents = corpus.documents[chosen]
    rows = PACKINGS[data.packing].make(documents, data.seq_len)
    tokens, needed = int((documents[:, 1] - documents[:, 0]).sum()), 1 if held else data.seq_len
    needed += data.packing == "none"
    if tokens < needed or not len(rows):
        raise ValueError(
            f"{'what is held out of ' * held}data.source {corpus.source!r} is too short: {len(documents)} documents "
            f"give {tokens} tokens, one sequence of data.seq_len={data.seq_len} needs {needed}"
        )
    return Data(corpus, rows, data.seq_len)


def _check_steps(checkpoint: Path, config: TrainConfig) -> None:
    """ValueError where a checkpoint leaves no step to do. The newest one may: a scheduler starts runs again, those that
    are over too."""
    done = checkpoint_step(checkpoint)
    if done > config.steps or (done == config.steps and config.resume != "latest"):
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has done {done} steps: none are left of the {config.steps} of this run"
        )


def _check_output(folder: Path) -> None:
    """ValueError when nothing can be written into a folder, which is made when it does not exist, or into that of its
    checkpoints: the first of them may be hours away."""
    place = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, checkpoint_folder(folder)):
            if os.path.lexists(place):
                with TemporaryFile(dir=place):
                    pass
    except FileExistsError as error:
        raise ValueError(f"output {str(folder)!r} is a file, not a folder") from error
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {str(place)!r}: {error.strerror}") from error
    for file in (folder / "metrics.jsonl", folder / "status.json"):
        if os.path.isdir(file) or (os.path.isfile(file) and not os.access(file, os.R_OK)):
            raise ValueError(f"{str(file)!r} of the output folder is a folder, or may not be read: move it away")


def _check_alike(whole: nn.Module, skeleton: nn.Module) -> None:
    """ValueError where one of them has a parameter of its own that the other ties, or has not."""
    read, made = ({name for name, _ in model.named_parameters()} for model in (whole, skeleton))
    if odd := sorted(read ^ made):
        raise ValueError(
            f"files and configuration differ in {some(odd)}, which one of them ties: no shares of that can be handed "
            'out, take engine = "ddp"'
        )
