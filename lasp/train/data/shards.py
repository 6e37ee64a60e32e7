"""A shard: the tokens of some documents in one file, mapped into memory when it is read.

header      one line of JSON, filled up with spaces to 4096 bytes: sizes, dtype, the tokenizer, a checksum of the rest
            and one of itself
bounds      [documents + 1] int64, where documents begin and end
hashes      [documents] uint32, of their contents: who is held out is decided by them
tokens      [tokens] uint16 or uint32, every document's last one its end
spoken      [tokens] bool, of conversations: which tokens are targets
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from lasp.kernels.chunks import ceil_div
from lasp.train.files import NO_FILE, regular, sealed, unsealed

FORMAT = "lasp tokens 2"
_HEADER = 4096
_BLOCK = 1 << 24
_KINDS = {"bounds": ("<i8",), "hashes": ("<u4",), "tokens": ("<u2", "<u4"), "spoken": ("|b1",)}


class Document(NamedTuple):
    """A document as it is written down."""

    ids: np.ndarray
    """[tokens], its end included."""

    hash: int
    """32 bits of its content."""

    spoken: np.ndarray | None
    """[tokens] bool, which are targets; None for all."""


@dataclass(frozen=True)
class Shard:
    """An open shard; only what is indexed is read."""

    path: Path
    header: dict[str, Any]
    bounds: np.ndarray
    hashes: np.ndarray
    tokens: np.ndarray
    spoken: np.ndarray | None

    @classmethod
    def open(cls, path: Path) -> Self:
        """ValueError, naming the file, when it is no shard, was changed or cut short, or cannot be read."""
        try:
            with open(path, "rb", opener=regular) as file:
                text, size = file.read(_HEADER), os.fstat(file.fileno()).st_size
                header, sections = _read_header(text, size)
                arrays = {name: _mapped(file, *section) for name, section in sections.items()}
        except OSError as error:
            if error.errno not in NO_FILE:
                raise ValueError(f"cannot read {str(path)!r} of the tokens: {error.strerror}") from error
            raise ValueError(f"{str(path)!r} is no file of tokens: remove it, and it is built anew") from error
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} of the tokens was cut short or changed ({error}): remove it, and it is built anew"
            ) from error
        return cls(path, header, arrays["bounds"], arrays["hashes"], arrays["tokens"], arrays.get("spoken"))

    @property
    def checksum(self) -> str:
        """Of all that follows the header, as it was written."""
        return str(self.header["checksum"])

    def check(self) -> None:
        """Read it all once. ValueError when it is not what was written, or cannot be read."""
        try:
            found = _checksum(self.path)
        except OSError as error:
            raise ValueError(f"cannot read {str(self.path)!r} of the tokens: {error.strerror}") from error
        if found != self.checksum:
            raise ValueError(f"{str(self.path)!r} of the tokens is damaged: remove it, and it is built anew")


def write_shard(path: Path, documents: Iterable[Document], vocab_size: int, about: dict[str, Any]) -> None:
    """Write a shard, which has its name only when it is complete. ValueError for ids beyond the vocabulary."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    parts = {name: partial.with_name(f"{partial.name}.{name}") for name in ("tokens", "spoken")}
    bounds, hashes, any_spoken = [0], [], False
    try:
        with parts["tokens"].open("wb") as tokens, parts["spoken"].open("wb") as spoken:
            for document in documents:
                if len(document.ids) and not 0 <= int(document.ids.max()) < vocab_size:
                    raise ValueError(f"the tokenizer gave id {int(document.ids.max())} of {vocab_size}")
                tokens.write(document.ids.astype(dtype).tobytes())
                mask = np.ones(len(document.ids), bool) if document.spoken is None else document.spoken
                any_spoken |= document.spoken is not None
                spoken.write(mask.tobytes())
                bounds.append(bounds[-1] + len(document.ids))
                hashes.append(document.hash)
        sections, offset = {}, _HEADER
        kinds = {"bounds": "<i8", "hashes": "<u4", "tokens": dtype.newbyteorder("<").str}
        counts = {"bounds": len(bounds), "hashes": len(hashes), "tokens": bounds[-1], "spoken": bounds[-1]}
        for name, kind in (kinds | ({"spoken": "|b1"} if any_spoken else {})).items():
            sections[name] = (kind, offset, counts[name])
            offset += ceil_div(counts[name] * np.dtype(kind).itemsize, 64) * 64
        with partial.open("wb") as file:
            file.truncate(offset)
            for name, (kind, start, _) in sections.items():
                file.seek(start)
                if name in parts:
                    with parts[name].open("rb") as part:
                        while block := part.read(_BLOCK):
                            file.write(block)
                else:
                    file.write(np.asarray({"bounds": bounds, "hashes": hashes}[name], kind).tobytes())
        header = {"format": FORMAT, **about, "size": offset, "sections": sections, "checksum": _checksum(partial)}
        with partial.open("r+b") as file:
            file.write(json.dumps(sealed(header)).encode().ljust(_HEADER - 1) + b"\n")
        partial.replace(path)
    finally:
        for left in (partial, *parts.values()):
            left.unlink(missing_ok=True)


def _read_header(text: bytes, size: int) -> tuple[dict[str, Any], dict[str, tuple[str, int, int]]]:
    """The header of a file of so many bytes, and its sections: dtype, offset, count. ValueError for one that was not
    written so."""
    try:
        header = unsealed(json.loads(text))
        sections = {name: tuple(section) for name, section in header["sections"].items()}
        tokens, documents = sections["tokens"][2], sections["hashes"][2]
        counts = {"bounds": documents + 1, "hashes": documents, "tokens": tokens, "spoken": tokens}
        fits = [
            kind in _KINDS[name]
            and count == counts[name]
            and isinstance(at * count, int)
            and _HEADER <= at <= size - count * np.dtype(kind).itemsize
            for name, (kind, at, count) in sections.items()
        ]
    except Exception as error:  # what was written may be anything
        raise ValueError("its header is not what was written") from error
    known = {"bounds", "hashes", "tokens"} <= sections.keys() and min(tokens, documents) >= 0
    if header.get("format") != FORMAT or header.get("size") != size or not known or not all(fits):
        raise ValueError(f"its header says other things than its {size} bytes")
    return header, sections


def _mapped(file: BinaryIO, kind: str, start: int, count: int) -> np.ndarray:
    return np.memmap(file, kind, "r", start, (count,)) if count else np.zeros(0, kind)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(_HEADER)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
