"""`lasp train`: configuration files and overrides, one-line errors, and the ranks it starts."""

import ipaddress
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lasp.launch import cli
from lasp.launch.configuration import RECIPES, read_config
from lasp.launch.data import main as main_data
from lasp.launch.train import as_rank, main
from lasp.train.metrics import read_metrics

TINY = """
output = "{folder}/run"
steps = 4
device = "cpu"
dtype = "float64"

[model]
num_hidden_layers = 2
hidden_size = 32
intermediate_size = 64
num_attention_heads = 2

[data]
source = "{folder}/text.txt"
seq_len = 65

[sample]
prompt = "To be"
tokens = 5
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 40)
    (tmp_path / "tiny.toml").write_text(TINY.format(folder=tmp_path))
    return str(tmp_path / "tiny.toml")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=110)


def error_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("lasp: error:")]


def test_overrides_win_over_the_file(recipe):
    config = read_config([recipe, "--sp", "4", "--optimizer.lr=0.5", "--model.hidden_size", "64", "--resume", "latest"])
    assert (config.sp, config.optimizer.lr, config.resume, config.steps) == (4, 0.5, "latest", 4)
    assert (config.model["hidden_size"], config.model["num_hidden_layers"], config.data.seq_len) == (64, 2, 65)


def test_every_recipe_is_a_configuration_known_by_its_name():
    names = [path.stem for path in RECIPES.glob("*.toml")]
    assert "demo" in names
    assert all(read_config([name]).output == f"runs/{name}" for name in names)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml"], ["nowhere.toml", "demo"]),
        (["{recipe}", "--stepz", "3"], ["stepz"]),
        (["{recipe}", "--data.sequence", "3"], ["data.sequence"]),
        (["{recipe}", "--config", "{folder}/unknown.toml"], ["optimizer", "beta"]),
        (["{recipe}", "--config", "{folder}/broken.toml"], ["broken.toml", "line 1"]),
        ([], ["CONFIG is missing", "demo"]),
        (["--steps", "3"], ["CONFIG is missing", "demo"]),
        (["{folder}/empty.toml"], ["empty.toml", "sets nothing"]),
        (["{recipe}", "--config", "{folder}/missing.toml"], ["no configuration file", "missing.toml"]),
        (["{recipe}", "--config={folder}/missing.toml"], ["no configuration file", "missing.toml"]),
        (["{folder}/latin.toml"], ["latin.toml", "utf-8"]),
        (["{folder}/nested.toml"], ["nested.toml"]),
        (["{recipe}", "--device", "tpu"], ["device", "'tpu'", "cuda"]),
        (["{recipe}", "--device", "mps"], ["device", "'mps'"]),
        (["{recipe}", "--device", ""], ["device", "''"]),
        (["{recipe}", "--seed", "18446744073709551616"], ["seed", "2^64", "18446744073709551616"]),
        (["{recipe}", "--seed", "-1"], ["seed", "-1"]),
        (["{recipe}", "--output", ""], ["output must name a folder"]),
        (["{recipe}", "--data.source", ""], ["data.source must name a text"]),
        (["{recipe}", "--model.num_hidden_layers", "0"], ["num_hidden_layers", "at least 1, got 0"]),
        (["{recipe}", "--model.hidden_size=-32"], ["hidden_size", "at least 1, got -32"]),
        (["{recipe}", "--model.mixer_options", "5"], ["mixer_options", "got 5"]),
        (["{recipe}", "--steps", "many"], ["steps", "many"]),
        (["{recipe}", "--layout", "spiral"], ["layout", "spiral", "zigzag"]),
        (["{recipe}", "--sp", "66"], ["65", "66"]),
        (["{recipe}", "--model.num_attention_heads", "5"], ["32", "5"]),
        (["{recipe}", "--model.heads", "5"], ["heads"]),
        (["{recipe}", "--data.source", "{folder}/missing.txt"], ["missing.txt", "No such file"]),
        (["{recipe}", "--data.seq_len", "9999"], ["1721 tokens", "9999"]),
        (["{recipe}", "--output", "{folder}/text.txt"], ["text.txt", "is a file, not a folder"]),
        (["{recipe}", "--data.tokenizer", "{folder}/text.txt"], ["text.txt"]),
        (["{recipe}", "--resume", "{folder}/step-000001"], ["step-000001"]),
        (["{recipe}", "--engine", "fsdp"], ["engine", "fsdp", "fsdp2"]),
        (["{recipe}", "--engine", "zero3", "--optimizer.name", "muon"], ["zero3", "flat parameters", "muon"]),
        (["{recipe}", "--engine", "fsdp2", "--optimizer.name", "adafactor"], ["adafactor", "whole matrices", "fsdp2"]),
        (["{recipe}", "--engine", "zero1"], ["zero1", "dtype", "float64"]),
        (["{recipe}", "--accumulation", "0"], ["accumulation must be at least 1, got 0"]),
        (["{recipe}", "--reduce_dtype", "float16"], ["reduce_dtype", "float16"]),
        (["{recipe}", "--steps", "0"], ["steps must be at least 1, got 0"]),
        (["{recipe}", "--save_every", "0"], ["save_every must be at least 1, got 0"]),
        (["{recipe}", "--data.packing", "best_fit"], ["packing", "best_fit", "first_fit"]),
        (["{recipe}", "--data.field", ""], ["data.field must name a field"]),
        (["{recipe}", "--data.tokenizer", ""], ["data.tokenizer must name a tokenizer"]),
        (["{recipe}", "--data.tokenizer", "{folder}"], ["no tokenizer can be read"]),
        (["{recipe}", "--data.batch_size", "0"], ["data.batch_size must be at least 1, got 0"]),
        (["{recipe}", "--config", "{folder}/shares.toml"], ["data.source needs positive shares"]),
        (["{recipe}", "--config", "{folder}/little.toml"], ["less than 1/1024"]),
        (["{recipe}", "--data.source", "{folder}/binary.txt"], ["binary.txt", "NUL byte at 3"]),
        (["{recipe}", "--data.source", "/dev/zero"], ["/dev/zero", "neither a file nor a folder"]),
        (["{recipe}", "--data.source", "{folder}/pipe"], ["pipe", "neither a file nor a folder"]),
        (["{recipe}", "--data.tokenizer", "{folder}/pipe.json"], ["pipe.json", "it is no file"]),
        (["{recipe}", "--data.source", "{folder}/rows.jsonl"], ["rows.jsonl", "line at byte 0", "data.field", "body"]),
        (["{recipe}", "--validation.fraction", "1"], ["validation.fraction must lie in [0, 1), got 1"]),
        (["{recipe}", "--validation.fraction", "0.001"], ["what is held out of data.source", "0 documents"]),
        (["{recipe}", "--validation.fraction", "0.1", "--validation.source", "stdlib"], ["exclude each other"]),
        (["{recipe}", "--validation.source", "{folder}/nowhere"], ["nowhere", "No such file"]),
        (["{recipe}", "--validation.every", "0"], ["validation.every must be at least 1, got 0"]),
        (["{recipe}", "--validation.sequences", "0"], ["validation.sequences must be at least 1, got 0"]),
        (["{recipe}", "--lora.rank=-1"], ["lora.rank must not be negative, got -1"]),
        (["{recipe}", "--lora.rank", "2", "--lora.target_modules", "nowhere"], ["nowhere"]),
        (["{recipe}", "--lora.alpha", "0"], ["lora.alpha must be positive, got 0"]),
        (["{recipe}", "--optimizer.name", "adam"], ["name", "adam", "adamw"]),
        (["{recipe}", "--optimizer.lr", "nan"], ["optimizer.lr", "nan"]),
        (["{recipe}", "--optimizer.lr", "1e-5"], ["0 <= min_lr <= lr"]),
        (["{recipe}", "--optimizer.schedule", "steps"], ["schedule", "wsd"]),
        (["{recipe}", "--optimizer.decay_steps", "0"], ["optimizer.decay_steps must be at least 1, got 0"]),
        (["{recipe}", "--optimizer.warmup_steps=-1"], ["optimizer.warmup_steps must not be negative, got -1"]),
        (["{recipe}", "--optimizer.clip", "0"], ["optimizer.clip must be positive, got 0"]),
        (["{recipe}", "--optimizer.betas", "[0.9, 1.0]"], ["optimizer.betas", "1.0"]),
        (["{recipe}", "--optimizer.weight_decay=-0.1"], ["optimizer.weight_decay", "-0.1"]),
        (["{recipe}", "--sample.tokens", "0"], ["sample.tokens must be at least 1, got 0"]),
        (["{recipe}", "--sample.temperature=-1"], ["sample.temperature must not be negative"]),
        (["{recipe}", "--overwrite", "true", "--resume", "latest"], ["contradict each other"]),
        (["{recipe}", "--config", "{folder}/named.toml"], ["no tokenizer can be read", "empty"]),
        (["{recipe}", "--model.kind", "gpt"], ["model.kind", "gpt"]),
        (["{recipe}", "--memory.mlp_tile", "0"], ["memory.mlp_tile must be at least 1, got 0"]),
        (["{recipe}", "--memory.checkpoint_every", "0"], ["memory.checkpoint_every must be at least 1, got 0"]),
        (["{recipe}", "--memory.offload", "true"], ["memory.offload moves what memory.checkpoint_every keeps: set it"]),
        (["{recipe}", "--dp", "0"], ["dp must be at least 1, got 0"]),
        (["{recipe}", "--output", "o" * 300], ["cannot write to the output folder", "File name too long"]),
        (["{recipe}", "--output", "o\udcff"], ["output must be UTF-8", "udcff"]),
        (["{recipe}", "--resume", "r\udcff"], ["resume must be UTF-8", "udcff"]),
        (["{recipe}", "--data.source", "s\udcff"], ["data.source must be UTF-8", "udcff"]),
        (["{recipe}", "--validation.source", "v\udcff"], ["validation.source must be UTF-8", "udcff"]),
        (["{recipe}", "--data.cache", "c\udcff"], ["data.cache must be UTF-8", "udcff"]),
        (["{recipe}", "--data.cache", ""], ["data.cache must name a folder"]),
        (["{recipe}", "--resume", ""], ['resume must name a checkpoint, or "latest"']),
        (["{recipe}", "--profile", "99999:100000"], ["profile must begin at one of the", "99999:100000"]),
        (["{recipe}", "--elastic", "true"], ["elastic = true needs dp"]),
        (["{recipe}", "--timeout", "0"], ["timeout must be positive and at most 604800, got 0"]),
        (["{recipe}", "--timeout", "1e300"], ["timeout must be positive and at most 604800, got 1e+300"]),
        (["{recipe}", "--restarts", "1", "--overwrite", "true"], ["restarts = 1 goes on from the newest checkpoint"]),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(recipe, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.delattr("lasp.launch.train._train")  # and no step, nor a rank
    monkeypatch.delattr("lasp.launch.train._start_ranks")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "unknown.toml").write_text("[optimizer]\nbeta = 3\n")
    (tmp_path / "broken.toml").write_text("a = = 3\n")
    (tmp_path / "empty.toml").write_text("# nothing yet\n")
    (tmp_path / "latin.toml").write_bytes(b'output = "\xe9"\n')
    (tmp_path / "shares.toml").write_text(f'[data.source]\n"{tmp_path}/text.txt" = 0.5\nstdlib = 0\n')
    (tmp_path / "little.toml").write_text(f'[data.source]\n"{tmp_path}/text.txt" = 1\nstdlib = 1e-6\n')
    (tmp_path / "named.toml").write_text(f'[model]\nname = "{tmp_path}/empty"\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(b"abc\0")
    (tmp_path / "rows.jsonl").write_text('{"body": "To be"}\n')
    (tmp_path / "nested.toml").write_text("a = " + "[" * 5000)
    assert main([argument.format(recipe=recipe, folder=tmp_path) for argument in arguments]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("lasp: error: ")
    assert stderr.count("\n") == 1
    assert all(part in stderr for part in said), stderr


@pytest.mark.parametrize(
    ("device", "sp", "there", "said"),
    [
        ("cuda", 1, 0, "torch finds no GPU here"),
        ("cuda", 4, 2, "4 ranks of this machine need a GPU each, torch finds 2"),
        (None, 4, 1, "4 ranks of this machine need a GPU each, torch finds 1"),
    ],
)
def test_gpus_that_are_not_there_are_missed_before_ranks_start(recipe, capsys, monkeypatch, device, sp, there, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    config = Path(recipe)
    config.write_text(config.read_text().replace('device = "cpu"\n', f'device = "{device}"\n' if device else ""))
    assert main([recipe, "--sp", str(sp)]) == 2
    stderr = capsys.readouterr().err
    assert said in stderr
    assert stderr.count("\n") == 1


def test_help_has_the_text_of_every_field(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in (
        "Optimizer steps in all",
        "Folder of the token files",
        "Learning rate of the last step",
        "Text to continue",
    ):
        assert text in told


def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_taken(recipe, tmp_path, capsys):
    assert main([recipe, "--save_every=2"]) == 0
    shard = tmp_path / "run" / "checkpoints" / "step-000004" / "state" / "rank-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    assert main([recipe, "--steps=8", "--resume=latest"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"rank-0.safetensors' of the checkpoint has \d+ bytes; .*: going on from step-000002", told), told
    assert [step.step for step in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000008" / "state")
    assert main([recipe, "--steps=9", "--resume=latest"]) == 2
    assert re.fullmatch(r"lasp: error: '.*step-000008/state/.*' .*\n", capsys.readouterr().err)


def test_a_run_that_is_over_and_started_again_says_so_and_ends_well(recipe, tmp_path, capsys, monkeypatch):
    """As by a scheduler, or by torchrun where a rank was killed at the very end: nothing is trained any more."""
    assert main([recipe]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr("lasp.launch.train.run_ranks", None)
    monkeypatch.setattr("lasp.train.loop.train", None)
    for start in (main, as_rank):
        capsys.readouterr()
        assert start([recipe, "--resume=latest", *["--sp=2"] * (start is main)]) == 0
        told = f"nothing is left to do: {tmp_path}/run/checkpoints/step-000004 has done the 4 steps of this run\n"
        assert capsys.readouterr().out == told
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert main([recipe, "--resume=latest", "--steps=3"]) == 2


def test_a_checkpoint_of_another_model_is_refused_before_ranks_start(recipe, tmp_path, capsys):
    assert main([recipe]) == 0
    checkpoint = f"{tmp_path}/run/checkpoints/step-000004"
    capsys.readouterr()
    arguments = [recipe, "--sp=2", "--steps=8", "--resume", checkpoint, "--model.intermediate_size=96"]
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "intermediate_size is 64 there and 96 here" in stderr
    assert stderr.count("\n") == 1


def test_data_is_built_ahead_of_a_training(recipe, tmp_path, capsys):
    assert main_data(["build", recipe]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/text.txt: 27 sequences of 65" in told
    assert len(list((tmp_path / "run" / "tokens").glob("*.tokens"))) == 1
    assert main_data(["build", recipe, "--data.source", "nowhere.txt"]) == 2
    assert main_data([]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.timeout(120)
def test_the_command_starts_ranks_whose_losses_are_those_of_one_process(recipe, tmp_path, capfd):
    assert main([recipe, "--output", f"{tmp_path}/alone"]) == 0
    capfd.readouterr()
    assert main([recipe, "--sp", "2"]) == 0
    told = capfd.readouterr()
    alone, together = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "run"))
    assert [m.loss for m in together] == pytest.approx([m.loss for m in alone], rel=1e-9)
    assert [m.grad_norm for m in together] == pytest.approx([m.grad_norm for m in alone], rel=1e-9)
    for result in ("metrics.jsonl", "loss.png", "checkpoints/step-000004"):
        assert f"{tmp_path}/run/{result}" in told.out
        assert (tmp_path / "run" / result).exists()
    assert told.out.count("The model continues 'To be'") == 1
    assert not error_lines(told.err)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_of_2_x_2_x_2_ranks_has_its_heads_and_all_levers_and_the_losses_are_those_of_one_process(recipe, tmp_path):
    """dp x sp x tp, two micro-batches a step of packed documents."""
    verse = "To be, or not to be, that is the question.\n" * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": verse[: 5 + 17 * n % 90]}) for n in range(100)))
    data = [f"--data.source={tmp_path}/rows.jsonl", "--data.packing=first_fit", "--data.seq_len=37", "--steps=10"]
    model = ["--model.pattern", '["gated_deltanet", "softmax"]', "--model.num_attention_heads=4"]
    levers = ["--memory.fuse_loss=true", "--memory.mlp_tile=8", "--memory.checkpoint_every=1"]
    assert main([recipe, *data, *model, "--data.batch_size=4", f"--output={tmp_path}/alone"]) == 0
    assert main([recipe, *data, *model, *levers, "--dp=2", "--sp=2", "--tp=2", "--accumulation=2"]) == 0
    alone, together = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "run"))
    assert len(alone) == 10
    assert [m.loss for m in together] == pytest.approx([m.loss for m in alone], rel=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readme_fine_tunes_validates_resumes_elsewhere_and_loads_in_plain_peft(tmp_path, monkeypatch):
    """The words of README.md, but for the length of sequences."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lasp.train.data.tokenizer import ByteTokenizer
    from tests.hf_models import configuration

    section = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").partition("## Fine-tuning\n")[2]
    monkeypatch.chdir(tmp_path)
    config = configuration("qwen3_next")
    config.vocab_size = 300
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("my-hybrid")
    ByteTokenizer().save(Path("my-hybrid"))
    tokenizer = AutoTokenizer.from_pretrained("my-hybrid")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    tokenizer.save_pretrained("my-hybrid")
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}! " * 9}] for n in range(99)]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    text = section.partition("```toml\n")[2].partition("```")[0]
    Path("tune.toml").write_text(text.replace("seq_len = 4096", "seq_len = 128"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # ranks of the CPU, of which there are enough
    commands = re.findall(r"^    ((?:lasp|python) .*)$", section.partition("\n## ")[0], re.MULTILINE)
    assert len(commands) == 3
    told = [
        subprocess.run(command, shell=True, env=environment, capture_output=True, text=True) for command in commands
    ]
    assert [(run.returncode, run.stderr if run.returncode else "") for run in told] == [(0, "")] * 3
    steps = read_metrics(Path("runs/tuned/metrics.jsonl"))
    assert [step.step for step in steps] == list(range(1, 41))
    held_out = {step.step: step.validation["chats.jsonl"] for step in steps if step.validation}
    assert held_out.keys() == {20, 40}
    assert held_out[40] < held_out[20]
    assert "held out" in told[0].stdout
    assert "lora_A" in told[2].stdout


FAULT = """
import os, time

del os.sched_getaffinity  # as on macOS
if os.environ.get("RANK") == "1":
    from lasp.train.loop import Trainer

    def step(self, step=Trainer.step):
        if self.steps_done == 2:
            open(os.environ["AT_WORK"], "w").close()
            for _ in range(600):
                time.sleep(0.1)
                if not os.path.exists(os.environ["AT_WORK"]):
                    break
            raise ValueError("the cause")
        return step(self)

    Trainer.step = step
"""
"""A sitecustomize.py: rank 1 waits before the third step until it was looked at, and fails."""


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and renames the host in a namespace")
def test_ranks_at_work_listen_to_this_machine_only_and_the_one_that_fails_is_named(recipe, tmp_path):
    """Where the name of the host does not resolve, too, and where it is left as it is if that takes rights we lack."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "temporary").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAULT)
    at_work, paths = tmp_path / "at-work", [str(tmp_path / "fault"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "AT_WORK": str(at_work), "TMPDIR": str(tmp_path / "temporary")}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    rename = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*rename, "true"], capture_output=True).returncode:
        rename = []
    command = [*rename, sys.executable, "-m", "lasp.launch.cli", "train", recipe, "--sp", "2"]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as run:
        while not at_work.exists() and run.poll() is None:
            time.sleep(0.1)
        addresses = [address for pid in descendants(run.pid) for address in listening(pid)]
        at_work.unlink(missing_ok=True)
        stderr = run.communicate(timeout=60)[1]
    assert addresses
    assert all(address in ("127.0.0.1", "::1") for address in addresses), addresses
    assert run.returncode == 1
    assert re.fullmatch(r"lasp: error: rank 1: step 3: the cause \(ValueError at .*\)\n", stderr), stderr
    assert [name for name in os.listdir(tmp_path / "temporary") if not name.startswith("torchinductor")] == []


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in descendants(int(child)))]


def listening(pid: int) -> list[str]:
    """The addresses at which a process waits for TCP connections."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()]
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                # Words of four bytes, each in the order of this machine.
                raw = bytes.fromhex(fields[1].partition(":")[0])
                raw = b"".join(raw[i : i + 4][:: -1 if sys.byteorder == "little" else 1] for i in range(0, len(raw), 4))
                found.append(str(ipaddress.ip_address(raw)))
    return found


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_of_torchrun_report_a_user_error_once(recipe):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lasp.launch.train")
    done = run(*torchrun, recipe, "--sp", "3")
    assert done.returncode != 0
    assert len(error_lines(done.stderr)) == 1, done.stderr


@pytest.mark.parametrize(
    ("codes", "code"), [([1, 70, 0], 0), ([1, 1, 1], 1), ([2], 2), ([1, 75], 75), ([130], 130), ([1, 143], 143)]
)
def test_ranks_that_fail_start_again_from_the_last_checkpoint(recipe, capsys, monkeypatch, codes, code):
    started = []

    def run_ranks(module: str, arguments: list[str], size: int, patience: float) -> int:
        started.append("--resume=latest" in arguments)
        return codes[len(started) - 1]

    monkeypatch.setattr("lasp.launch.train.run_ranks", run_ranks)
    assert main([recipe, "--sp", "2", "--restarts", "2"]) == code
    assert started == [False, True, True][: len(codes)]
    assert capsys.readouterr().err.count("starting again from the last checkpoint; restarts left: ") == len(codes) - 1


def test_lasp_knows_its_subcommands(capsys, monkeypatch):
    assert cli.main([]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in cli.COMMANDS)
    assert cli.main(["trian"]) == 2
    known = ", ".join(cli.COMMANDS)
    assert capsys.readouterr().err == f"lasp: error: unknown command 'trian'; choose from {known}\n"
    monkeypatch.setitem(cli.COMMANDS, "echo", cli.Command("lasp.launch.train", "for this test"))
    assert cli.main(["echo", "nowhere.toml"]) == 2


@pytest.mark.timeout(120)
def test_a_mistake_of_one_rank_ends_all_and_is_told_by_the_first(recipe):
    """Two ranks started by hand, as under Slurm; only the second is given an unknown key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank, extra in enumerate(([], ["--stepz", "3"])):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "lasp.launch.train", str(recipe), "--sp", "2", *extra]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "stepz" in told[0]
    assert "(rank 1 of 2)" in told[0]
