"""Which modules of a model are layers, mixers, and token-wise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from lasp.layers import Mixer
from lasp.parallel.data_parallel import outermost_layers
from lasp.wrap.families import FAMILIES, RECURRENCES
from lasp.wrap.parallelize import base_model
from lasp.wrap.refusal import is_tokenwise
from lasp.wrap.swap import calls

_MLP = re.compile(r"(MLP|Mlp|FeedForward|SwiGLU)$")
# transformers keeps the functions of softmax attention in a registry of this name.
_MIXING = dict.fromkeys((*RECURRENCES, "ALL_ATTENTION_FUNCTIONS"))
_MIXERS = frozenset(name for family in FAMILIES.values() for name in family.methods)


def layers_of(model: Any) -> list[nn.Module]:
    """The blocks of a model, in order.

    Raises ValueError where there are none.
    """
    found = [layer for layer in outermost_layers(base_model(model)) if any(True for _ in layer.children())]
    if not found:
        raise ValueError(f"{type(base_model(model)).__name__} has no list of layers")
    return found


def mixers_of(layer: nn.Module) -> list[nn.Module]:
    """The modules in a layer that mix tokens."""
    return list(_outermost(layer, _is_mixer))


def tokenwise_parts(model: Any) -> list[nn.Module]:
    """MLPs, the experts of a mixture, and those norms over the hidden size that are written in Python.

    torch's own norms save nothing but their input.
    """
    target = base_model(model)
    hidden = target.config.get_text_config().hidden_size
    return list(_outermost(target, lambda m: is_mlp(m) or is_mixture(m) or _is_norm(m, hidden)))


def is_mlp(module: nn.Module) -> bool:
    """Whether a module takes one tensor of tokens, and treats each by itself."""
    within = list(module.modules())[1:]
    return bool(_MLP.search(_name(module))) and bool(within) and all(map(is_tokenwise, within))


def is_mixture(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture, which are told of every token which it goes to.

    Adapters of peft on their parameters belong to them: these act within the wrapper's forward alone.
    """
    while isinstance(inside := getattr(module, "base_layer", None), nn.Module):
        module = inside
    return _name(module).endswith("Experts")


def _is_norm(module: nn.Module, hidden: int) -> bool:
    own = not type(module).__module__.startswith("torch.") and _name(module).endswith("Norm")
    return own and getattr(getattr(module, "weight", None), "shape", None) == (hidden,)


def _is_mixer(module: nn.Module) -> bool:
    known = isinstance(module, Mixer) or type(module).__name__ in _MIXERS or hasattr(type(module), "linearized_from")
    return known or any(calls(module, _MIXING))


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for child in module.children():
        if wanted(child):
            yield child
        else:
            yield from _outermost(child, wanted)


def _name(module: nn.Module) -> str:
    """Of its class; FSDP2 makes one of its own."""
    return type(module).__name__
