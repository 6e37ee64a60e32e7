"""A corpus: text files turned, once, into a memory-mapped file of token ids."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lasp.train.config import DataConfig
from lasp.train.tokenizer import Tokenizer

# Below the standard library lie third-party code and tests too, which differ between machines, and tables of character
# sets, which are no text.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "encodings"}


def find_documents(source: str) -> list[Path]:
    """The files that `data.source` names, sorted by path.

    A folder gives all its text files, at any depth, but for hidden ones and those with a NUL byte near their start.
    ValueError when nothing is found.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts)]
    elif glob.has_magic(source) and not os.path.exists(source):
        paths = [Path(path) for path in glob.glob(source, recursive=True) if os.path.isfile(path)]
    elif os.path.isdir(source):
        paths = [path for path in Path(source).rglob("*") if path.is_file() and _is_text(path, Path(source))]
    else:
        paths = [Path(source)]
    if not paths:
        raise ValueError(f"data.source {source!r} holds no text file")
    return sorted(paths)


def prepare_corpus(data: DataConfig, folder: Path, tokenizer: Tokenizer) -> Path:
    """Tokenize `data.source` into `folder`, unless that was done before; return the path of the token file.

    The file's name is a hash of the listing (paths, sizes, times of change) and of the tokenizer, its suffix the dtype
    of the ids. It appears under that name only when it is complete, so several processes may prepare the same corpus.
    ValueError when a document cannot be read or the folder not be written, or when all documents hold less than one
    sequence and its last target.
    """
    documents = find_documents(data.source)
    path = folder / f"{_key(documents, tokenizer)}.{_dtype(tokenizer.vocab_size)}"
    if not path.exists():
        try:
            _write_whole(path, documents, tokenizer)
        except OSError as error:
            raise ValueError(f"cannot write the tokens of the corpus to {str(folder)!r}: {error.strerror}") from error
    count = path.stat().st_size // np.dtype(path.suffix[1:]).itemsize
    if count <= data.seq_len:
        raise ValueError(
            f"data.source {data.source!r} is too short: {len(documents)} documents give {count} tokens, "
            f"one sequence of data.seq_len={data.seq_len} and its last target need {data.seq_len + 1}"
        )
    return path


def open_corpus(path: Path) -> np.ndarray:
    """The tokens of a prepared corpus, `[tokens]`, mapped: only what is indexed is read."""
    return np.memmap(path, dtype=path.suffix[1:], mode="r")


def _is_text(path: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    with _open_document(path) as file:
        return b"\0" not in file.read(8192)


def _open_document(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} of the corpus: {error.strerror}") from error


def _key(documents: Iterable[Path], tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.key.encode())
    for path in documents:
        with _open_document(path) as file:
            status = os.fstat(file.fileno())
        digest.update(f"\0{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _dtype(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _write_whole(path: Path, documents: Iterable[Path], tokenizer: Tokenizer) -> None:
    """Write a token file that has its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            _write_tokens(file, documents, tokenizer)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_tokens(file: BinaryIO, documents: Iterable[Path], tokenizer: Tokenizer) -> None:
    dtype = _dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.vocab_size - 1], dtype=dtype)
    for path in documents:
        with _open_document(path) as document:
            text = document.read()
        if text:
            file.write(tokenizer.encode(text).astype(dtype).tobytes())
            file.write(end.tobytes())
