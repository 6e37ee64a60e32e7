"""Documents: which files a source names, and the texts and conversations in them."""

import glob
import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lasp.train.files import NO_FILE

# Below the standard library lie third-party code and tests too, which differ between machines, and tables of character
# sets, which are no text.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "encodings"}
_LINES = (".jsonl", ".ndjson", ".json")
_TABLES = (".parquet", ".arrow")
_PART = 64 << 20  # bytes of a file of JSON lines that are read as one part
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"


class Part(NamedTuple):
    """A file, or the lines of one that begin in a range of its bytes."""

    path: Path
    start: int = 0
    stop: int | None = None


Text = bytes | list[dict[str, Any]]
"""A text, or a conversation: messages with "role" and "content"."""


def find_parts(source: str) -> list[Part]:
    """The files that a source names, sorted by path; large files of JSON lines in several parts.

    A folder gives all its text files, at any depth, but for hidden ones and those with a NUL byte near their start; one
    that `datasets` has saved gives its tables. ValueError when nothing is found, or it cannot be looked for.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts)]
    elif glob.has_magic(source) and not os.path.exists(source):
        _check_folders(source)
        paths = [path for path in map(Path, glob.glob(source, recursive=True)) if _is_file(path)]
    elif os.path.isfile(os.path.join(source, "state.json")) and glob.glob(os.path.join(source, "*.arrow")):
        paths = list(Path(source).glob("*.arrow"))
    elif os.path.isdir(source):
        paths = [path for path in _below(Path(source)) if _is_file(path) and _is_text(path)]
    elif os.path.exists(source) and not os.path.isfile(source):
        raise ValueError(f"data.source {source!r} is neither a file nor a folder")
    else:
        paths = [Path(source)]
    if not paths:
        raise ValueError(f"data.source {source!r} holds no text file")
    return [part for path in sorted(paths) for part in _parts(path)]


def read_documents(part: Part, field: str) -> Iterator[tuple[str, Text]]:
    """The documents of a part that are not empty nor null, each with where it stands.

    Files of JSON lines and tables give a document per row, the value of `field`; a gzipped file what is in it; any
    other file is one text, a mark of its byte order left out. ValueError for what cannot be read: files with NUL bytes,
    rows that are no JSON object or lack the field.
    """
    suffix = _suffix(part.path)
    if suffix in _TABLES:
        rows = _read_table(part.path, suffix, field)
    elif suffix in _LINES:
        rows = _read_lines(part, field)
    else:
        rows = iter([(str(part.path), _read_text(part.path))])
    for place, value in rows:
        if value:
            yield place, value


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file, its gzip undone, open for reading. ValueError, naming it, when it cannot be read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:  # the last two of gzip
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> ValueError:
    told = (isinstance(error, OSError) and error.strerror) or error
    return ValueError(f"cannot read {str(path)!r} of the corpus: {told}")


def _is_file(path: Path) -> bool:
    """ValueError where that cannot be known: no file is passed over without a word."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in NO_FILE:
            return False
        raise _unreadable(path, error) from error


def _below(root: Path) -> Iterator[Path]:
    """All that is in a folder and those below it, but for what is hidden. ValueError for one that cannot be read."""

    def fail(error: OSError) -> None:
        raise _unreadable(error.filename, error) from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in files if not name.startswith("."))


def _check_folders(pattern: str) -> None:
    """ValueError for a folder in which a pattern looks for names and that cannot be read: glob passes over those."""
    while glob.has_magic(pattern):
        place, name = os.path.split(pattern)
        deeper = glob.iglob(pattern, recursive=True) if name == "**" else ()  # which looks in all that it finds
        for folder in (*glob.glob(place or ".", recursive=True), *deeper):
            try:
                os.scandir(folder).close() if glob.has_magic(name) else os.stat(os.path.join(folder, name))
            except OSError as error:
                if error.errno not in NO_FILE:
                    raise _unreadable(error.filename, error) from error
        pattern = place


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _is_text(path: Path) -> bool:
    """Whether a file is one of text, or a table. What is called .gz and is none is neither."""
    if _suffix(path) in _TABLES:
        return True
    with open_file(path) as file:
        if isinstance(file, gzip.GzipFile) and file.fileobj.peek(2)[:2] != _GZIP:
            return False
        return b"\0" not in file.read(8192)


def _parts(path: Path) -> list[Part]:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
        if size > _PART:
            return [Part(path, start, min(size, start + _PART)) for start in range(0, size, _PART)]
    return [Part(path)]


def _read_text(path: Path) -> bytes:
    with open_file(path) as file:
        text = file.read()
    if (at := text.find(b"\0")) >= 0:
        raise ValueError(f"{str(path)!r} of the corpus is no text: it has a NUL byte at {at}")
    return text.removeprefix(_BOM)


def _read_lines(part: Part, field: str) -> Iterator[tuple[str, Text]]:
    with open_file(part.path) as file:
        first = file.read(4).removeprefix(_BOM).lstrip()[:1] if part.start == 0 else b""
        file.seek(0)
        if first == b"[" and _suffix(part.path) == ".json":
            for index, row in enumerate(_load(file.read(), str(part.path))):
                yield _value(row, field, f"{str(part.path)!r}, row {index + 1},")
            return
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while part.stop is None or file.tell() < part.stop:
            at, line = file.tell(), file.readline()
            if not line:
                return
            if line.strip():
                place = f"{str(part.path)!r}, the line at byte {at},"
                yield _value(_load(line, place), field, place)


def _load(content: bytes, place: str) -> Any:
    try:
        return json.loads(content.removeprefix(_BOM))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} of the corpus is no JSON: {error}") from error


def _value(row: Any, field: str, place: str) -> tuple[str, Text]:
    if not isinstance(row, dict):
        raise ValueError(f"{place} of the corpus is no JSON object")
    value = row.get(field)
    if value is None and field in row:
        return place, b""
    if isinstance(value, str):
        return place, value.encode(errors="replace")
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        return place, value
    if field not in row:
        raise ValueError(f"{place} of the corpus has no {field!r} (data.field), but {', '.join(map(repr, row))}")
    raise ValueError(f"{place} of the corpus: {field!r} is neither a text nor messages with role and content")


def _read_table(path: Path, suffix: str, field: str) -> Iterator[tuple[str, Text]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(f'{str(path)!r} of the corpus is a table: pip install "lasp2[data]"') from error
    try:
        if suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        else:
            batches = iter(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))))
        rows = (row for batch in batches for row in batch.to_pylist())
        for index, row in enumerate(rows):
            yield _value(row, field, f"{str(path)!r}, row {index + 1},")
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {str(path)!r} of the corpus: {str(error).splitlines()[0]}") from error
