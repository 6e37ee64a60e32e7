"""Many short documents on one device: those of one length are a batch, where chunked kernels take them one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lasp.parallel.call import Turn


class ShortDocuments(NamedTuple):
    """bounds: of all documents; groups: which of them go together, those of one length or all that are long."""

    bounds: tuple[int, ...]
    groups: list[list[int]]

    @classmethod
    def of(cls, bounds: tuple[int, ...], longest: int) -> ShortDocuments | None:
        """None where few documents of up to `longest` tokens have a length in common."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for document, (start, stop) in enumerate(pairwise(bounds)):
            by_length[min(stop - start, longest + 1)].append(document)
        long = by_length.pop(longest + 1, None)
        if sum(map(len, by_length.values())) < max(2, 2 * len(by_length)):
            return None
        return cls(bounds, [*by_length.values(), *([long] if long else [])])

    def run(
        self, operation: Callable[..., Any], tokens: Sequence[Tensor | None], initial_state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Output [1, T, ...] and final states [documents, ...] of an operation of one device.

        tokens: [1, T, ...] each, or [H] where it is the same for all tokens.
        """
        order = _order([t for group in self.groups for d in group for t in range(*self._span(d))], tokens)
        in_order = [x if x is None or x.dim() == 1 else x.index_select(1, order) for x in tokens]
        outputs, finals, start = [], [], 0
        for group in self.groups:
            lengths = [stop - start for start, stop in map(self._span, group)]
            part = slice(start, start := start + sum(lengths))
            options: dict[str, Any] = {"initial_state": None if initial_state is None else initial_state[group]}
            rows = (len(group), lengths[0])
            if len(set(lengths)) > 1:
                rows, options["cu_seqlens"] = (1, sum(lengths)), [0, *accumulate(lengths)]
            own = [x if x is None or x.dim() == 1 else x[:, part].reshape(*rows, *x.shape[2:]) for x in in_order]
            output, final = operation(*own, output_final_state=True, **options)
            outputs.append(output.flatten(0, 1))
            finals.append(final)
        documents = _order([d for group in self.groups for d in group], tokens)
        return torch.cat(outputs)[order.argsort()].unsqueeze(0), torch.cat(finals)[documents.argsort()]

    def _span(self, document: int) -> tuple[int, int]:
        return self.bounds[document], self.bounds[document + 1]


def short_documents(turn: Turn, packed: bool, steps: int, longest: int) -> ShortDocuments | None:
    """Those of a call of one device whose tokens are `steps` rows each; longest: in rows."""
    if not packed or turn.group is not None:
        return None
    bounds = turn().bounds
    assert bounds is not None, "packed"
    return ShortDocuments.of(tuple(steps * bound for bound in bounds), longest)


def _order(values: list[int], beside: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor(values, device=next(x for x in beside if x is not None).device)
