"""The benchmarks of Triton's kernels: what can be seen of them without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

import tests.interpreter  # noqa: F401 - before the kernels are imported
from lasp.launch.bench import cuda, main
from lasp.launch.bench.compilation import SHARED_LIMITS, beyond, table
from lasp.launch.bench.kernels import Shape
from lasp.launch.bench.mixers import MIXERS, Mixer
from lasp.launch.bench.timing import wall_seconds

SMALL = Shape(1, 70, 1, 16)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    """KDA launches all of them. In a process of its own: here kernels are the interpreter's."""
    file = tmp_path / "figures.json"
    what = ["--mixers", "KDA", "--dims", "128", "--archs", "90", "--json", str(file)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "lasp.launch.bench", "kernels", "--compile-only", *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(file.read_text())["kernels"]
    decay = {"sum_gates", "carry", "carry_back", "attend", "grad_values", "grad_keys"}
    assert {kernel["kernel"] for kernel in kernels} == decay | {"solve", "grad_solve"}
    assert [beyond(kernel) for kernel in kernels] == [{}] * len(kernels)
    assert all(0 < kernel["archs"]["90"]["registers"] <= 255 for kernel in kernels)


def test_the_compile_table_marks_what_is_beyond_a_limit() -> None:
    fits = {"tile": "64x32", "warps": 4, "stages": 2, "registers": 99, "stack": 0, "shared": 40 * 1024}
    large = fits | {"shared": 200 * 1024}
    archs = {"80": large, "90": large, "100": fits | {"stack": 16}, "120": {"error": "no such card"}}
    kernel = {"kernel": "carry", "mixer": "GLA", "dtype": "bf16", "dim": 64, "archs": archs}
    assert SHARED_LIMITS[80] < 200 < SHARED_LIMITS[90]
    wrong = beyond(kernel)
    assert wrong["80"] == "64x32, 4 warps: 99 regs, 200 KiB"
    assert wrong["100"] == "64x32, 4 warps: 99 regs, 40 KiB, 16 B spilled"
    assert set(wrong) == {"80", "100", "120"}
    line = table({"kernels": [kernel]}).splitlines()[-1]
    assert line.startswith(f"| carry | GLA | bf16 | 64 | {wrong['80']} | {wrong['80']} | ")
    assert line.endswith(f"| {wrong['100']} | does not compile |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_refuses_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["kernels", "--device", "cuda"])
    assert exit_.value.code == 2
    assert "--device cuda needs a GPU, and torch sees none here" in capsys.readouterr().err


@pytest.mark.parametrize("name", MIXERS)
def test_our_contestant_passes_its_check(name: str) -> None:
    """By the interpreter, in bf16."""
    found = cuda.check(MIXERS[name], SMALL, "cpu")
    errors = found["errors"]["lasp"]
    assert len(errors) == 1 + len(MIXERS[name].trained(MIXERS[name].inputs(SMALL, "cpu")))
    assert found["passed"], errors


def test_a_wrong_or_failing_contestant_does_not_pass() -> None:
    class Wrong(type(MIXERS["basic"])):
        def ours(self, q: torch.Tensor, *rest: torch.Tensor, backend: str) -> torch.Tensor:
            if backend == "triton":
                raise RuntimeError("no such card")
            return super().ours(q if backend == "torch" else 1.05 * q, *rest)

    mixer = Wrong("basic", None, False, "chunk_simple_gla")
    failed = cuda.check(mixer, SMALL, "cpu")
    assert failed == {"errors": {"lasp": "RuntimeError: no such card"}, "passed": False}
    wrong = cuda.check(mixer, SMALL, "cpu", backend="auto")
    assert not wrong["passed"]
    assert max(wrong["errors"]["lasp"]) == pytest.approx(0.05, rel=0.1)


def test_errors_that_are_not_numbers_are_infinite() -> None:
    nan, ones = torch.full((2,), float("nan")), torch.ones(2, dtype=torch.float64)
    assert cuda.relative_error(nan, ones) == float("inf")
    assert cuda.relative_error(torch.tensor([1.0, 2.0]), ones) == pytest.approx(0.5**0.5)


def test_both_passes_are_timed_and_a_failure_is_told() -> None:
    mixer = MIXERS["scalar gate"]
    inputs = mixer.inputs(SMALL, "cpu")

    def fail(*inputs: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this head dim")

    clock = iter(range(100))

    def seconds(run: object) -> float:
        run()
        return float(next(clock))

    functions = {"lasp": partial(mixer.ours, backend="torch"), "fla": fail}
    found = cuda.time_passes(functions, inputs, mixer.trained(inputs), 3, clock=seconds)
    assert found == {"lasp": {"forward": 6.0, "forward and backward": 7.0}, "fla": "ValueError: not this head dim"}


def test_ours_are_measured_before_the_peer_tunes_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer's first mixer is quick, its second takes more time than there is."""
    done = []

    def time_mixer(mixer: Mixer, shape: Shape, repeat: int, ceilings: dict, theirs: object = None) -> dict:
        rivals = ["lasp"] if theirs is None else ["lasp", "fla"]
        done.append((mixer.name, rivals))
        if "fla" in rivals and mixer.name == "KDA":
            time.sleep(60)
        return cuda.row(mixer.name, shape, {rival: {} for rival in rivals})

    for name, fake in {
        "time_mixer": time_mixer,
        "time_attention": lambda shape, repeat: {"flash attention": {}},
        "check": lambda *rest: {"errors": {"lasp": [0.0]}, "passed": True},
        "find_errors": lambda *rest: [0.1],
        "measure_ceilings": dict,
        "card": dict,
        "has_peer": lambda: True,
        "SHAPES": cuda.SHAPES[:1],
    }.items():
        monkeypatch.setattr(cuda, name, fake)
    options = Namespace(mixers=["basic", "KDA", "GLA"], minutes=2 / 60, repeat=1)
    found = cuda.measure(options)
    assert [rivals for _, rivals in done] == [["lasp"]] * 3 + [["lasp", "fla"]] * 2
    rows = {one["mixer"]: list(one["seconds"]) for one in found["rows"]}
    assert rows == {"basic": ["lasp", "fla"], "KDA": ["lasp"], "GLA": ["lasp"], "softmax": ["flash attention"]}
    assert [name for name, _ in found["left_out"]] == ["fla's KDA", "fla's GLA"]
    assert found["checks"]["basic"]["errors"] == {"lasp": [0.0], "fla": [0.1]}


def test_the_turn_that_goes_on_at_the_end_is_cut_off() -> None:
    """Also in a backward pass."""

    class Sleeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
            try:
                time.sleep(60)
            except Exception as error:  # what compilers do
                raise RuntimeError("failed") from error
            return grad

    def take(name: str, sleeps: bool) -> str:
        assert not torch._C._is_multithreading_enabled()  # a GPU's backward pass would have a thread of its own
        x = torch.ones(1, requires_grad=True)
        if sleeps:
            cuda.time_passes({name: Sleeper.apply}, [x], [x], 1, clock=wall_seconds)
        return name.upper()

    start = time.monotonic()
    found = cuda.until(start + 1, [("a", False), ("b", True), ("c", False)], take)
    assert found == {("a", False): "A"}
    assert 1 <= time.monotonic() - start < 30


def test_operations_and_traffic_of_a_decay_mixer() -> None:
    """Counted by hand for one token and head of dim 16: q, k, v in bf16 and a gate in fp32."""
    mixer, shape = MIXERS["scalar gate"], Shape(1, 1, 1, 16)
    inputs = mixer.inputs(shape, "cpu")
    assert mixer.operations(shape, backward=False) == 2 * (2 * 64 * 16 + 2 * 16 * 16)
    assert mixer.traffic(inputs, backward=False) == 3 * 32 + 4 + 32
    # The same again with the output's gradient for the output, and the gradients of q, k, v and the gate.
    assert mixer.traffic(inputs, backward=True) == 2 * (3 * 32 + 4 + 32) + 3 * 32 + 4
    fixed = MIXERS["lightning"]
    assert len(fixed.trained(fixed.inputs(shape, "cpu"))) == 3


def test_the_table_of_times(capsys: pytest.CaptureFixture[str]) -> None:
    mixer, ceilings = MIXERS["basic"], {"bytes": 4e12, "operations": 7e14}
    shape = cuda.SHAPES[0]
    passes = dict(zip(cuda.PASSES, (1e-3, 4e-3), strict=True))
    ours = cuda.row("basic", shape, {"lasp": passes, "fla": {name: 1.5 * took for name, took in passes.items()}})
    ours["shares"] = cuda.shares(mixer, shape, [torch.empty(10**6, dtype=torch.float32)] * 4, passes, ceilings)
    attention = cuda.row("softmax", shape, {"flash attention": "RuntimeError: no kernel"})
    checks = {"basic": {"errors": {"lasp": [1e-3, 2e-3]}, "passed": True}}
    figures = {"card": {"chip": "none"}, "ceilings": ceilings, "checks": checks, "rows": [ours, attention]}
    cuda.show(figures | {"left_out": [["KDA", vars(shape)]]})
    lines = capsys.readouterr().out.splitlines()
    assert "| basic | yes | 2.0e-03 |  |" in lines
    # 4 inputs and an output of 4 MB twice, and 4 gradients, at 4 TB/s: 14 us of 4 ms; of operations 466 us.
    assert "| 1, 32768, 32, 128 | basic | 1.000 | 1.500 | 4.000 | 6.000 | 1.50 | 0% | 12% |" in lines
    failed = "RuntimeError: no kernel"
    assert f"| 1, 32768, 32, 128 | softmax | {failed} |  | {failed} |  |  |  |  |" in lines
    assert "not measured: KDA at 1, 32768, 32, 128" in lines
    assert lines[-1] == "a copy moves 4.00 TB/s, a product does 700 TFLOP/s"
