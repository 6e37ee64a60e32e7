"""lasp: train linear-attention, state-space, softmax and hybrid models with the sequence cut over ranks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lasp.functional import causal_conv1d, delta_rule, hybrid_attention, linear_attention, softmax_attention
from lasp.kernels.backend import backend_report
from lasp.linearize.convert import linearize
from lasp.memory.checkpoints import checkpoint_activations
from lasp.memory.fused_loss import fuse_loss
from lasp.memory.tiles import tile_mlp
from lasp.parallel.collator import PackingCollator, ShardedCollator
from lasp.parallel.collectives import traffic
from lasp.parallel.cut import Cut
from lasp.parallel.data_parallel import data_parallel
from lasp.parallel.gradients import clip_grad_norm_, sync_gradients
from lasp.parallel.group import SequenceGroup, init_mesh, shutdown
from lasp.parallel.loss import cross_entropy, linear_cross_entropy, token_log_probs
from lasp.parallel.sharding import shard, shard_batch, unshard
from lasp.verify import verify
from lasp.wrap.parallelize import parallelize, unparallelize
from lasp.wrap.saving import save_pretrained

if TYPE_CHECKING:
    from lasp.train.sharded_trainer import ShardedTrainer as ShardedTrainer

__version__ = "0.1.0"

__all__ = [
    "Cut",
    "PackingCollator",
    "SequenceGroup",
    "ShardedCollator",
    "backend_report",
    "causal_conv1d",
    "checkpoint_activations",
    "clip_grad_norm_",
    "cross_entropy",
    "data_parallel",
    "delta_rule",
    "fuse_loss",
    "hybrid_attention",
    "init_mesh",
    "linear_attention",
    "linear_cross_entropy",
    "linearize",
    "parallelize",
    "save_pretrained",
    "shard",
    "shard_batch",
    "shutdown",
    "softmax_attention",
    "sync_gradients",
    "tile_mlp",
    "token_log_probs",
    "traffic",
    "unparallelize",
    "unshard",
    "verify",
]

_LAZY = {"ShardedTrainer": "lasp.train.sharded_trainer"}
"""Public names that need transformers, and where they are: imported when they are asked for (PEP 562)."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'lasp' has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(f'lasp.{name} needs {error.name}: pip install "lasp2[hf]"') from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
