"""parallelize and unparallelize: a Hugging Face causal language model, in place, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lasp.kernels.arguments import check_choice
from lasp.parallel import softmax
from lasp.parallel.group import SequenceGroup
from lasp.parallel.scan import check_scan
from lasp.wrap import fla
from lasp.wrap.attention import NAME, attention, describe_mask
from lasp.wrap.model import balance, loss, prepare
from lasp.wrap.modules import METHODS
from lasp.wrap.recurrences import FUNCTIONS
from lasp.wrap.refusal import check_adapters, check_model, family
from lasp.wrap.swap import Function, calls, rebind, restore, swap, undecorated
from lasp.wrap.wiring import WIRING, LayerCall, Wiring


def parallelize(
    model: Any, group: SequenceGroup | None, *, attention: softmax.Method = "auto", scan: str = "auto"
) -> Any:
    """Make a model take this rank's part of every sequence (`lasp.shard_batch`); in place, this instance only.

    attention: method of `softmax_attention`. scan: of `linear_attention` and `delta_rule`, for recurrences. The model's
    loss is the whole sequence's mean, with the gradient of this rank's part: see `lasp.sync_gradients`. Documents come
    as cu_seqlens and are isolated, also where transformers lets them leak. Returns the model. Raises ValueError for a
    model not known to be exact (docs/models.md), naming the modules.
    """
    target = base_model(model)
    if hasattr(target, WIRING):
        raise ValueError("the model is parallelised already; lasp.unparallelize(model) first")
    check_scan(scan)
    check_choice("attention", attention, softmax.METHODS)
    check_model(target)
    check_adapters(model)
    wire(target, group, attention, scan)
    return model


def unparallelize(model: Any) -> Any:
    """Undo `parallelize`. Raises ValueError for a model that is not parallelised."""
    target = base_model(model)
    if not hasattr(target, WIRING):
        raise ValueError("the model is not parallelised")
    before = getattr(target, WIRING).before
    if target.config._attn_implementation != before:
        target.set_attn_implementation(before)
    del target._loss_function
    for module in target.modules():
        restore(module)
        module.__dict__.pop(WIRING, None)
    return model


def base_model(model: Any) -> Any:
    """The model inside a wrapper of peft, which calls its `forward` and not the module."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def wire(model: Any, group: SequenceGroup | None, attention: softmax.Method, scan: str) -> None:
    """`parallelize` without asking whether the model is known."""
    wiring = Wiring(group, attention, scan, model.config._attn_implementation)
    _own_config(model)
    _switch_attention(model)
    for module in model.modules():
        module.__dict__[WIRING] = wiring
    for module in list(model.modules()):
        if module is not model:
            _swap_functions(module)
            _swap_methods(module)
            _swap_rotation(module)
    model.loss_function = partial(torch.compiler.disable(loss), wiring)
    if family(model) in fla.MODELS:
        swap(model, "_compute_logits_and_loss", torch.compiler.disable(fla.logits_and_loss))
    swap(model, "generate", _refuse_to_generate)
    _swap_forward(model)


def _refuse_to_generate(_: Any, *args: Any, **kwargs: Any) -> None:
    raise ValueError("a parallelised model sees a part of each sequence: call lasp.unparallelize to generate")


def _switch_attention(model: Any) -> None:
    """Softmax attention goes through the registry, and masks come as descriptions."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, torch.compiler.disable(attention))
    AttentionMaskInterface.register(NAME, describe_mask)
    if model._can_set_attn_implementation():
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(f"{type(model).__name__} did not switch its attention: it does not call the registry")


def _own_config(model: Any) -> None:
    """Models made from one configuration share the object; the switch must not reach the others."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if "config" in module.__dict__:
            module.config = copies.setdefault(id(module.config), copy.deepcopy(module.config))


def _swap_functions(module: nn.Module) -> None:
    """Methods that call a known recurrence call ours."""
    theirs = type(module).__module__.startswith("fla.")
    functions = fla.FUNCTIONS if theirs else FUNCTIONS
    # A layer of flash-linear-attention hands documents on to its convolutions; one of transformers would refuse them.
    take: Function = dict.get if theirs else dict.pop
    for method, original, names in calls(module, functions):
        swap(module, method, _with_functions(original, {name: functions[name] for name in names}, take))


def _with_functions(original: Any, functions: Mapping[str, Function], take: Function) -> Function:
    @torch.compiler.disable
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = LayerCall.of(self, take(kwargs, "cu_seqlens", None))
        own = rebind(original, {name: partial(function, call) for name, function in functions.items()})
        return own(self, *args, **kwargs)

    return run


def use_pytorch(model: nn.Module) -> None:
    """Let a model compute its recurrences in PyTorch, where transformers would call an installed library of kernels.

    flash-linear-attention needs a GPU, and transformers calls it without one too.
    """
    for module in model.modules():
        for method, original, names in calls(module, FUNCTIONS):
            swap(module, method, undecorated(original, names))


def _swap_methods(module: nn.Module) -> None:
    """Modules that mix tokens in code of their own get a method of ours."""
    for path, function in (METHODS | fla.METHODS).get(type(module).__name__, {}).items():
        *child, method = path.split(".")
        swap(module.get_submodule(".".join(child)), method, _with_call(function))


def _with_call(function: Function) -> Function:
    @torch.compiler.disable
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(LayerCall.of(self, kwargs.pop("cu_seqlens", None)), self, *args, **kwargs)

    return run


def _swap_rotation(module: Any) -> None:
    """RoPE whose frequencies depend on the longest position sees that of the whole sequence."""
    kinds = getattr(module, "rope_type", None)
    if not {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
        return
    original = type(module).forward

    def run(self: nn.Module, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        wiring: Wiring = getattr(self, WIRING)
        if wiring.packed:
            raise ValueError(f"rope_type {kinds!r} depends on one length, and packed documents have several")
        last = position_ids.new_full((*position_ids.shape[:-1], 1), wiring.length - 1)
        rotations = original(self, x, torch.cat([position_ids, last], -1), *args, **kwargs)
        return tuple(rotation[:, :-1] for rotation in rotations)

    swap(module, "forward", run)


def _swap_forward(model: Any) -> None:
    original = type(model).forward
    prepared, balanced = torch.compiler.disable(prepare), torch.compiler.disable(balance)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        wiring: Wiring = getattr(self, WIRING)
        kwargs = prepared(self, wiring, args, kwargs)
        call = LayerCall(wiring, kwargs.get("cu_seqlens"))
        return rebind(original, {"load_balancing_loss_func": partial(balanced, call)})(self, *args, **kwargs)

    swap(model, "forward", run)
