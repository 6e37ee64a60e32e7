"""A corpus: the documents of one source, tokenized once into shards."""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from lasp.train.data.documents import Part, find_parts, open_file, read_documents
from lasp.train.data.shards import FORMAT, Document, Shard, write_shard
from lasp.train.data.tokenizer import Tokenizer, load_tokenizer

_SHARD = 64 << 20  # bytes of files that go into a shard together
_ALONE = 16 << 20  # bytes that one process reads sooner than others are started


@dataclass(frozen=True)
class Corpus:
    """Documents one after another; positions count the tokens of all of them."""

    source: str
    """What they were read from."""

    shards: tuple[Shard, ...]
    """The files that hold them."""

    @property
    def checksum(self) -> str:
        """Of all tokens and bounds."""
        return hashlib.sha256("".join(shard.checksum for shard in self.shards).encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def documents(self) -> np.ndarray:
        """[documents, 2]: where each begins and ends."""
        bounds = [shard.bounds + start for shard, start in zip(self.shards, self._starts[:-1], strict=True)]
        return np.concatenate([np.stack([b[:-1], b[1:]], 1) for b in bounds])

    @cached_property
    def hashes(self) -> np.ndarray:
        """[documents]: 32 bits of each one's content."""
        return np.concatenate([shard.hashes for shard in self.shards])

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *(shard.tokens for shard in self.shards)])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a range within a document, int64, and which of them are targets, bool."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        first = int(self._starts[number])
        return self.shards[number].read(start - first, stop - first)

    def check(self) -> None:
        """Read all of it once. ValueError when it is not what was written."""
        for shard in self.shards:
            shard.check()


def build_corpus(
    source: str,
    field: str,
    tokenizer: Tokenizer,
    name: str,
    folder: Path,
    tell: Callable[[int, int], None] = lambda done, shards: None,
) -> Corpus:
    """Tokenize a source into `folder`, but for what was done before, and open it.

    A shard's file is named by a hash of its listing (paths, sizes, times of change), the field and the tokenizer, and
    has its name only when it is complete: several processes may build the same corpus, and one that was ended goes on.
    name: of the tokenizer, for processes that read other shards meanwhile. tell: called with the shards done, and all.
    ValueError when a document cannot be read, or the folder not be written.
    """
    shards = [(folder / f"{_key(parts, field, tokenizer)}.tokens", parts) for parts in _grouped(find_parts(source))]
    missing = [(path, parts) for path, parts in shards if not path.exists()]
    tell(len(shards) - len(missing), len(shards))
    try:
        for done, _ in enumerate(_build(missing, field, tokenizer, name), start=1 + len(shards) - len(missing)):
            tell(done, len(shards))
    except OSError as error:
        raise ValueError(f"cannot write the tokens of the corpus to {str(folder)!r}: {error.strerror}") from error
    corpus = Corpus(source, tuple(Shard.open(path) for path, _ in shards))
    if not corpus.tokens:
        raise ValueError(f"data.source {source!r} holds no text: its {len(corpus.shards)} shards are empty")
    return corpus


def _build(missing: Sequence[tuple[Path, list[Part]]], field: str, tokenizer: Tokenizer, name: str) -> Iterator[None]:
    """Write shards, in this process or, where there is much to do, in one for each core."""
    if len(missing) < 2 or sum(_size(part) for _, parts in missing for part in parts) < _ALONE:
        for path, parts in missing:
            write_shard(path, _tokenized(parts, field, tokenizer), tokenizer.vocab_size, {"tokenizer": tokenizer.key})
            yield
        return
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=_end_with_parent) as pool:
        for job in as_completed([pool.submit(_build_one, path, parts, field, name) for path, parts in missing]):
            job.result()
            yield


def _end_with_parent() -> None:
    """End this process when the one that started it ends, however that ends: it would wait for work for ever."""

    def follow() -> None:
        parent = parent_process()
        assert parent is not None, "a pool has started this process"
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _build_one(path: Path, parts: list[Part], field: str, name: str) -> None:
    for _ in _build([(path, parts)], field, load_tokenizer(name), name):
        pass


def _tokenized(parts: Iterable[Part], field: str, tokenizer: Tokenizer) -> Iterator[Document]:
    end = np.array([tokenizer.end])
    for part in parts:
        for place, text in read_documents(part, field):
            try:
                if isinstance(text, bytes):
                    ids, spoken, content = tokenizer.encode(text), None, text
                else:
                    ids, spoken = tokenizer.chat(text)
                    content = repr(text).encode()
            except ValueError as error:
                raise ValueError(f"{place} of the corpus: {error}") from error
            if spoken is None and not (len(ids) and ids[-1] == tokenizer.end):
                ids = np.concatenate([ids, end])
            yield Document(ids, zlib.crc32(content), spoken)


def _grouped(parts: list[Part]) -> list[list[Part]]:
    """Parts that follow each other, until they are large enough for a shard."""
    groups: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        if groups[-1] and size >= _SHARD:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += _size(part)
    return groups


def _size(part: Part) -> int:
    return (part.stop or _status(part.path).st_size) - part.start


def _status(path: Path) -> os.stat_result:
    with open_file(path):  # whether it can be read
        return path.stat()


def _key(parts: Iterable[Part], field: str, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(f"{FORMAT}\0{tokenizer.key}\0{field}".encode())
    for part in parts:
        status = _status(part.path)
        told = f"\0{part.path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{part.start}\0{part.stop}"
        digest.update(told.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
