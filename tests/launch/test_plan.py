"""Plans: the same as what runs, where both can be had; files that `lasp train` takes; what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lasp.kernels import head
from lasp.launch.cli import main
from lasp.launch.plan import report
from lasp.launch.plan.candidate import LEVERS, Candidate, Job, candidates
from lasp.launch.plan.estimate import busy, estimate, memory_of, ranked, tokenwise
from lasp.launch.plan.footprint import Footprints, Run, Setting, sample
from lasp.launch.plan.report import longest
from lasp.launch.plan.tally import Tally
from lasp.launch.simulate.exchanges import sum_of_gradients
from lasp.launch.simulate.machine import MACHINES
from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.parallel.scan import ScanName
from lasp.train.config import LoraConfig, OptimizerConfig, OptimizerName
from lasp.train.model import ModelPlan
from lasp.train.optimizer import build_optimizers

TINY: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                        "vocab_size": 64}  # fmt: skip


def setting(
    mixer: str = "gated_deltanet", pattern: str = "LN", levers: str = "none", scan: ScanName = "gather"
) -> Setting:
    model = ModelPlan(LinearLlamaConfig(**TINY, mixer=mixer, pattern=pattern), None, LoraConfig())
    return Setting(model, LEVERS[levers], "contiguous", scan, "ring", "float32", MACHINES["cpu"].wires)


def held(found: Run) -> dict[str, float]:
    return found.moments.most(lambda item: 1.0)


@pytest.mark.parametrize("levers", ["none", pytest.param("checkpoints", marks=pytest.mark.slow)])
def test_short_runs_tell_of_long_ones(levers: str) -> None:
    """Memory, work and bytes of more tokens and ranks than any run had are those of a run that has them."""
    told = Footprints(setting(levers=levers)._replace(levers=LEVERS["none"])).of(6, 320, 0, LEVERS[levers])
    real = sample(setting(levers=levers), 6, 320)
    assert sum(held(told).values()) == pytest.approx(sum(held(real).values()), rel=1e-3)
    assert told.mixing == pytest.approx(real.mixing)
    assert {key: size for key, (size, _) in told.sent.items() if key[0] != "all_reduce"} == {
        key: size for key, (size, _) in real.sent.items() if key[0] != "all_reduce"
    }


def candidate(**fields: Any) -> Candidate:
    return Candidate(**{"dp": 1, "sp": 2, "layout": "contiguous", "scan": "gather", "method": "ring", "engine": "ddp",
                        "levers": "none", **fields})  # fmt: skip


def test_memory_by_engine() -> None:
    """Parameters and what the optimizer keeps of them: whole under ddp, shares of all ranks under fsdp2."""
    footprints = Footprints(setting())
    held_here = footprints.of(2, 64, 0)
    size = sum(p.nbytes for p in LinearLlamaForCausalLM(footprints.setting.model.config).parameters())
    whole = memory_of(held_here, candidate(), 2, MACHINES["cpu"].chip)
    kept = held_here.parameters.optimizer
    assert (whole["parameters"], whole["optimizer"], whole["gradient buckets"]) == (size, kept, size)
    shared = memory_of(held_here, candidate(engine="fsdp2"), 2, MACHINES["cpu"].chip)
    assert (shared["parameters"], shared["optimizer"]) == (size / 2, kept / 2)
    assert "allowance" in memory_of(held_here, candidate(), 2, MACHINES["h100"].chip)


def test_the_longest_sequence_fits_and_more_does_not() -> None:
    footprints, machine = Footprints(setting()), MACHINES["cpu"]
    tokens = longest(candidate(), machine, footprints) // 2

    def size(tokens: int) -> float:
        return sum(memory_of(footprints.of(2, tokens, 0), candidate(), 2, machine.chip).values())

    assert size(tokens) <= machine.chip.memory < size(int(1.01 * tokens))


def test_candidates_have_numbers_that_divide() -> None:
    job = Job(seq=64, tokens=256, nodes=1, gpus=8)
    found = list(candidates(job, "contiguous", ["gather", "ring"], ["ring"], ["ddp"], ["none"]))
    assert [(c.dp, c.sp, c.scan, c.repeat(job)) for c in found] == [
        (4, 2, "gather", 1), (4, 2, "ring", 1), (2, 4, "gather", 2), (2, 4, "ring", 2), (1, 8, "gather", 4),
        (1, 8, "ring", 4)]  # fmt: skip
    with pytest.raises(ValueError, match="--tokens-per-step must be a multiple of --seq"):
        Job(64, 100, 1, 8)


def test_a_lever_that_does_nothing_is_no_candidate() -> None:
    """Tiles of 1024 tokens, of ranks that have as many; but where nothing else is asked for."""

    def levers(seq: int, asked: list[str]) -> list[tuple[int, str]]:
        job = Job(seq=seq, tokens=2 * seq, nodes=1, gpus=2)
        return [(c.sp, c.levers) for c in candidates(job, "contiguous", ["ring"], ["ring"], ["ddp"], asked)]

    both = ["checkpoints", "tiles"]
    assert levers(1024, both) == [(1, "checkpoints"), (2, "checkpoints")]
    assert levers(2048, both) == [(1, "checkpoints"), (1, "tiles"), (2, "checkpoints")]
    assert levers(1024, ["tiles"]) == [(1, "tiles"), (2, "tiles")]


def test_of_plans_that_are_as_fast_the_simplest_is_the_first() -> None:
    def told(seconds: float, sp: int, levers: str, fits: bool = True) -> Any:
        return SimpleNamespace(seconds=seconds, bytes=1, fits=fits, candidate=SimpleNamespace(sp=sp, levers=levers))

    fast, tied, simple, slow = (
        told(*each) for each in ((1.0, 2, "none"), (1.01, 1, "tiles"), (1.019, 1, "fused loss"), (1.03, 1, "none"))
    )
    large = told(float("inf"), 1, "none", fits=False)
    assert ranked([large, slow, simple, tied, fast]) == [simple, fast, tied, slow, large]
    assert ranked([slow, fast]) == [fast, slow], "3 % are told apart"
    assert ranked([large]) == [large]


def test_a_core_that_computes_launches_too() -> None:
    run, cpu = sample(setting("lightning", "L"), 1, 64), replace(MACHINES["cpu"].chip, launch=1.0)
    calls = sum(
        e.calls for (place, way), e in run.effort.items() if way == "forward" and place not in ("rest", "optimizer")
    )
    own, beside = (tokenwise(run, "forward", replace(cpu, overlap=overlap)) for overlap in (False, True))
    assert own - tokenwise(run, "forward", replace(cpu, launch=0.0)) == pytest.approx(calls)
    assert beside == calls


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, JSON that says why others lose, a trace, and a configuration that `lasp train` reads."""
    from lasp.launch.configuration import read_config

    files = {
        name: tmp_path / f"{name}.{kind}" for name, kind in (("json", "json"), ("trace", "json"), ("write", "toml"))
    }
    arguments = ["plan", "--model", "tiny", "--seq", "512", "--tokens-per-step", "512", "--gpu", "cpu", "--gpus", "2"]
    arguments += ["--scan", "gather,ring", "--engine", "ddp", "--dtype", "float32", "--price", "1"]
    assert main([*arguments, *(word for name, file in files.items() for word in (f"--{name}", str(file)))]) == 0
    table = capsys.readouterr().out
    assert "tokens/s" in table
    assert re.search(r"longest sequence of dp 1 x sp 2, .* in 7.45 GiB: \d+ tokens", table)
    assert f"lasp train {files['write']}" in table
    told = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [each["why_not"] is None for each in told] == [True] + [False] * (len(told) - 1)
    assert all(each["bytes"] == pytest.approx(sum(each["memory"].values())) for each in told)
    config = read_config([str(files["write"])])
    assert (config.sp, config.dp, config.data.seq_len, config.model["preset"]) == (2, 1, 512, "tiny")
    assert json.loads(files["trace"].read_text(encoding="utf-8"))["traceEvents"]


@pytest.mark.parametrize(("change", "told"), [
    (["--gpu", "v100"], "--gpu must be a100, h100, h200, b200, cpu or a file, got 'v100'"),
    (["--scan", "best"], "unknown best; choose from"),
    (["--tokens-per-step", "100"], "must be a multiple of --seq"),
    (["--price", "-3"], "--price must not be negative, got -3.0"),
    (["--memory", "0"], "--memory must be positive, got 0.0"),
    (["--top", "0"], "argument --top: must be a whole number of at least 1, got '0'"),
    (["--model", "nothing"], "'nothing': no model type of transformers, and no folder"),
])  # fmt: skip
def test_what_is_refused(change: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "tiny", "--seq", "512", "--tokens-per-step", "512", *change]) == 2
    assert told in capsys.readouterr().err


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"chip": {"memory": 1e6}}), encoding="utf-8")
    arguments = ["plan", "--model", "tiny", "--seq", "256", "--tokens-per-step", "256", "--gpus", "1"]
    assert main([*arguments, "--gpu", str(file), "--engine", "ddp"]) == 1
    assert "1 do not fit 0 GiB; the smallest, dp 1 x sp 1, ddp, levers: none" in capsys.readouterr().out


def test_nothing_is_held_for_logits_that_nobody_looks_at() -> None:
    """A fused loss of a wide vocabulary holds tiles of its logits, which a tensor of theirs would be larger than."""
    wide = LinearLlamaConfig(**{**TINY, "vocab_size": 20000}, mixer="lightning", pattern="L")
    told = setting(levers="fused loss")._replace(model=ModelPlan(wide, None, LoraConfig()))
    tokens = 64
    tiles = 3 * tokens * head.CLASSES * 4  # logits, their gradient, and what a backward makes of both
    weights = 2 * 20000 * TINY["hidden_size"] * 4  # the gradients of the embedding and of the head
    assert sum(held(sample(told, 1, tokens)).values()) < tiles + weights + 2**20 < tokens * 20000 * 4 + weights


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_what_an_optimizer_keeps(name: OptimizerName) -> None:
    """The bytes of what a real one has after a step."""
    told = setting("lightning", "L")._replace(optimizer=name)
    model = LinearLlamaForCausalLM(told.model.config)
    optimizers = build_optimizers(model, OptimizerConfig(name=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [own for optimizer in optimizers for state in optimizer.state.values() for own in state.values()]
    assert sample(told, 1, 64).parameters.optimizer == sum(
        own.nbytes for own in states if isinstance(own, torch.Tensor)
    )


@pytest.mark.parametrize(("line", "told"), [
    ("tp = 2", "not planned: tp of the configuration"),
    ("[memory]\ncheckpoint_every = 1\noffload = true", "not planned: memory.offload of"),
    ("compile = true", "not planned: compile of"),
])  # fmt: skip
def test_what_no_plan_knows_is_refused(
    line: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.toml"
    file.write_text(line + "\n[model]\npreset = 'tiny'\n", encoding="utf-8")
    assert main(["plan", "--model", str(file), "--seq", "512", "--tokens-per-step", "512"]) == 2
    assert told in capsys.readouterr().err


def test_shares_of_whole_matrices_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--optimizer", "muon", "--engine", "ddp,fsdp2"]
    assert main(["plan", "--model", "tiny", "--seq", "512", "--tokens-per-step", "512", *asked]) == 2
    assert "muon over the shares of fsdp2 is not planned: take --engine ddp" in capsys.readouterr().err


def test_the_plot(tmp_path: Path) -> None:
    """Drawn over all numbers of ranks."""
    file, machine = tmp_path / "lengths.png", MACHINES["cpu"]
    report.plot(candidate(), ["none"], machine, Footprints(setting("lightning", "L")), file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_measured_mixers_take_their_own_time() -> None:
    """As `lasp bench chip` writes it: the share of the chip's operations, and how many times as long backward takes."""
    job, cpu, footprints = Job(64, 64, 1, 1), MACHINES["cpu"], Footprints(setting("lightning", "L"))
    (kind,) = set(sample(footprints.setting, 1, 64).kinds)
    own = replace(cpu, chip=replace(cpu.chip, mixers={kind: (0.6, 3.0)}))
    before, after = (estimate(candidate(sp=1), job, on, footprints).items[kind] for on in (cpu, own))
    assert after / before == pytest.approx(((1 + 3) / 0.6) / ((1 + 2) / cpu.chip.mixing))


def test_of_measured_mixers_passes_over_memory_are_not_counted_again() -> None:
    cpu, run = MACHINES["cpu"].chip, sample(setting("lightning", "L"), 1, 64)
    (kind,) = set(run.kinds)
    places = {place for place, way in run.effort if way == "backward"}
    assert places == {kind, "mlp and norms", "embedding", "rest"}, "backward by the place that made the nodes"
    there, back = (run.effort[kind, way] for way in ("forward", "backward"))
    assert back.flops == 2 * there.flops > 0
    assert min(there.bytes, back.bytes) > 0
    slow = replace(cpu, launch=0.0)
    measured = replace(slow, mixers={kind: (0.1, 2.0)})
    for way, effort in (("forward", there), ("backward", back)):
        passes = effort.bytes / (slow.stream * slow.bandwidth)
        assert tokenwise(run, way, slow) - tokenwise(run, way, measured) == pytest.approx(passes)


def test_of_measured_softmax_attention_passes_are() -> None:
    """Its kernels alone grow with the square of the tokens."""
    run, slow = sample(setting("lightning", "N"), 1, 64), replace(MACHINES["cpu"].chip, launch=0.0)
    (kind,) = run.softmax
    measured = replace(slow, mixers={kind: (0.1, 2.0)})
    assert [tokenwise(run, way, measured) for way in ("forward", "backward")] == [
        tokenwise(run, way, slow) for way in ("forward", "backward")
    ]


def test_products_are_counted_in_place_too_and_those_of_16_bits_apart() -> None:
    found, a = Tally(), torch.ones(4, 8)
    with found:
        torch.zeros(4, 4).addmm_(a, a.T)
        a.bfloat16() @ a.T.bfloat16()
    effort = found.effort["rest", "forward"]
    assert (effort.flops, effort.half) == (2 * 2 * 4 * 4 * 8, 2 * 4 * 4 * 8)
    cpu = replace(MACHINES["cpu"].chip, half=0.1, launch=0.0)
    assert busy(replace(effort, bytes=0.0), cpu) == pytest.approx((1 + 10) * effort.half / (cpu.matmul * cpu.flops))


def test_without_values_operations_are_those_that_run() -> None:
    """Tensors without values are asked for their device before each: neither that nor a view is a pass over memory."""

    def count() -> tuple[float, float]:
        with Tally() as found:
            a = torch.ones(4, 8)
            (a.mul(2).unsqueeze(0).unbind()[0] + a).relu_()
        effort = found.effort["rest", "forward"]
        return effort.bytes, effort.calls

    real = count()
    with FakeTensorMode():
        assert count() == real
    assert real == (4 * 4 * 8 * (1 + 2 + 3 + 2), 4), "ones, mul, add, relu"


class _Again(torch.autograd.Function):
    """A square that is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            return torch.autograd.grad((own @ torch.eye(4)).square(), own, grad)[0]


class _Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        squared: Tensor = _Again.apply(x)
        return squared


def test_a_pass_within_a_pass_is_its_place_s() -> None:
    found, module = Tally(), _Squared()
    with found, found.places({module: "square"}):
        module(torch.ones(4, 4, requires_grad=True)).sum().backward()
    assert found.effort["square", "backward"].flops == 2 * 2 * 4**3, "the product again, and its gradient"
    assert found.effort["rest", "backward"].flops == 0


def test_large_tensors_have_new_memory() -> None:
    """On a CPU; those of a length at which they are large, though in the runs that told of it they are not."""
    footprints, logits = Footprints(setting("lightning", "L")), 4 * TINY["vocab_size"]
    few, many = (footprints.of(1, tokens, 0).effort["rest", "forward"] for tokens in (1 << 16, 1 << 17))
    assert (few.fresh, many.fresh) == (0, 2 * logits * (1 << 17)), "logits, and their log-softmax"
    cpu = MACHINES["cpu"].chip
    assert busy(many, cpu) - busy(many, replace(cpu, fresh=0.0)) == pytest.approx(many.fresh * cpu.fresh)


def test_gradients_take_the_core_that_computes() -> None:
    """On a CPU nothing hides their sum, and a rank at work slows the others."""
    job, cpu, footprints = Job(64, 128, 1, 2), MACHINES["cpu"], Footprints(setting("lightning", "L"))
    two = candidate(dp=2, sp=1)
    told = estimate(two, job, cpu, footprints)
    size = footprints.of(1, 64, 0).parameters.trained / 2
    (seconds,) = sum_of_gradients(size, 2, cpu.wires, None).collectives  # type: ignore[union-attr]
    assert told.items["waiting for gradients"] == pytest.approx(2 * seconds)
    beside = replace(cpu, chip=replace(cpu.chip, overlap=True))
    hidden = estimate(two, job, beside, footprints).items.get("waiting for gradients", 0.0)
    assert hidden < 1.1 * seconds, "but those of the layer that is last backward"
    slow = replace(cpu, together=replace(cpu.chip, flops=cpu.chip.flops / 2))
    assert estimate(two, job, slow, footprints).items["Lightning"] == pytest.approx(2 * told.items["Lightning"])
    alone = [estimate(candidate(sp=1), Job(64, 64, 1, 1), on, footprints).seconds for on in (cpu, slow)]
    assert alone[0] == alone[1]


def test_what_is_most_in_a_long_run_may_not_be_in_short_ones() -> None:
    """Four layers of softmax attention, of 16 times as many tokens as the shortest run has."""
    deep = LinearLlamaConfig(**{**TINY, "num_hidden_layers": 4, "vocab_size": 512}, mixer="lightning", pattern="N")
    told = setting()._replace(model=ModelPlan(deep, None, LoraConfig()))
    real = sum(held(sample(told, 1, 2048)).values())
    assert sum(held(Footprints(told).of(1, 2048, 0)).values()) == pytest.approx(real, rel=0.01)
