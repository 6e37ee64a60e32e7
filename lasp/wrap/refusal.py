"""Which models are refused: all whose family has no record, and of the others what their record does not know."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

from lasp.kernels.arguments import told
from lasp.wrap.families import RECURRENCES, family_of
from lasp.wrap.family import ENTRY, Family, folder_of
from lasp.wrap.swap import calls

# Modules of torch that treat every token by itself.
_TOKENWISE = {
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout,
    nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict,
}  # fmt: skip
_TRUSTED = (
    "transformers.activations", "transformers.pytorch_utils", "torch.nn.modules.activation", "peft.tuners.lora",
    "peft.utils.other", "lasp.linearize.methods",
)  # fmt: skip
# Whose code may be wrapped around a module's forward, and which classes add nothing to the one that they stand for.
_DECORATING = ("transformers", "torch", "accelerate", "peft", "fla", "lasp")
_TRANSPARENT = ("torch.distributed.", "torch._dynamo.")
_MIXING = {nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d}  # among torch's activations


def takes_group(model: Any) -> bool:
    """Whether a model is of our own kind: its class says so, its forward has a `group`, and its mixers exchange."""
    return bool(getattr(type(model), "takes_group", False))


def check_module(model: Any) -> None:
    """Raises ValueError for what is no model at all."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {told(model)}")


def check_model(model: Any) -> None:
    """Raises ValueError where the model, a module in it or an option of it is not known to be exact."""
    modules = list(model.modules())
    check_forwards(modules)
    check_noise(model, modules)
    own = [path for path, m in model.named_modules() if has_own_forward(m)]
    if own:
        raise ValueError(f"the forward of {own[0] or type(model).__name__} is not that of its class, and not known")
    if takes_group(model):
        _check_own(model)
    else:
        _check_foreign(model)


def _check_own(model: Any) -> None:
    foreign = [
        f"{path} ({type(m).__qualname__})"
        for path, m in model.named_modules()
        if not is_tokenwise(m) and not any(cls.__module__.startswith("lasp.") for cls in type(m).__mro__)
    ]
    if foreign:
        raise ValueError(f"modules that may mix tokens and are not known: {', '.join(foreign)}")


def _check_foreign(model: Any) -> None:
    name, family = type(model).__name__, family_of(model)
    inside = list(model.children())
    if family is None and len(inside) == 1 and (takes_group(inside[0]) or family_of(inside[0]) is not None):
        within = type(inside[0]).__name__
        raise ValueError(f"{name} is around a {within}: parallelize that, and put {name} around it afterwards")
    if family is None:
        own = sorted({type(m).__name__ for m in model.modules() if not _tokenwise(type(m))} - {name})
        raise ValueError(
            f"{name} ({type(model).__module__}) is not verified: of its modules {', '.join(own)} any may mix tokens "
            "unseen. docs/models.md lists what is. It needs a record in lasp/wrap/families, which says what stands in "
            "for what mixes tokens (docs/huggingface.md), and lasp.verify"
        )
    if name not in (_causal_language_models() if family.model is None else {family.model}):
        raise ValueError(f"{name}: only causal language models are sequence-parallel")
    foreign = [
        f"{path} ({type(m).__qualname__})" for path, m in model.named_modules() if not _known(family, model, path, m)
    ]
    if foreign:
        raise ValueError(
            f"modules that may mix tokens and are not known in {name}: {', '.join(foreign)}. Each needs a stand-in in "
            "the record of its family, in lasp/wrap/families; what treats every token by itself can be built from "
            "torch.nn's layers"
        )
    if getattr(model.config, ENTRY, None) and not any(hasattr(type(m), "linearized_from") for m in model.modules()):
        raise ValueError(f"{name} was read without what lasp.linearize added to it: read its folder by lasp.linearize")
    _check_recurrences(family, model)
    family.check_options(model)
    if getattr(model, "use_kernels", False):
        raise ValueError("use_kernels=True replaces whole modules; load the model without it")
    if "_loss_function" in vars(model):
        raise ValueError(
            f"{name} has a loss_function of its own, which would see a rank's part: del model._loss_function"
        )


def _check_recurrences(family: Family, model: nn.Module) -> None:
    """What one family calls under a name, another may call under the same, and mean something else."""
    others = dict.fromkeys(RECURRENCES - family.functions.keys())
    for path, module in model.named_modules():
        for method, _, names in calls(module, others):
            raise ValueError(
                f"{path} ({type(module).__qualname__}) calls {', '.join(sorted(names))} in {method}, for which the "
                f"record of {family.folder!r} in lasp/wrap/families has no stand-in"
            )


def check_forwards(modules: Iterable[nn.Module]) -> None:
    """Raises ValueError for a class whose forward is not the one in its own file: it may leave out what was replaced.

    Liger, Unsloth and others put a forward of their own into the classes of transformers.
    """
    for cls in {type(module) for module in modules}:
        # FSDP2 makes a class of its own for each, with a copy of the forward.
        holders = (c for c in cls.__mro__ if "forward" in vars(c) and not c.__module__.startswith("torch.distributed."))
        owner = next(holders)
        function = vars(owner)["forward"]
        home = getattr(sys.modules.get(owner.__module__), "__dict__", None)
        while hasattr(function, "__wrapped__") and _written_in(function).split(".")[0] in _DECORATING:
            function = function.__wrapped__
        if getattr(function, "__globals__", None) is not home:
            raise ValueError(
                f"{owner.__name__}.forward was patched (from {_written_in(function)}) and need not come to what lasp "
                "replaces in it: use the model without the patch"
            )


def _written_in(function: Any) -> str:
    """The module that a function was written in; decorators copy `__module__`."""
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def check_noise(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Raises ValueError for noise that a rank's part would get otherwise than the whole sequence."""
    for module in modules:
        own = vars(module)  # what is not there takes `getattr` long, and all of them are asked at every forward
        for hook in own["_forward_hooks"].values():
            if getattr(hook, "__name__", "") == "neftune_post_forward_hook":
                path = path_to(module, model)
                raise ValueError(f"neftune_noise_alpha: the noise on {path} is scaled by the length of a rank's part")
        if own.get("layerdrop"):
            raise ValueError(f"layerdrop={own['layerdrop']}: every rank would leave out other layers, set it to 0")
        if any(type(variant).__name__.startswith("ALora") for variant in own.get("lora_variant", {}).values()):
            path = path_to(module, model)
            raise ValueError(f"alora_invocation_tokens: {path} looks for them in a rank's part alone")


def path_to(module: nn.Module, model: nn.Module) -> str:
    """Where in a model a module is, for a message; the first of its names."""
    return next((path for path, other in model.named_modules() if other is module), "")


def check_adapters(model: Any) -> None:
    """Raises ValueError for a wrapper of peft that puts tokens before the sequence: every rank would have them."""
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(f"{type(config).__name__} puts tokens of its own before every rank's part; LoRA does not")


def _causal_language_models() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _known(family: Family, model: nn.Module, path: str, module: nn.Module) -> bool:
    cls = type(module)
    if family.knows(cls) or folder_of(module) == family.folder or _tokenwise(cls):
        return "Indexer" not in cls.__name__
    # Convolutions and the like belong to the mixer around them, if that is one that we know.
    mixer = model.get_submodule(path.rpartition(".")[0])
    mixes = type(mixer).__name__ in family.methods or any(calls(mixer, family.functions))
    return cls.__module__.startswith("torch.nn.") and mixes and folder_of(mixer) == family.folder


def is_tokenwise(module: nn.Module) -> bool:
    """Whether a module treats every token by itself; so does one that compiles, shards or checkpoints others."""
    return _plain_class(module) is nn.Module or _tokenwise(_plain_class(module))


def has_own_forward(module: nn.Module) -> bool:
    """Whether an instance's forward is not that of its class. Hooks of accelerate and the compiler put one there."""
    return "forward" in vars(module) and "_hf_hook" not in vars(module) and _plain_class(module) is not nn.Module


def _plain_class(module: nn.Module) -> type:
    return next(c for c in type(module).__mro__ if not c.__module__.startswith(_TRANSPARENT))


def _tokenwise(cls: type) -> bool:
    return cls in _TOKENWISE or (cls not in _MIXING and cls.__module__.startswith(_TRUSTED))
