"""Token mixers as nn.Modules, one file each, thin over `lasp.functional`."""

from lasp.layers.based import Based
from lasp.layers.delta_product import DeltaProduct
from lasp.layers.deltanet import DeltaNet
from lasp.layers.gated_deltanet import GatedDeltaNet
from lasp.layers.gla import GatedLinearAttention
from lasp.layers.hedgehog import Hedgehog
from lasp.layers.hgrn2 import Hgrn2
from lasp.layers.inline import InLine
from lasp.layers.kda import KimiDeltaAttention
from lasp.layers.lightnet import LightNet
from lasp.layers.lightning import Lightning
from lasp.layers.linear import LinearAttention
from lasp.layers.mamba import Mamba
from lasp.layers.mamba2 import Mamba2
from lasp.layers.mixer import Mixer
from lasp.layers.mlstm import MLstm
from lasp.layers.mom import MixtureOfMemories
from lasp.layers.rebased import Rebased
from lasp.layers.recurrent import RecurrentMixer
from lasp.layers.retention import Retention
from lasp.layers.rwkv7 import Rwkv7
from lasp.layers.s4d import S4D
from lasp.layers.slstm import SLstm
from lasp.layers.softmax import SoftmaxAttention
from lasp.layers.state import ConvolvedMemory, KeyValues, ScaledMemory, State

__all__ = [
    "MIXERS",
    "S4D",
    "Based",
    "ConvolvedMemory",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "Hedgehog",
    "Hgrn2",
    "InLine",
    "KeyValues",
    "KimiDeltaAttention",
    "LightNet",
    "Lightning",
    "LinearAttention",
    "MLstm",
    "Mamba",
    "Mamba2",
    "Mixer",
    "MixtureOfMemories",
    "Rebased",
    "RecurrentMixer",
    "Retention",
    "Rwkv7",
    "SLstm",
    "ScaledMemory",
    "SoftmaxAttention",
    "State",
    "mixer_class",
]

MIXERS: dict[str, type[Mixer]] = {
    "linear": LinearAttention,
    "lightning": Lightning,
    "retention": Retention,
    "gla": GatedLinearAttention,
    "hgrn2": Hgrn2,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "based": Based,
    "rebased": Rebased,
    "hedgehog": Hedgehog,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "delta_product": DeltaProduct,
    "kda": KimiDeltaAttention,
    "rwkv7": Rwkv7,
    "mom": MixtureOfMemories,
    "inline": InLine,
    "lightnet": LightNet,
    "mlstm": MLstm,
    "s4d": S4D,
    "slstm": SLstm,
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
