"""A shard: the tokens of some documents in one file.

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
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO, NamedTuple, Self
from uuid import uuid4

import numpy as np

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


class Section(NamedTuple):
    """A part of a shard."""

    kind: str
    """Its dtype, as NumPy writes it."""

    start: int
    """Its first byte."""

    length: int
    """How many elements it has."""

    def read(self, file: BinaryIO, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some of its elements. ValueError where the file has fewer."""
        size, count = np.dtype(self.kind).itemsize, (self.length if stop is None else stop) - start
        file.seek(self.start + start * size)
        if len(content := file.read(count * size)) < count * size:
            raise ValueError("it ends early")
        return np.frombuffer(content, self.kind)


@dataclass(frozen=True)
class Shard:
    """A shard whose tokens stay where they are. Its file is open only while it is read: a corpus has many."""

    path: Path
    header: dict[str, Any]
    sections: dict[str, Section]
    bounds: np.ndarray
    hashes: np.ndarray

    @classmethod
    def open(cls, path: Path) -> Self:
        """ValueError, naming the file, when it is no shard, was changed or cut short, or cannot be read."""
        with _reading(path) as file:
            header, sections = _read_header(file.read(_HEADER), os.fstat(file.fileno()).st_size)
            return cls(path, header, sections, sections["bounds"].read(file), sections["hashes"].read(file))

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.sections["tokens"].length

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a range, int64, and which of them are targets, bool. ValueError, naming the file, when it
        cannot be read any more."""
        with _reading(self.path) as file:
            spoken = self.sections.get("spoken")
            ids = self.sections["tokens"].read(file, start, stop).astype(np.int64)
            return ids, np.ones(stop - start, bool) if spoken is None else spoken.read(file, start, stop)

    @property
    def checksum(self) -> str:
        """Of all that follows the header, as it was written."""
        return str(self.header["checksum"])

    def check(self) -> None:
        """Read it all once. ValueError when it is not what was written, or cannot be read."""
        with _reading(self.path) as file:
            if _checksum(file) != self.checksum:
                raise ValueError("its SHA-256 is not what was written")


def write_shard(path: Path, documents: Iterable[Document], vocab_size: int, about: dict[str, Any]) -> None:
    """Write a shard, which has its name only when it is complete. ValueError for ids beyond the vocabulary."""
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}")  # others may write the same, on any host
    bounds, hashes, any_spoken = [0], [], False
    try:
        with TemporaryFile(dir=path.parent) as tokens, TemporaryFile(dir=path.parent) as spoken:
            for document in documents:
                if len(document.ids) and not 0 <= int(document.ids.max()) < vocab_size:
                    raise ValueError(f"the tokenizer gave id {int(document.ids.max())} of {vocab_size}")
                tokens.write(document.ids.astype(dtype).tobytes())
                mask = np.ones(len(document.ids), bool) if document.spoken is None else document.spoken
                any_spoken |= document.spoken is not None
                spoken.write(mask.tobytes())
                bounds.append(bounds[-1] + len(document.ids))
                hashes.append(document.hash)
            parts: dict[str, tuple[str, IO[bytes]]] = {
                "bounds": ("<i8", BytesIO(np.asarray(bounds, "<i8").tobytes())),
                "hashes": ("<u4", BytesIO(np.asarray(hashes, "<u4").tobytes())),
                "tokens": (dtype.newbyteorder("<").str, tokens),
            }
            _assemble(partial, parts | ({"spoken": ("|b1", spoken)} if any_spoken else {}), about)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _assemble(path: Path, parts: Mapping[str, tuple[str, IO[bytes]]], about: dict[str, Any]) -> None:
    """Write sections, each of a dtype and from a file, and then the header."""
    sections = {}
    with path.open("w+b") as file:
        file.seek(_HEADER)
        for name, (kind, part) in parts.items():
            start, size = file.tell(), part.seek(0, os.SEEK_END)
            sections[name] = Section(kind, start, size // np.dtype(kind).itemsize)
            part.seek(0)
            shutil.copyfileobj(part, file, _BLOCK)
            file.write(bytes(-size % 64))
        header = {"format": FORMAT, **about, "size": file.tell(), "sections": sections, "checksum": _checksum(file)}
        file.seek(0)
        file.write(json.dumps(sealed(header)).encode().ljust(_HEADER - 1) + b"\n")


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """A shard, open for reading: ValueErrors of the block, and errors of the disk, name it."""
    try:
        with open(path, "rb", opener=regular) as file:
            yield file
    except FileNotFoundError as error:
        raise ValueError(f"{str(path)!r} of the tokens is gone: start again, and it is built anew") from error
    except OSError as error:
        if error.errno not in NO_FILE:
            raise ValueError(f"cannot read {str(path)!r} of the tokens: {error.strerror or error}") from error
        raise ValueError(f"{str(path)!r} is no file of tokens: remove it, and it is built anew") from error
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} of the tokens is damaged ({error}): remove it, and it is built anew"
        ) from error


def _read_header(text: bytes, size: int) -> tuple[dict[str, Any], dict[str, Section]]:
    """The header of a file of so many bytes, and its sections. ValueError for one that was not written so."""
    try:
        header = unsealed(json.loads(text))
        sections = {name: Section(*section) for name, section in header["sections"].items()}
        tokens, documents = sections["tokens"].length, sections["hashes"].length
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
    known = "bounds" in sections and min(tokens, documents) >= 0
    if header.get("format") != FORMAT or header.get("size") != size or not known or not all(fits):
        raise ValueError(f"its header says other things than its {size} bytes")
    return header, sections


def _checksum(file: BinaryIO) -> str:
    """Of all that follows the header."""
    digest = hashlib.sha256()
    file.seek(_HEADER)
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
