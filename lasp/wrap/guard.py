"""What a user may have changed since `parallelize`, asked at every call of a model: is all that we replaced still ours?

Nothing here sends anything; the model's header tells the other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lasp.wrap.attention import NAME, attention
from lasp.wrap.model import loss
from lasp.wrap.refusal import check_forwards, check_noise, has_own_forward, is_tokenwise, path_to
from lasp.wrap.swap import is_swapped, replaced
from lasp.wrap.wiring import WIRING, Wiring

_AGAIN = "change a model before lasp.parallelize, or between lasp.unparallelize and it"


def check_unchanged(model: Any, modules: Sequence[nn.Module], wiring: Wiring) -> None:
    """Raises ValueError where one of a model's modules is no longer what `parallelize` made of it, or has joined since.

    What treats every token by itself may join or be exchanged: LoRA, a resized embedding.
    """
    check_forwards(modules)
    check_noise(model, modules)
    for module in modules:
        for method in replaced(module):
            raise ValueError(f"{_named(module, model, method)} was replaced since lasp.parallelize; {_AGAIN}")
        if has_own_forward(module) and not is_swapped(module, "forward"):
            raise ValueError(f"{_named(module, model, 'forward')} is not that of its class; {_AGAIN}")
        if vars(module).get(WIRING) is not wiring and not is_tokenwise(module):
            joined = f"{path_to(module, model)} ({type(module).__name__})"
            raise ValueError(f"{joined} joined since lasp.parallelize; {_AGAIN}")
    if wiring.before is not None:
        _check_attention(modules)
    if wiring.family is not None and model is wiring.model:
        _check_loss(model)
        wiring.family.check_options(model)


def _named(module: nn.Module, model: nn.Module, method: str) -> str:
    path = path_to(module, model)
    return f"{path}.{method}" if path else f"the model's {method}"


def _check_attention(modules: Sequence[nn.Module]) -> None:
    from transformers import AttentionInterface

    chosen = {id(c): c._attn_implementation for m in modules if (c := vars(m).get("config")) is not None}
    others = sorted({str(name) for name in chosen.values() if name != NAME})
    if others or AttentionInterface().get(NAME) is not attention:
        raise ValueError(
            f"the attention was set to {', '.join(others) or 'another function'} since lasp.parallelize, and a rank "
            f"would attend to its own part; {_AGAIN}"
        )


def _check_loss(model: Any) -> None:
    if getattr(vars(model).get("_loss_function"), "func", None) is not loss:
        raise ValueError(f"the loss_function was replaced since lasp.parallelize and would see a rank's part; {_AGAIN}")
