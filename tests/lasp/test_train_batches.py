"""Rows of documents, and the batches of a step: every token once per epoch, whoever reads it."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lasp.parallel.layout import even_slices
from lasp.train.config import DataConfig, TrainConfig
from lasp.train.data.batches import Batches, Data, Share, all_rows, shares
from lasp.train.data.corpus import Corpus
from lasp.train.data.packing import PACKINGS, Piece, Split, held_out
from lasp.train.data.shards import Document, Shard, write_shard
from lasp.train.data.tokenizer import load_tokenizer
from lasp.train.run import prepare_data
from lasp.train.source import MicroBatch

SEQ = 16
AXES = [(1, 1), (2, 1), (1, 2), (2, 2)]


def corpus(folder: Path, lengths: list[int], shards: int = 1, name: str = "a") -> Corpus:
    """Documents whose tokens are all different, in some files."""
    ids = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    parts = [ids[i * len(ids) // shards : (i + 1) * len(ids) // shards] for i in range(shards)]
    paths = [folder / f"{name}-{i}.tokens" for i in range(shards)]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, [Document(one, int(one[0]), None) for one in part], 70000, {})
    return Corpus(name, tuple(Shard.open(path) for path in paths))


@pytest.fixture
def hundred(tmp_path: Path) -> Corpus:
    """A hundred documents of 1 to 3 sequences, in three files."""
    lengths = np.random.default_rng(0).integers(1, 3 * SEQ, 100)
    return corpus(tmp_path, lengths.tolist(), 3)


def data(corpus: Corpus, packing: str, seq_len: int = SEQ) -> Data:
    return Data(corpus, PACKINGS[packing].make(corpus.documents, seq_len), seq_len)


def share(rank: int, dp: int, sp: int, batch_size: int = 1, layout: str = "contiguous") -> Share:
    return Share(lambda length: even_slices(length, rank % sp, sp, layout), batch_size, rank // sp, dp)


def whole(parts: list[MicroBatch], layout: str = "contiguous") -> dict[str, torch.Tensor]:
    """A micro-batch from its parts on the ranks of a sequence."""
    slices = [even_slices(parts[0].length, rank, len(parts), layout) for rank in range(len(parts))]
    order = torch.cat([torch.arange(s.start, s.stop) for own in slices for s in own]).argsort()
    return {name: torch.cat([part.tensors[name] for part in parts], 1)[:, order] for name in parts[0].tensors}


def pieces(batch: dict[str, torch.Tensor], bounds: tuple[int, ...] | None) -> Iterator[tuple[list[int], ...]]:
    """Ids, targets and positions of each document of a micro-batch."""
    assert bounds is not None
    for start, stop in pairwise(bounds):
        yield tuple(batch[name][0, start:stop].tolist() for name in ("input_ids", "shift_labels", "position_ids"))


@pytest.mark.parametrize("packing", ["split", "first_fit"])
@pytest.mark.parametrize(("dp", "sp"), AXES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_token_is_once_in_an_epoch_and_every_target_is_the_next_of_its_document(hundred, packing, dp, sp, layout):
    found = data(hundred, packing)
    ranks = [Batches([(found, 1.0)], share(rank, dp, sp, 2 // dp, layout), accumulation=2) for rank in range(dp * sp)]
    follows = {i: i + 1 for start, stop in hundred.documents.tolist() for i in range(start, stop - 1)}
    seen, targets, steps = Counter(), Counter(), len(found.rows) // 4  # whole ones
    for step in range(steps):
        read = [batches.read(step) for batches in ranks]
        for micro in range(2):
            for replica in range(dp):
                parts = [read[replica * sp + rank][micro] for rank in range(sp)]
                for ids, labels, positions in pieces(whole(parts, layout), parts[0].bounds):
                    assert positions == list(range(len(ids)))
                    if (ids[-1] == 0 and len(ids) > 1 and ids[1] == 0) or (labels == [-100] and ids == [0]):
                        continue  # the room that a row had left
                    seen.update(ids)
                    targets.update(label for label in labels if label != -100)
                    for one, label in zip(ids, labels, strict=True):
                        assert label == follows.get(one, -100)
    left = [piece for row in set(range(len(found.rows))) for piece in found.rows.row(row)]
    assert sum(piece.stop - piece.start for piece in left) == hundred.tokens
    assert max(seen.values()) == 1
    assert max(targets.values()) == 1
    rows = [batches.row(i)[1] for batches in ranks[:1] for i in range(4 * steps)]
    assert seen.keys() | {0} == {i for row in rows for p in found.rows.row(row) for i in range(p.start, p.stop)} | {0}


@pytest.mark.parametrize("packing", ["split", "first_fit", "none"])
@pytest.mark.parametrize(("dp", "sp"), AXES)
def test_the_rows_of_a_step_are_the_same_however_ranks_share_them(hundred, packing, dp, sp):
    found = data(hundred, packing)
    one = Batches([(found, 1.0)], share(0, 1, 1, 4), seed=5)
    ranks = [Batches([(found, 1.0)], share(rank, dp, sp, 2 // dp), 2, 5) for rank in range(dp * sp)]
    for step in (0, 3, 40):
        (expected,) = one.read(step)
        read = [batches.read(step) for batches in ranks]
        parts = [
            whole([read[replica * sp + rank][micro] for rank in range(sp)])
            for micro in range(2)
            for replica in range(dp)
        ]
        dim = 0 if packing == "none" else 1
        for name, value in expected.tensors.items():
            assert torch.equal(torch.cat([part[name] for part in parts], dim), value)


def test_documents_that_are_not_kept_apart_are_one_text(hundred):
    found = data(hundred, "none")
    read = [batch.tensors for batch in all_rows(found, share(0, 1, 1, 3))]
    ids, targets = (torch.cat([batch[name].flatten() for batch in read]) for name in ("input_ids", "shift_labels"))
    last = hundred.tokens - 1  # the one token that nothing precedes is no target, what follows it is room
    assert torch.equal(ids[: last + 1], torch.arange(last + 1))
    assert torch.equal(targets[:last], torch.arange(1, last + 1))
    assert not ids[last + 1 :].any()
    assert (targets[last:] == -100).all()
    assert len(ids) - last <= 3 * SEQ
    assert torch.equal(read[0]["position_ids"], torch.arange(SEQ).expand(3, -1))
    assert next(all_rows(found, share(0, 1, 1))).bounds is None


def lines(texts: list[Any], field: str = "text") -> bytes:
    return "\n".join(json.dumps({field: text}) for text in texts).encode()


def talks(texts: list[str]) -> bytes:
    return lines([[{"role": "assistant", "content": text}] for text in texts], "messages")


def save_files(folder: Path, texts: list[str]) -> None:
    for n, text in enumerate(texts):
        (folder / f"{n // 50}").mkdir(exist_ok=True)
        name = folder / f"{n // 50}" / f"{n:03}.txt"
        name.with_suffix(".txt.gz").write_bytes(gzip.compress(text.encode())) if n % 2 else name.write_text(text)


def save_table(path: Path, texts: list[str], parquet: bool) -> None:
    """As pandas writes it, or `datasets.save_to_disk` leaves it."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra data")
    table = pyarrow.table({"text": texts})
    if parquet:
        pytest.importorskip("pyarrow.parquet").write_table(table, path / "a.parquet", row_group_size=7)
        return
    (path / "state.json").write_text("{}")
    for part in range(2):
        with (
            pyarrow.OSFile(str(path / f"data-0000{part}-of-00002.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table.slice(50 * part, 50))


SOURCES: dict[str, Callable[[Path, list[str]], Any]] = {
    "": save_files,  # the folder itself
    "**/*.txt*": save_files,
    "a.jsonl": lambda folder, texts: (folder / "a.jsonl").write_bytes(lines(texts)),
    "a.ndjson.gz": lambda folder, texts: (folder / "a.ndjson.gz").write_bytes(gzip.compress(lines(texts))),
    "a.json": lambda folder, texts: (folder / "a.json").write_text(json.dumps([{"text": text} for text in texts])),
    "talks.jsonl": lambda folder, texts: (folder / "talks.jsonl").write_bytes(talks(texts)),
    "*.parquet": lambda folder, texts: save_table(folder, texts, parquet=True),
    ".": lambda folder, texts: save_table(folder, texts, parquet=False),
}
"""What `data.source` names in a folder, and how documents get there."""
QUICK = ("", "a.jsonl", "*.parquet")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    """A tokenizer that knows a chat template, and the tokens of a hundred documents, of which none is there twice."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lengths = np.random.default_rng(1).integers(1, 3 * SEQ, 100)
    ids = [part.tolist() for part in np.split(np.arange(2, 2 + lengths.sum()), np.cumsum(lengths)[:-1])]
    known = {"</s>": 0, "?": 1} | {f"w{i}": i for part in ids for i in part}
    library = Tokenizer(models.WordLevel(known, unk_token="?"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="</s>", unk_token="?")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %} {{ eos_token }}"
    tokenizer.save_pretrained(folder := tmp_path_factory.mktemp("words"))
    return str(folder), [[*part, 0] for part in ids]


@pytest.mark.parametrize(
    "source", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SOURCES]
)
def test_a_hundred_documents_of_any_source_are_read_once_and_in_the_same_steps(tmp_path, words, source):
    """Laid in each way: by one rank, and by a run that is resumed at another dp x sp after every step."""
    name, expected = words
    SOURCES[source](tmp_path, [" ".join(f"w{i}" for i in ids[:-1]) for ids in expected])
    field, cache = "messages" if "talks" in source else "text", str(tmp_path / ".tokens")
    for packing in PACKINGS:
        config = TrainConfig(data=DataConfig(str(tmp_path / source), field, name, SEQ, packing, cache=cache))
        (found,), _ = prepare_data(config, load_tokenizer(name), None)
        assert [found.corpus.read(*ends)[0].tolist() for ends in found.corpus.documents] == expected
        one, steps = Batches([(found, 1.0)], share(0, 1, 1, 4), seed=7), -(-len(found.rows) // 4)
        read = [one.read(step)[0].tensors for step in range(steps)]
        rows = torch.cat([batch["input_ids"].view(-1, SEQ) for batch in read])[: len(found.rows)]
        seen = Counter(rows.flatten().tolist())
        del seen[0]  # ends, and room that was left
        assert seen == {i: 1 for ids in expected for i in ids[:-1]}
        for step, batch in enumerate(read):
            dp, sp = AXES[(step + step // 4) % 4]
            parts = [Batches([(found, 1.0)], share(r, dp, sp, 2 // dp), 2, 7).read(step) for r in range(dp * sp)]
            laid = [whole([parts[d * sp + r][micro] for r in range(sp)]) for micro in range(2) for d in range(dp)]
            for key, value in batch.items():
                assert torch.equal(torch.cat([part[key] for part in laid], int(packing != "none")), value)


def test_first_fit_keeps_whole_what_fits_and_wastes_little(hundred):
    rows = data(hundred, "first_fit").rows
    starts = dict(hundred.documents.tolist())
    for row in (rows.row(i) for i in range(len(rows))):
        assert sum(piece.stop - piece.start for piece in row) <= SEQ
        for piece in row:
            if piece.start in starts and starts[piece.start] - piece.start <= SEQ:
                assert piece == Piece(piece.start, starts[piece.start], False)
    assert len(rows) < 1.1 * hundred.tokens / SEQ


def test_split_cuts_where_a_row_ends():
    rows = Split.make(np.array([[0, 5], [9, 12], [20, 24]]), 6)
    assert [rows.row(i) for i in range(len(rows))] == [
        [Piece(0, 5, False), Piece(9, 10, True)],
        [Piece(10, 12, False), Piece(20, 24, False)],
    ]


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(hundred):
    found = data(hundred, "split")
    batches, count = Batches([(found, 1.0)], share(0, 1, 1), seed=3), len(found.rows)
    first, second = ([batches.row(i + epoch * count)[1] for i in range(count)] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second


def test_a_mixture_gives_the_shares_that_were_asked_for(tmp_path):
    parts = [data(corpus(tmp_path, [SEQ * n], name=name), "split") for name, n in (("a", 5), ("b", 7), ("c", 3))]
    batches = Batches(list(zip(parts, (0.7, 0.2, 0.1), strict=True)), share(0, 1, 1), seed=2)
    rows = [batches.row(i) for i in range(2048)]
    counts = Counter(row[0].corpus.source for row in rows)
    assert counts == {"a": 2 * 717, "b": 2 * 205, "c": 2 * 102}
    of_a = [row[1] for row in rows if row[0].corpus.source == "a"]
    assert all(sorted(of_a[i : i + 5]) == list(range(5)) for i in range(0, 1400, 5))  # epochs of its own
    assert {row[0].corpus.source for row in rows[:40]} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("weights", "said"),
    [((1.0, 0.0), "positive"), ((1.0, float("nan")), "positive"), ((1.0, 1e-4), "less than 1/1024")],
)
def test_weights_that_give_nothing_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        shares(weights)


@pytest.mark.parametrize(("dp", "sp"), AXES)
def test_a_validation_reads_every_row_once(hundred, dp, sp):
    found, seen = data(hundred, "split"), Counter()
    for rank in range(dp * sp):
        batches = list(all_rows(found, share(rank, dp, sp, 3)))
        assert len(batches) == -(-len(found.rows) // (3 * dp))
        seen.update(int(label) for batch in batches for label in batch.tensors["shift_labels"].flatten() if label >= 0)
    assert seen.keys() == {i for start, stop in hundred.documents.tolist() for i in range(start + 1, stop)}
    assert set(seen.values()) == {1}
    assert len(list(all_rows(found, share(0, 1, 1, 3), limit=4))) == 2


def test_held_out_are_documents_by_their_content():
    hashes = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    assert held_out(hashes, 0.1).mean() == pytest.approx(0.1, abs=0.01)
    assert not held_out(hashes, 0.0).any()
    assert (held_out(hashes, 0.1) <= held_out(hashes, 0.2)).all()


def test_only_what_the_assistant_says_is_a_target(tmp_path):
    write_shard(tmp_path / "a.tokens", [Document(np.arange(6), 0, np.array([0, 0, 1, 1, 0, 1], bool))], 100, {})
    found = data(Corpus("a", (Shard.open(tmp_path / "a.tokens"),)), "split", 4)
    batches = [next(iter(all_rows(found, share(0, 1, 1, 2))))]
    assert batches[0].tensors["shift_labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batches[0].bounds == (0, 4, 6, 8)
    assert batches[0].targets == 3


@pytest.mark.parametrize("packing", ["split", "first_fit", "none"])
def test_a_rank_reads_its_slices_and_one_target_each(tmp_path, monkeypatch, packing):
    found, taken, read = data(corpus(tmp_path, [5000, 5000]), packing, 1000), [], Shard.read

    def counted(shard: Shard, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        taken.append(stop - start)
        return read(shard, start, stop)

    monkeypatch.setattr(Shard, "read", counted)
    Batches([(found, 1.0)], share(1, 1, 4)).read(0)
    assert taken == [251]
