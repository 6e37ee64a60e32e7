"""parallelize and unparallelize: a Hugging Face causal language model, in place, and back."""

from __future__ import annotations

import copy
import inspect
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lasp.kernels.arguments import check_choice
from lasp.parallel import methods
from lasp.parallel.call import Arguments, begin_call
from lasp.parallel.group import SequenceGroup
from lasp.parallel.parameters import outline
from lasp.parallel.scan import Scan, ScanName, check_scan
from lasp.wrap.attention import NAME, attention, describe_mask
from lasp.wrap.checkpointing import bind_checkpoints, release_checkpoints
from lasp.wrap.dropout import drops, functional, swap_joined, swap_randomness
from lasp.wrap.families import family_of
from lasp.wrap.family import Family
from lasp.wrap.guard import check_unchanged
from lasp.wrap.model import balance, check_loss, loss, prepare
from lasp.wrap.refusal import check_adapters, check_model, check_module, takes_group
from lasp.wrap.rotation import swap_rotation
from lasp.wrap.swap import Function, calling_undecorated, calls, rebind_telling, restore, swap
from lasp.wrap.wiring import WIRING, Forward, LayerCall, Wiring

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model, group: SequenceGroup | None, *, attention: methods.Method = "auto", scan: ScanName | Scan = "auto"
) -> Model:
    """Make a model take this rank's part of every sequence (`lasp.shard_batch`); in place, this instance only.

    attention: method of `softmax_attention`. scan: of `linear_attention` and `delta_rule`, for recurrences. The model's
    loss is the whole sequence's mean, with the gradient of this rank's part: see `lasp.sync_gradients`. Documents come
    as cu_seqlens and are isolated, also where transformers lets them leak. All ranks of the group call it. Returns the
    model. Raises ValueError, on every rank, for a model not known to be exact (docs/models.md), naming the modules, and
    for ranks that do not call it with the same model and options. The models of `lasp.models` are given the group at
    every call; "auto" is what their configuration says.
    """
    target = base_model(model)

    def check() -> Arguments:
        check_module(target)
        if hasattr(target, WIRING):
            raise ValueError("the model is parallelised already; lasp.unparallelize(model) first")
        check_scan(scan, group)
        check_choice("attention", attention, methods.METHODS)
        check_model(target)
        check_adapters(model)
        return Arguments({"model": outline(target), "attention": attention, "scan": str(scan)}, 1)

    begin_call(group, "parallelize", check)()
    if takes_group(target):
        target.choose_exchange(scan, attention)
        _bind(target, group)
    else:
        wire(target, group, attention, scan)
    return model


def unparallelize(model: Model) -> Model:
    """Undo `parallelize`. Raises ValueError for a model that is not parallelised."""
    target = base_model(model)
    if not hasattr(target, WIRING):
        raise ValueError("the model is not parallelised")
    before = getattr(target, WIRING).before
    if before is not None:
        target.set_attn_implementation(before)
        _choose_attention(target, before)
    if takes_group(target):
        target.choose_exchange()
    if getattr(vars(target).get("_loss_function"), "func", None) is loss:
        del target._loss_function
    for module in target.modules():
        restore(module)
        release_checkpoints(module)
        module.__dict__.pop(WIRING, None)
    return model


def base_model(model: Any) -> Any:
    """The model inside a wrapper of peft, which calls its `forward` and not the module."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def wire(model: Any, group: SequenceGroup | None, attention: methods.Method, scan: str | Scan) -> None:
    """`parallelize` for a foreign model that is known."""
    family = family_of(model)
    assert family is not None, "checked"
    _own_config(model)
    switches = model._can_set_attn_implementation()
    wiring = Wiring(group, attention, scan, model.config._attn_implementation if switches else None, model, family)
    if switches:
        _switch_attention(model)
    for module in model.modules():
        module.__dict__[WIRING] = wiring
    for module in list(model.modules()):
        if module is not model:
            _swap_functions(family, module)
            swap_rotation(module)
        _swap_methods(family, module)
    model.loss_function = partial(loss, wiring)
    _swap_whole(model)


def _bind(model: Any, group: SequenceGroup | None) -> None:
    """`parallelize` for a model that takes a group itself: it is given this one at every call."""
    wiring = Wiring(group, "auto", "auto", None, model)
    for module in model.modules():
        module.__dict__[WIRING] = wiring
    _swap_whole(model)


def _swap_whole(model: Any) -> None:
    if hasattr(model, "generate"):
        swap(model, "generate", _refuse_to_generate)
    for module in model.modules():
        if "input_ids" in inspect.signature(type(module).forward).parameters:
            _swap_forward(module)
    for module in model.modules():
        swap_randomness(module)


def _refuse_to_generate(model: Any, *args: Any, **kwargs: Any) -> None:
    with _telling(getattr(model, WIRING).group, "generate"):
        raise ValueError("a parallelised model sees a part of each sequence: call lasp.unparallelize to generate")


def _telling(group: SequenceGroup | None, work: str) -> AbstractContextManager[None]:
    return nullcontext() if group is None else group.telling(work)


def _switch_attention(model: Any) -> None:
    """Softmax attention goes through the registry, and masks come as descriptions."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, describe_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise ValueError(f"{type(model).__name__} did not switch its attention: it does not call the registry")
    _choose_attention(model, NAME)


def _choose_attention(model: Any, name: str) -> None:
    """Let every configuration say the same, those too that only modules without attention hold."""
    for module in model.modules():
        if "config" in vars(module):
            module.config._attn_implementation = name


def _own_config(model: Any) -> None:
    """Models made from one configuration share the object; the switch must not reach the others."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if "config" in module.__dict__:
            module.config = copies.setdefault(id(module.config), copy.deepcopy(module.config))


def _swap_functions(family: Family, module: nn.Module) -> None:
    """Methods that call a known recurrence call ours."""
    for method, original, names in calls(module, family.functions):
        swap(module, method, _with_functions(original, {name: family.functions[name] for name in names}))


def _with_functions(original: Any, functions: dict[str, Function]) -> Function:
    def tell(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        hidden = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 3)  # [B, T, D]
        tokens = next((x.shape[1] for x in hidden), None)
        # Of a layer called by itself; what it calls would not know the word.
        return LayerCall.of(module, kwargs.pop("cu_seqlens", None), tokens)

    return torch.compiler.disable(rebind_telling(original, functions, tell))


def use_pytorch(model: nn.Module) -> None:
    """Let a model compute its recurrences in PyTorch, where transformers would call an installed library of kernels.

    flash-linear-attention needs a GPU, and transformers calls it without one too.
    """
    family = family_of(model)
    functions = {} if family is None else family.functions
    for module in model.modules():
        for method, original, names in calls(module, functions):
            swap(module, method, calling_undecorated(original, names))


def _swap_methods(family: Family, module: nn.Module) -> None:
    """Modules that mix tokens in code of their own get a method of ours."""
    for path, function in family.methods.get(type(module).__name__, {}).items():
        *child, method = path.split(".")
        swap(module.get_submodule(".".join(child)), method, _with_call(function))


def _with_call(function: Function) -> Function:
    @torch.compiler.disable
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(LayerCall.of(self, kwargs.pop("cu_seqlens", None)), self, *args, **kwargs)

    return run


def _swap_forward(model: Any) -> None:
    """The model, and the model without its head, which others call by itself (value heads, chunked losses)."""
    original: Any = type(model).forward
    others = {"load_balancing_loss_func": balance} | ({"nn.functional.dropout": functional} if drops(original) else {})
    forward = rebind_telling(original, others, lambda module, *_: getattr(module, WIRING))

    begin, end = torch.compiler.disable(_begin), torch.compiler.disable(check_loss)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        wiring: Wiring = getattr(self, WIRING)
        if wiring.running is not None:
            return forward(self, *args, **kwargs)
        under_way, kwargs = begin(self, wiring, args, kwargs)
        # A layer, a hook or a user's interrupt may end it on one rank: the next header of the others tells them.
        with wiring.within(under_way), _telling(wiring.group, f"the forward of {type(self).__name__}"):
            output = forward(self, *args, **kwargs)
            if not takes_group(self):
                end(self, under_way, kwargs)
        return output

    swap(model, "forward", torch.compiler.disable(run, recursive=False))


def _begin(
    part: nn.Module, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Forward, dict[str, Any]]:
    """A forward, and what it is called with, once all of the model has been looked at."""
    model = part if wiring.model is None else wiring.model
    modules = list(model.modules())
    forward, kwargs = prepare(part, partial(check_unchanged, model, modules, wiring), wiring, args, kwargs)
    swap_joined(modules, wiring)
    bind_checkpoints(modules, wiring)
    return forward, kwargs
