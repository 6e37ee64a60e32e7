"""From text to token ids and back: bytes, or a Hugging Face `tokenizers` file."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a corpus and a sampler need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end of document included; it is the last."""

    @property
    def key(self) -> str:
        """A name that differs between tokenizers that give different ids."""

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]`, without its end."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; what is no text is replaced, ends of documents are left out."""


class ByteTokenizer:
    """Every byte is a token; id 256 ends a document."""

    vocab_size = 257
    key = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]` uint8."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become "�"."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer from a `tokenizers` JSON file; the id after its last one ends a document."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Library

        try:
            content = Path(path).read_bytes()
            self._tokenizer = Library.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(
                f'data.tokenizer {path!r} is neither "bytes" nor a readable tokenizers file: {error}'
            ) from error
        # Files of embedding models say how far a text is cut or filled up; a corpus is neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"data.tokenizer {path!r} has no tokens")
        self._end = max(ids) + 1  # ids may have gaps
        self.vocab_size = self._end + 1
        self.key = f"whole-{hashlib.sha256(content).hexdigest()}"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]`; bytes that are not UTF-8 are read as "�"."""
        encoding = self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.uint32)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return str(self._tokenizer.decode([i for i in ids if i != self._end]))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. ValueError when it cannot be read."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)
