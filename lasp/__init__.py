"""lasp: train linear-attention, state-space, softmax and hybrid models with the sequence cut over ranks."""

from lasp.functional import causal_conv1d, delta_rule, linear_attention, softmax_attention
from lasp.kernels.backend import backend_report
from lasp.parallel.collator import ShardedCollator
from lasp.parallel.collectives import traffic
from lasp.parallel.gradients import clip_grad_norm_, data_parallel, sync_gradients
from lasp.parallel.group import SequenceGroup, init_mesh
from lasp.parallel.loss import cross_entropy
from lasp.parallel.sharding import shard, shard_batch, unshard
from lasp.verify import verify
from lasp.wrap.parallelize import parallelize, unparallelize

__all__ = [
    "SequenceGroup",
    "ShardedCollator",
    "backend_report",
    "causal_conv1d",
    "clip_grad_norm_",
    "cross_entropy",
    "data_parallel",
    "delta_rule",
    "init_mesh",
    "linear_attention",
    "parallelize",
    "shard",
    "shard_batch",
    "softmax_attention",
    "sync_gradients",
    "traffic",
    "unparallelize",
    "unshard",
    "verify",
]
