"""Which models are refused: all that were not run and compared, parameter by parameter, with one device."""

from __future__ import annotations

from typing import Any

# Softmax attention only, of which tests/distributed/test_wrap_attention.py compares every gradient.
VERIFIED = ("llama", "mistral", "qwen2", "qwen3")


def check_model(model: Any) -> None:
    """Raises ValueError where the model, or an option of it, is not known to be exact."""
    config = model.config
    if config.model_type not in VERIFIED:
        mixers = sorted({f"{n} ({type(m).__name__})" for n, m in model.named_modules() if "layers.0." in n + "."})
        raise ValueError(
            f"model type {config.model_type!r} is not verified, only {', '.join(VERIFIED)}; a module of it may mix "
            f"tokens unseen: {'; '.join(mixers)}. It needs an adapter, or a line in lasp/wrap/refusal.py and its test."
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(f"rope_type {rope!r} depends on the length that one rank sees; use another")
    if getattr(model, "use_kernels", False):
        raise ValueError("use_kernels=True replaces whole modules; load the model without it")
