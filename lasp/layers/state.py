"""What a mixer remembers of the tokens before: a memory of fixed size, or all their keys and values.

A state is a tensor, or a NamedTuple of states where a mixer keeps more than one thing. Every tensor's first dim counts
the rows of the batch, or the packed documents: caches select rows of a state without knowing whose it is. A mixer
defines its NamedTuple here, returns it from `mix`, and refuses a state of any other type with a ValueError; None stands
for nothing before the first token.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


class KeyValues(NamedTuple):
    """Keys and values of N tokens, in order, as softmax attention keeps them."""

    k: Tensor
    """[B, N, H_kv, D], with their positions already in them."""

    v: Tensor
    """[B, N, H_kv, D]."""

    shown: Tensor
    """[B, N] bool; False for padding, which no token sees."""

    def followed_by(self, later: Self) -> Self:
        """These tokens and `later` ones.

        Raises:
            ValueError: batches, heads or dims that differ.
        """
        if self.k.shape[0] != later.k.shape[0] or self.k.shape[2:] != later.k.shape[2:]:
            raise ValueError(
                f"keys of shape {tuple(later.k.shape)} cannot continue from a state with keys {tuple(self.k.shape)}"
            )
        return type(self)(*(torch.cat(parts, 1) for parts in zip(self, later, strict=True)))

    def last(self, tokens: int) -> Self:
        """The last `tokens` tokens, or as many as there are."""
        start = max(self.k.shape[1] - tokens, 0)
        return type(self)(*(x[:, start:] for x in self))


class ConvolvedMemory(NamedTuple):
    """What a recurrence behind a short convolution keeps."""

    memory: Any
    """The recurrence's own state: [B or documents, H, K, V] in fp32 (fp64), or a NamedTuple."""

    tail: Tensor
    """[B or documents, channels, W - 1], what went into the convolution last, oldest first."""


class ScaledMemory(NamedTuple):
    """A memory divided by what would overflow: a running sum of exponentials, or the largest of them."""

    memory: Tensor
    """[B or documents, H_kv, K, V], in fp32 (fp64)."""

    log_scale: Tensor
    """[B or documents, H_kv, ...], the logarithm of that."""


# A recurrence keeps [B or documents, H_kv, K, V] in fp32 (fp64), of a size that does not grow with the text.
State = Tensor | tuple[Any, ...]


def select_rows(state: State, index: Tensor) -> State:
    """The state whose row i of the batch is row index[i] of this one."""
    if isinstance(state, Tensor):
        return state.index_select(0, index.to(state.device))
    return type(state)(*(select_rows(part, index) for part in state))
