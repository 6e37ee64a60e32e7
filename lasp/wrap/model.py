"""What belongs to a whole Hugging Face model: its inputs, its positions, its loss and its routers' balance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.kernels.arguments import told
from lasp.kernels.documents import document_bounds
from lasp.kernels.values import check_values, may_look_at
from lasp.parallel import collectives
from lasp.parallel.batch import AGREEMENT, CUT, check_ids, check_tokens, read_agreement
from lasp.parallel.call import Arguments, begin_call, modes
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.loss import cross_entropy
from lasp.parallel.untraced import outside
from lasp.wrap.wiring import WIRING, Forward, Wiring


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
    if wiring.running is None:
        return cross_entropy(logits, shift_labels, group=wiring.group, num_items=num_items_in_batch)
    wiring.running.has_loss = True
    return cross_entropy(logits, shift_labels, cut=wiring.running.cut, num_items=num_items_in_batch)


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
) -> tuple[Forward, dict[str, Any]]:
    """A model's forward and its keywords: what would be silently wrong is an error; positions are global.

    check: whether the model is still ours. Without the cut of its batch the ranks agree on one, and the ValueError for
    what `lasp.shard_batch` would not have made is raised on all of them.
    """
    given, agreement = kwargs.pop(CUT, None), kwargs.pop(AGREEMENT, None)
    documents = kwargs.pop("cu_seqlens", None)
    tokens = args[0] if args else kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens

    def checked() -> Arguments:
        check()
        said = sorted(name for name, x in kwargs.items() if x is not None and x is not False)
        fields = {"arguments": said} | read_agreement(agreement) | modes()
        fields["dtype"] = next((str(p.dtype) for p in model.parameters()), None)
        _check_inputs(model, args, kwargs, tokens)
        assert tokens is not None, "checked"
        bounds = _check_cut(given, documents, wiring.group, kwargs)
        _check_vocabulary(model, tokens, given)
        return Arguments(fields | {"batch": tokens.shape[0]}, tokens.shape[1], bounds)

    group = None if given is not None else wiring.group
    cut = begin_call(group, "forward of the model", checked, given)()
    assert tokens is not None, "checked"
    if 0 in cut.lengths:
        raise ValueError(f"every rank needs a token, the ranks hold {list(cut.lengths)}: use lasp.shard_batch")
    own = cut.positions(tokens.device)
    if not cut.packed:
        positions, wait = kwargs.get("position_ids"), given is None
        begin_call(group, "positions of the model", lambda: _check_positions(positions, own, wait))()
    if not cut.packed or kwargs.get("position_ids") is None:
        kwargs["position_ids"] = own.unsqueeze(0)
    if kwargs.get("labels") is not None:
        kwargs["labels"] = kwargs["shift_labels"]  # models of flash-linear-attention hand on no others
    parameters = inspect.signature(type(model).forward).parameters
    if CUT in parameters:
        kwargs[CUT] = cut
    if "position_ids" not in parameters:
        kwargs.pop("position_ids", None)
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs["use_cache"] = False
    return Forward(cut, len(tokens)), kwargs


def check_loss(model: Any, forward: Forward, kwargs: dict[str, Any]) -> None:
    """Raises ValueError where a forward had labels and did not come to our loss."""
    if kwargs.get("labels") is not None and not forward.has_loss:
        raise ValueError(f"{type(model).__name__} took labels and did not call its loss_function, which lasp replaces")


def _check_cut(
    cut: Cut | None, documents: Tensor | None, group: SequenceGroup | None, kwargs: dict[str, Any]
) -> tuple[int, ...] | None:
    """The bounds of documents, from a batch's cut or its cu_seqlens."""
    if kwargs.get("inputs_embeds") is not None and kwargs.get("position_ids") is None:
        raise ValueError(
            "inputs_embeds need the position_ids of lasp.shard_batch: prompts that peft puts before a sequence drop "
            "them, and would stand before every rank's part"
        )
    if cut is None:
        return None if documents is None else document_bounds(documents)
    if not isinstance(cut, Cut):
        raise ValueError(f"cut must be a lasp.Cut, got {told(cut)}")
    if not (cut.size == 1 if group is None else group.cuts_as(cut.group)):
        raise ValueError("the batch was cut over another group than the model is parallelised over")
    if documents is not None:
        cut.check_documents(documents)
    cut.check_mask(kwargs.get("attention_mask"))
    return cut.bounds


def _check_inputs(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor | None) -> None:
    if tokens is None or len(args) > 1:
        raise ValueError("a parallelised model needs input_ids or inputs_embeds, and all else by name")
    check_tokens(tokens)
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
    family = getattr(model, WIRING).family
    if family is not None:
        family.check_inputs(kwargs)


def _check_vocabulary(model: Any, tokens: Tensor, cut: Cut | None) -> None:
    try:
        ids = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # transformers does not find them
        return
    check_ids(tokens, ids, cut)


def _check_positions(given: Tensor | None, own: Tensor, wait: bool) -> Arguments:
    """Positions must count the whole sequence. wait: for an accelerator, to look at them."""
    wrong = "position_ids must count the whole sequence; packed documents need their cu_seqlens"
    if given is not None and given.shape[-1] != len(own):
        raise ValueError(wrong)
    if given is not None and may_look_at(given):
        check_values(given == own, lambda: wrong)
    elif given is not None and wait and not bool((given == own).all()):
        raise ValueError(wrong)
    return Arguments({}, len(own))
