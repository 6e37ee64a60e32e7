"""What one training run is: plain values, checked as soon as they are known, the same on every rank.

The classes know nothing of files or command lines (`lasp.launch.configuration` fills them from both). The text
under a field is its documentation.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

Dtype = Literal["float32", "float64", "bfloat16"]
EngineName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
OptimizerName = Literal["adamw", "muon", "lion", "adafactor"]


_WEEK = 7 * 24 * 3600


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_utf8(path: str) -> bool:
    """Names of files may be any bytes, which Python keeps as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are cut into batches."""

    source: str | dict[str, float] = "stdlib"
    """"stdlib" (this interpreter's own standard library), a file, a folder, a glob such as "books/**/*.txt"; or a table
    of such names with the share of all sequences that each gives. A file is one document; files of JSON lines, Parquet
    files and folders that `datasets` has saved have one per row."""

    field: str = "text"
    """Of the rows of JSON lines and tables: a text, or a conversation, a list of messages with role and content. What
    the assistant says is the target of a conversation, and the tokenizer's chat template writes it down."""

    tokenizer: str | None = None
    """"bytes" (256 bytes and an end-of-document token), the path of a Hugging Face `tokenizers` JSON file, or what
    AutoTokenizer reads: a folder, a name on the hub. By default that of `model.name`, and "bytes" without one."""

    seq_len: int = 4096
    """Tokens of one whole sequence; the sp ranks hold seq_len / sp of them each."""

    packing: Literal["split", "first_fit", "none"] = "split"
    """How documents are laid into sequences. "split": one after another, cut every seq_len tokens. "first_fit": whole
    into the first of 64 open sequences that has room, what is longer cut every seq_len tokens. In both, no document
    sees another. "none": as "split", but a sequence is one text, and documents see those before them."""

    batch_size: int = 1
    """Sequences per micro-batch of one data-parallel rank; a step has dp x `accumulation` times as many."""

    cache: str | None = None
    """Folder of the token files; by default `tokens` in the output folder."""

    def __post_init__(self) -> None:
        _require(bool(self.source), f"data.source must name a text, got {self.source!r}")
        _require(isinstance(self.source, str) or all(self.source), f"data.source names no text: {self.source}")
        if isinstance(self.source, dict):
            shares = self.source.values()
            _require(
                all(0 < share < math.inf for share in shares), f"data.source needs positive shares, got {self.source}"
            )
        _require(bool(self.field), 'data.field must name a field, got ""')
        _require(self.tokenizer != "", 'data.tokenizer must name a tokenizer, got ""')
        _require(self.seq_len >= 1, f"data.seq_len must be at least 1, got {self.seq_len}")
        _require(self.batch_size >= 1, f"data.batch_size must be at least 1, got {self.batch_size}")

    @property
    def mixture(self) -> dict[str, float]:
        """The sources, each with its share."""
        return {self.source: 1.0} if isinstance(self.source, str) else self.source


@dataclass(frozen=True)
class ValidationConfig:
    """Text that is not trained on, and the mean loss of all of its targets."""

    fraction: float = 0.0
    """Share of each source's documents that is held out, chosen by a hash of their content."""

    source: str | None = None
    """A source of its own, named as `data.source` is."""

    every: int = 100
    """Steps between two validations; one comes after the last step."""

    sequences: int | None = None
    """At most so many sequences of each source; by default all."""

    def __post_init__(self) -> None:
        _require(0 <= self.fraction < 1, f"validation.fraction must lie in [0, 1), got {self.fraction}")
        _require(self.source != "", 'validation.source must name a text, got ""')
        _require(self.every >= 1, f"validation.every must be at least 1, got {self.every}")
        _require(
            self.sequences is None or self.sequences >= 1,
            f"validation.sequences must be at least 1, got {self.sequences}",
        )
        _require(
            self.source is None or not self.fraction, "validation.source and validation.fraction exclude each other"
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, its schedule, and clipping of the global gradient norm."""

    name: OptimizerName = "adamw"
    """"adamw"; "muon" for the matrices between embedding and head with AdamW for the rest; "lion", whose rate is a
    third to a tenth of AdamW's and its decay as many times larger; "adafactor", with engine = "ddp" and tp = 1."""

    lr: float = 1e-3
    """Highest learning rate, reached at the end of the warm-up."""

    min_lr: float = 1e-4
    """Learning rate of the last step; of no meaning to the schedule "constant"."""

    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """From the end of the warm-up to `min_lr`: half a cosine, a line, neither ("constant"), or `lr` until the last
    `decay_steps` and then a line ("wsd", warm-up, stable, decay)."""

    warmup_steps: int = 10
    """Steps of the linear warm-up."""

    decay_steps: int = 100
    """Steps of the decay of schedule "wsd"."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments; of what Lion steps along, and of its moment."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; vectors (norms, decays, biases) have none."""

    clip: float = 1.0
    """Gradients whose global norm is larger are scaled down to it."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.min_lr <= self.lr < math.inf, f"need 0 <= min_lr <= lr, got min_lr={self.min_lr} and lr={self.lr}"
        )
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps must not be negative, got {self.warmup_steps}")
        _require(self.decay_steps >= 1, f"optimizer.decay_steps must be at least 1, got {self.decay_steps}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optimizer.betas must lie in [0, 1), got {self.betas}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        _require(self.clip > 0, f"optimizer.clip must be positive, got {self.clip}")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of peft around a model whose own weights stay as they are. Checkpoints hold the adapters."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model."""

    alpha: float = 16.0
    """What the adapters add is scaled by alpha / rank."""

    target_modules: str | list[str] = "all-linear"
    """Names of the modules that get adapters; all linear ones but the head by default."""

    merge: bool = False
    """After the last step, write the model with what the adapters add to its weights into `merged` in the output
    folder, for `from_pretrained`."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"lora.rank must not be negative, got {self.rank}")
        _require(0 < self.alpha < math.inf, f"lora.alpha must be positive, got {self.alpha}")
        _require(bool(self.rank) or not self.merge, "lora.merge merges adapters: lora.rank must be at least 1, got 0")
        _require(bool(self.target_modules), f"lora.target_modules must name modules, got {self.target_modules!r}")


@dataclass(frozen=True)
class MemoryConfig:
    """Levers that let the sequence be longer (docs/memory.md); none changes the curve."""

    fuse_loss: bool = False
    """The loss from hidden states and the head's weight, without [tokens, vocabulary] in memory."""

    mlp_tile: int | None = None
    """MLPs, experts and norms take so many tokens at a time, and compute them again in backward."""

    checkpoint_every: int | None = None
    """Every n-th layer keeps its input alone, and is computed again in backward: 1 for all layers."""

    offload: bool = False
    """Keep those inputs in the CPU's memory."""

    def __post_init__(self) -> None:
        every = self.checkpoint_every
        _require(every is None or every >= 1, f"memory.checkpoint_every must be at least 1, got {every}")
        _require(
            not self.offload or every is not None, "memory.offload moves what memory.checkpoint_every keeps: set it"
        )
        _require(
            self.mlp_tile is None or self.mlp_tile >= 1, f"memory.mlp_tile must be at least 1, got {self.mlp_tile}"
        )


@dataclass(frozen=True)
class Fsdp2Config:
    """Of the engine "fsdp2"."""

    reshard: bool = True
    """Let what a layer has gathered go after its forward, and gather it again for backward; false keeps it."""

    offload: bool = False
    """Keep parameters, gradients and optimizer state in the CPU's memory between their uses; the step is made there."""


@dataclass(frozen=True)
class SampleConfig:
    """The text a trained model writes at the end of a run, as a first impression of it."""

    prompt: str | None = None
    """Text to continue; without one nothing is generated."""

    tokens: int = 200
    """How many tokens to generate."""

    temperature: float = 0.7
    """0 takes the likeliest token every time; larger values are more adventurous."""

    def __post_init__(self) -> None:
        _require(self.tokens >= 1, f"sample.tokens must be at least 1, got {self.tokens}")
        _require(self.temperature >= 0, f"sample.temperature must not be negative, got {self.temperature}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    output: str = "runs/train"
    """Folder that receives metrics.jsonl, log.txt, loss.png and checkpoints/."""

    overwrite: bool = False
    """Start anew in an output folder that already holds checkpoints, deleting them; otherwise that is an error."""

    resume: str | None = None
    """Continue from a checkpoint: the path of a `step-…` folder, or "latest" for the output folder's newest, if any."""

    allow_change: bool = False
    """Continue although the data or the mathematics are others than those of the run that wrote the checkpoint."""

    steps: int = 1000
    """Optimizer steps in all, those of the runs that this one resumes included."""

    save_every: int | None = None
    """A checkpoint every so many steps; the last step always writes one."""

    save_minutes: float = 30.0
    """A checkpoint, too, where the last one is older than this; 0 for none."""

    keep_last: int | None = None
    """The newest so many checkpoints stay; by default all that `save_every` asks for, or asked for when they were
    written, and others as long as they are among the newest two."""

    keep_every: int | None = None
    """Checkpoints of every so many steps stay for good."""

    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in the CPU's memory, which is kept for the next one."""

    time_limit: float | None = None
    """Seconds of training after which the run saves and ends, to be resumed; by default it ends with its steps."""

    timeout: float = 600.0
    """Seconds that a step, a batch of what is held out and a checkpoint may take. Where one takes longer on any rank,
    all ranks print their stacks, one says who is behind, and the run ends (docs/reliability.md)."""

    skips: int = 3
    """How many steps in a row may have a loss or gradients that are not finite. They change nothing, and their data is
    not read again; one more ends the run."""

    drift_every: int = 100
    """Steps between two comparisons of the parameters that ranks hold alike, by checksums; 0 for none."""

    restarts: int = 0
    """How often the ranks that `lasp train` starts are started again after a failure, from the last checkpoint."""

    log_every: int = 10
    """Steps between two lines of log.txt, for which the ranks tell each other what a step took (docs/training.md)."""

    tracker: str | None = None
    """A further place for metrics, which accelerate knows: "tensorboard", "wandb", "trackio", ...; its package must be
    installed. It is told every `log_every` steps."""

    profile: str | None = None
    """Steps of which every rank writes a trace of torch.profiler into `profile` in the output folder: "10:13" for 10 to
    13."""

    seed: int = 0
    """Decides the initial weights and the order of the data."""

    dtype: Dtype = "float32"
    """Of the computation. Weights and optimizer state have it too, except for bfloat16, where they stay float32."""

    engine: EngineName = "ddp"
    """How the dp x sp ranks hold the model: "ddp", each the whole of it; "fsdp2", each a share of parameters, gradients
    and optimizer state; "zero1", "zero2", "zero3", DeepSpeed's shares of the optimizer state, of gradients too, of
    parameters too (needs the extra `deepspeed`). The curve is the same."""

    accumulation: int = 1
    """Micro-batches per step: their gradients add up to those of one batch that is as many times larger."""

    compile: bool = False
    """torch.compile of every layer; mixers stay outside where they do not trace."""

    reduce_dtype: Literal["float32", "bfloat16"] | None = None
    """In which gradients are summed over the ranks; by default in their own dtype, which is that of the weights."""

    device: str | None = None
    """"cpu" or "cuda"; by default a GPU where there is one."""

    sp: int = 1
    """Ranks that share each sequence."""

    dp: int | None = None
    """Groups of sp x tp ranks that train on different sequences; by default as many as the started ranks make up, and
    `lasp train` starts as many as the GPUs of its machine do."""

    elastic: bool = False
    """Train by fewer ranks than dp x sp x tp where a launcher has no more: fewer replicas make more micro-batches a
    step, and the last of them cuts its sequences into fewer parts."""

    tp: int = 1
    """Ranks that share the heads of every mixer and the channels of every feed-forward of a linear_llama; they read
    the same tokens. Engines "ddp" and "fsdp2"."""

    layout: Literal["contiguous", "zigzag"] = "contiguous"
    """How a sequence is cut over the sp ranks."""

    model: dict[str, Any] = field(default_factory=dict)
    """`kind = "linear_llama"` (the default) with fields of LinearLlamaConfig, and `preset` for the size they change; or
    `name`, a folder or a model of the Hugging Face hub, with its weights; `from_scratch = true` takes its configuration
    alone, with random weights and further fields of it."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in the place of full training."""

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory outside the mixers."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text and the batches."""

    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """What is held out."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""

    fsdp2: Fsdp2Config = field(default_factory=Fsdp2Config)
    """Of the engine "fsdp2"."""

    sample: SampleConfig = field(default_factory=SampleConfig)
    """What to generate when training is over."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.time_limit is None or self.time_limit > 0, f"time_limit must be positive, got {self.time_limit}")
        _require(
            self.save_every is None or self.save_every >= 1, f"save_every must be at least 1, got {self.save_every}"
        )
        _require(0 <= self.save_minutes < math.inf, f"save_minutes must not be negative, got {self.save_minutes}")
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(0 < self.timeout <= _WEEK, f"timeout must be positive and at most {_WEEK}, got {self.timeout}")
        _require(self.skips >= 0, f"skips must not be negative, got {self.skips}")
        _require(self.drift_every >= 0, f"drift_every must not be negative, got {self.drift_every}")
        _require(self.restarts >= 0, f"restarts must not be negative, got {self.restarts}")
        _require(
            not self.restarts or (not self.overwrite and self.resume in (None, "latest")),
            f"restarts = {self.restarts} goes on from the newest checkpoint: neither overwrite = true nor a certain "
            "checkpoint to resume from goes with it",
        )
        _require(self.log_every >= 1, f"log_every must be at least 1, got {self.log_every}")
        _require(self.tracker != "", 'tracker must name a tracker, got ""')
        _require(
            self.profile is None or len(self.profiled) > 0,
            f'profile must be the first and the last step of a trace, as in "10:13", got {self.profile!r}',
        )
        _require(
            self.profile is None or self.profiled.start <= self.steps,
            f"profile must begin at one of the {self.steps} steps, got {self.profile!r}",
        )
        _require(self.accumulation >= 1, f"accumulation must be at least 1, got {self.accumulation}")
        _require(bool(self.output), 'output must name a folder, got ""')
        _require(self.resume != "", 'resume must name a checkpoint, or "latest", got ""')
        _require(self.data.cache != "", 'data.cache must name a folder, got ""')
        paths = [("output", self.output), ("resume", self.resume), ("data.cache", self.data.cache)]
        paths += [("data.source", source) for source in self.data.mixture]
        for name, path in [*paths, ("validation.source", self.validation.source)]:
            _require(_is_utf8(path or ""), f"{name} must be UTF-8, as what writes checkpoints asks, got {path!r}")
        _require(0 <= self.seed < 1 << 64, f"seed must not be negative and less than 2^64, got {self.seed}")
        _require(self.device in (None, "cpu", "cuda"), f'device must be "cpu" or "cuda", got {self.device!r}')
        _require(self.sp >= 1, f"sp must be at least 1, got {self.sp}")
        _require(self.dp is None or self.dp >= 1, f"dp must be at least 1, got {self.dp}")
        _require(
            not self.elastic or self.dp is not None, "elastic = true needs dp: how many replicas there are in full"
        )
        _require(
            not self.engine.startswith("zero") or not self.compile,
            f'engine = "{self.engine}" has hooks of its own in every layer: compile = true needs "ddp" or "fsdp2"',
        )
        _require(
            self.engine == "fsdp2" or self.fsdp2 == Fsdp2Config(),
            f'[fsdp2] is of engine = "fsdp2", got "{self.engine}"',
        )
        _require(self.tp >= 1, f"tp must be at least 1, got {self.tp}")
        _require(
            self.tp == 1 or (self.engine in ("ddp", "fsdp2") and not self.lora.rank),
            f'tp = {self.tp} takes engine = "ddp" or "fsdp2" and no adapters, got "{self.engine}" and lora.rank = '
            f"{self.lora.rank}",
        )
        _require(
            self.tp == 1 or self.engine == "fsdp2" or self.reduce_dtype is None,
            f'tp = {self.tp} with engine = "{self.engine}" sums gradients in their own dtype: leave reduce_dtype out',
        )
        _require(
            self.data.seq_len >= self.sp,
            f"a sequence of data.seq_len={self.data.seq_len} has fewer tokens than sp={self.sp} ranks",
        )
        _require(
            not self.engine.startswith("zero") or self.optimizer.name == "adamw",
            f'engine = "{self.engine}" has flat parameters: optimizer.name must be "adamw", got {self.optimizer.name}',
        )
        _require(
            self.optimizer.name != "adafactor" or (self.engine == "ddp" and self.tp == 1),
            f'optimizer.name = "adafactor" takes whole matrices, and engine = "{self.engine}" with tp = {self.tp} has '
            'shares of them: take engine = "ddp" and tp = 1',
        )
        _require(
            not self.engine.startswith("zero") or self.dtype != "float64",
            f'engine = "{self.engine}" keeps float32 states: dtype must be "float32" or "bfloat16", got "{self.dtype}"',
        )
        _require(
            not (self.overwrite and self.resume), f"overwrite = true and resume = {self.resume!r} contradict each other"
        )

    @property
    def profiled(self) -> range:
        """The steps that `profile` asks for."""
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.profile or "")
        return range(0) if found is None else range(int(found[1]), int(found[2]) + 1)

    @property
    def tokenizer(self) -> str:
        """What names the tokenizer."""
        return self.data.tokenizer or str(self.model.get("name") or "bytes")


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "validation": ValidationConfig,
    "lora": LoraConfig,
    "memory": MemoryConfig,
    "optimizer": OptimizerConfig,
    "fsdp2": Fsdp2Config,
    "sample": SampleConfig,
}
"""The classes of the fields that are tables of a TOML file."""
