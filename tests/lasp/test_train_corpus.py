"""The corpus on disk: what is read of files, and what is refused."""

import errno
import gzip
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lasp.train.data import corpus as corpora
from lasp.train.data import shards
from lasp.train.data.corpus import Corpus, build_corpus
from lasp.train.data.documents import find_parts
from lasp.train.data.shards import Document, Shard, write_shard
from lasp.train.data.tokenizer import ByteTokenizer, FileTokenizer, ModelTokenizer, _pieces, load_tokenizer
from lasp.train.files import sealed, unsealed
from tests.launch.forked import alive

END = 256


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"second")
    (folder / "a.txt").write_bytes(b"first\xff")
    (folder / "deep" / "c.md").write_bytes(b"third")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary.bin").write_bytes(b"\0\1\2")
    (folder / ".hidden").write_bytes(b"hidden")
    return folder


def built(source: object, folder: Path, field: str = "text", name: str = "bytes") -> Corpus:
    return build_corpus(str(source), field, load_tokenizer(name), name, folder / "tokens")


def documents(corpus: Corpus) -> list[list[int]]:
    return [corpus.read(start, stop)[0].tolist() for start, stop in corpus.documents]


def test_documents_of_a_folder_in_order_each_with_an_end(texts, tmp_path):
    assert documents(built(texts, tmp_path)) == [[*b"first\xff", END], [*b"second", END], [*b"third", END]]


def test_sources_a_file_and_a_glob(texts, tmp_path):
    assert documents(built(texts / "b.txt", tmp_path)) == [[*b"second", END]]
    assert documents(built(texts / "**" / "*.md", tmp_path)) == [[*b"third", END]]


def test_stdlib_is_sorted_source_text_of_this_interpreter_only():
    paths = [part.path for part in find_parts("stdlib")]
    assert paths == sorted(paths)
    assert any(path.name == "argparse.py" for path in paths)
    assert not any({"site-packages", "dist-packages"} & set(path.parts) for path in paths)


def test_tokens_are_written_once_and_again_when_the_text_changes(texts, tmp_path):
    first = built(texts, tmp_path)
    written = first.shards[0].path.stat().st_mtime_ns
    assert built(texts, tmp_path).shards[0].path.stat().st_mtime_ns == written
    (texts / "a.txt").write_bytes(b"another first")
    assert built(texts, tmp_path).shards[0].path != first.shards[0].path
    assert not [path for path in (tmp_path / "tokens").iterdir() if path.name.startswith(".")]


def test_many_files_make_shards_that_are_built_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "_SHARD", 10)
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(b"x%d" % number)
    whole = built(tmp_path / "texts", tmp_path)
    assert len(whole.shards) == 2
    whole.shards[0].path.unlink()
    kept = whole.shards[1].path.stat().st_mtime_ns
    told: list[tuple[int, int]] = []
    tokenizer = ByteTokenizer()
    again = build_corpus(
        str(tmp_path / "texts"), "text", tokenizer, "bytes", tmp_path / "tokens", lambda *seen: told.append(seen)
    )
    assert told == [(1, 2), (2, 2)]
    assert again.shards[1].path.stat().st_mtime_ns == kept
    assert documents(again) == [[*b"x%d" % number, END] for number in range(8)]
    assert again.checksum == whole.checksum


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"one\r\ntwo", [b"one\r\ntwo"]),
        ("a.txt", b"\xef\xbb\xbfone", [b"one"]),
        ("a.txt", "é".encode("latin-1"), [b"\xe9"]),
        ("a.txt.gz", gzip.compress(b"one", mtime=0), [b"one"]),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": ""}\r\n{"text": "tw\\u00e9"}', [b"one", "twé".encode()]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n', mtime=0), [b"one"]),
        ("a.json", b'\xef\xbb\xbf[{"text": "one"}, {"text": "two", "n": 3}]', [b"one", b"two"]),
        ("a.json", b'{"text": "one"}\n{"text": "two"}\n', [b"one", b"two"]),
        ("a.ndjson", json.dumps({"text": "x" * 3_000_000}).encode(), [b"x" * 3_000_000]),
    ],
)
def test_what_files_say(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert documents(built(tmp_path / name, tmp_path)) == [[*text, END] for text in expected]


@pytest.mark.parametrize("part", [1, 7, 16, 17, 18, 1000])
def test_a_large_file_of_lines_is_read_in_parts_that_share_no_line(tmp_path, monkeypatch, part):
    monkeypatch.setattr("lasp.train.data.documents._PART", part)
    lines = [json.dumps({"text": "é" * n}) for n in range(1, 12)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert documents(built(tmp_path / "a.jsonl", tmp_path)) == [[*("é" * n).encode(), END] for n in range(1, 12)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"a" * 9000 + b"\0", "is no text: it has a NUL byte at 9000"),
        ("a.txt", b"", "holds no text"),
        ("a.txt.gz", b"no gzip", "cannot read"),
        ("a.jsonl", b'{"text": "one"}\nno json\n', "the line at byte 16, of the corpus is no JSON"),
        ("a.jsonl", b'{"text": 3}\n', "'text' is neither a text nor messages"),
        ("a.jsonl", b'{"body": "one"}\n', "has no 'text' .data.field., but 'body'"),
        ("a.jsonl", b'["one"]\n', "is no JSON object"),
        ("a.json", b'{\n "text": "one"}', "is no JSON"),
        ("a.jsonl", b'{"text": [{"role": "user", "content": "one"}]}\n', "need a tokenizer with a chat template"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        built(tmp_path / name, tmp_path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "tokens").glob(".*"))


def test_sources_that_are_not_there(texts, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read '.*missing\.txt'.*No such file"):
        built(texts / "missing.txt", tmp_path)
    with pytest.raises(ValueError, match=r"'.*\*\.rst' holds no text file"):
        built(texts / "*.rst", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="the extra data is there")
def test_tables_say_what_they_need(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"is a table: pip install \"lasp2\[data\]\""):
        built(tmp_path / "a.parquet", tmp_path)


def test_tables(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")
    table = pyarrow.table({"body": ["one", "", None, "two"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert documents(built(tmp_path / "a.parquet", tmp_path, "body")) == [[*b"one", END], [*b"two", END]]
    saved = tmp_path / "saved"  # as `datasets.save_to_disk` leaves it
    saved.mkdir()
    (saved / "state.json").write_text("{}")
    path = str(saved / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(path, "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table.slice(0, 1))
    assert documents(built(saved, tmp_path, "body")) == [[*b"one", END]]


def failing(monkeypatch, name: str, where: str, number: int) -> None:
    """Let a call of the operating system fail for one path."""
    call = getattr(os, name)

    def fail(path: object = ".", *rest: object, **options: object) -> object:
        if str(path).endswith(where):
            raise OSError(number, os.strerror(number), str(path))
        return call(path, *rest, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(
    ("source", "name", "where"),
    [
        *((source, "scandir", "deep") for source in ("", "/**/*.md", "/*/*.md", "/**")),
        *((source, "stat", "c.md") for source in ("", "/**/*.md", "/*/*.md", "/**")),
        ("/*/c.md", "stat", "c.md"),
        ("/**/c.md", "stat", "c.md"),
        ("/**/c.md", "scandir", "deep"),
    ],
)
def test_a_source_of_which_a_part_cannot_be_read_is_refused(texts, tmp_path, monkeypatch, source, name, where):
    """It would be a smaller corpus, without a word."""
    failing(monkeypatch, name, where, errno.ESTALE)
    with pytest.raises(ValueError, match=rf"cannot read '.*{where}' of the corpus: Stale file handle"):
        built(f"{texts}{source}", tmp_path)


def test_hidden_folders_need_not_be_readable(texts, tmp_path, monkeypatch):
    (texts / ".git").mkdir()
    failing(monkeypatch, "scandir", ".git", errno.EACCES)
    assert len(documents(built(texts, tmp_path))) == 3
    assert len(documents(built(f"{texts}/**/*.md", tmp_path))) == 1


@pytest.mark.parametrize("number", [1, 2])
def test_a_disk_that_fails_makes_no_smaller_corpus(texts, tmp_path, monkeypatch, number):
    """The first look tells whether it is text, a later one reads it."""

    class Failing(io.FileIO):
        def readall(self) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def readinto(self, _: object) -> int:
            self.readall()

    looks, opened = [], Path.open

    def fail(path: Path, *rest: object) -> io.IOBase:
        if path.name != "b.txt":
            return opened(path, *rest)
        looks.append(path)
        return io.BufferedReader(Failing(path)) if len(looks) >= number else opened(path, *rest)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ValueError, match=r"cannot read '.*b\.txt' of the corpus: Input/output error"):
        built(texts, tmp_path)


def test_what_is_called_a_gzip_and_is_none_is_no_text(texts, tmp_path):
    (texts / "b.txt.gz").write_bytes(b"\x1e\x8b" + gzip.compress(b"To be")[2:])
    assert len(documents(built(texts, tmp_path))) == 3
    with pytest.raises(ValueError, match=r"cannot read '.*b\.txt\.gz' of the corpus: Not a gzip"):
        built(texts / "b.txt.gz", tmp_path)


def test_a_gzip_that_is_cut_short_or_damaged_is_refused(tmp_path):
    whole = gzip.compress(b"To be, or not to be, that is the question.\n")
    for damage in (whole[:20], whole[:-1], whole[:-6] + b"12" + whole[-4:], whole[:10] + b"\xff" * 9 + whole[19:]):
        (tmp_path / "a.txt.gz").write_bytes(damage)
        for source in (tmp_path, tmp_path / "a.txt.gz"):
            with pytest.raises(ValueError, match=r"cannot read '.*a\.txt\.gz' of the corpus: "):
                built(source, tmp_path)


def test_a_build_that_is_killed_leaves_nothing_and_one_that_fails_neither(tmp_path, monkeypatch):
    def texts() -> Iterator[Document]:
        yield Document(np.array([1]), 0, None)
        assert os.listdir(tmp_path) == [], "what has a name would stay"
        yield Document(np.array([2]), 0, None)

    def fail(_: object) -> str:
        assert len(os.listdir(tmp_path)) == 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_checksum", fail)
        with pytest.raises(OSError, match="No space left"):
            write_shard(tmp_path / "a.tokens", texts(), 257, {})
    assert os.listdir(tmp_path) == []
    write_shard(tmp_path / "a.tokens", texts(), 257, {})
    assert os.listdir(tmp_path) == ["a.tokens"]


def test_two_that_write_one_shard_do_not_meet(tmp_path):
    """Their processes may have one number: on two hosts, in two containers."""

    def texts(other: bool) -> Iterator[Document]:
        yield Document(np.array([1, 2]), 0, None)
        if other:
            write_shard(tmp_path / "a.tokens", texts(False), 257, {})
        yield Document(np.array([3]), 1, None)

    write_shard(tmp_path / "a.tokens", texts(True), 257, {})
    assert os.listdir(tmp_path) == ["a.tokens"]
    Shard.open(tmp_path / "a.tokens").check()
    assert Shard.open(tmp_path / "a.tokens").read(0, 3)[0].tolist() == [1, 2, 3]


def test_shards_of_another_format_are_built_anew(texts, tmp_path, monkeypatch):
    before = built(texts, tmp_path).shards[0].path
    monkeypatch.setattr(corpora, "FORMAT", "of another version")
    assert built(texts, tmp_path).shards[0].path != before


def damaged(path: Path, at: int, byte: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(byte)


def test_a_damaged_shard_is_found_before_anything_is_trained(texts, tmp_path):
    corpus = built(texts, tmp_path)
    corpus.check()
    path = corpus.shards[0].path
    damaged(path, path.stat().st_size - 100, b"\x55")
    with pytest.raises(ValueError, match=r"is damaged \(.*\): remove it"):
        built(texts, tmp_path).check()
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole + whole, bytes(len(whole)), b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="remove it, and it is built anew"):
            built(texts, tmp_path)


def test_every_bit_of_a_header_is_looked_at(tmp_path):
    path = tmp_path / "a.tokens"
    write_shard(path, [Document(np.array([5, 6]), 7, None)], 257, {"tokenizer": "bytes"})
    whole = path.read_bytes()
    for bit in range(8 * 4096):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"a\.tokens' of the tokens is damaged \("):
            Shard.open(path)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("tokens", [">u2", 4224, 2]),
        ("tokens", ["nonsense", 4224, 2]),
        ("tokens", [["<u2"], 4224, 2]),
        ("tokens", ["<u2", 4224, 2.0]),
        ("tokens", ["<u2", 4224, -2]),
        ("tokens", ["<u2", 4224, 1 << 40]),
        ("tokens", ["<u2", 0, 2]),
        ("tokens", ["<u2", 4226 + 64, 2]),
        ("tokens", ["<u2", 4224]),
        ("hashes", ["<u4", 4160, 2]),
        ("bounds", None),
        ("surprise", ["<u2", 4224, 2]),
        ("spoken", ["|b1", 4224, 1]),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused_though_its_checksum_fits(tmp_path, name, section):
    path = tmp_path / "a.tokens"
    write_shard(path, [Document(np.array([5, 6]), 7, None)], 257, {})
    whole = path.read_bytes()
    header = unsealed(json.loads(whole[:4096]))
    header["sections"][name] = section
    header["sections"] = {name: section for name, section in header["sections"].items() if section is not None}
    path.write_bytes(json.dumps(sealed(header)).encode().ljust(4096) + whole[4096:])
    with pytest.raises(ValueError, match=r"a\.tokens' of the tokens is damaged \(its header"):
        Shard.open(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_no_file_of_tokens(tmp_path, make):
    make(tmp_path / "a.tokens")
    with pytest.raises(ValueError, match=r"a\.tokens' is no file of tokens: remove it"):
        Shard.open(tmp_path / "a.tokens")


def test_tokens_that_cannot_be_read_are_not_to_be_removed(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.tokens", [Document(np.array([5, 6]), 7, None)], 257, {})
    shard = Shard.open(tmp_path / "a.tokens")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", fail)
    for read in (lambda: Shard.open(tmp_path / "a.tokens"), shard.check, lambda: shard.read(0, 2)):
        with pytest.raises(ValueError, match=r"^cannot read '.*a\.tokens' of the tokens: Permission denied$"):
            read()


def test_tokens_that_are_cut_short_while_they_are_used_are_named(tmp_path):
    """Of a mapped file that is the end of the process."""
    write_shard(tmp_path / "a.tokens", [Document(np.array([5, 6]), 7, None)], 257, {})
    shard = Shard.open(tmp_path / "a.tokens")
    os.truncate(tmp_path / "a.tokens", 4226)
    assert shard.read(0, 1)[0].tolist() == [5]
    with pytest.raises(ValueError, match=r"a\.tokens' of the tokens is damaged \(it ends early\)"):
        shard.read(0, 2)


def test_shards_take_no_descriptors(tmp_path):
    """A large corpus has more of them than a process may have files open."""
    resource = pytest.importorskip("resource")
    write_shard(tmp_path / "a.tokens", [Document(np.array([5, 6]), 7, np.array([True, False]))], 257, {})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limit[1]))
    try:
        corpus = Corpus("a", tuple(Shard.open(tmp_path / "a.tokens") for _ in range(300)))
        assert corpus.read(598, 600)[0].tolist() == [5, 6]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_ids_beyond_the_vocabulary_are_found_when_they_are_written(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer gave id 300 of 257"):
        write_shard(tmp_path / "a.tokens", [Document(np.array([1, 300]), 0, None)], 257, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1])
def test_a_shard_holds_what_was_written(tmp_path, size):
    told = [Document(np.array([5, size - 1]), 7, None), Document(np.array([3]), 1 << 31, np.array([False]))]
    write_shard(tmp_path / "a.tokens", told, size, {})
    shard = Shard.open(tmp_path / "a.tokens")
    assert shard.bounds.tolist() == [0, 2, 3]
    assert shard.hashes.tolist() == [7, 1 << 31]
    assert shard.tokens == 3
    assert [part.tolist() for part in shard.read(0, 3)] == [[5, size - 1, 3], [True, True, False]]
    assert [part.tolist() for part in shard.read(1, 2)] == [[size - 1], [True]]


def test_bytes_round_trip_and_what_is_no_text_is_replaced():
    tokenizer = ByteTokenizer()
    text = "naïve – ∂x"
    assert tokenizer.decode(tokenizer.encode(text.encode()).tolist()) == text
    assert tokenizer.decode([104, 105, 256, 255]) == "hi�"


def words(path: Path, last: int = 2, **options: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": last}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    if "truncation" in options:
        library.enable_truncation(options["truncation"])
    if "padding" in options:
        library.enable_padding(length=options["padding"], pad_id=2, pad_token="?")
    library.save(str(path / "words.json"))
    return str(path / "words.json")


def test_a_tokenizers_file(tmp_path):
    tokenizer = load_tokenizer(words(tmp_path))
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode(b"to be or").tolist() == [0, 1, 2]
    (tmp_path / "text").write_bytes(b"be to be")
    assert documents(built(tmp_path / "text", tmp_path, name=words(tmp_path))) == [[1, 0, 1, 3]]
    assert tokenizer.decode([1, 0, 3]) == "be to"
    with pytest.raises(ValueError, match=r"words\.jsn"):
        load_tokenizer(str(tmp_path / "words.jsn"))


def test_text_that_is_not_utf8_is_refused_where_letters_are_tokens(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    with pytest.raises(ValueError, match=r"latin\.txt of the corpus: is not UTF-8: byte 0xef at 2"):
        built(tmp_path / "latin.txt", tmp_path, name=words(tmp_path))


@pytest.mark.parametrize("options", [{"truncation": 4}, {"padding": 64}, {"truncation": 4, "padding": 64}])
def test_truncation_and_padding_saved_in_a_tokenizer_are_not_for_a_corpus(tmp_path, options):
    assert load_tokenizer(words(tmp_path, **options)).encode(b"to be " * 5).tolist() == [0, 1] * 5


@pytest.mark.parametrize("last", [3, 9, 70000])
def test_the_end_of_a_document_is_no_token_of_a_vocabulary_with_gaps(tmp_path, last):
    tokenizer = load_tokenizer(words(tmp_path, last))
    assert tokenizer.vocab_size == last + 2
    (tmp_path / "text").write_bytes(b"to be or")
    assert documents(built(tmp_path / "text", tmp_path, name=words(tmp_path, last))) == [[0, 1, last, last + 1]]


def test_ids_that_few_tokens_have_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"words\.json' has 3 tokens, and ids up to 200000"):
        load_tokenizer(words(tmp_path, 200_000))


@pytest.mark.parametrize("known", [[], ["<|endoftext|>"], ["<|endoftext|>", "<|endoftext1|>"]])
def test_a_tokenizer_is_written_with_an_end_of_its_own(tmp_path, known):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    vocabulary = {name: number for number, name in enumerate(["to", "be", *known])}
    Tokenizer(models.WordLevel(vocabulary, unk_token="to")).save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    tokenizer.save(tmp_path / "model")
    written = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert written.eos_token_id == tokenizer.end == 2 + len(known)
    assert written.eos_token not in vocabulary


def test_a_tokenizer_that_no_file_can_hold_is_left_out_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="its ids have gaps, documents end with 10"):
        load_tokenizer(words(tmp_path, 9)).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({}, unk_token="?")).save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match=r"empty\.json' has no tokens"):
        load_tokenizer(str(tmp_path / "empty.json"))


def test_a_long_text_is_encoded_in_pieces_that_end_with_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("lasp.train.data.tokenizer._PIECE", 8)
    assert load_tokenizer(words(tmp_path)).encode(b"to be\n" * 50).tolist() == [0, 1] * 50


@pytest.mark.parametrize("text", ["to be\n" * 9, "to be to be", "to be " * 9, "tobe" * 9 + "\n\nto be", "é" * 16, ""])
def test_a_line_without_an_end_is_encoded_in_pieces_as_well(tmp_path, monkeypatch, text):
    monkeypatch.setattr("lasp.train.data.tokenizer._PIECE", 8)
    pieces = list(_pieces(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 16 for piece in pieces)
    assert all(one.endswith("\n") or two.startswith(" ") or " " not in one for one, two in pairwise(pieces))


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}{{ '</s> ' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture
def folder(tmp_path) -> str:
    """A tokenizer of transformers that begins texts with <s>, knows a chat template, and would truncate."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = ["<s>", "</s>", "?", "user", "assistant", "to", "be"]
    library = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.enable_truncation(2)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>", unk_token="?")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_tokenizer_of_transformers_begins_and_ends_documents_as_it_does(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, ModelTokenizer)
    assert (tokenizer.vocab_size, tokenizer.end) == (7, 1)
    (tmp_path / "text").write_bytes(b"to be to be")
    assert documents(built(tmp_path / "text", tmp_path, name=folder)) == [[0, 5, 6, 5, 6, 1]]
    assert tokenizer.decode([0, 5, 6, 1]) == "to be"


def test_the_assistants_turns_are_the_targets_of_a_conversation(folder, tmp_path):
    turns = [("user", "to"), ("assistant", "be"), ("user", "be"), ("assistant", "to be")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    corpus = built(tmp_path / "a.jsonl", tmp_path, "messages", folder)
    ids, spoken = corpus.read(0, corpus.tokens)
    assert ids.tolist() == [3, 5, 4, 6, 1, 3, 6, 4, 5, 6, 1]
    assert spoken.tolist() == [i in (3, 4, 8, 9, 10) for i in range(11)]


def test_a_template_that_rewrites_earlier_turns_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer._tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="writes turn 0 otherwise"):
        tokenizer.chat([{"role": "assistant", "content": "to"}, {"role": "user", "content": "be"}])


@pytest.mark.parametrize("name", ["bytes", "words", "folder"])
def test_a_saved_tokenizer_gives_the_same_ids(tmp_path, folder, name):
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer({"bytes": "bytes", "words": words(tmp_path), "folder": folder}[name])
    tokenizer.save(tmp_path / "saved")
    text = "to be\n or\tnaïve 🙂" if name == "bytes" else "to be or"
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert saved(text)["input_ids"] == tokenizer.encode(text.encode()).tolist()
    assert saved.eos_token_id == tokenizer.end


WITHOUT_END = """
import os, sys, time
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
from lasp.train.data.corpus import _end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_that_tokenize_end_with_the_one_that_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(WITHOUT_END)
    with subprocess.Popen([sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, text=True) as run:
        child = int(run.stdout.readline())
        run.terminate()
    began = time.monotonic()
    while alive(child):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
