"""The benchmark command on a small shape: that it runs and what it writes, not how fast anything is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp.launch.bench import contest, convergence, main, memory, wrapped
from lasp.launch.bench.case import Case
from lasp.launch.bench.kernels import RECURRENCES, Shape
from lasp.launch.bench.plan import plan_at
from lasp.launch.bench.timing import compared
from lasp.launch.network import lacking
from lasp.launch.plan.candidate import candidates
from lasp.launch.simulate.machine import Machine

SMALL = Shape(tokens=256, heads=2, dim=32)


@pytest.mark.slow
def test_bench_kernels_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    shape = ["--tokens", "512", "--heads", "1", "--dim", "32", "--repeat", "1"]
    assert main(["kernels", "--recurrences", "linear_attention", *shape, "--json", str(file)]) == 0
    found = json.loads(file.read_text())["recurrences"]["linear_attention"]
    assert found["times_faster"] == found["seconds"][found["best_peer"]] / found["seconds"]["lasp"]
    assert set(found["peak_bytes"]) == {"lasp", found["best_peer"]}
    assert 0 < found["share_of_matmul_peak"] < 1
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"lasp is (\d+\.\d\d times (faster|slower) than|as fast as) transformers", told)


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        (2.049, "2.05 times faster than a"),
        (0.91, "1.10 times slower than a"),
        (0.5, "2.00 times slower than a"),
        (1.002, "as fast as a"),
        (0.997, "as fast as a"),
    ],
)
def test_what_is_slower_is_called_slower(speed: float, words: str) -> None:
    assert compared(speed, "a") == words


@pytest.mark.parametrize(("seeds", "words"), [(1, "mean of 1 seed"), (2, "mean of 2 seeds")])
def test_one_seed_is_one(seeds: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"mixer": "linear", "pattern": "pure", "loss": 1.0}
    convergence.show({"steps": 3, "seeds": seeds, "runs": [run]})
    assert re.search(rf"{words}\b", " ".join(capsys.readouterr().out.split()))


@pytest.mark.parametrize("name", RECURRENCES)
def test_our_contestant_and_the_peer_compute_the_same(name: str) -> None:
    """A benchmark of two different things would measure nothing."""
    recurrence = RECURRENCES[name]
    inputs = recurrence.inputs(SMALL)
    ours, (peer, *_) = recurrence.ours(*inputs), (recurrence.peer(*inputs, chunk) for chunk in recurrence.chunks)
    if name == "linear_attention":  # Mamba-2 multiplies the values by dt = -log_decay
        ours = recurrence.ours(*inputs[:2], inputs[2] * -inputs[3].unsqueeze(-1), inputs[3])
    torch.testing.assert_close(ours, peer, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_bench_attention_measures_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    shape = ["--ranks", "2", "--tokens", "256", "--heads", "2", "--dim", "16", "--repeat", "1"]
    assert main(["attention", *shape, "--json", str(file)]) == 0
    run = json.loads(file.read_text())["ranks"]["2"]
    assert run["times_faster"] == run["seconds"][run["best_peer"]] / run["seconds"]["lasp ring, zigzag"]
    assert len(run["seconds"]) == 6
    assert "2 ranks: our ring on zigzag is" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_bench_convergence_trains_every_mixer_and_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plot = tmp_path / "figures.json", tmp_path / "losses.png"
    assert main(["convergence", "--mixers", "linear", "--steps", "2", "--json", str(file), "--plot", str(plot)]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert [(run["mixer"], run["pattern"]) for run in runs] == [
        ("linear", "pure"),
        ("linear", "1/4 hybrid"),
        ("softmax", "pure"),
    ]
    assert all(len(run["curves"][0]) == 2 and 5 < run["loss"] < 6 for run in runs)  # about ln 257 before it has learnt
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"{runs[0]['loss']:.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_convergence_says_why_a_run_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown mixer 'none'"):
        main(["convergence", "--mixers", "none", "--steps", "1"])


@pytest.mark.timeout(180)
@pytest.mark.slow
def test_bench_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    emulated = [] if lacking() else ["--emulate", "rate=1gbit"]
    file, plot = tmp_path / "figures.json", tmp_path / "scans.png"
    shape = ["--ranks", "2", "--mib", "1", "--scans", "gather", "ring", "heads", "--repeat", "1", "--plot", str(plot)]
    layers = ["--layers", "decay", "softmax", "--tokens", "64", "--heads", "2"]
    assert main(["scan", *shape, *layers, *emulated, "--json", str(file)]) == 0
    ((wired,), (cell,)) = (found := json.loads(file.read_text())["networks"]), found[0]["cells"]
    assert wired["network"] == ("1gbit" if emulated else "loopback")
    gathered, hopped = cell["scans"]
    assert (hopped["received"], hopped["steps"]) == (1 << 20, 1)
    assert gathered["received"] == (1 << 20) + 16 * 128 * 4, "and a transfer of 16 heads of 128 channels"
    rows = {(row["layer"], row["method"]): row for row in found[0]["layers"]}
    assert [*rows] == [
        *(("decay", how) for how in ("gather", "ring", "heads")),
        *(("softmax", how) for how in ("ring", "gather", "ulysses")),
    ]
    state, tokens = 2 * 128 * 128 * 4, 64 * 2 * 128 * 4
    assert rows["decay", "ring"]["received"] == state, "one way"
    assert rows["decay", "heads"]["received"] == 2 * 5 * tokens // 2, "half of q, k, v, gates and output, and back"
    assert rows["softmax", "ulysses"]["received"] == 2 * 4 * tokens // 2
    assert all(row["flight"] > 0 and row["predicted"] > 0 and row["seconds"] > 0 for row in rows.values())
    told = capsys.readouterr().out
    assert "| 1 | ring" in told
    assert "| softmax | ulysses | 0.2 | 4 |" in told
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "of 2 predictions within 25 %" in told


def test_bench_wrapped_steps_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    shape = ["--layers", "1", "--heads", "2", "--tokens", "32"]
    assert main(["wrapped", *shape, "--repeat", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["times_faster"] == found["seconds"]["transformers"] / found["seconds"]["lasp"]
    assert "| transformers |" in capsys.readouterr().out
    plain, own = wrapped.steps(layers=1, heads=2, tokens=32)
    torch.testing.assert_close(own(), plain())


def test_the_longest_sequence_follows_from_two_lengths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {"plain": (2**29, 2**18), "offload": (2**29, 2**14)}  # bytes at 512 tokens, and for each one more

    def measured(ranks: int, lever: str, tokens: int, tile: int) -> tuple[int, int]:
        layers = peaks[lever][0] + (tokens - 512) * peaks[lever][1]
        return layers, max(layers, 2**30)  # the end of backward

    monkeypatch.setattr(memory, "_peaks", measured)
    assert main(["memory", "--part", "lengths", "--ranks", "1", "2", "--gib", "1", "--levers", *peaks]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"| plain | 2560 | 5120 |", "| offload | 33280 | 66560 |"} < {*lines}
    assert main(["memory", "--part", "lengths", "--ranks", "2", "--gib", "1", "--levers", "plain", "--train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "plain, trained on 2 x 2508 tokens: 1.000 GiB per rank" in lines
    assert "plain, trained on 2 x 2636 tokens: 1.019 GiB per rank" in lines


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bench_memory_measures_the_loss_and_a_lever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    small = ["--loss", "20000", "600", "32", "--ranks", "1", "--levers", "offload", "--tokens", "64", "96"]
    assert main(["memory", *small, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["loss"]["fused"] < 40e6 < 90e6 < found["loss"]["plain"]  # one tile, and the logits twice
    (cell,) = found["cells"]
    assert 5e8 < cell["peaks"][0] < 2e9  # weights, gradients and AdamW's states
    assert "| offload |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scan", "--ranks", "1"], "argument --ranks: must be a whole number of at least 2, got '1'"),
        (["scan", "--mib", "0"], "argument --mib: must be a whole number of at least 1, got '0'"),
        (["scan", "--repeat", "none"], "argument --repeat: must be a whole number of at least 1, got 'none'"),
        (["scan", "--emulate", "fast"], "argument --emulate: a network is emulated by its rate alone"),
        (["step", "--layers", "6"], "argument --layers: must be a multiple of 4, got '6'"),
        (["step", "--tokens", "0"], "argument --tokens: must be a whole number of at least 1, got '0'"),
        (["scaling", "--minutes", "nan"], "argument --minutes: must be a number above 0, got 'nan'"),
    ],
)
def test_wrong_options_are_told_before_ranks_start(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_network_that_cannot_be_made_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr("shutil.which", lambda tool: tool)
    with pytest.raises(SystemExit, match="2"):
        main(["scan", "--emulate", "rate=1gbit"])
    assert "no network can be emulated here: network namespaces need root" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_chip_writes_what_a_plan_reads(tmp_path: Path) -> None:
    file = tmp_path / "chip.json"
    assert main(["chip", "--models", "gla", "qwen3", "--tokens", "64", "--repeat", "1", "--json", str(file)]) == 0
    on = Machine.named(str(file))
    for chip in (on.among(1, 1), on.among(2, 2)):
        assert {*chip.mixers} == {"GatedLinearAttention", "Qwen3Attention"}
        assert all(share > 0 and back > 0 for share, back in chip.mixers.values())
        assert chip.pace > 0


def test_a_plan_is_brought_to_the_pace_of_the_machine() -> None:
    case, cpu = Case("lightning", "L", tokens=64), Machine.named("cpu")
    as_told = plan_at(case, cpu, 0.3)  # nobody looked at a pace
    slower = plan_at(case, replace(cpu, chip=replace(cpu.chip, pace=0.2)), 0.3)
    assert slower["seconds"] == pytest.approx(1.5 * as_told["seconds"])
    assert sum(slower["items"].values()) == pytest.approx(1.5 * sum(as_told["items"].values()))
    assert slower["bytes"] == as_told["bytes"]


def test_a_choice_is_held_against_the_fastest_that_fits() -> None:
    held = contest.Contest("lightning", "L", ranks=2, seq=256, mb=100)
    made = {one.sp: held.case(one) for one in candidates(held.job, "contiguous", ["ring"], ["ring"], ["ddp"], ["none"])}
    assert {sp: (case.ranks, case.dp, case.batches, case.tokens) for sp, case in made.items()} == {
        1: (1, 2, 1, 256), 2: (2, 1, 2, 128)
    }  # fmt: skip
    tried = [{"candidate": name, "seconds": seconds, "bytes": 1e6 * mb}
             for name, seconds, mb in (("a", 1.0, 90), ("b", 0.9, 100), ("c", 0.5, 101))]  # fmt: skip
    chosen, fastest = contest.choice({"mb": held.mb, "candidates": tried})
    assert chosen is not None
    assert fastest is not None
    assert (chosen["candidate"], fastest["candidate"]) == ("a", "b")
    assert contest.choice({"mb": 1, "candidates": tried}) == (tried[0], None)
    assert contest.choice({"mb": 1, "candidates": []}) == (None, None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_plan_trains_what_it_chooses_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "--part", "choice", "--contests", "5", "--repeat", "1", "--json", str(file)]) == 0
    (held,) = json.loads(file.read_text())["choices"]
    assert len(held["candidates"]) == 6, "three levers, for tiles do nothing, and two ways to lay out two ranks"
    assert all(one["bytes"] > 0 and one["seconds"] > 0 for one in held["candidates"])
    assert "the choice fits and is within 5 % of the fastest in" in capsys.readouterr().out
