"""What a generation remembers: one state per layer, of a size that only softmax layers let grow with the sequence."""

from dataclasses import fields

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from lasp.layers.state import State, select_rows

NAMES = ("past_key_values", "cache")
"""What transformers calls a cache, as an argument and in an output: the first until 5.23, the second since 5.24."""

NAME = NAMES[1] if NAMES[1] in {field.name for field in fields(BaseModelOutputWithPast)} else NAMES[0]
"""The one that the installed transformers uses."""


class RecurrentCache:
    """The states of all layers after `seen_tokens` tokens, of whatever kind each mixer keeps.

    It offers what `generate()` asks of a cache: the length seen so far, and reordering for beam search. It cannot be
    shortened, since a state does not tell its last token apart.

    Args:
        num_layers: layers of the model.

    Attributes:
        states: one per layer, of the kind its mixer keeps (`lasp.layers.State`); None before the first token.
        seen_tokens: tokens the states have taken in, padding included.
    """

    # Asked by generate(): states are replaced rather than written in place, and cannot give tokens back.
    is_compileable = False
    is_croppable = False

    def __init__(self, num_layers: int) -> None:
        self.states: list[State | None] = [None] * num_layers
        self.seen_tokens = 0

    @property
    def is_linear(self) -> list[bool]:
        """Asked by generate() since transformers 5.24: of no layer is the number of tokens seen unknown."""
        return [False] * len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_layers={len(self.states)}, seen_tokens={self.seen_tokens})"

    def update(self, states: list[State | None], new_tokens: int) -> None:
        """Replace the states by those `new_tokens` tokens later."""
        self.states = states
        self.seen_tokens += new_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen; the same for every layer."""
        return self.seen_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i of the batch continue from what row beam_idx[i] was."""
        self.states = [None if state is None else select_rows(state, beam_idx) for state in self.states]

    def reset(self) -> None:
        """Forget everything."""
        self.states = [None] * len(self.states)
        self.seen_tokens = 0


def one_cache(past_key_values: RecurrentCache | None, cache: RecurrentCache | None) -> RecurrentCache | None:
    """The cache that a caller gave by either name. Raises ValueError for two, and for what is no `RecurrentCache`."""
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, RecurrentCache):
        raise ValueError(f"past_key_values must be a RecurrentCache, got {type(given).__name__}")
    return given
