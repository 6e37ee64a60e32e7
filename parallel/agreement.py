"""Agreement: what every rank says about its call before any data moves.

Under gloo, ranks that call a collective with different shapes or dtypes get garbage in 6 of 14 cases and an abort in
others. So each call begins with one all-gather of a fixed-size header; whoever disagrees, or has found an error in its
own arguments, makes every rank raise the same ValueError.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from lasp.parallel import collectives

HEADER_BYTES = 1024
_ERROR_BYTES = 400


class Disagreement(ValueError):
    """What every rank raises where the ranks' values of one field differ."""

    def __init__(self, field: str, values: list[Any]) -> None:
        told = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        super().__init__(f"ranks disagree on {field}: {told}")
        self.field = field


class Agreement:
    """A header exchange in flight: started at construction, settled by `wait()`."""

    def __init__(self, group: dist.ProcessGroup, fields: dict[str, Any], error: str | None, tokens: int = 0) -> None:
        """fields must be equal on all ranks; tokens, this rank's number of them, may differ."""
        packed = _pack({"tokens": tokens, "error": error, "fields": fields if error is None else {}})
        sent = torch.zeros(HEADER_BYTES, dtype=torch.uint8)
        sent[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self._pending = collectives.all_gather(sent, group, "control")

    def wait(self) -> list[int]:
        """Every rank's number of tokens. Raises the same ValueError on every rank where they do not agree."""
        rows = self._pending.wait()
        headers = [json.loads(bytes(row.tolist()).rstrip(b"\0")) for row in rows]
        errors = {rank: header["error"] for rank, header in enumerate(headers) if header["error"]}
        if errors:
            raise ValueError(_tell_errors(errors, len(headers)))
        _compare([header["fields"] for header in headers])
        return [header["tokens"] for header in headers]


def _pack(header: dict[str, Any]) -> bytes:
    """The header as JSON. What does not fit, or is no plain value, is an error of this rank, told like any other."""
    try:
        packed = json.dumps(header, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as problem:
        return _pack({**header, "error": f"an argument that cannot be compared: {problem}", "fields": {}})
    if len(packed) <= HEADER_BYTES:
        return packed
    error = header["error"] or f"the header of this call takes {len(packed)} bytes, at most {HEADER_BYTES} fit"
    printable = "".join(c if c.isprintable() else " " for c in error)
    shortened = printable.encode()[:_ERROR_BYTES].decode(errors="ignore")
    return json.dumps({"tokens": header["tokens"], "error": shortened, "fields": {}}, ensure_ascii=False).encode()


def _tell_errors(errors: dict[int, str], size: int) -> str:
    """One line per distinct error, with the ranks that made it when not all did."""
    lines = []
    for error in dict.fromkeys(errors.values()):
        ranks = [rank for rank, said in errors.items() if said == error]
        lines.append(error if len(ranks) == size else f"{error} (rank {', '.join(map(str, ranks))} of {size})")
    return "\n".join(lines)


def _compare(fields: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(name for own in fields for name in own):
        values = [own.get(name) for own in fields]
        if any(value != values[0] for value in values):
            raise Disagreement(name, values)
