"""Token mixers as nn.Modules, one file each, thin over `lasp.functional`."""

from lasp.layers.lightning import Lightning
from lasp.layers.linear import LinearAttention
from lasp.layers.mixer import Mixer
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.retention import Retention
from lasp.layers.softmax import SoftmaxAttention
from lasp.layers.state import KeyValues, State

__all__ = [
    "MIXERS",
    "KeyValues",
    "Lightning",
    "LinearAttention",
    "Mixer",
    "RecurrentMixer",
    "Retention",
    "SoftmaxAttention",
    "State",
    "mixer_class",
]

MIXERS: dict[str, type[Mixer]] = {
    "linear": LinearAttention,
    "lightning": Lightning,
    "retention": Retention,
    "softmax": SoftmaxAttention,
}


def mixer_class(name: str) -> type[Mixer]:
    """The mixer called `name`.

    Raises:
        ValueError: there is none; the message lists the known names.
    """
    if name not in MIXERS:
        raise ValueError(f"unknown mixer {name!r}; known: {', '.join(sorted(MIXERS))}")
    return MIXERS[name]
