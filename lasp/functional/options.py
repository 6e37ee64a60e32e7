"""The keywords that operations share, for type checkers: what an operation returns depends on `output_final_state`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from lasp.kernels.backend import Backend
from lasp.parallel.cut import Cut
from lasp.parallel.group import SequenceGroup
from lasp.parallel.scan import Scan, ScanName


class SequenceOptions(TypedDict, total=False):
    """Of every operation whose state passes on from token to token."""

    initial_state: Tensor | None
    cu_seqlens: Tensor | Sequence[int] | None
    group: SequenceGroup | None
    cut: Cut | None


class RecurrenceOptions(SequenceOptions, total=False):
    """Of linear recurrences."""

    scale: float | None
    scan: ScanName | Scan
    backend: Backend
    chunk_size: int | None
