"""Losses that are means over the whole sequence, and whose gradients are this rank's part of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.arguments import check_integer, check_number, check_tensors
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel import collectives
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.untraced import untraced


@untraced
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy over the whole sequence's valid tokens. It never shifts.

    logits [..., vocabulary], labels [...], both local. cut: of the batch, in the place of group; labels are [..., T]
    then. num_items: the denominator, where it is not the number of valid tokens of this batch (gradient accumulation),
    the same on every rank. The value is the same on every rank; the gradient is that of this rank's tokens, and the
    ranks' gradients sum to the whole. Computed in fp32 (fp64 for fp64 logits). Without a single valid token in the
    whole sequence the result is nan, as torch's. Raises ValueError for bad shapes or labels, on every rank of a group,
    with a cut on the rank that has them; and on all of them for num_items that differ (with a cut, on CPU).
    """

    def check() -> Arguments:
        fields = _check(logits, labels, ignore_index)
        if cut is None or not isinstance(num_items, Tensor):  # a header reads the number
            check_number("num_items", num_items)
        if cut is None:
            fields["num_items"] = None if num_items is None else float(num_items)
            return Arguments(fields, labels.numel())
        return Arguments(fields, labels.shape[-1] if labels.dim() else 1)

    turn = begin_call(group, "cross_entropy", check, cut)
    turn()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    local = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")
    valid = (labels != ignore_index).sum()
    given = None if num_items is None else torch.as_tensor(num_items, device=logits.device).double()
    number, mark = (valid.double(), valid.double() * 0) if given is None else (given, (given + 1).square())
    # One message for all sums: fp64 holds any count exactly.
    sums = torch.stack([local.detach().double(), number, mark])
    if turn.group is not None:
        with turn.forward():
            sums = collectives.all_reduce(sums, turn.group.process_group, "forward").wait()
        if may_look_at(sums):  # with a cut, this is all that a rank learns of the others
            alike = _as_all(sums[2], mark, turn.group.size)
            alike = alike if given is None else alike & _as_all(sums[1], given, turn.group.size)
            check_values(alike, lambda: f"the ranks give other num_items, this one {num_items}")
    denominator = sums[1] if given is None else given
    own = local / denominator.to(local.dtype)
    # Exactly the same value on every rank, with the gradient of this rank's part.
    return (sums[0] / denominator).to(own.dtype) + (own - own.detach())


def _as_all(total: Tensor, own: Tensor, ranks: int) -> Tensor:
    """Whether the sum over the ranks is as if all had this rank's number; of numbers and squares, whether they do."""
    return (total - ranks * own).abs() <= 1e-9 * total.abs()


def _check(logits: Tensor, labels: Tensor, ignore_index: int) -> dict[str, Any]:
    """Returns what all ranks must share."""
    check_tensors(logits=logits, labels=labels)
    check_integer("ignore_index", ignore_index)
    if logits.dim() < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [..., vocabulary], got {logits.dtype} {list(logits.shape)}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {list(logits.shape)} need labels {list(logits.shape[:-1])}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the device of logits, {logits.device}, got {labels.device}")
    if may_look_at(labels):
        fits = (labels >= 0) & (labels < logits.shape[-1]) | (labels == ignore_index)
        check_values(fits, lambda: _range(labels[labels != ignore_index], logits.shape[-1], ignore_index))
    return {
        "device": logits.device.type,
        "vocabulary": logits.shape[-1],
        "logits dtype": str(logits.dtype),
        "ignore_index": ignore_index,
        "backward": logits.requires_grad and torch.is_grad_enabled(),
    }


def _range(counted: Tensor, vocabulary: int, ignore_index: int) -> str:
    found = f"{counted.min().item()}..{counted.max().item()}"
    return f"labels must lie in 0..{vocabulary - 1} or be {ignore_index}, got {found}"
