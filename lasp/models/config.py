"""What a model made of mixers can be told; the configuration of Linear-Llama3, and the sizes it is known in."""

import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from lasp.kernels.arguments import check_choice
from lasp.layers import MIXERS, mixer_class
from lasp.parallel.methods import METHODS
from lasp.parallel.scan import check_scan

# Shapes of "160m" and "410m" after Pythia (arXiv 2304.01373), of "1b" after LASP-2 (arXiv 2502.07563) with the
# vocabulary of Llama 3, of "3b" and "8b" after Llama 3.2 and Llama 3 (arXiv 2407.21783, table 3); "tiny" is for tests
# and demonstrations, with a byte per token.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    },
    "160m": {
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "410m": {
        "vocab_size": 50304,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


class MixerConfig(PreTrainedConfig):
    """What all models of this package are told: sizes, and which mixer each layer has.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers: as in Llama.
        num_attention_heads: heads of every mixer.
        num_key_value_heads: heads of keys, values and states (default: num_attention_heads).
        head_dim: width of a head (default: hidden_size / num_attention_heads).
        mixer: the linear mixer, a name in `lasp.layers.MIXERS`.
        pattern: which mixer each layer has, repeated until num_hidden_layers: a string of L (the linear mixer) and N
            (softmax attention) such as "LLLN", or a list of mixer names.
        scan: how ranks share the states of linear mixers, as in `lasp.linear_attention`.
        attention: how they share the keys and values of softmax attention: the method of `lasp.softmax_attention`.
        mixer_options: further keywords of a mixer by its name, such as `{"softmax": {"window": 4096}}`.
        tie_word_embeddings: whether the head is the transposed embedding.
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: epsilon of all norms.
        **kwargs: as for `transformers.PreTrainedConfig`.

    Raises:
        ValueError: a size below 1, an unknown mixer or option, a pattern that does not fit, a mixer that knows only
            the past where tokens see what comes after them.
    """

    causal: ClassVar[bool] = True  # of the family: False lets tokens see what comes after them

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mixer: str = "lightning"
    pattern: str | list[str] = "L"
    scan: str = "auto"
    attention: str = "auto"
    mixer_options: dict[str, dict[str, Any]] | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self._check_values()
        for name in self.layer_mixers:
            if mixer_class(name).causal_only and not self.causal:
                fit = sorted(other for other, mixer in MIXERS.items() if not mixer.causal_only)
                raise ValueError(f"{name!r} knows only the past, an encoder needs one of: {', '.join(fit)}")
        for name, options in (self.mixer_options or {}).items():
            known = mixer_class(name).option_names()
            if unknown := set(options) - known:
                raise ValueError(f"unknown options {sorted(unknown)} of mixer {name!r}; known: {sorted(known)}")

    def _check_values(self) -> None:
        """ValueError for values that no model can have; how they fit together is for the mixers to check."""
        optional = ("num_key_value_heads", "head_dim")
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            *optional,
        )
        for name in sizes:
            size = getattr(self, name)
            if not (type(size) is int and size >= 1) and not (size is None and name in optional):
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        for name in ("initializer_range", "rms_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        check_scan(self.scan)
        check_choice("attention", self.attention, METHODS)
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(f"tie_word_embeddings must be true or false, got {self.tie_word_embeddings!r}")
        if not isinstance(self.pattern, str | list | tuple):
            raise ValueError(f"pattern must be a string of L and N or a list of mixers, got {self.pattern!r}")
        options = self.mixer_options
        if options is not None and not (
            isinstance(options, dict) and all(isinstance(o, dict) for o in options.values())
        ):
            raise ValueError(f"mixer_options must be keywords of mixers by their names, got {options!r}")

    # Not called layer_types: transformers checks a field of that name against its own list of attention kinds.
    @property
    def layer_mixers(self) -> list[str]:
        """The name of each layer's mixer, first layer first."""
        names = [self._mixer_of(symbol) for symbol in self.pattern] if isinstance(self.pattern, str) else self.pattern
        if not names or self.num_hidden_layers % len(names):
            raise ValueError(
                f"the length of pattern must divide num_hidden_layers, got {self.pattern!r} (length {len(names)})"
                f" for {self.num_hidden_layers} layers"
            )
        return list(names) * (self.num_hidden_layers // len(names))

    def options_of(self, name: str) -> dict[str, Any]:
        """The further keywords of the mixer called `name`."""
        return (self.mixer_options or {}).get(name, {})

    def _mixer_of(self, symbol: str) -> str:
        if symbol not in "LN":
            raise ValueError(f"pattern consists of L (linear) and N (softmax), got {symbol!r} in {self.pattern!r}")
        return self.mixer if symbol == "L" else "softmax"


class LinearLlamaConfig(MixerConfig):
    """Configuration of a Linear-Llama3: Llama 3 with linear mixers in the place of attention (LASP-2, section 4).

    Args:
        use_cache: whether a forward in evaluation mode returns the states.
        **kwargs: as for `MixerConfig`.

    Raises:
        ValueError: what `MixerConfig` raises.
    """

    model_type = "linear_llama"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]

    use_cache: bool = True

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "LinearLlamaConfig":
        """The configuration called `name` ("tiny", "160m", "410m", "1b", "3b" or "8b"), with some fields replaced.

        Raises:
            ValueError: an unknown name or field; and what the constructor raises.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        if unknown := set(overrides) - set(cls.__dataclass_fields__):
            raise ValueError(f"unknown fields {sorted(unknown)} of {cls.__name__}")
        return cls(**{**PRESETS[name], **overrides})
