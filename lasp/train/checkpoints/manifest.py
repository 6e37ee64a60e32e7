"""Manifest: what a whole checkpoint consists of, down to the bit."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Self

from lasp.train.checkpoints.folders import checkpoint_step
from lasp.train.files import NO_FILE, regular, sealed, unsealed

FILE = "manifest.json"
VERSION = 1
TOGETHER = 8
"""How many files are compared side by side, where there are as many cores: less than ten, for a digit names each."""
_LIMIT = 1 << 22  # bytes of JSON, which may take twenty times as many when it is read
_WORD = r"\w[\w.@+-]*"
_NAME = re.compile(rf"(?:{_WORD}/)?{_WORD}", re.ASCII)
_DIGEST = re.compile("[0-9a-f]{64}")


class Damaged(ValueError):
    """A file of a checkpoint is not what was written. Names the file."""


class Entry(NamedTuple):
    """Of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint."""

    path: Path
    """The folder of the checkpoint."""

    files: dict[str, Entry]
    """Of every file but the manifest, by its name in that folder."""

    sha256: str
    """Of the manifest: checkpoints with the same one are the same."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """That of the checkpoint in this folder, with every file there in its size. Damaged where one is not, or the
        manifest is of another step; ValueError for a checkpoint of another version of this package, and for files that
        cannot be read."""
        if not path.is_dir():
            kind = Damaged if os.path.lexists(path) else ValueError  # a file, or a link that leads nowhere
            raise kind(f"{str(path)!r} is not a checkpoint: there is no such folder")
        if os.path.exists(path / "training.pt") and not os.path.exists(path / FILE):
            raise ValueError(f"checkpoint {str(path)!r} was written by an earlier version of lasp, which can read it")
        content, sha256 = _parse(path, FILE)
        try:
            content = unsealed(content)
        except ValueError as error:
            raise Damaged(f"{str(path / FILE)!r} of the checkpoint is damaged: {error}") from error
        if content.get("version") != VERSION:
            raise ValueError(f"checkpoint {str(path)!r} has version {content.get('version')!r}; known is {VERSION}")
        step = content.get("step")
        if step != checkpoint_step(path):
            raise Damaged(f"{str(path / FILE)!r} is of step {step!r}, its folder of step {checkpoint_step(path)}")
        try:
            files = {name: _entry(name, entry) for name, entry in content["files"].items()}
        except Exception as error:  # what was written may be anything
            raise Damaged(f"{str(path / FILE)!r} is not the manifest of a checkpoint") from error
        for name, entry in files.items():
            with reading(path, name) as file:
                if (size := os.fstat(file.fileno()).st_size) != entry.size:
                    raise Damaged(f"{str(path / name)!r} of the checkpoint has {size} bytes; {entry.size} were written")
        return cls(path, files, sha256)

    def check(self, names: Iterable[str] | None = None) -> Self:
        """Compare these files, by default all, with their checksums. Damaged, naming the first that differs; ValueError
        for one that cannot be read."""
        with ThreadPoolExecutor(min(TOGETHER, os.cpu_count() or 1)) as pool:
            list(pool.map(self._check, sorted(self.files if names is None else names)))
        return self

    def _check(self, name: str) -> None:
        if name not in self.files:
            raise Damaged(f"{str(self.path / name)!r} is not among the files of the checkpoint's manifest")
        with reading(self.path, name) as file:
            found = Entry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
        if found != self.files[name]:
            raise Damaged(
                f"{str(self.path / name)!r} of the checkpoint is damaged: its SHA-256 is not what was written"
            )


def write_manifest(folder: Path, step: int, written: Mapping[str, Entry]) -> None:
    """Make a folder the checkpoint of a step: with this, it is complete, and on the disk.

    written: the files that ranks have already put there. OSError where one of them has not arrived.
    """
    for name, entry in written.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry.size:
            raise OSError(f"{name} was written by a rank, and is not there: do all ranks share {str(folder.parent)!r}?")
    paths = sorted(folder.rglob("*"))
    others = {str(path.relative_to(folder).as_posix()): path for path in paths if path.is_file()}
    files = {name: written.get(name) or flushed(path) for name, path in others.items()}
    content = {"version": VERSION, "step": step, "files": {name: entry._asdict() for name, entry in files.items()}}
    (folder / FILE).write_text(json.dumps(sealed(content), indent=1) + "\n", encoding="utf-8")
    flushed(folder / FILE)
    for path in (*(path for path in paths if path.is_dir()), folder):
        flush_folder(path)


def flushed(path: Path) -> Entry:
    """Size and checksum of a file, which is on the disk afterwards."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return Entry(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def flush_folder(path: Path) -> None:
    """See that the names in a folder are on the disk."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def reading(folder: Path, name: str) -> Iterator[BufferedReader]:
    """A file of a checkpoint, open for reading. Damaged unless it is one, in that very folder: no link leads out.
    ValueError, naming it, where it is one and cannot be read: it may be whole, and is not to be taken for damaged."""
    path = folder / name
    try:
        if path.parent != folder and path.parent.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, "a link leads there")
        with open(path, "rb", opener=lambda path, flags: regular(path, flags | os.O_NOFOLLOW)) as file:
            yield file
    except OSError as error:
        if error.errno in NO_FILE:
            raise Damaged(f"{str(path)!r} of the checkpoint is missing, or no file") from error
        raise ValueError(f"cannot read {str(path)!r} of the checkpoint: {error.strerror or error}") from error


def read_json(folder: Path, name: str, limit: int = _LIMIT) -> dict[str, Any]:
    """The object that a JSON file of a checkpoint holds, of so many bytes at most. Damaged, naming the file, where it
    holds none."""
    return _parse(folder, name, limit)[0]


def _parse(folder: Path, name: str, limit: int = _LIMIT) -> tuple[dict[str, Any], str]:
    """The same, and the checksum of the file."""
    path = folder / name
    with reading(folder, name) as file:
        text = file.read(limit + 1)
    try:
        if len(text) > limit:
            raise ValueError(f"it has more than {limit} bytes")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        told = (str(error) or type(error).__name__).splitlines()[0]
        raise Damaged(f"cannot read {str(path)!r} of the checkpoint: {told}") from error
    if not isinstance(content, dict):
        raise Damaged(f"{str(path)!r} of the checkpoint is not a JSON object")
    return content, hashlib.sha256(text).hexdigest()


def _entry(name: str, written: Mapping[str, Any]) -> Entry:
    entry = Entry(**written)
    if not _NAME.fullmatch(name) or not isinstance(entry.size, int) or not _DIGEST.fullmatch(entry.sha256):
        raise ValueError(name)
    return entry
