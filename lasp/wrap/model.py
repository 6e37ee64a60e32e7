"""What belongs to a whole Hugging Face model: its inputs, its positions, its loss and its routers' balance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.parallel import collectives
from lasp.parallel.batch import AGREEMENT, read_agreement
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.loss import cross_entropy
from lasp.parallel.untraced import outside
from lasp.wrap.wiring import WIRING, Batch, Wiring, parts_of, refuse


@outside
def loss(
    wiring: Wiring,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The model's loss function: the targets come shifted."""
    assert shift_labels is not None, "checked before the forward"
    wiring.has_loss = True
    return cross_entropy(logits, shift_labels, group=wiring.group, num_items=num_items_in_batch)


def balance(
    wiring: Wiring,
    gate_logits: tuple[Tensor, ...] | None,
    num_experts: int,
    top_k: int = 2,
    attention_mask: Tensor | None = None,
) -> Tensor | int:
    """`load_balancing_loss_func` over the whole sequence (Switch Transformers, arXiv:2101.03961, equations 4 to 6).

    gate_logits: per layer [B·T, experts]; attention_mask [B, T]. The same value on every rank, with the gradient of
    this rank's tokens.
    """
    if not isinstance(gate_logits, tuple):
        return 0
    logits = torch.stack([layer.to(gate_logits[0].device) for layer in gate_logits])
    probabilities = logits.softmax(-1)
    chosen = F.one_hot(probabilities.topk(top_k, -1).indices, num_experts).sum(-2)
    counted = torch.ones_like(logits[..., :1]) if attention_mask is None else attention_mask.reshape(1, -1, 1)
    counted = counted.expand_as(logits[..., :1]).double()
    own = (probabilities * counted).sum((0, 1))
    sums = torch.cat([own.detach().double(), (chosen * counted).sum((0, 1)), counted.sum().view(1)])
    if wiring.group is not None:
        sums = collectives.all_reduce(sums, wiring.group.process_group, "forward").wait()
    shares, tokens = (sums[:-1] / sums[-1]).chunk(2)
    own = own / sums[-1]
    whole = (shares + (own - own.detach())) * tokens
    return (num_experts * whole.sum()).to(torch.promote_types(logits.dtype, torch.float32))


def prepare(
    model: Any, check: Callable[[], None], wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The keywords for a model's forward: what would be silently wrong is an error on every rank; positions are global.

    check: whether the model is still ours. Raises ValueError for what `lasp.shard_batch` would not have made.
    """
    group, agreement = wiring.group, kwargs.pop(AGREEMENT, None)
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens

    def checked() -> Arguments:
        check()
        return _check_inputs(model, args, kwargs, tokens, agreement)

    lengths = begin_call(group, "forward of the model", checked)()
    assert tokens is not None, "checked"
    if 0 in lengths:
        raise ValueError(f"every rank needs a token, the ranks hold {list(lengths)}: use lasp.shard_batch")
    parts, packed = parts_of(lengths, group), kwargs.get("cu_seqlens") is not None
    if not packed:
        own = torch.cat([torch.arange(*part) for part in parts]).to(tokens.device)
        begin_call(group, "positions of the model", lambda: _check_positions(kwargs.get("position_ids"), own))()
        kwargs["position_ids"] = own.unsqueeze(0)
    wiring.batch, wiring.positions = (
        Batch(len(tokens), lengths, parts, packed),
        kwargs["position_ids"].flatten(0, -2)[0],
    )
    wiring.has_loss = False
    if kwargs.get("labels") is not None:
        kwargs["labels"] = kwargs["shift_labels"]  # models of flash-linear-attention hand on no others
    parameters = inspect.signature(type(model).forward).parameters
    if "group" in parameters:
        kwargs["group"] = group
    if "position_ids" not in parameters:
        kwargs.pop("position_ids", None)
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs["use_cache"] = False
    return kwargs


def check_loss(model: Any, wiring: Wiring, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where a forward had labels and did not come to our loss; a rank that did waits there for us."""
    if kwargs.get("labels") is not None and not wiring.has_loss:
        refuse(
            wiring.group, f"{type(model).__name__} took labels and did not call its loss_function, which lasp replaces"
        )


def _check_inputs(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor | None, agreement: Tensor | None
) -> Arguments:
    agreed = read_agreement(agreement)
    if tokens is None or len(args) > 1:
        raise ValueError("a parallelised model needs input_ids or inputs_embeds, and all else by name")
    if kwargs.get("group") not in (None, getattr(model, WIRING).group):
        raise ValueError("the model is parallelised over another group than the one given: lasp.unparallelize it first")
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ValueError(
            "labels without shift_labels lose the target at each border: use lasp.shard_batch, or lasp.ShardedTrainer "
            "in the place of Trainer"
        )
    for cache in ("past_key_values", "cache", "cache_params", "state"):
        if kwargs.get(cache) is not None:
            raise ValueError(f"a parallelised model takes no {cache}: call lasp.unparallelize to generate")
    if isinstance(kept := kwargs.get("logits_to_keep"), Tensor) or kept:
        raise ValueError("logits_to_keep counts from the end of every rank's part: take them from all logits")
    if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError("output_attentions: a parallelised model keeps no attention weights")
    if kwargs.get("inputs_embeds") is not None and kwargs.get("position_ids") is None:
        raise ValueError(
            "inputs_embeds need the position_ids of lasp.shard_batch: prompts that peft puts before a sequence drop "
            "them, and would stand before every rank's part"
        )
    if kwargs.get("cu_seqlens") is not None and kwargs.get("position_ids") is None:
        raise ValueError("cu_seqlens need position_ids of each document: use lasp.shard_batch")
    mask = kwargs.get("attention_mask")
    if type(model).__name__.startswith("OPT") and mask is not None and not mask.all():
        raise ValueError("OPT counts positions by its attention_mask: leave that out, with padding at the end only")
    _check_vocabulary(model, tokens)
    said = sorted(name for name, x in kwargs.items() if x is not None and x is not False)
    return Arguments({"batch": tokens.shape[0], "arguments": said} | agreed, tokens.shape[1])


def _check_vocabulary(model: Any, tokens: Tensor) -> None:
    """An embedding would fail on the rank that holds the id alone, on a GPU without saying which."""
    try:
        ids = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers does not find them
        return
    if ids is None or tokens.is_floating_point() or not tokens.numel():
        return
    least, most = torch.stack(tokens.aminmax()).tolist()
    if least < 0 or most >= ids:
        raise ValueError(f"input_ids must be from 0 to {ids - 1}, got {least if least < 0 else most}")


def _check_positions(given: Tensor | None, own: Tensor) -> Arguments:
    if given is not None and (given.shape[-1] != len(own) or not (given == own).all()):
        raise ValueError("position_ids must count the whole sequence; packed documents need their cu_seqlens")
    return Arguments({}, len(own))
