"""parallelize and unparallelize: a Hugging Face causal language model, in place, and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import pieces_of
from lasp.parallel.loss import cross_entropy
from lasp.wrap.attention import NAME, WIRING, Wiring, attention, describe_mask
from lasp.wrap.refusal import check_model


def parallelize(model: Any, group: SequenceGroup | None, *, attention: str = "auto", scan: str = "auto") -> Any:
    """Make a model take this rank's part of every sequence (`lasp.shard_batch`); in place, this instance only.

    attention: method of `softmax_attention`. scan: of recurrences, which are all refused for now. The model's loss is
    the whole sequence's mean, with the gradient of this rank's part: see `lasp.sync_gradients`. Documents come as
    cu_seqlens and are isolated. Raises ValueError for a model not known to be exact.
    """
    if hasattr(model, WIRING):
        raise ValueError("the model is parallelised already; lasp.unparallelize(model) first")
    if scan != "auto":
        raise ValueError(f"scan={scan!r} is for recurrences, and models with any are refused")
    check_model(model)
    before = model.config._attn_implementation
    _own_config(model)
    _register()
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} did not switch its attention: it does not call the registry")
    wiring = Wiring(group, attention, before)
    for module in model.modules():
        if module is model or type(module).__name__.endswith("Attention"):
            setattr(module, WIRING, wiring)
    model.loss_function = _Loss(wiring)
    model.register_forward_pre_hook(_Prepare(), with_kwargs=True)
    return model


def unparallelize(model: Any) -> Any:
    """Undo `parallelize`. Raises ValueError for a model that is not parallelised."""
    if not hasattr(model, WIRING):
        raise ValueError("the model is not parallelised")
    model.set_attn_implementation(getattr(model, WIRING).before)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _Prepare):
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    del model._loss_function
    for module in model.modules():
        module.__dict__.pop(WIRING, None)
    return model


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, describe_mask)


def _own_config(model: Any) -> None:
    """Models made from one configuration share the object; the switch must not reach the others."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if "config" in module.__dict__:
            module.config = copies.setdefault(id(module.config), copy.deepcopy(module.config))


class _Loss:
    """The model's loss function: the targets come shifted."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        assert shift_labels is not None, "checked before the forward"
        return cross_entropy(logits, shift_labels, group=self.wiring.group, num_items=num_items_in_batch)


class _Prepare:
    """Before the forward: what would be silently wrong is an error on every rank; positions are global."""

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        group = getattr(model, WIRING).group
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        lengths = begin_call(group, lambda: _check_inputs(args, kwargs, tokens))()
        assert tokens is not None, "checked"
        if kwargs.get("cu_seqlens") is None:
            rank = 0 if group is None else group.rank
            pieces = pieces_of(lengths, "contiguous" if group is None else group.layout)
            own = torch.cat([torch.arange(p.start, p.stop) for p in pieces if p.rank == rank]).to(tokens.device)
            begin_call(group, lambda: _check_positions(kwargs.get("position_ids"), own))()
            kwargs["position_ids"] = own.unsqueeze(0)
        return args, kwargs | {"use_cache": False}


def _check_inputs(args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor | None) -> Arguments:
    if tokens is None or len(args) > 1:
        raise ValueError("a parallelised model needs input_ids or inputs_embeds, and all else by name")
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ValueError("labels without shift_labels lose the target at each border: use lasp.shard_batch")
    if kwargs.get("past_key_values") is not None:
        raise ValueError("a parallelised model takes no past_key_values: call lasp.unparallelize to generate")
    if kwargs.get("cu_seqlens") is not None and kwargs.get("position_ids") is None:
        raise ValueError("cu_seqlens need position_ids of each document: use lasp.shard_batch")
    fields = {"batch": tokens.shape[0], "labels": kwargs.get("labels") is not None}
    return Arguments(fields | {"documents": kwargs.get("cu_seqlens") is not None}, tokens.shape[1])


def _check_positions(given: Tensor | None, own: Tensor) -> Arguments:
    if given is not None and not (given == own).all():
        raise ValueError("position_ids must count the whole sequence; packed documents need their cu_seqlens")
    return Arguments({}, len(own))
