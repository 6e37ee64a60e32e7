"""Training on one device, and the checkpoints it leaves and resumes from."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
from lasp.parallel.group import shutdown
from lasp.train import log
from lasp.train.checkpoints import checkpointer
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_path, list_checkpoints
from lasp.train.config import DataConfig, OptimizerConfig, SampleConfig, TrainConfig, ValidationConfig
from lasp.train.loop import Summary, Trainer, train
from lasp.train.metrics import MetricsFile, StepMetrics, read_metrics
from lasp.train.optimizer import build_optimizers, learning_rate
from lasp.train.ranks import Ranks, fitted
from lasp.train.run import Run
from lasp.train.sample import sample
from lasp.train.status import read_status

MODEL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 60)
    return path


@pytest.fixture
def config(text, tmp_path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        device="cpu",
        steps=6,
        model=MODEL,
        data=DataConfig(str(text), seq_len=64, batch_size=2),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2),
    )


@pytest.fixture(scope="module", autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def saved(text, tmp_path_factory) -> Run:
    """A run of six steps, with its checkpoint; tests work on copies of it."""
    config = TrainConfig(
        output=str(tmp_path_factory.mktemp("saved")),
        device="cpu",
        steps=6,
        model=MODEL,
        data=DataConfig(str(text), seq_len=64),
    )
    return replace(Run.prepare(config), checkpoint=trained(config).checkpoint)


def trained(config: TrainConfig) -> Summary:
    return train(Run.prepare(config), Ranks.join(config))


def weights(summary: Summary) -> dict[str, torch.Tensor]:
    return LinearLlamaForCausalLM.from_pretrained(summary.checkpoint).state_dict()


def test_loss_falls_and_everything_lies_where_the_summary_says(config):
    summary = trained(replace(config, steps=30))
    assert 5.2 < summary.losses[0] < 5.9  # log(257) is what a model that knows nothing has
    assert summary.losses[-1] < 3.5
    assert [metrics.loss for metrics in read_metrics(summary.metrics)] == summary.losses
    assert summary.plot.read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors", "state", "run.json", "manifest.json"} <= set(
        os.listdir(summary.checkpoint)
    )
    text = sample(
        summary.checkpoint, Run.prepare(replace(config, output=config.output + "2")).tokenizer, SampleConfig("To be")
    )
    assert text.startswith("To be")


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64", "bfloat16"])
def test_resuming_is_bitwise_the_uninterrupted_run(config, dtype):
    config = replace(config, dtype=dtype, save_every=4)
    whole = trained(config)
    assert [path.name for path in list_checkpoints(checkpoint_folder(config.output))] == ["step-000004", "step-000006"]
    interrupted = replace(config, output=config.output + "-interrupted")
    Path(interrupted.output).mkdir()
    shutil.copy(whole.metrics, interrupted.output)  # says more than the checkpoint, as after a crash
    shutil.copytree(whole.checkpoint.with_name("step-000004"), checkpoint_folder(interrupted.output) / "step-000004")
    resumed = trained(replace(interrupted, resume="latest"))
    assert resumed.losses == whole.losses[4:]
    assert [metrics.loss for metrics in read_metrics(resumed.metrics)] == whole.losses
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


class StubTracker:
    """A tracker in memory, as accelerate makes them."""

    requires_logging_directory = False
    told: ClassVar[list[object]] = []

    def __init__(self, name: str) -> None:
        self.told.append(name)

    def store_init_configuration(self, values: dict) -> None:
        self.told.append(values["optimizer.lr"])

    def log(self, values: dict, step: int) -> None:
        self.told.append((step, values["loss"], values["tokens"]))

    def finish(self) -> None:
        self.told.append("finished")


def test_what_is_told_of_a_run_is_what_was_done(config, monkeypatch):
    """Figures, log, trace, tracker and state of a hybrid, whose operations are counted here by hand."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "stub", StubTracker)
    monkeypatch.setattr("lasp.train.meter.peak_flops", lambda *_: 1e12)
    config = replace(
        config,
        steps=5,
        model={**MODEL, "pattern": "LN"},
        data=replace(config.data, packing="none"),
        log_every=2,
        tracker="stub",
        profile="2:3",
    )
    summary = trained(config)
    steps, run = read_metrics(summary.metrics), Path(config.output)
    measured = [step for step in steps if step.seconds is not None]
    assert [step.step for step in measured] == [2, 4, 5]
    layers = (5 + 4) * 32 * 32 + 2 * 3 * 32 * 64  # one mixer has a gate
    linear, softmax = 4 * 2 * 16 * 16, 2 * (16 + 16) * 2 * 65 / 2
    flops = 2 * 64 * (6 * (layers + 257 * 32) + 3 * (linear + softmax))
    for step in measured:
        assert step.flops_per_second * step.seconds == pytest.approx(flops)
        assert step.mfu == pytest.approx(step.flops_per_second / 1e12)
        assert step.tokens == step.step * 128
        assert step.tokens_per_second_per_rank == pytest.approx(128 / step.seconds)
        assert (step.received, step.slowest_rank, step.slowest_by) == (0, 0, 0)
        assert 0 <= step.waited < step.seconds
        assert step.memory > 10**8
        assert 0 < step.data < step.seconds
    log = (run / "log.txt").read_text()
    assert "parameters" in log
    assert f"step 4/5 loss {steps[3].loss:.3f} norm" in log
    assert "checkpoint of step 5" in log
    told = [(step.step, step.loss, step.tokens) for step in measured]
    assert StubTracker.told == ["run", config.optimizer.lr, *told, "finished"]
    names = {
        event.get("name") for event in json.loads((run / "profile/steps-2-3-rank-0.json").read_text())["traceEvents"]
    }
    assert {"lasp::step 2", "lasp::step 3", "lasp::forward", "lasp::backward"} <= names
    assert not {"lasp::step 1", "lasp::step 4"} & names
    assert read_status(run) == ("done", 5, "")


def test_a_run_that_fails_says_by_what_and_keeps_its_plot(config, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self: step(self) if self.steps_done < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(replace(config, save_every=2))
    run = Path(config.output)
    assert read_status(run) == ("failed", 6, "ZeroDivisionError: division by zero")
    assert (run / "log.txt").read_text().endswith("ended by ZeroDivisionError: division by zero\n")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ranks", "axes"),
    [
        (24, (3, 4, 2, 2)),
        (16, (2, 4, 2, 3)),
        (8, (1, 4, 2, 6)),
        (6, (1, 3, 2, 6)),
        (2, (1, 1, 2, 6)),
        (30, (3, 4, 2, 2)),
    ],
)
def test_fewer_ranks_of_an_elastic_run_read_in_a_step_what_all_of_them_would(config, ranks, axes):
    config = replace(config, dp=3, sp=4, tp=2, accumulation=2, elastic=True)
    found = fitted(config, ranks)
    assert (found.dp, found.sp, found.tp, found.accumulation) == axes
    assert found.dp * found.accumulation == 6
    assert replace(found, dp=3, sp=4, accumulation=2) == config
    assert fitted(replace(config, elastic=False), ranks) == replace(config, elastic=False)


@pytest.mark.parametrize("ranks", [1, 7, 20])
def test_ranks_that_cannot_share_a_step_out_are_refused(config, ranks):
    with pytest.raises(ValueError, match=f"elastic = true: {ranks} ranks cannot share out what dp 3 x sp 4 x tp 2"):
        fitted(replace(config, dp=3, sp=4, tp=2, elastic=True), ranks)


def test_latest_without_a_checkpoint_starts_from_scratch(config):
    assert len(trained(replace(config, resume="latest", steps=2)).losses) == 2


def test_the_seed_decides_the_run(config):
    first, again = trained(config), trained(replace(config, output=config.output + "-again"))
    other = trained(replace(config, output=config.output + "-other", seed=1))
    assert first.losses == again.losses
    assert first.losses != other.losses


def test_a_second_run_does_not_mix_with_the_first(config):
    trained(config)
    with pytest.raises(ValueError, match=r"already holds 1 checkpoints, the last step-000006"):
        Run.prepare(config)
    last = str(checkpoint_path(config.output, 6))
    for steps, resume in ((6, last), (5, last), (5, "latest")):
        with pytest.raises(ValueError, match=f"has done 6 steps: none are left of the {steps} of this run"):
            Run.prepare(replace(config, resume=resume, steps=steps))
    assert Run.prepare(replace(config, resume="latest")).is_over
    assert not Run.prepare(replace(config, resume="latest", steps=7)).is_over
    trained(replace(config, overwrite=True, steps=3))
    assert [path.name for path in list_checkpoints(checkpoint_folder(config.output))] == ["step-000003"]


def test_a_checkpoint_of_another_model_is_refused_with_the_fields_that_differ(config):
    saved = trained(config).checkpoint
    other = replace(
        config, output=config.output + "-other", resume=str(saved), model={**MODEL, "intermediate_size": 96}
    )
    with pytest.raises(ValueError, match=r"of another model: intermediate_size is 64 there and 96 here$"):
        Run.prepare(other)
    with pytest.raises(ValueError, match=r"nowhere' is not a checkpoint"):
        Run.prepare(replace(other, resume="nowhere"))


@pytest.mark.parametrize(
    "name", [f".step-000004.{os.getpid()}", ".step-000002.1", ".step-1234567.77"], ids=["own", "other", "long"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_killed_save_left_is_removed(config, name, overwrite):
    """The next process may have the same number, as it has in every container."""
    folder = checkpoint_folder(config.output)
    (folder / name).mkdir(parents=True)
    (folder / name / "config.json").write_text("{")
    (folder / ".mine").mkdir()
    trained(replace(config, steps=4, save_every=2, overwrite=overwrite))
    assert sorted(os.listdir(folder)) == [".mine", "step-000002", "step-000004"]


def test_links_and_files_where_checkpoints_are_looked_for_end_no_run(config, tmp_path):
    """Somebody moved a checkpoint to another disk, which may not be there; a copy went wrong."""
    folder = checkpoint_folder(config.output)
    trained(replace(config, steps=2, save_every=1))
    (folder / "step-000002").rename(tmp_path / "moved")
    (folder / "step-000002").symlink_to(tmp_path / "moved")
    (folder / "step-000001").rename(folder / ".step-000001.deleted")
    (folder / ".step-000001.partial").symlink_to(tmp_path / "moved")
    (folder / ".step-000003.partial").touch()
    (folder / "step-000008").touch()
    (folder / "step-000009").symlink_to("/nowhere/at/all")
    trained(replace(config, steps=4, save_every=1, keep_last=1, resume="latest"))
    assert sorted(os.listdir(folder)) == ["step-000004", "step-000008.damaged", "step-000009.damaged"]
    assert (tmp_path / "moved" / "manifest.json").exists()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/nowhere/at/all")], ids=["file", "link"])
def test_checkpoints_that_could_not_be_written_are_missed_before_the_first_step(config, make):
    Path(config.output).mkdir()
    make(checkpoint_folder(config.output))
    with pytest.raises(ValueError, match=r"cannot write to the output folder '.*checkpoints': N"):
        Run.prepare(config)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_is_removed_meanwhile_ends_the_run_and_one_made_anew_is_left_alone(
    config, tmp_path, monkeypatch, anew, elsewhere
):
    step = Trainer.step

    def removing(self: Trainer):
        if self.steps_done == 1:
            shutil.rmtree(config.output)
            if anew:
                Path(config.output).mkdir()
        return step(self)

    monkeypatch.setattr(Trainer, "step", removing)
    if elsewhere:
        config = replace(config, data=replace(config.data, cache=str(tmp_path / "tokens")))
    with pytest.raises(ValueError, match="was removed or moved while the run was at work"):
        trained(replace(config, save_every=2))
    assert not anew or os.listdir(config.output) == []


def test_going_back_is_refused_with_advice_that_can_be_followed(config):
    summary = trained(replace(config, save_every=3))
    back = replace(config, resume=str(summary.checkpoint.with_name("step-000003")))
    with pytest.raises(ValueError, match="to go on from step-000003, choose another output, or remove those after it"):
        Run.prepare(back)
    shutil.rmtree(summary.checkpoint)
    assert Run.prepare(back).checkpoint.name == "step-000003"


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [
        (11, 10, [*(i / 10 for i in range(1, 11)), 0.1]),
        (5, 10, [0.25, 0.5, 0.75, 1.0, 0.1]),
        (1, 10, [1.0]),
        (1, 0, [1.0]),
        (2, 1, [1.0, 0.1]),
        (3, 0, [1.0, 0.55, 0.1]),
        (5, 2, [0.5, 1.0, 1.0, 0.55, 0.1]),
    ],
)
def test_the_last_step_has_the_least_rate_however_long_the_warm_up(steps, warmup, expected):
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=warmup)
    assert [learning_rate(step, steps, config) for step in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize("mixer", ["kda", "mamba2", "gated_deltanet", "lightning"])
def test_only_weight_matrices_decay(mixer):
    model = LinearLlamaForCausalLM(LinearLlamaConfig(**{**MODEL, "vocab_size": 64, "mixer": mixer}))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others = (
        [names[id(p)] for p in g["params"]] for g in build_optimizers(model, OptimizerConfig())[0].param_groups
    )
    assert all(name.endswith(".weight") for name in matrices)
    assert all(name.endswith(("norm.weight", "A_log", "dt_bias", ".D", ".bias", "layernorm.weight")) for name in others)
    assert sorted(matrices + others) == sorted(names.values())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 32}, "unknown fields of the model: hiden_size"),
        ({**MODEL, "num_attention_heads": 3}, "32.*3|3.*32"),
        ({**MODEL, "hidden_size": "wide"}, "hidden_size.*wide"),
        ({**MODEL, "hidden_size": -32}, "hidden_size must be a whole number of at least 1, got -32"),
        ({**MODEL, "num_hidden_layers": 0}, "num_hidden_layers must be .* at least 1, got 0"),
        ({**MODEL, "num_hidden_layers": -2}, "num_hidden_layers must be .* at least 1, got -2"),
        ({**MODEL, "vocab_size": -1}, "vocab_size must be .* at least 1, got -1"),
        ({**MODEL, "head_dim": 1.5}, "head_dim must be .* at least 1, got 1.5"),
        ({**MODEL, "mixer_options": 5}, "mixer_options must be keywords of mixers by their names, got 5"),
        ({**MODEL, "mixer_options": {"softmax": 5}}, "mixer_options must be keywords"),
        ({**MODEL, "pattern": 3}, "pattern must be a string of L and N or a list of mixers, got 3"),
        ({**MODEL, "rms_norm_eps": float("nan")}, "rms_norm_eps must be a number of at least 0, got nan"),
        ({**MODEL, "initializer_range": -1}, "initializer_range must be a number of at least 0, got -1"),
        ({**MODEL, "tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({**MODEL, "vocab_size": 100}, "vocab_size=100 is less than the tokenizer's 257"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(config, model, message):
    with pytest.raises(ValueError, match=message):
        Run.prepare(replace(config, model=model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"dtype": "float64"}, "dtype was 'float32' and is 'float64'"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr was 0.001 and is 0.5"),
        ({"optimizer": {"weight_decay": 0.5}}, "optimizer.weight_decay was 0.1 and is 0.5"),
        ({"optimizer": {"betas": (0.9, 0.99)}}, r"optimizer.betas was \[0.9, 0.95\] and is \[0.9, 0.99\]"),
        ({"optimizer": {"schedule": "linear"}}, "optimizer.schedule was 'cosine' and is 'linear'"),
        ({"data": {"seq_len": 32}}, "data.seq_len was 64 and is 32"),
        ({"data": {"packing": "first_fit"}}, "data.packing was 'split' and is 'first_fit'"),
        ({"data": {"batch_size": 3}}, "sequences of a step were 1 and are 3"),
        ({"accumulation": 2}, "sequences of a step were 1 and are 2"),
        ({"validation": {"fraction": 0.1}}, "validation.fraction was 0.0 and is 0.1"),
        ({"data": {"source": "other.txt"}}, "data.source was"),
    ],
)
def test_a_run_that_continues_another_one_says_what_it_changes(saved, change, said, tmp_path):
    config = replace(saved.config, output=str(tmp_path / "run"), resume=str(saved.checkpoint), steps=7)
    fields = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    with pytest.raises(ValueError, match=rf"{said}.*--allow-change goes on nevertheless"):
        trained(replace(config, **fields))


def test_a_change_that_is_allowed_is_made(saved, tmp_path):
    config = replace(saved.config, output=str(tmp_path / "run"), resume=str(saved.checkpoint), steps=7)
    assert len(trained(replace(config, seed=3, accumulation=2, allow_change=True)).losses) == 1


def test_another_text_under_the_same_name_is_another_corpus(config, text, tmp_path):
    (tmp_path / "text.txt").write_text(text.read_text())
    config = replace(config, data=replace(config.data, source=str(tmp_path / "text.txt")))
    trained(replace(config, steps=1))
    (tmp_path / "text.txt").write_text(text.read_text().replace("question", "Question"))
    with pytest.raises(ValueError, match=r"read something else: tokens were '\w+' and are '\w+'; --allow-change"):
        trained(replace(config, steps=2, resume="latest"))


def test_what_decides_neither_data_nor_mathematics_is_free(config):
    whole = trained(replace(config, save_every=3))
    free = {"accumulation": 2, "data": replace(config.data, batch_size=1), "engine": "fsdp2", "layout": "zigzag"}
    resume = str(whole.checkpoint.with_name("step-000003"))
    resumed = trained(replace(config, output=config.output + "2", resume=resume, **free))
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-5)


def test_what_is_held_out_is_never_trained_on_and_its_loss_is_the_mean_over_all_its_targets(config, tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} " * (20 + number))
    data = replace(config.data, source=str(tmp_path / "texts"), batch_size=3)
    config = replace(config, data=data, validation=ValidationConfig(fraction=0.3, every=4))
    run = Run.prepare(config)
    (training,), (held,) = run.training, run.validation
    both = [{piece for i in range(len(data.rows)) for piece in data.rows.row(i)} for data in (training, held)]
    assert sum(piece.stop - piece.start for pieces in both for piece in pieces) == training.corpus.tokens
    summary = trained(config)
    seen = [metrics for metrics in read_metrics(summary.metrics) if metrics.validation]
    assert [metrics.step for metrics in seen] == [4, 6]
    model = LinearLlamaForCausalLM.from_pretrained(summary.checkpoint)
    losses = []
    for piece in both[1]:
        ids = torch.from_numpy(held.corpus.read(piece.start, piece.stop + piece.goes_on)[0])[None]
        logits = model(ids[:, : piece.stop - piece.start]).logits[0].log_softmax(-1)
        losses += [-logits[i, token].item() for i, token in enumerate(ids[0, 1:].tolist())]
    assert summary.validation == {data.source: pytest.approx(sum(losses) / len(losses), rel=1e-5)}


def test_a_preset_takes_the_vocabulary_of_the_tokenizer(config):
    run = Run.prepare(replace(config, model={"preset": "tiny", "num_hidden_layers": 1}))
    config = run.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 1, 257)


def test_a_loss_that_is_not_finite_is_skipped_and_a_fourth_in_a_row_ends_the_run(config, capfd):
    trainer = Trainer.start(Run.prepare(config), Ranks.join(config))
    assert torch.initial_seed() == config.seed
    engine = trainer.engine
    trainer.step()
    good = engine.model.lm_head.weight[0, 0].item()
    with torch.no_grad():
        engine.model.lm_head.weight[0, 0] = torch.nan
    before = [
        value.clone() for value in [*engine.model.parameters(), *engine.optimizers[0].state_dict()["state"][0].values()]
    ]
    told = (
        r"step 5: loss nan, gradient norm nan: not finite are parameters of rank 0 \(first model.embed_tokens.weight\)"
    )
    steps = [trainer.step() for _ in range(3)]
    with pytest.raises(FloatingPointError, match=f"{told}; 4 such steps in a row, skips = 3"):
        trainer.step()
    after = [*engine.model.parameters(), *engine.optimizers[0].state_dict()["state"][0].values()]
    for value, old in zip(after, before, strict=True):
        assert torch.equal(value.nan_to_num(), old.nan_to_num())
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert [(step.step, step.skipped) for step in steps] == [(2, 1), (3, 2), (4, 3)]
    assert capfd.readouterr().out.count("; skipped") == 3
    with torch.no_grad():
        engine.model.lm_head.weight[0, 0] = good
    assert (trainer.step().skipped, trainer.skipped) == (None, 0)


@pytest.mark.parametrize(
    "name",
    ["log.txt", "loss.png", "metrics.jsonl", "status.json", ".loss.png", ".metrics.jsonl", ".status.json"],
)
def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(config, name):
    Path(config.output).mkdir()
    os.mkfifo(Path(config.output) / name)
    summary = trained(replace(config, steps=2))
    assert read_status(Path(config.output)).word == "done"
    assert len(read_metrics(summary.metrics)) == 2


def test_a_picture_that_cannot_be_drawn_ends_no_run_and_is_told_once(config, caplog):
    (Path(config.output) / "loss.png").mkdir(parents=True)
    summary = trained(replace(config, save_every=1))
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(r"cannot draw '.*/loss\.png': .*Is a directory.*", told)
    assert summary.checkpoint.is_dir()


def test_a_log_that_cannot_be_written_ends_no_run_and_is_told_once(config, capsys):
    (Path(config.output) / "log.txt").mkdir(parents=True)
    trained(config)
    assert capsys.readouterr().err.count("lasp: warning: cannot write ") == 1


def test_who_has_lost_a_rank_does_not_say_that_it_failed_itself(config, monkeypatch):
    def lost(_: Trainer) -> None:
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer")

    monkeypatch.setattr(Trainer, "step", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        trained(config)
    assert read_status(Path(config.output)).word == "running"
    assert "ended by RuntimeError" in (Path(config.output) / "log.txt").read_text()


def test_an_interrupt_stays_one_where_the_folder_is_gone(config, monkeypatch):
    def interrupted(_: Trainer) -> None:
        shutil.rmtree(config.output)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(config)


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json"])
def test_a_file_that_cannot_be_begun_is_named(config, monkeypatch, name):
    write = Path.write_text

    def fail(path: Path, *rest: object, **options: object) -> int:
        return full() if path.name == f".{name}" else write(path, *rest, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match=rf"No space left on device: '.*/{name}'"):
        trained(config)


def test_a_log_on_a_full_disk_ends_no_run(config, monkeypatch, capsys):
    monkeypatch.setattr(log._Lines, "_open", lambda _: open("/dev/full", "a"))  # noqa: SIM115
    trained(config)
    assert capsys.readouterr().err.count("lasp: warning: cannot write ") == 1


def test_lines_of_metrics_that_cannot_be_written_name_their_file(config, monkeypatch):
    path = Path(config.output) / "metrics.jsonl"
    enter = MetricsFile.__enter__

    def onto_a_full_disk(file: MetricsFile) -> MetricsFile:
        file._file = SimpleNamespace(write=full, close=full, name=str(path))
        return enter(file)

    monkeypatch.setattr(MetricsFile, "__enter__", onto_a_full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        trained(config)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("of the step"), SystemExit("of a hook")]
)
@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_fails_sees_first_to_what_is_written_in_the_background(config, monkeypatch, error, fails):
    """A full disk is met by the next line of metrics before anybody asks what came of the checkpoint."""
    write, begun = checkpointer.write_manifest, Event()

    def slow_manifest(*arguments: object) -> None:
        begun.wait()
        full() if fails else write(*arguments)

    def fail_at_3(trainer: Trainer) -> StepMetrics:
        if trainer.steps_done == 2:
            begun.set()
            raise error
        return step(trainer)

    step = Trainer.step
    monkeypatch.setattr(checkpointer, "write_manifest", slow_manifest)
    monkeypatch.setattr(Trainer, "step", fail_at_3)
    told = "cannot save '.*step-000002': .*No space left" if fails and isinstance(error, OSError) else str(error)
    with pytest.raises(type(error), match=re.escape(told) if told == str(error) else told):
        trained(replace(config, save_every=2, async_save=True))
    folder = Path(config.output)
    assert os.listdir(folder / "checkpoints") == ([] if fails else ["step-000002"])
    assert read_status(folder).word == "failed"
    assert ("checkpoint of step 2" in (folder / "log.txt").read_text()) == (not fails)
