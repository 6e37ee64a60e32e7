"""FLOPs of a model's weights: what one token costs, whatever carries it out."""

from typing import Any

from torch import nn

from lasp.layers import Mixer

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_topk")


def weight_flops(model: Any) -> float:
    """Floating-point operations of one token with the weights of a model, forward and backward.

    A weight multiplies and adds once forward, once for the gradient of its input, and once for its own where it is
    trained: 6 operations, or 4. Looking up an embedding takes none, the head does, also where both are one tensor. Of
    the weights of experts, each token meets the share that the model's configuration says; of a mixer's, what it says.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    looked_up -= {id(getattr(head, "weight", None))}
    share, met = _chosen_share(model), dict[int, float]()
    for mixer in (module for module in model.modules() if isinstance(module, Mixer)):
        met |= {id(mixer.get_parameter(name)): own for name, own in mixer.weights_met().items()}
    total = 0.0
    for name, parameter in model.named_parameters():
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1 and id(parameter) not in looked_up:
            count = getattr(parameter, "ds_numel", parameter.numel())  # where a rank holds a share of it
            of_it = share if ".experts." in name else met.get(id(parameter), 1.0)
            total += count * (6 if parameter.requires_grad else 4) * of_it
    return total


def _chosen_share(model: Any) -> float:
    """The share of a layer's experts that a token meets."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    experts = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), None)
    chosen = next((getattr(config, name) for name in _CHOSEN if getattr(config, name, None)), None)
    return chosen / experts if isinstance(experts, int) and isinstance(chosen, int) else 1.0
