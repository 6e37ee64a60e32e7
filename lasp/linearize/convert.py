"""linearize: a softmax model of transformers, in place; and its folder, read back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn

from lasp.kernels.arguments import check_choice, check_integer, told
from lasp.linearize.attention import MIXER, REGISTRY, TURN, Errors, Linearized, linearized_class
from lasp.linearize.methods import METHODS
from lasp.parallel.parameters import some
from lasp.wrap.family import ENTRY
from lasp.wrap.parallelize import base_model
from lasp.wrap.refusal import check_model, takes_group
from lasp.wrap.swap import calls, undecorated
from lasp.wrap.wiring import WIRING

# What a forward says that does more than to attend to keys and values of its own tokens.
_MORE = {
    "softcap", "attn_logit_softcapping", "s_aux", "sinks", "position_bias", "indices", "block_indices", "indexer",
    "kv_b_proj", "kv_a_proj_with_mqa", "lambda_q1", "shared_kv_states", "kv_shared_layer_index", "is_cross_attention",
}  # fmt: skip
_NEEDED = ("layer_idx", "head_dim", "num_key_value_groups")


def linearize(model: Any, method: str | None = None, layers: str | Sequence[int] = "all", **options: Any) -> Any:
    """Turn softmax layers of a causal language model of transformers into linear ones; in place.

    method: "liger" (arXiv:2503.01496), gated linear attention of the layer's own projections beside a window, which
    needs training but no new parameters; or "lolcats" (arXiv:2410.10254), a window and learned feature maps under one
    normaliser, which `lasp linearize` trains to do as the layer did. layers: "all", the first a of every b softmax
    layers as "a/b", or their places in the model. options: `window`, in tokens (64).

    model: one that `lasp.parallelize` takes, with or without adapters of peft, and whose softmax layers are plain:
    grouped heads, rotary positions, a window. It is parallelised, trained, saved and generates as before, from a state
    of constant size. A folder that such a model was saved in is read back by `lasp.linearize(folder)`; transformers
    alone would read it without what was added. Returns the model. Raises ValueError for a model or layer that is not
    known to be exact, naming it.
    """
    if isinstance(model, str | Path):
        if method is not None:
            raise ValueError(f"a folder says how it was linearised: lasp.linearize({str(model)!r}) alone")
        found = read(model)
        if not is_linearized(found):
            raise ValueError(f"{str(model)!r} holds no linearised model: read it by transformers, and linearise that")
        return found
    target = base_model(model)
    check_choice("method", method, tuple(METHODS))
    assert method is not None, "checked"
    if unknown := sorted(
        options.keys() - (signature(METHODS[method]).parameters.keys() - {"heads", "key_heads", "head_dim"})
    ):
        raise ValueError(f"lasp.linearize: {method} knows no {', '.join(unknown)}")
    if hasattr(target, WIRING):
        raise ValueError("the model is parallelised: linearise it before, or lasp.unparallelize it")
    if is_linearized(target):
        raise ValueError("the model is linearised already")
    if takes_group(target):
        raise ValueError(f"{type(target).__name__} has linear layers of its own: choose its pattern instead")
    check_model(target)
    known = softmax_layers(target)
    chosen = choose_layers(layers, sorted(known))
    for index in chosen:
        _check_plain(index, known[index])
    for index in chosen:
        _convert(known[index], method, options)
    setattr(target.config, ENTRY, {"method": method, "layers": chosen, "options": options})
    return model


def is_linearized(model: Any) -> bool:
    return any(isinstance(module, Linearized) for module in model.modules())


def read(folder: str | Path, **options: Any) -> Any:
    """A causal language model by its folder or name on the hub, linearised where its configuration says so. options:
    those of `from_pretrained`. ValueError for files that lack a weight of the model, or hold one that it has not."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(folder)
    options |= {"output_loading_info": True}
    if getattr(config, ENTRY, None) is None:
        return _complete(*AutoModelForCausalLM.from_pretrained(folder, **options))
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        follow(self)

    # transformers makes the model first and then looks for weights of all that is in it.
    made: Any = type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})
    model = _complete(*made.from_pretrained(folder, **options))
    model.__class__ = base
    return model


def _complete(model: Any, told: dict[str, Any]) -> Any:
    """A model that its files have filled: transformers draws what they lack, and says so in its log alone."""
    for key, wrong in (("missing_keys", "lack"), ("unexpected_keys", "hold, beyond what the model has,")):
        if names := sorted(told[key]):
            raise ValueError(f"the files of {type(model).__name__} {wrong} {some(names)}")
    return model


def follow(model: Any) -> Any:
    """A model, linearised where its configuration says so; what is added has its first values."""
    entry = getattr(model.config, ENTRY, None)
    if entry is not None and not is_linearized(model):
        known = softmax_layers(model)
        for index in entry["layers"]:
            _convert(known[index], entry["method"], entry["options"])
    return model


def learn(model: Any) -> Errors:
    """Let the linearised layers of a model return the softmax attention that they had, and note in `Errors` how far
    they are from it, at every forward until `forget`."""
    errors = Errors()
    for module in model.modules():
        if isinstance(module, Linearized):
            module.errors = errors
    return errors


def forget(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, Linearized):
            module.errors = None


def softmax_layers(model: Any) -> dict[int, Any]:
    """The softmax attentions of a model by their places. ValueError where there are none."""
    names = {REGISTRY: None}
    found = [m for m in model.modules() if any(method == "forward" for method, *_ in calls(m, names))]
    if not found:
        raise ValueError(f"{type(model).__name__} has no softmax layers to linearise")
    if unplaced := [type(m).__name__ for m in found if not isinstance(getattr(m, "layer_idx", None), int)]:
        raise ValueError(f"{type(model).__name__}: {unplaced[0]} has no layer_idx, and is not known to be plain")
    return {module.layer_idx: module for module in found}


def choose_layers(layers: str | Sequence[int], known: list[int]) -> list[int]:
    """Places in the model, in order."""
    if isinstance(layers, str):
        share = re.fullmatch(r"(\d+)/(\d+)", "1/1" if layers == "all" else layers)
        first, every = (int(share[1]), int(share[2])) if share else (0, 0)
        if not 0 < first <= every:
            raise ValueError(f'layers must be "all", a share such as "1/2", or a list of places, got {layers!r}')
        return [place for number, place in enumerate(known) if number % every < first]
    if not isinstance(layers, Sequence) or not layers:
        raise ValueError(f'layers must be "all", a share such as "1/2", or a list of places, got {told(layers)}')
    places = set()
    for place in layers:
        check_integer("a layer's place", place, 0)
        places.add(int(place))
    if missing := sorted(places - set(known)):
        raise ValueError(f"layers {missing} are no softmax layers of the model, which are {known}")
    return sorted(places)


def _check_plain(index: int, module: nn.Module) -> None:
    name, code = type(module).__name__, undecorated(type(module).forward).__code__
    words: set[Any] = {*code.co_names, *code.co_varnames}
    for constant in code.co_consts:
        words |= set(constant) if isinstance(constant, tuple) else set()
    if more := sorted(_MORE & words):
        raise ValueError(f"layer {index} ({name}) is no plain softmax attention: its forward has {', '.join(more)}")
    if TURN not in words or not {REGISTRY} <= words:
        raise ValueError(f"layer {index} ({name}) is no plain softmax attention with rotary positions")
    if missing := [n for n in _NEEDED if not isinstance(getattr(module, n, None), int)]:
        raise ValueError(f"layer {index} ({name}) is not known to be plain: it has no {', '.join(missing)}")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"layer {index} ({name}) is not causal")
    dropout = getattr(module, "attention_dropout", 0)
    if dropout := getattr(dropout, "p", dropout):
        raise ValueError(
            f"layer {index} ({name}) has attention_dropout {dropout}, a linearised one has none: read it with 0"
        )


def _convert(module: Any, method: str, options: dict[str, Any]) -> None:
    heads, like = module.config.num_attention_heads, next(module.parameters())
    mixer = METHODS[method](heads, heads // module.num_key_value_groups, module.head_dim, **options)
    softmax: Any = type(module)
    module.__class__ = linearized_class(softmax)
    setattr(module, MIXER, mixer.to(device=like.device, dtype=like.dtype).train(module.training))
