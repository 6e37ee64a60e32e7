"""One rank of a group whose others are not there: what it computes and exchanges, with tensors that have no values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from lasp.parallel.agreement import Call, Channel
from lasp.parallel.group import SequenceGroup
from lasp.parallel.layout import Layout
from lasp.parallel.wires import Wires


class Echo(Channel):
    """Every other rank says what this one does."""

    def agree(self, call: Call, fields: dict[str, Any], error: str | None = None, tokens: int = 0) -> Any:
        if error is not None:
            raise ValueError(error)
        return SimpleNamespace(call=call, wait=lambda: [tokens] * len(self.ranks))


@contextmanager
def alone(size: int, rank: int, layout: Layout, wires: Wires, node_size: int | None) -> Iterator[SequenceGroup]:
    """The group, of torch's process group that does nothing: collectives.py, its ledger and all above are real.

    No process group may exist.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        ranks = dist.group.WORLD
        assert ranks is not None, "just made"
        yield SequenceGroup(
            ranks, ranks, rank, size, layout, False, Echo(ranks), wires=wires, node_size=node_size
        )  # fmt: skip
    finally:
        dist.destroy_process_group()
