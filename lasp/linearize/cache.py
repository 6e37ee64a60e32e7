"""The state of a linearised layer in a cache of transformers: of constant size, beside layers of any kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from lasp.layers.state import select_rows


class StateLayer(CacheLayerMixin):
    """In the place of a layer's keys and values: the state of `lasp.linearize.methods` after `seen` tokens."""

    is_sliding = False
    is_compileable = False
    is_croppable = False  # a state cannot give tokens back

    def __init__(self) -> None:
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def take(self, state: Any, tokens: int) -> None:
        """Replace the state by that of so many tokens later."""
        self.state = state
        self.seen += tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values as they come: the layer's state is told of them by `take`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """A state is small, and stays where it is."""

    def prefetch(self) -> None:
        """As `offload`."""

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def crop(self, *_: Any) -> None:
        raise ValueError("the state of a linearised layer cannot give tokens back")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = self.state[0].shape[0]
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        self.state = None if self.state is None else select_rows(self.state, rows)


def state_layer(cache: Any, index: int) -> StateLayer:
    """That of a layer, made at its first call. ValueError for a cache that softmax attention has filled."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise ValueError(f"a linearised layer keeps its state in a Cache of transformers, got {type(cache).__name__}")
    while len(layers) <= index and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    if not isinstance(layers[index], StateLayer):
        if layers[index].is_initialized:
            raise ValueError(f"layer {index} is linearised, and its cache holds keys and values: begin with a new one")
        layers[index] = StateLayer()
    found: StateLayer = layers[index]
    return found
