"""What a user may have changed since `parallelize`, asked at every call of a model: is all that we replaced still ours?

Nothing here sends anything; the model's header tells the other ranks.
"""

from __future__ import annotations

from typing import Any

from lasp.wrap.attention import NAME, attention
from lasp.wrap.model import loss
from lasp.wrap.refusal import check_forwards, check_noise, has_own_forward, is_tokenwise, takes_group
from lasp.wrap.swap import is_swapped, replaced
from lasp.wrap.wiring import WIRING, Wiring

_AGAIN = "change a model before lasp.parallelize, or between lasp.unparallelize and it"


def check_unchanged(model: Any, wiring: Wiring) -> None:
    """Raises ValueError where a part of the model is no longer what `parallelize` made of it, or has joined since.

    What treats every token by itself may join or be exchanged: LoRA, a resized embedding.
    """
    modules = dict(model.named_modules())
    check_forwards(modules.values())
    check_noise(model)
    for path, module in modules.items():
        for method in replaced(module):
            raise ValueError(f"{_named(path, method)} was replaced since lasp.parallelize; {_AGAIN}")
        if has_own_forward(module) and not is_swapped(module, "forward"):
            raise ValueError(f"{_named(path, 'forward')} is not that of its class; {_AGAIN}")
        if vars(module).get(WIRING) is not wiring and not is_tokenwise(module):
            raise ValueError(f"{path} ({type(module).__name__}) joined since lasp.parallelize; {_AGAIN}")
    if wiring.before is not None:
        _check_attention(modules.values())
    has_loss = model is wiring.model and not takes_group(model)
    if has_loss and not is_swapped(model, "_compute_logits_and_loss"):
        _check_loss(model)


def _named(path: str, method: str) -> str:
    return f"{path}.{method}" if path else f"the model's {method}"


def _check_attention(modules: Any) -> None:
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
