"""Which implementation of a kernel family runs. The only file here that may look at the environment."""

from __future__ import annotations

from types import ModuleType

from lasp.kernels.decay import chunked

BACKENDS = ("auto", "torch")


def decay_stages(backend: str) -> ModuleType:
    """The staged functions of the decay family: a module with the six stages of `lasp.kernels.decay.chunked`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return chunked
