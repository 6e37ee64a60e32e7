"""Checkpoints: what is whole, what is refused, and what nothing of is run."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lasp.launch.export import main as export_command
from lasp.parallel import collectives
from lasp.parallel.group import shutdown
from lasp.train.checkpoints import folders, retention, writer
from lasp.train.checkpoints import manifest as manifests
from lasp.train.checkpoints.export import export, read_weights
from lasp.train.checkpoints.folders import (
    checkpoint_folder,
    checkpoint_path,
    checkpoint_step,
    list_checkpoints,
)
from lasp.train.checkpoints.manifest import Damaged, Manifest, write_manifest
from lasp.train.checkpoints.retention import superseded, was_asked
from lasp.train.checkpoints.staging import Copies
from lasp.train.config import DataConfig, TrainConfig
from lasp.train.engines.engine import flatten
from lasp.train.files import sealed
from lasp.train.loop import Summary, Trainer, train
from lasp.train.ranks import Ranks
from lasp.train.run import Run

NORM = "model.norm.weight"
MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module", autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Run:
    """A run of six steps with checkpoints at 3 and 6, the one to resume; tests work on copies of them."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    config = TrainConfig(
        output=str(folder / "run"),
        device="cpu",
        steps=6,
        save_every=3,
        model=MODEL,
        data=DataConfig(str(folder / "text.txt"), seq_len=64, cache=str(folder)),
    )
    return replace(Run.prepare(config), checkpoint=trained(config).checkpoint)


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy of the run's last checkpoint."""
    return shutil.copytree(saved.checkpoint, tmp_path / "step-000006")


@pytest.fixture
def again(saved, tmp_path) -> TrainConfig:
    """The run, to be continued in a copy of its folder."""
    shutil.copytree(saved.config.output, tmp_path / "run")
    return replace(saved.config, output=str(tmp_path / "run"), resume="latest", steps=8)


def trained(config: TrainConfig) -> Summary:
    return train(Run.prepare(config), Ranks.join(config))


def blank(run: Run) -> Trainer:
    """A trainer of the same run that has done nothing."""
    return Trainer.start(replace(run, checkpoint=None), Ranks.join(run.config))


def seal(path: Path) -> None:
    """Give a crafted checkpoint a manifest that fits."""
    (path / manifests.FILE).unlink(missing_ok=True)
    write_manifest(path, int(path.name.removeprefix("step-")), {})


def craft(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors that a checkpoint of one rank holds, and all that says what they are."""
    file = path / writer.FOLDER / "rank-0.safetensors"
    tensors = {name.rpartition(" at ")[0]: value for name, value in load_file(file).items()}
    change(tensors)
    index = {}
    for name, value in tensors.items():
        part = {"offsets": [0] * value.dim(), "sizes": list(value.shape), "file": file.name}
        dtype = str(value.dtype).removeprefix("torch.")
        index[name] = {"dtype": dtype, "shape": list(value.shape), "parts": [part]}
    place = {name: f"{name} at {','.join('0' * value.dim())}" for name, value in tensors.items()}
    save_file({place[name]: value.contiguous() for name, value in tensors.items()}, file)
    (path / writer.INDEX).write_text(json.dumps({"tensors": index}))
    seal(path)


def each(kind: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], object]:
    """A change of what the optimizer keeps of every parameter under this name; "" for the weights."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "random" not in name and name.partition(": ")[2] == kind]:
            tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (each("", lambda w: w.double()), r"24 tensors differ: .*\) float64 there and .*\) float32 here"),
        (each("", lambda w: w.to(torch.int8)), r"24 tensors differ: .*\) int8 there and .*\) float32 here"),
        (each("exp_avg", lambda _: torch.zeros(3)), r"exp_avg is \(3,\) float32 there and \(257, 32\) float32 here"),
        (each("exp_avg", lambda m: m.double()), r"exp_avg is \(257, 32\) float64 there"),
        (each("exp_avg", lambda m: m[..., :-1]), r"exp_avg is \(257, 31\) float32 there"),
        (lambda t: t.pop(f"{NORM}: exp_avg"), r"1 tensors differ: model.norm.weight: exp_avg is None there"),
        (lambda t: t.update({f"{NORM}: max": torch.zeros(2)}), r"1 tensors differ: .*: max is \(2,\) float32"),
        (lambda t: t.update({f"{NORM}: step": torch.zeros(2)}), r": step is \(2,\) float32 there"),
        (lambda t: t.update(other=t.pop(NORM)), "2 tensors differ"),
        (lambda t: t.clear(), "24 tensors differ"),
    ],
)
def test_a_state_of_something_else_is_refused_before_any_of_it_is_loaded(saved, copy, change, said):
    craft(copy, change)
    trainer = blank(saved)
    before = {name: value.clone() for name, value in trainer.engine.model.state_dict().items()}
    with pytest.raises(ValueError, match=said) as caught:
        trainer.checkpoints.load(copy, trainer.engine)
    assert "step-000006" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.model.state_dict().items())
    assert not trainer.engine.optimizers[0].state


def test_random_states_are_put_back(saved, copy):
    drawn = []
    craft(copy, lambda tensors: drawn.append(torch.manual_seed(5).get_state()) or tensors.update({RANDOM: drawn[0]}))
    expected = torch.rand(3)
    torch.manual_seed(6)
    trainer = blank(saved)
    trainer.checkpoints.load(copy, trainer.engine)
    assert torch.equal(torch.rand(3), expected)
    craft(copy, lambda tensors: tensors.update({RANDOM: torch.zeros(5056, dtype=torch.uint8)}))
    with pytest.raises(ValueError, match="is no state of a generator"):
        trainer.checkpoints.load(copy, blank(saved).engine)


RANDOM = "random: 0 of dp 1 x sp 1: cpu"


def swap(path: Path) -> None:
    """The file of the other checkpoint in its place."""
    folder, name = next((up, path.relative_to(up)) for up in path.parents if up.name == "step-000006")
    shutil.copyfile(folder.with_name("step-000003") / name, path)


def flip(path: Path, place: float = 0.5) -> None:
    """Turn over one bit."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 16
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: flip(path, 0),
    "bit": flip,
    "last bit": lambda path: flip(path, 1),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": lambda path: (path.rename(path.with_suffix(".away")), path.symlink_to(path.with_suffix(".away"))),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", [*DAMAGES, "swapped"])
def test_any_damage_to_any_file_is_one_line_that_names_it(again, tmp_path, kind):
    path = Path(again.output) / "checkpoints" / "step-000006"
    names = [*Manifest.read(path).files, manifests.FILE]
    assert {"config.json", "run.json", "tokenizer.json", "model.safetensors", writer.INDEX} < set(names)
    for name in names:
        here = shutil.copytree(path, tmp_path / "step-000006", symlinks=True)
        shutil.copytree(path.with_name("step-000003"), tmp_path / "step-000003")
        there = tmp_path / "step-000003" / name
        if kind != "swapped":
            DAMAGES[kind](here / name)
        elif there.exists() and there.read_bytes() != (here / name).read_bytes():
            swap(here / name)
        else:
            there = None
        if kind != "swapped" or there is not None:
            with pytest.raises(Damaged, match=name) as caught:
                Manifest.read(here).check()
            assert "\n" not in str(caught.value)
        shutil.rmtree(here)
        shutil.rmtree(tmp_path / "step-000003")


def test_the_newest_whole_checkpoint_is_taken_and_a_damaged_one_set_aside(again, saved, caplog):
    folder = checkpoint_folder(again.output)
    flip(folder / "step-000006" / writer.FOLDER / "rank-0.safetensors")
    run = Run.prepare(again)
    assert run.checkpoint.name == "step-000003"
    [told] = caplog.messages
    assert "step-000006/state/rank-0.safetensors' of the checkpoint is damaged" in told
    assert "going on from step-000003; it is called step-000006.damaged now" in told
    resumed = train(run, Ranks.join(again))
    assert len(resumed.losses) == 5
    assert sorted(os.listdir(folder)) == ["step-000003", "step-000006", "step-000006.damaged", "step-000008"]
    assert Run.prepare(replace(again, steps=9)).checkpoint.name == "step-000008"


def test_where_no_checkpoint_is_whole_nothing_begins_anew(again):
    for path in list_checkpoints(checkpoint_folder(again.output)):
        (path / manifests.FILE).unlink()
    before = sorted(os.listdir(checkpoint_folder(again.output)))
    with pytest.raises(ValueError, match=r"step-000006/manifest.json'.*none of the 2 checkpoints there is whole"):
        Run.prepare(again)
    assert sorted(os.listdir(checkpoint_folder(again.output))) == before


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("call", ["open", "read"])
def test_what_cannot_be_read_is_not_taken_for_damaged(again, monkeypatch, number, call):
    """It may be whole: nothing is renamed, and no older one taken."""
    folder = checkpoint_folder(again.output)
    before = sorted(os.listdir(folder))

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    def fail_for_one(path: object, *rest: object) -> int:
        return fail() if "index.json" in str(path) else opened(path, *rest)

    opened = os.open
    if call == "open":
        monkeypatch.setattr(os, "open", fail_for_one)
    else:
        monkeypatch.setattr(manifests.hashlib, "file_digest", fail)
    with pytest.raises(ValueError, match=f"^cannot read '.*' of the checkpoint: {os.strerror(number)}$") as caught:
        Run.prepare(again)
    assert not isinstance(caught.value, Damaged)
    assert "step-000006/" in str(caught.value)
    assert sorted(os.listdir(folder)) == before


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_taken_for_an_empty_one(again, monkeypatch):
    def fail(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(ValueError, match=r"Permission denied: '.*checkpoints'"):
        Run.prepare(again)


def test_a_name_in_other_digits_is_no_checkpoint(tmp_path):
    for name in ("step-٠٠٠٠٩٠", "step-000050", "step-50", "step-000050x", "Step-000060"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000050"]


def test_checkpoints_that_an_earlier_run_was_asked_for_stay(again):
    trained(replace(again, steps=11, save_every=2, save_minutes=0))
    assert sorted(os.listdir(checkpoint_folder(again.output))) == [f"step-{step:06d}" for step in (3, 6, 8, 10, 11)]
    trained(replace(again, steps=12, save_every=2, keep_last=2))
    assert sorted(os.listdir(checkpoint_folder(again.output))) == ["step-000011", "step-000012"]


@pytest.mark.parametrize("background", [False, True])
def test_an_old_checkpoint_that_cannot_be_deleted_ends_no_run(again, monkeypatch, caplog, background):
    """NFS keeps what somebody still reads; a folder may be protected."""
    folder = checkpoint_folder(again.output)
    (folder / ".step-000001.deleted").mkdir()
    (folder / ".step-000001.deleted" / "tokenizer.json").touch()
    rename = Path.rename

    def protected(path: Path, to: Path) -> Path:
        if path.name == "step-000006":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, to)

    def fail(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), "tokenizer.json")

    monkeypatch.setattr(Path, "rename", protected)
    monkeypatch.setattr(folders.shutil, "rmtree", fail)
    trained(replace(again, keep_last=1, save_every=1, async_save=background))
    told = "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert len(re.findall(r"cannot delete '.*/\.step-000001\.deleted': .*not empty", told)) == 1
    assert len(re.findall(r"cannot delete '.*/\.step-000003\.deleted': .*not empty", told)) == 1
    assert len(re.findall(r"cannot delete '.*/step-000006': .*Permission denied", told)) == 1
    assert [path.name for path in list_checkpoints(folder)] == ["step-000006", "step-000008"]
    assert "checkpoint of step 8" in (Path(again.output) / "log.txt").read_text()


def test_what_is_left_of_the_very_checkpoint_is_not_written_into(again, monkeypatch):
    (checkpoint_folder(again.output) / ".step-000008.partial").mkdir()
    monkeypatch.setattr(retention, "remove", lambda path: None)
    with pytest.raises(OSError, match=r"cannot save '.*step-000008': .*File exists: '.*\.step-000008\.partial'"):
        trained(again)


def test_checkpoints_that_cannot_be_looked_at_are_the_users_mistake(again, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "step-000006")

    monkeypatch.setattr(Manifest, "read", fail)
    with pytest.raises(ValueError, match="Stale file handle: 'step-000006'"):
        Run.prepare(again)


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json"])
def test_folders_in_the_place_of_a_runs_files_are_refused_before_it_begins(again, name):
    (Path(again.output) / name).unlink(missing_ok=True)
    (Path(again.output) / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}' of the output folder is a folder, or may not be read: move it away"):
        Run.prepare(again)


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(again):
    path = checkpoint_folder(again.output) / "step-000006"
    flip(path / "run.json")
    with pytest.raises(ValueError, match=r"run.json' of the checkpoint is damaged"):
        Run.prepare(replace(again, resume=str(path)))
    assert path.is_dir()


def test_what_is_damaged_after_it_was_looked_at_is_refused_before_any_is_loaded(saved, copy):
    trainer = blank(saved)
    before = {name: value.clone() for name, value in trainer.engine.model.state_dict().items()}
    flip(copy / writer.FOLDER / "rank-0.safetensors")
    with pytest.raises(ValueError, match=r"rank-0.safetensors' of the checkpoint is damaged"):
        trainer.checkpoints.load(copy, trainer.engine)
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.model.state_dict().items())


def test_checkpoints_of_other_versions_and_steps_are_told_apart(again):
    path = checkpoint_folder(again.output) / "step-000006"
    shutil.copytree(path, path.with_name("step-000020"))
    with pytest.raises(Damaged, match=r"is of step 6, its folder of step 20"):
        Manifest.read(path.with_name("step-000020"))
    edit(manifests.FILE, lambda manifest: manifest.update(version=7))(path)
    with pytest.raises(ValueError, match=r"step-000006' has version 7; known is 1"):
        Run.prepare(again)
    (path / manifests.FILE).rename(path / "training.pt")
    with pytest.raises(ValueError, match="written by an earlier version of lasp"):
        Run.prepare(again)


class Evil:
    """What pickle makes a call of."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (MARK,)


MARK = "/tmp/lasp-checkpoints-ran-code"


def put(name: str, content: bytes | Callable[[Path], object]) -> Callable[[Path], None]:
    """A change of one file of a checkpoint, whose manifest is made to fit."""

    def change(path: Path) -> None:
        if callable(content):
            content(path / name)
        else:
            (path / name).write_bytes(content)
        seal(path)

    return change


def edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of what a JSON file says, with a manifest that fits."""

    def changed(path: Path) -> None:
        content = json.loads((path / name).read_text())
        content.pop("sha256", None)
        change(content)
        content = sealed(content) if name == manifests.FILE else content
        (path / name).write_text(json.dumps(content))
        if name != manifests.FILE:
            seal(path)

    return changed


def parts(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of every part of every tensor of the index."""
    return edit(writer.INDEX, lambda index: [change(p) for of in index["tensors"].values() for p in of["parts"]])


def tensors(**fields: object) -> Callable[[Path], None]:
    return edit(writer.INDEX, lambda index: [of.update(fields) for of in index["tensors"].values()])


def zip_bomb() -> bytes:
    import io
    import zipfile

    with zipfile.ZipFile(whole := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", b"\0" * (1 << 26))
    return whole.getvalue()


SHARD = f"{writer.FOLDER}/rank-0.safetensors"
HUGE = 1 << 40
ENTRY = {"size": 10, "sha256": "0" * 64}
HOSTILE: dict[str, Callable[[Path], object]] = {
    "a pickle for a shard": put(SHARD, pickle.dumps(Evil())),
    "a pickle for the index": put(writer.INDEX, pickle.dumps(Evil())),
    "a pickle for the manifest": lambda path: (path / manifests.FILE).write_bytes(pickle.dumps(Evil())),
    "a pickle for run.json": put("run.json", pickle.dumps(Evil())),
    "a zip bomb for a shard": put(SHARD, zip_bomb()),
    "a header of 2^63 bytes": put(SHARD, b"\xff" * 7 + b"\x7f" + b"{}"),
    "a shard that is a device": put(SHARD, lambda file: (file.unlink(), file.symlink_to("/dev/zero"))),
    "a shard that is elsewhere": put(SHARD, lambda file: file.rename(file.parent.parent / "a")),
    "a way out in the index": parts(lambda part: part.update(file="../../step-000006/state/rank-0.safetensors")),
    "a whole path in the index": parts(lambda part: part.update(file="/etc/passwd")),
    "a number for a file": parts(lambda part: part.update(file=7)),
    "a way out in the manifest": edit(manifests.FILE, lambda m: m["files"].update({"../../text.txt": ENTRY})),
    "a whole path in the manifest": edit(manifests.FILE, lambda m: m["files"].update({"/etc/passwd": ENTRY})),
    "no files in the manifest": edit(manifests.FILE, lambda m: m.update(files={})),
    "a list of files": edit(manifests.FILE, lambda m: m.update(files=[1])),
    "huge shapes": tensors(shape=[HUGE, HUGE]),
    "huge tensors": tensors(shape=[HUGE], parts=[{"offsets": [0], "sizes": [HUGE], "file": "rank-0.safetensors"}]),
    "thousands of dims": tensors(shape=[2] * 9_000),
    "negative sizes": parts(lambda part: part.update(sizes=[-size for size in part["sizes"]])),
    "offsets outside": parts(lambda part: part.update(offsets=[9999 for _ in part["sizes"]])),
    "fractions": parts(lambda part: part.update(sizes=[0.5 for _ in part["sizes"]])),
    "an unknown dtype": tensors(dtype="float128"),
    "an object for a dtype": tensors(dtype="load"),
    "holes": tensors(parts=[]),
    "brackets": put(writer.INDEX, b"[" * 100_000),
    "a long number": put("run.json", b'{"steps": ' + b"9" * 100_000 + b"}"),
    "a huge run.json": put("run.json", lambda file: os.truncate(file, 1 << 24)),
    "a list for run.json": put("run.json", b"[]"),
    "a list for config.json": put("config.json", b"[]"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_one_line_and_runs_nothing(saved, tmp_path, name):
    path = tmp_path / "run" / "checkpoints" / "step-000006"
    shutil.copytree(saved.checkpoint, path)
    HOSTILE[name](path)
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = replace(saved.config, output=str(tmp_path / "other"), resume=str(path), steps=8)
    with pytest.raises(ValueError, match="step-000006") as caught:
        trained(config)
    assert "\n" not in str(caught.value)
    assert not os.path.exists(MARK)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100 * (1 << 20 if sys.platform == "darwin" else 1 << 10)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_files_of_noise_whose_checksums_fit_are_refused_or_read_and_end_nothing(saved, copy):
    """R16: bytes overwritten, cut off, put in or left out at random places of any file but the manifest."""
    generator, told = random.Random(0), []
    whole = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != manifests.FILE}
    trainer = blank(saved)
    for number in range(1000):
        path = generator.choice(sorted(whole))
        content = bytearray(whole[path])
        for _ in range(generator.choice([1, 1, 4, 64])):
            place = generator.randrange(min(len(content), generator.choice([64, 1 << 12, 1 << 30])))
            noise = generator.randbytes(generator.choice([1, 1, 8]))
            content[place : place + generator.choice([0, len(noise), 2 * len(noise)])] = noise
        path.write_bytes(content[: generator.randrange(1, len(content))] if number % 10 == 0 else content)
        seal(copy)
        try:
            trainer.checkpoints.load(copy, trainer.engine)
        except ValueError as error:
            told.append(str(error))
        path.write_bytes(whole[path])
    assert 300 < len(told) < 1000
    assert not [line for line in told if "\n" in line]


def test_two_hundred_flipped_bits_are_refused_by_the_name_of_their_file(saved, copy):
    generator, content = random.Random(0), {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for _ in range(200):
        path = generator.choice(sorted(content))
        flip(path, generator.random())
        with pytest.raises(ValueError, match=re.escape(str(path.relative_to(copy)))):
            Manifest.read(copy).check()
        path.write_bytes(content[path])
    Manifest.read(copy).check()


def test_a_large_state_is_eight_files_alike_in_size_which_one_rank_reads_again(again, monkeypatch):
    """R15: they are compared side by side."""
    trainer = Trainer.start(Run.prepare(again), Ranks.join(again))
    monkeypatch.setattr(writer, "LEAST", 1 << 12)
    trainer.checkpoints.save(7, trainer.engine, False, trainer.kept)
    path = checkpoint_path(again.output, 7)
    sizes = [file.stat().st_size for file in sorted(path.glob("state/*.safetensors"))]
    assert len(sizes) == 8
    assert max(sizes) < 1.5 * min(sizes)
    expected = trainer.engine.model.state_dict()
    weights = read_weights(Manifest.read(path).check())
    assert weights.keys() == {name for name, _ in trainer.engine.model.named_parameters()}
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    other = Trainer.start(replace(Run.prepare(again), checkpoint=None), Ranks.join(again))
    assert other.checkpoints.load(path, other.engine) == 7
    one, two = (flatten(of.engine.state().optimizer) for of in (trainer, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    flip(path / "state" / "rank-0-5.safetensors")
    with pytest.raises(ValueError, match=r"rank-0-5.safetensors' of the checkpoint is damaged"):
        other.checkpoints.load(path, other.engine)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("place", ["the shard", "the folder"])
def test_a_save_that_fails_leaves_the_others_as_they_were(again, background, place, monkeypatch):
    resource = pytest.importorskip("resource")
    folder = checkpoint_folder(again.output)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run, limit = Run.prepare(replace(again, async_save=background)), resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = Trainer.start(run, Ranks.join(again))
    if place == "the folder":

        def full(path: Path, *_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(Path, "mkdir", full)
        wrong = r"step-000009': .*No space left.*/\.step-000009\.partial'"
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        wrong = r"step-000009': .*File too large.*\(rank 0\)"
    try:
        with pytest.raises(OSError, match=f"cannot save '.*{wrong}"):
            trainer.checkpoints.save(9, trainer.engine, True, trainer.kept)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sorted(os.listdir(folder)) == ["step-000003", "step-000006"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [9, 10]),
        ({"save_every": 4}, [4, 8, 9, 10]),
        ({"keep_last": 3}, [8, 9, 10]),
        ({"keep_last": 1, "save_every": 2}, [10]),
        ({"keep_last": 1, "keep_every": 3, "save_every": 1}, [3, 6, 9, 10]),
        ({"keep_every": 5}, [5, 9, 10]),
    ],
)
def test_which_checkpoints_stay(fields, expected):
    present = [checkpoint_path("run", step) for step in range(1, 11)]
    gone = superseded(present, TrainConfig(**fields))
    assert [checkpoint_step(path) for path in present if path not in gone] == expected


@pytest.mark.parametrize(
    ("run", "asked"),
    [
        ('{"save_every": 3, "steps": 9}', True),
        ('{"save_every": 4, "steps": 6}', True),
        ('{"save_every": 4, "steps": 9}', False),
        ('{"save_every": null, "steps": 9}', False),
        ('{"steps": 9}', True),
        ("{", True),
    ],
)
def test_what_a_run_was_asked_for_is_written_there_and_stays_where_that_cannot_be_read(tmp_path, run, asked):
    (tmp_path / "step-000006").mkdir()
    (tmp_path / "step-000006" / "run.json").write_text(run)
    assert was_asked(tmp_path / "step-000006") == asked


def test_where_the_old_ones_cannot_be_listed_the_new_one_is_there(again, monkeypatch, caplog):
    def fail(_: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(retention, "list_checkpoints", fail)
    assert trained(again).checkpoint.name == "step-000008"
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert re.search("cannot delete what is superseded in '.*checkpoints': .*Too many open files", told[0])


def test_time_asks_for_checkpoints_too(again):
    trained(replace(again, resume=None, overwrite=True, save_every=4, save_minutes=1e-9))
    assert sorted(os.listdir(checkpoint_folder(again.output))) == ["step-000004", "step-000007", "step-000008"]
    trained(replace(again, resume=None, overwrite=True, save_every=None, save_minutes=0))
    assert os.listdir(checkpoint_folder(again.output)) == ["step-000008"]


def test_copies_of_one_state_after_another_lie_in_the_same_memory():
    copies, state = Copies(), {"weight": torch.ones(3), "steps": torch.zeros(1, dtype=torch.int64)}
    first = copies.of(state)["weight"]
    state["weight"].mul_(2)
    assert first.tolist() == [1, 1, 1]
    assert copies.of(state)["weight"] is first
    assert first.tolist() == [2, 2, 2]
    assert copies.of({"weight": torch.ones(2)})["weight"].tolist() == [1, 1], "another layout"
    copies.close()


def test_a_rank_that_writes_nothing_copies_nothing():
    """Where ranks share no folder, all but the first."""
    copies = Copies()
    assert [copies.of({}) for _ in range(2)] == [{}, {}]


@pytest.mark.parametrize("background", [False, True])
def test_who_watches_is_told_which_rank_has_written_where_training_waits(again, background):
    trainer = Trainer.start(Run.prepare(replace(again, async_save=background)), Ranks.join(again))
    last = collectives.Last()
    with collectives.following(last):
        trainer.checkpoints.save(7, trainer.engine, True, trainer.kept)
    assert (last.count, last.name) == (1, "its part is written")


def test_who_has_not_written_in_the_background_is_not_told_as_one_who_has(again, monkeypatch):
    trainer, save_file = (
        Trainer.start(Run.prepare(replace(again, async_save=True)), Ranks.join(again)),
        writer.save_file,
    )
    last, begun, go_on = collectives.Last(), Event(), Event()

    def slow(*arguments: object) -> None:
        begun.set()
        go_on.wait()
        save_file(*arguments)

    monkeypatch.setattr(writer, "save_file", slow)
    trainer.checkpoints.save(7, trainer.engine, False, trainer.kept)
    with collectives.following(last), ThreadPoolExecutor(1) as pool:
        begun.wait()
        waits = pool.submit(trainer.checkpoints.close)
        time.sleep(0.2)
        assert (last.count, waits.done()) == (0, False)
        go_on.set()
        waits.result()
    assert last.count == 1


@pytest.mark.parametrize("saves", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_what_is_saved_in_the_background_is_the_state_at_the_call(again, saves):
    trainer = Trainer.start(Run.prepare(replace(again, async_save=True)), Ranks.join(again))
    for step in range(7, 7 + saves):
        trainer.step()
        expected = {name: value.clone() for name, value in trainer.engine.model.state_dict().items()}
        trainer.checkpoints.save(step, trainer.engine, step == 6 + saves, trainer.kept)
        for parameter in trainer.engine.model.parameters():
            parameter.data.add_(1.0)  # as training would, while the writer is at work
        path = checkpoint_path(again.output, step)
        trainer.checkpoints._wait()
        weights = read_weights(Manifest.read(path).check())
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.parametrize("name", ["step-000003", "step-000006", ""])
def test_export_gives_a_model_that_transformers_reads(again, tmp_path, name, capsys):
    folder = Path(again.output)
    source = folder / "checkpoints" / name if name else folder
    assert export_command([str(source), str(tmp_path / "model")]) == 0
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    weights = read_weights(Manifest.read(folder / "checkpoints" / (name or "step-000006")))
    assert all(torch.equal(read.state_dict()[key], value) for key, value in weights.items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token_id == 256
    assert "state" not in os.listdir(tmp_path / "model")
    assert export_command([str(source), str(tmp_path / "model")]) == 2
    assert export_command([str(tmp_path), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("to", ["nowhere", "empty"])
def test_no_link_is_exported_into(again, tmp_path, to):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").symlink_to(to)
    with pytest.raises(ValueError, match="model' exists already"):
        export(Path(again.output) / "checkpoints" / "step-000006", tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == ["empty", "model", "run"]


def test_a_model_that_was_exported_is_trained_on(again, tmp_path):
    assert export_command([again.output, str(tmp_path / "model")]) == 0
    config = replace(again, output=str(tmp_path / "on"), resume=None, model={"name": str(tmp_path / "model")})
    weights = read_weights(Manifest.read(checkpoint_folder(again.output) / "step-000006"))
    model = Run.prepare(config).model.build(1, torch.float32).state_dict()
    assert all(torch.equal(model[name], value) for name, value in weights.items())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_while_two_ranks_save_lose_nothing_and_the_run_is_the_undisturbed_one(tmp_path):
    subprocess.run([sys.executable, "-m", "tests.killed_saves", str(tmp_path), "50"], check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["in a save"] >= 25
    assert (found["kills"], found["lost"], found["damaged"], found["equal"]) == (50, 0, 0, True)
