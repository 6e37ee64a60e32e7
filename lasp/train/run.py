"""A run that was checked as far as one process can check it: what remains is to train."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import torch

from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.parallel.group import SequenceGroup
from lasp.train.batches import Batches
from lasp.train.checkpoint import check_checkpoint, checkpoint_step, find_checkpoint
from lasp.train.config import TrainConfig
from lasp.train.corpus import open_corpus, prepare_corpus
from lasp.train.ranks import Ranks
from lasp.train.source import Source
from lasp.train.tokenizer import Tokenizer, load_tokenizer
from lasp.wrap.parallelize import parallelize

_WEIGHT_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Run:
    """A configuration and what it names: tokens on disk, the shape of the model, the checkpoint to start from."""

    config: TrainConfig
    """What the user asked for."""

    tokenizer: Tokenizer
    """Turns the corpus into tokens, and what the model writes into text."""

    corpus: Path
    """The token file."""

    model: LinearLlamaConfig
    """The model's shape; its vocabulary is the tokenizer's."""

    checkpoint: Path | None
    """Where to resume, None to start from scratch."""

    @classmethod
    def prepare(cls, config: TrainConfig) -> Self:
        """Check everything that needs no other rank, and tokenize the corpus unless that was done before.

        ValueError for a model that cannot be, an unreadable or too short corpus, a checkpoint that is missing, of
        another model or at the end of the run already, and for an output folder that holds another run or cannot be
        written.
        """
        tokenizer = load_tokenizer(config.data.tokenizer)
        model = _model_config(config.model, tokenizer.vocab_size)
        checkpoint = find_checkpoint(config)
        if checkpoint is not None:
            check_checkpoint(checkpoint, model)
            if checkpoint_step(checkpoint) >= config.steps:
                raise ValueError(
                    f"checkpoint {str(checkpoint)!r} has done the {config.steps} steps of this run already"
                )
        _check_output(Path(config.output))
        folder = Path(config.data.cache or Path(config.output) / "tokens")
        return cls(config, tokenizer, prepare_corpus(config.data, folder, tokenizer), model, checkpoint)

    @classmethod
    def prepare_together(cls, config: TrainConfig, everyone: SequenceGroup) -> Self:
        """`prepare` on all ranks, which all raise the same ValueError when one of them cannot, or when they differ.

        Rank 0 is first, so that ranks on one machine find the tokens that it has written.
        """
        run, error = cls._attempt(config) if everyone.rank == 0 else (None, None)
        everyone.agree("preparing the run on rank 0", {}, error).wait()
        if everyone.rank != 0:
            run, error = cls._attempt(config)
        everyone.agree("preparing the run", run._fingerprint() if run else {}, error).wait()
        assert run is not None  # or there was an error, and everyone has raised it
        return run

    def build_model(self, ranks: Ranks) -> LinearLlamaForCausalLM:
        """The model before its first step, the same on every rank and for every dtype, its sequences cut over sp."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            model = LinearLlamaForCausalLM(self.model)
        return parallelize(model.to(ranks.device, _WEIGHT_DTYPES[self.config.dtype]).train(), ranks.sequence)

    def open_source(self, ranks: Ranks) -> Source:
        """What this rank reads."""
        data = self.config.data
        return Batches(
            open_corpus(self.corpus),
            data.seq_len,
            ranks.sequence.slices(data.seq_len),
            data.batch_size,
            self.config.accumulation,
            ranks.dp_rank,
            ranks.dp_size,
            self.config.seed,
        )

    @classmethod
    def _attempt(cls, config: TrainConfig) -> tuple[Self | None, str | None]:
        """The run, or why there is none."""
        try:
            return cls.prepare(config), None
        except (ValueError, OSError) as error:
            return None, str(error)

    def _fingerprint(self) -> dict[str, str | int | None]:
        """What must be the same on every rank, in short."""
        return {
            "configuration": hashlib.sha256(repr(self.config).encode()).hexdigest()[:8],
            "bytes of tokens": self.corpus.stat().st_size,
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
        }


def _check_output(folder: Path) -> None:
    """ValueError when nothing can be written into a folder, which is made when it does not exist."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise ValueError(f"output {str(folder)!r} is a file, not a folder") from error
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {str(folder)!r}: {error.strerror}") from error


def _model_config(fields: dict[str, Any], vocab_size: int) -> LinearLlamaConfig:
    """The model's configuration from the fields of `config.model`, checked as only building the model can."""
    fields = {"vocab_size": vocab_size, **fields}
    preset = fields.pop("preset", None)
    # transformers would take any keyword for a new field.
    if unknown := sorted(fields.keys() - LinearLlamaConfig.__dataclass_fields__.keys()):
        raise ValueError(f"unknown fields of the model: {', '.join(unknown)}")
    try:
        config = LinearLlamaConfig.preset(preset, **fields) if preset else LinearLlamaConfig(**fields)
        with torch.device("meta"):
            LinearLlamaForCausalLM(config)
    except Exception as error:  # torch and transformers have their own ways to reject sizes
        raise ValueError(f"no model can be built from {fields}: {error}") from error
    if config.vocab_size < vocab_size:
        raise ValueError(f"model.vocab_size={config.vocab_size} is less than the tokenizer's {vocab_size}")
    return config
