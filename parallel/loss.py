"""Log-probabilities of labels, and losses that are means over the whole sequence, with this rank's part as gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp.kernels.arguments import check_integer, check_number, check_tensors, told
from lasp.kernels.head import label_log_probs
from lasp.kernels.logits import Logits, log_probs_of
from lasp.kernels.precision import product_dtype
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel import collectives
from lasp.parallel.call import Arguments, Turn, begin_call
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.untraced import outside, untraced

Items = Tensor | int | None


@untraced
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    ignore_index: int = -100,
    num_items: Items = None,
) -> Tensor:
    """Mean cross-entropy over the whole sequence's valid tokens. It never shifts.

    logits [..., vocabulary], labels [...], both local. cut: of the batch, in the place of group; labels are [..., T]
    then. num_items: the denominator, where it is not the number of valid tokens of this batch (gradient accumulation),
    the same on every rank. The value is the same on every rank; the gradient is that of this rank's tokens, and the
    ranks' gradients sum to the whole. Computed in fp32 (fp64 for fp64 logits). Without a single valid token in the
    whole sequence the result is nan, as torch's. Raises ValueError for bad shapes or labels, on every rank of a group,
    with a cut on the rank that has them; and on all of them for num_items that differ (with a cut, on CPU).
    """
    check = _arguments(lambda: _check(logits, labels, ignore_index), labels, cut, num_items)
    turn = begin_call(group, "cross_entropy", check, cut)
    turn()
    return _mean(turn, -_log_probs_of(logits, labels, ignore_index).sum(), labels != ignore_index, num_items)


@outside
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    ignore_index: int = -100,
    num_items: Items = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, labels)` without the logits in memory: its value, gradients and errors.

    hidden [..., D] and labels [...] are local, weight [vocabulary, D] and bias [vocabulary] whole: what FSDP2 gathers
    for a forward, and no DTensor. Logits come in tiles of 32 MB, twice: forward keeps a number per token, and backward
    computes the tiles again. Products are in the dtype of hidden and weight, or autocast's; all else, the sum of the
    weight's gradient too, is in fp32 (fp64 for fp64 inputs). Differentiable once.
    """
    check = _arguments(lambda: _check_head(hidden, weight, bias, labels, ignore_index), labels, cut, num_items)
    turn = begin_call(group, "linear_cross_entropy", check, cut)
    turn()
    found = label_log_probs(hidden, weight, bias, labels, ignore_index, product_dtype(hidden))
    return _mean(turn, -found.sum(), labels != ignore_index, num_items)


@outside
def token_log_probs(
    hidden: Tensor,
    weight: Tensor | None,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    group: SequenceGroup | None = None,
    cut: Cut | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """The log-probability of each label, [...], 0 where it is ignore_index; for preferences, RL and distillation.

    As for `linear_cross_entropy`: hidden [..., D], weight [vocabulary, D], bias [vocabulary], labels [...], never
    shifted. Without a weight, `hidden` are the logits [..., vocabulary]; those of a model under `lasp.fuse_loss` are
    not computed for it either. In fp32 (fp64 for fp64 inputs). Nothing is exchanged but the check that all ranks of a
    group ask for the same. Differentiable once: hidden gets its gradient, weight and bias this rank's part of theirs.
    """

    def check() -> dict[str, Any]:
        if weight is not None:
            return _check_head(hidden, weight, bias, labels, ignore_index)
        if bias is not None:
            raise ValueError("a bias goes with a weight, got none")
        return _check(hidden, labels, ignore_index)

    begin_call(group, "token_log_probs", _arguments(check, labels, cut), cut)()
    if weight is None:
        return _log_probs_of(hidden, labels, ignore_index)
    return label_log_probs(hidden, weight, bias, labels, ignore_index, product_dtype(hidden))


def _log_probs_of(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if isinstance(logits, Logits):
        return logits.log_probs(labels, ignore_index)
    return log_probs_of(logits, labels, ignore_index)


def _mean(turn: Turn, local: Tensor, valid: Tensor, num_items: Items) -> Tensor:
    """The sum of `local` over the ranks by the number of their valid tokens, or by num_items."""
    count = valid.sum().double()
    given = None if num_items is None else torch.as_tensor(num_items, device=local.device).double()
    number, mark = (count, count * 0) if given is None else (given, (given + 1).square())
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
    whole: Tensor = _Worth.apply(own, (sums[0] / denominator).to(own.dtype))
    return whole


class _Worth(torch.autograd.Function):
    """Exactly the same value on every rank, with the gradient of this rank's part; infinite ones too.

    own, value [] -> value []; the gradient is own's. No exchange in either direction.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _as_all(total: Tensor, own: Tensor, ranks: int) -> Tensor:
    """Whether the sum over the ranks is as if all had this rank's number; of numbers and squares, whether they do."""
    return (total - ranks * own).abs() <= 1e-9 * total.abs()


def _arguments(
    check: Callable[[], dict[str, Any]], labels: Tensor, cut: Cut | None, num_items: Items = None
) -> Callable[[], Arguments]:
    """The check of a call, for `begin_call`."""

    def found() -> Arguments:
        fields = check()
        if cut is None or not isinstance(num_items, Tensor):  # a header reads the number
            check_number("num_items", num_items)
        if cut is None:
            fields["num_items"] = None if num_items is None else float(num_items)
        # Over a group no matter how the rows lie: [B·T] of a zigzag batch is no even cut of anything.
        return Arguments(fields, labels.shape[-1] if cut is not None and labels.dim() else 1)

    return found


def _check(logits: Tensor, labels: Tensor, ignore_index: int) -> dict[str, Any]:
    """Returns what all ranks must share."""
    check_tensors(labels=labels, **({} if isinstance(logits, Logits) else {"logits": logits}))
    if logits.dim() < 1 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating [..., vocabulary], got {logits.dtype} {list(logits.shape)}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {list(logits.shape)} need labels {list(logits.shape[:-1])}, got {list(labels.shape)}")
    return {
        "logits dtype": str(logits.dtype),
        "backward": logits.requires_grad and torch.is_grad_enabled(),
        **_check_labels(labels, logits, logits.shape[-1], ignore_index),
    }


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> dict[str, Any]:
    """The same for hidden states and their head."""
    check_tensors(("bias",), hidden=hidden, weight=weight, bias=bias, labels=labels)
    if hidden.dim() < 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating [..., D], got {hidden.dtype} {list(hidden.shape)}")
    if hasattr(weight, "placements"):
        raise ValueError(f"weight is a DTensor, {weight.placements}: give the whole, weight.full_tensor()")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not weight.shape[0]:
        raise ValueError(
            f"weight must be [vocabulary, D] with D = {hidden.shape[-1]} of hidden, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [vocabulary] = [{weight.shape[0]}], got {list(bias.shape)}")
    follows = product_dtype(hidden) != hidden.dtype  # autocast, which makes one of all dtypes
    for name, x in {"weight": weight, "bias": bias}.items():
        if x is not None and (x.device != hidden.device or not x.is_floating_point()):
            raise ValueError(f"{name} must be floating and on the device of hidden, {hidden.device}, got {told(x)}")
        if x is not None and x.dtype != hidden.dtype and not follows:
            raise ValueError(f"{name} must be {hidden.dtype} as hidden, got {x.dtype}")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"hidden {list(hidden.shape)} needs labels {list(hidden.shape[:-1])}, got {list(labels.shape)}"
        )
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return {
        "hidden": [str(hidden.dtype), hidden.shape[-1]],
        "bias": bias is not None,
        "backward": wanted,
        **_check_labels(labels, hidden, weight.shape[0], ignore_index),
    }


def _check_labels(labels: Tensor, beside: Tensor, vocabulary: int, ignore_index: int) -> dict[str, Any]:
    """Labels [...] among so many classes, for logits or hidden states on `beside`'s device."""
    check_integer("ignore_index", ignore_index)
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device != beside.device:
        raise ValueError(f"labels must be on {beside.device}, got {labels.device}")
    if may_look_at(labels):
        fits = (labels >= 0) & (labels < vocabulary) | (labels == ignore_index)
        check_values(fits, lambda: _range(labels[labels != ignore_index], vocabulary, ignore_index))
    return {"device": beside.device.type, "vocabulary": vocabulary, "ignore_index": ignore_index}


def _range(counted: Tensor, vocabulary: int, ignore_index: int) -> str:
    found = f"{counted.min().item()}..{counted.max().item()}"
    return f"labels must lie in 0..{vocabulary - 1} or be {ignore_index}, got {found}"
