"""Triton on a CPU: its interpreter, with what it gets wrong about bf16 and tf32 put right.

Of bf16 it cuts digits off where every GPU rounds to the nearest, and multiplies the bits as integers; of tf32 it
multiplies all digits of fp32, where a GPU may drop the last 13. `conftest.py` chooses the interpreter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(data, source, target, rounding)
    bits = np.frombuffer(data.astype(np.float32).tobytes(), dtype=np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16).reshape(data.shape)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *options: Any) -> Any:
    a, b = _widened(a), _widened(b)
    if str(precision).endswith("TF32") and a.dtype.scalar == tl.float32:
        a, b = _shortened(a), _shortened(b)
    return _dot(self, a, b, d, precision, *options)


def _shortened(x: Any) -> Any:
    """To tf32's digits."""
    bits = np.ascontiguousarray(x.data).view(np.uint32) & np.uint32(0xFFFFE000)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _widened(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    data = (x.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
