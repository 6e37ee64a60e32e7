"""Training on one device, and the checkpoints it leaves and resumes from."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lasp.models import LinearLlamaForCausalLM
from lasp.parallel.group import shutdown
from lasp.train.checkpoint import checkpoint_folder, list_checkpoints
from lasp.train.config import DataConfig, OptimizerConfig, SampleConfig, TrainConfig
from lasp.train.loop import Summary, Trainer, train
from lasp.train.metrics import read_metrics
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from lasp.train.sample import sample

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
    assert {"config.json", "model.safetensors", "training.pt", "run.json"} <= set(os.listdir(summary.checkpoint))
    text = sample(
        summary.checkpoint, Run.prepare(replace(config, output=config.output + "2")).tokenizer, SampleConfig("To be")
    )
    assert text.startswith("To be")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
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
    with pytest.raises(ValueError, match="has done the 6 steps of this run already"):
        Run.prepare(replace(config, resume="latest"))
    trained(replace(config, overwrite=True, steps=3))
    assert [path.name for path in list_checkpoints(checkpoint_folder(config.output))] == ["step-000003"]


def test_a_checkpoint_of_another_model_is_refused_with_the_fields_that_differ(config):
    saved = trained(config).checkpoint
    other = replace(
        config, output=config.output + "-other", resume=str(saved), model={**MODEL, "intermediate_size": 96}
    )
    with pytest.raises(ValueError, match=r"of another model: intermediate_size is 64 there and 96 here$"):
        Run.prepare(other)
    with pytest.raises(ValueError, match=r"'nowhere' is not a checkpoint"):
        Run.prepare(replace(other, resume="nowhere"))


def test_weights_that_do_not_fit_their_own_configuration_are_refused(config):
    saved = trained(config).checkpoint
    written = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**written, "intermediate_size": 96}))
    wider = replace(
        config, output=config.output + "2", resume=str(saved), steps=9, model={**MODEL, "intermediate_size": 96}
    )
    with pytest.raises(
        ValueError, match=r"6 parameters differ: .*gate_proj.weight is \(64, 32\) there and \(96, 32\) here"
    ):
        trained(wider)


def test_a_failed_save_leaves_no_checkpoint(config, monkeypatch):
    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        trained(config)
    assert os.listdir(checkpoint_folder(config.output)) == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hiden_size": 32}, "unknown fields of the model: hiden_size"),
        ({**MODEL, "num_attention_heads": 3}, "32.*3|3.*32"),
        ({**MODEL, "hidden_size": "wide"}, "hidden_size.*wide"),
        ({**MODEL, "vocab_size": 100}, "vocab_size=100 is less than the tokenizer's 257"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(config, model, message):
    with pytest.raises(ValueError, match=message):
        Run.prepare(replace(config, model=model))


def test_a_preset_takes_the_vocabulary_of_the_tokenizer(config):
    run = Run.prepare(replace(config, model={"preset": "tiny", "num_hidden_layers": 1}))
    assert (run.model.hidden_size, run.model.num_hidden_layers, run.model.vocab_size) == (128, 1, 257)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(config):
    trainer = Trainer.start(Run.prepare(config), Ranks.join(config))
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(FloatingPointError, match="step 1: loss nan, gradient norm nan"):
        trainer.step()
    for parameter, value in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), value.nan_to_num())
