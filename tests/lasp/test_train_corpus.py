"""The corpus on disk, and the batches read from it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lasp.train.batches import Batches
from lasp.train.config import DataConfig
from lasp.train.corpus import find_documents, open_corpus, prepare_corpus
from lasp.train.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer


class CountingArray(np.ndarray):
    """An array that notes how many elements every look at it takes."""

    taken: list[int]

    def __getitem__(self, key):
        piece = np.asarray(super().__getitem__(key))
        self.taken.append(piece.size)
        return piece


def counting(tokens: np.ndarray) -> CountingArray:
    array = tokens.view(CountingArray)
    array.taken = []
    return array


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


def prepared(texts: Path, source: str, seq_len: int = 4) -> np.ndarray:
    data = DataConfig(source=source, seq_len=seq_len)
    return open_corpus(prepare_corpus(data, texts.parent / "tokens", ByteTokenizer()))


def test_documents_of_a_folder_in_order_each_with_an_end(texts):
    expected = [*b"first\xff", 256, *b"second", 256, *b"third", 256]
    assert prepared(texts, str(texts)).tolist() == expected


def test_sources_a_file_and_a_glob(texts):
    assert prepared(texts, str(texts / "b.txt")).tolist() == [*b"second", 256]
    assert prepared(texts, str(texts / "**" / "*.md")).tolist() == [*b"third", 256]


def test_stdlib_is_sorted_source_text_of_this_interpreter_only():
    documents = find_documents("stdlib")
    assert documents == sorted(documents)
    assert any(path.name == "argparse.py" for path in documents)
    assert not any({"site-packages", "dist-packages"} & set(path.parts) for path in documents)


def test_tokens_are_written_once_and_again_when_the_text_changes(texts):
    data, folder = DataConfig(source=str(texts), seq_len=4), texts.parent / "tokens"
    first = prepare_corpus(data, folder, ByteTokenizer())
    written = first.stat().st_mtime_ns
    assert prepare_corpus(data, folder, ByteTokenizer()) == first
    assert first.stat().st_mtime_ns == written
    (texts / "a.txt").write_bytes(b"another first")
    assert prepare_corpus(data, folder, ByteTokenizer()) != first
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_unreadable_empty_and_short_sources_are_refused_with_path_and_sizes(texts):
    with pytest.raises(ValueError, match=r"cannot read '.*missing\.txt'.*No such file"):
        prepared(texts, str(texts / "missing.txt"))
    with pytest.raises(ValueError, match=r"'.*\*\.rst' holds no text file"):
        prepared(texts, str(texts / "*.rst"))
    with pytest.raises(ValueError, match=r"too short: 1 documents give 7 tokens.*seq_len=7.*need 8"):
        prepared(texts, str(texts / "b.txt"), seq_len=7)
    assert len(prepared(texts, str(texts / "b.txt"), seq_len=6)) == 7


def test_bytes_round_trip_and_what_is_no_text_is_replaced():
    tokenizer = ByteTokenizer()
    text = "naïve – ∂x"
    assert tokenizer.decode(tokenizer.encode(text.encode()).tolist()) == text
    assert tokenizer.decode([104, 105, 256, 255]) == "hi�"


def test_a_tokenizers_file(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode(b"to be or").tolist() == [0, 1, 2]
    (tmp_path / "text").write_bytes(b"be to be")
    path = prepare_corpus(DataConfig(source=str(tmp_path / "text"), seq_len=2), tmp_path, tokenizer)
    assert open_corpus(path).tolist() == [1, 0, 1, 3]
    assert tokenizer.decode([1, 0, 3]) == "be to"
    with pytest.raises(ValueError, match=r"words\.jsn"):
        load_tokenizer(str(tmp_path / "words.jsn"))


@pytest.mark.parametrize("option", ["truncation", "padding", "both"])
def test_truncation_and_padding_saved_in_a_tokenizer_are_not_for_a_corpus(tmp_path, option):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    if option != "padding":
        library.enable_truncation(4)
    if option != "truncation":
        library.enable_padding(length=64, pad_id=2, pad_token="?")
    library.save(str(tmp_path / "words.json"))
    assert load_tokenizer(str(tmp_path / "words.json")).encode(b"to be " * 5).tolist() == [0, 1] * 5


@pytest.mark.parametrize("last", [3, 9, 70000])
def test_the_end_of_a_document_is_no_token_of_a_vocabulary_with_gaps(tmp_path, last):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": last}, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    assert tokenizer.vocab_size == last + 2
    (tmp_path / "text").write_bytes(b"to be or")
    path = prepare_corpus(DataConfig(source=str(tmp_path / "text"), seq_len=2), tmp_path, tokenizer)
    assert open_corpus(path).tolist() == [0, 1, last, last + 1]


def test_a_tokenizer_without_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({}, unk_token="?")).save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match=r"empty\.json' has no tokens"):
        load_tokenizer(str(tmp_path / "empty.json"))


def test_slices_of_all_ranks_are_the_batch_of_one_process():
    tokens = np.arange(1000, dtype=np.uint16)
    whole = Batches(tokens, seq_len=13, slices=[slice(0, 13)], batch_size=3, seed=5).read(4)[0].tensors
    zigzag = [[slice(0, 4), slice(10, 13)], [slice(4, 7), slice(7, 10)]]
    parts = [Batches(tokens, seq_len=13, slices=cut, batch_size=3, seed=5).read(4)[0].tensors for cut in zigzag]
    order = [i for cut in zigzag for piece in cut for i in range(piece.start, piece.stop)]
    for name in ("input_ids", "shift_labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name][:, order])
    assert torch.equal(whole["shift_labels"], whole["input_ids"] + 1)
    assert torch.equal(whole["position_ids"], torch.arange(13).expand(3, -1))


def test_a_rank_reads_its_slices_and_one_target_each():
    tokens = counting(np.arange(10_000, dtype=np.uint16))
    Batches(tokens, seq_len=1000, slices=[slice(250, 500)], batch_size=2).read(0)
    assert tokens.taken == [251, 251]


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order():
    tokens = np.zeros(10 * 8 + 1, dtype=np.uint16)
    batches = [Batches(tokens, 8, [slice(0, 8)], 1, dp_rank=dp_rank, dp_size=2, seed=3) for dp_rank in range(2)]
    seen = [window for step in range(10) for rank in batches for window in rank.windows(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_data_parallel_ranks_share_out_the_batch_of_one_process():
    tokens = np.zeros(100 * 8, dtype=np.uint16)
    one = Batches(tokens, 8, [slice(0, 8)], batch_size=4)
    two = [Batches(tokens, 8, [slice(0, 8)], batch_size=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    for step in range(3):
        assert one.windows(step) == two[0].windows(step) + two[1].windows(step)
