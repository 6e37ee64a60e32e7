"""The Trainer of transformers on a cut sequence: losses, evaluation and weights are those of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lasp

pytest.importorskip("accelerate")

from tests.hf_models import make_single

ROOT = Path(__file__).parents[2]
# Ten sequences, most with another number of targets; two epochs of three steps, the last of each with half the batches.
SCRIPT = """
import json, sys
import torch, transformers
import lasp
from lasp.train.sharded_trainer import ShardedTrainer
from tests.hf_models import make

sp, dp, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
ids = torch.randint(97, (10, 29), generator=torch.Generator().manual_seed(0))
samples = [{"input_ids": text, "labels": text.clone()} for text in ids]
for i, sample in enumerate(samples):
    sample["labels"][: 3 * i] = -100
held_out = {"odd": samples[:3], "even": samples[:4]}
options = transformers.TrainingArguments(
    folder, num_train_epochs=2, per_device_train_batch_size=2 // dp, per_device_eval_batch_size=2 // dp,
    gradient_accumulation_steps=2, learning_rate=0.01, logging_steps=1, eval_strategy="epoch", save_strategy="no",
    report_to="none", use_cpu=True, disable_tqdm=True,
)
model = make("qwen3_5")
if sp * dp == 1:  # the library's own loss is one in fp32
    model.loss_function = lambda logits, labels, num_items_in_batch, **_: lasp.cross_entropy(
        logits[:, :-1], labels[:, 1:], num_items=num_items_in_batch
    )
    trainer = transformers.Trainer(model, options, train_dataset=samples, eval_dataset=held_out)
else:
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(sp=sp, dp=dp, device="cpu"))
    lasp.parallelize(model, group)
    trainer = ShardedTrainer(model, options, train_dataset=samples, eval_dataset=held_out, group=group)
trainer.train()
test_loss = trainer.predict(held_out["even"]).metrics["test_loss"]
if trainer.args.process_index == 0:
    keys = ("loss", "grad_norm", "eval_odd_loss", "eval_even_loss")
    logs = {key: [log[key] for log in trainer.state.log_history if key in log] for key in keys}
    weights = [p.double().norm().item() for p in model.parameters()]
    print(json.dumps({"logs": logs | {"test": [test_loss]}, "weights": weights}))
"""


def run(folder: Path, sp: int, dp: int) -> dict[str, Any]:
    (folder / "script.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={sp * dp}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*torchrun, "script.py", str(sp), str(dp), str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"logs')]
    return json.loads(line)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"compute_metrics": dict}, {}),
        ({"compute_loss_func": sum}, {}),
        ({}, {"label_smoothing_factor": 0.1}),
        ({}, {"average_tokens_across_devices": False}),
        ({}, {"neftune_noise_alpha": 5.0}),
    ],
)
def test_what_would_see_a_part_is_refused(tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    from lasp.train.sharded_trainer import ShardedTrainer

    (option,) = arguments | options
    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(device="cpu"))
    with pytest.raises(ValueError, match=f"{option}.* would see a rank's part"):
        ShardedTrainer(make_single("llama"), training, group=group, **arguments)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("use_liger_kernel", {"use_liger_kernel": True}),
        ("split_batches", {"accelerator_config": {"split_batches": True}}),
        ("dispatch_batches=True", {"accelerator_config": {"dispatch_batches": True}}),
    ],
)
def test_what_was_not_compared_is_refused(tmp_path: Path, match: str, options: dict[str, Any]) -> None:
    from transformers import TrainingArguments

    from lasp.train.sharded_trainer import ShardedTrainer

    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(device="cpu"))
    with pytest.raises(ValueError, match=f"ShardedTrainer takes no {match}"):
        ShardedTrainer(lasp.parallelize(make_single("llama"), group), training, group=group)


@pytest.mark.parametrize("method", ["compute_loss", "prediction_step", "training_step", "evaluation_loop"])
@pytest.mark.parametrize("behind", [True, False])
def test_other_trainers_are_refused_by_name(tmp_path: Path, method: str, behind: bool) -> None:
    """As those of TRL, whose losses would be of a part. A step of one's own around ShardedTrainer's is taken."""
    from transformers import Trainer, TrainingArguments

    from lasp.train.sharded_trainer import ShardedTrainer

    other = type("SFTTrainer", (Trainer if behind else ShardedTrainer,), {method: getattr(ShardedTrainer, method)})
    mixed = type("Mixed", (ShardedTrainer, other) if behind else (other,), {})
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(device="cpu"))
    model = lasp.parallelize(make_single("llama"), group)
    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    if behind or method in ("compute_loss", "prediction_step"):
        with pytest.raises(ValueError, match=f"SFTTrainer.{method} would see a rank's part of each sequence"):
            mixed(model, training, group=group)
    else:
        mixed(model, training, group=group)


def test_the_plain_trainer_says_which_one_to_take(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(lasp.parallelize(make_single("llama"), None), training, train_dataset=[row])
    with pytest.raises(ValueError, match=r"use lasp.shard_batch, or lasp.ShardedTrainer in the place"):
        trainer.train()


def test_a_model_that_is_not_parallelised_over_the_group_is_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from lasp.train.sharded_trainer import ShardedTrainer

    training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    group = lasp.SequenceGroup.from_mesh(lasp.init_mesh(device="cpu"))
    for model in (make_single("llama"), lasp.parallelize(make_single("llama"), None)):
        with pytest.raises(ValueError, match="not parallelised over this group"):
            ShardedTrainer(model, training, group=group)


def test_trains_a_model_of_ones_own(tmp_path: Path) -> None:
    """As `Trainer` does without a group; on several ranks the model is compared in tests/distributed."""
    import torch
    from transformers import Trainer, TrainingArguments

    from lasp.models import LinearLlamaConfig, LinearLlamaForCausalLM
    from lasp.train.sharded_trainer import ShardedTrainer

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    samples = [{"input_ids": torch.arange(i, i + 20), "labels": torch.arange(i, i + 20)} for i in range(4)]
    options = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    losses = []
    for group in (None, lasp.SequenceGroup.from_mesh(lasp.init_mesh(device="cpu"))):
        torch.manual_seed(0)
        model = LinearLlamaForCausalLM(LinearLlamaConfig(**sizes, num_hidden_layers=1))
        arguments = TrainingArguments(str(tmp_path), save_strategy="no", **options)
        if group is None:
            trainer = Trainer(model, arguments, train_dataset=samples)
        else:
            trainer = ShardedTrainer(lasp.parallelize(model, group), arguments, train_dataset=samples, group=group)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_trains_as_one_process(tmp_path: Path) -> None:
    expected = run(tmp_path, 1, 1)
    assert [len(values) for values in expected["logs"].values()] == [6, 6, 2, 2, 1]
    for sp, dp in ((2, 1), (2, 2)):
        seen = run(tmp_path, sp, dp)
        for key, values in expected["logs"].items():
            if dp == 1 or key != "eval_odd_loss":
                assert seen["logs"][key] == pytest.approx(values, rel=1e-6 if key == "loss" else 1e-9)  # kept in fp32
        assert seen["weights"] == pytest.approx(expected["weights"], rel=1e-9)
