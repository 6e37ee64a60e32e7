"""The loss from hidden states: a model's head makes logits that are computed when somebody looks at them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from lasp.kernels.arguments import told
from lasp.kernels.logits import Logits
from lasp.wrap.parallelize import base_model
from lasp.wrap.refusal import takes_group
from lasp.wrap.swap import swap
from lasp.wrap.wiring import WIRING

Model = TypeVar("Model", bound=nn.Module)


def fuse_loss(model: Model) -> Model:
    """Let a model compute its loss as `lasp.linear_cross_entropy` does: no [tokens, vocabulary] in memory; in place.

    The model keeps its contract: `output.logits` is there, as good as a tensor, and is computed when it is used, of the
    weights of that moment; whoever gives labels and takes the loss has none. Scales, casts and softcaps of logits are
    part of the loss.
    For a model of `lasp.models`, or one that is parallelised, after `lasp.parallelize`; `lasp.unparallelize` undoes it.
    `lasp.token_log_probs(output.logits, None, labels)` makes no logits either. Returns the model. Raises ValueError for
    a head that is no plain linear layer, and for models with another loss.
    """
    target = base_model(model)
    if not takes_group(target) and not hasattr(target, WIRING):
        raise ValueError(f"{type(target).__name__} computes its loss from logits: lasp.parallelize(model, group) first")
    head = target.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"the head of {type(target).__name__} is no linear layer, its logits stay: {told(head)}")
    swap(head, "forward", torch.compiler.disable(_logits))
    return model


def _logits(head: nn.Linear, hidden: Tensor) -> Logits:
    return Logits.of(head, hidden)
