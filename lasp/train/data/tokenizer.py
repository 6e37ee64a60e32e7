"""From text to token ids and back: bytes, a `tokenizers` JSON file, or a tokenizer of transformers."""

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

_PIECE = 1 << 20  # letters of a text that are encoded at a time, at least
_TOGETHER = 8  # pieces that the library shares out over cores; what it makes of a piece is 150 times as large


class Tokenizer(Protocol):
    """What a corpus and a sampler need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the end of document included."""

    @property
    def end(self) -> int:
        """The id that ends a document."""

    @property
    def key(self) -> str:
        """A name that differs between tokenizers that give different ids."""

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]`, without its end. ValueError for what is no text."""

    def chat(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, and which of them the assistant says. ValueError for what is none."""

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; what is no text is replaced, ends of documents are left out."""

    def save(self, folder: Path) -> None:
        """Write what `AutoTokenizer.from_pretrained` reads, where these ids can be said so."""


class ByteTokenizer:
    """Every byte is a token, whatever the encoding of the text; id 256 ends a document."""

    vocab_size = 257
    end = 256
    key = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]` uint8."""
        return np.frombuffer(text, dtype=np.uint8)

    def chat(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        raise ValueError('conversations need a tokenizer with a chat template, data.tokenizer is "bytes"')

    def decode(self, ids: list[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become "�"."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        library = Library(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        _save(library, self.end, folder)


class FileTokenizer:
    """A tokenizer from a `tokenizers` JSON file; the id after its last one ends a document."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Library

        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise OSError("it is no file")
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
        self.end = _largest(ids, path) + 1
        self.vocab_size = self.end + 1
        self.key = f"pieces-{hashlib.sha256(content).hexdigest()}"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]`."""
        found, pieces = [np.zeros(0, np.uint32)], _pieces(text)
        while some := list(islice(pieces, _TOGETHER)):
            encoded = self._tokenizer.encode_batch_fast(some, add_special_tokens=False)
            found += [np.asarray(piece.ids, np.uint32) for piece in encoded]
        return np.concatenate(found)

    def chat(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        raise ValueError("conversations need a tokenizer with a chat template, data.tokenizer is a tokenizers file")

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return str(self._tokenizer.decode([i for i in ids if i != self.end]))

    def save(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Library

        _save(Library.from_str(self._tokenizer.to_str()), self.end, folder)


class ModelTokenizer:
    """A tokenizer of transformers, from a folder or the hub: it begins documents as it does, its own eos ends them."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # each class has its own ways to reject a folder
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"data.tokenizer: no tokenizer can be read from {name!r}: {told}") from error
        if self._tokenizer.eos_token_id is None:
            raise ValueError(f"data.tokenizer {name!r} has no end-of-sequence token to end documents with")
        self.end = int(self._tokenizer.eos_token_id)
        self.vocab_size = _largest([*self._tokenizer.get_vocab().values(), self.end], name) + 1
        self._start = [i for i in self._tokenizer("")["input_ids"] if i != self.end]
        said = [sorted(self._tokenizer.get_vocab().items()), self._start, self.end, self._tokenizer.chat_template]
        said.append(getattr(self._tokenizer, "backend_tokenizer", None) and self._tokenizer.backend_tokenizer.to_str())
        self.key = f"model-{hashlib.sha256(json.dumps(said).encode()).hexdigest()}"

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of one document, `[tokens]`; what the tokenizer puts before a text is among them."""
        options = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
        found = (self._tokenizer(piece, **options)["input_ids"] for piece in _pieces(text))
        return np.concatenate([np.asarray(ids, np.uint32) for ids in chain([self._start], found)])

    def chat(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids = self._apply(messages)
            spoken = np.zeros(len(ids), bool)
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    before = self._apply(messages[:turn], add_generation_prompt=True)
                    until = self._apply(messages[: turn + 1])
                    if ids[: len(until)] != until or until[: len(before)] != before:
                        raise ValueError(f"the chat template writes turn {turn} otherwise once others follow")
                    spoken[len(before) : len(until)] = True
        except Exception as error:  # a template is a program
            told = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"a conversation does not fit the chat template of the tokenizer: {told}") from error
        return np.asarray(ids, np.uint32), spoken

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        if not messages:
            return []
        return list(self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names. ValueError when it cannot be read."""
    if name == "bytes":
        return ByteTokenizer()
    return FileTokenizer(name) if name.endswith(".json") or Path(name).is_file() else ModelTokenizer(name)


def _largest(ids: Collection[int], name: str) -> int:
    """The largest id. ValueError where most of those below it are nobody's: a model has a row for each."""
    largest = max(ids)
    if largest > 10 * len(ids) + 100_000:
        raise ValueError(f"data.tokenizer {name!r} has {len(ids)} tokens, and ids up to {largest}")
    return largest


def _pieces(text: bytes) -> Iterator[str]:
    """A text in pieces of a million letters or two, so that one large file needs no more memory: they end with a line,
    in a longer line before a space, and without one anywhere."""
    try:
        whole = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte 0x{text[error.start]:02x} at {error.start}") from error
    start = 0
    while start < len(whole):
        least, end = start + _PIECE, start + 2 * _PIECE
        if end < len(whole):
            end = whole.find("\n", least, end) + 1 or max(whole.rfind(" ", least, end), 0) or end
        yield whole[start:end]
        start = end


def _save(library: Any, end: int, folder: Path) -> None:
    """Write a tokenizer whose next id ends a document; where ids have gaps, which no file can say, a warning."""
    from transformers import PreTrainedTokenizerFast

    names = (f"<|endoftext{number or ''}|>" for number in count())
    name = next(name for name in names if library.token_to_id(name) is None)  # GPT-2 has the first
    library.add_special_tokens([name])
    if (found := library.token_to_id(name)) == end:
        PreTrainedTokenizerFast(tokenizer_object=library, eos_token=name).save_pretrained(folder)
    else:
        warnings.warn(
            f"no tokenizer is written beside the model: its ids have gaps, documents end with {end}, and a file of "
            f"tokenizers would give that end {found}",
            stacklevel=2,
        )
