"""Which models are trained: verified ones with their weights or without, and adapters around them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lasp.parallel.group import shutdown
from lasp.train.config import (
    DataConfig,
    Fsdp2Config,
    LoraConfig,
    MemoryConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
    ValidationConfig,
)
from lasp.train.data.tokenizer import ByteTokenizer
from lasp.train.engines import start_engine
from lasp.train.lion import Lion
from lasp.train.loop import Summary, Trainer, conclude, train
from lasp.train.model import ModelPlan
from lasp.train.optimizer import build_optimizers
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from lasp.train.sample import sample
from lasp.train.status import Status, read_status
from tests.hf_models import configuration

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    yield
    shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny hybrid as `save_pretrained` leaves it, with a tokenizer that has a chat template."""
    path = tmp_path_factory.mktemp("hybrid")
    config = configuration("qwen3_next")
    config.vocab_size = 300
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    ByteTokenizer().save(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def config(tmp_path: Path, folder: str) -> TrainConfig:
    """A fine-tuning on conversations, a fifth of which is held out."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!" * (1 + n % 5)}]}
        for n in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return TrainConfig(
        output=str(tmp_path / "run"),
        device="cpu",
        steps=6,
        model={"name": folder},
        data=DataConfig(str(tmp_path / "chat.jsonl"), "messages", seq_len=48, batch_size=2, packing="first_fit"),
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=1),
        validation=ValidationConfig(fraction=0.2, every=6),
    )


def trained(config: TrainConfig) -> Summary:
    return train(Run.prepare(config), Ranks.join(config))


def test_adapters_are_trained_saved_as_peft_does_and_resumed(config, folder):
    peft = pytest.importorskip("peft")
    config = replace(config, lora=LoraConfig(rank=4, merge=True), save_every=3)
    whole = trained(config)
    assert whole.losses[-1] < whole.losses[0] - 0.2
    saved = peft.AutoPeftModelForCausalLM.from_pretrained(whole.checkpoint)
    merged = transformers.AutoModelForCausalLM.from_pretrained(Path(config.output) / "merged")
    ids = torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(merged(ids).logits, saved(ids).logits, rtol=1e-4, atol=1e-5)
    shutil.rmtree(Path(config.output) / "merged")  # as if it was killed after its last checkpoint
    Status("running", 6).write(Path(config.output))
    assert conclude(Run.prepare(replace(config, resume="latest"))) == whole.checkpoint
    again = transformers.AutoModelForCausalLM.from_pretrained(Path(config.output) / "merged")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in merged.state_dict().items())
    assert read_status(Path(config.output)) == ("done", 6, "")
    own = Trainer.start(
        replace(Run.prepare(replace(config, steps=7, resume=str(whole.checkpoint)))), Ranks.join(config)
    )
    for name, value in saved.named_parameters():
        assert torch.equal(dict(own.engine.model.named_parameters())[name], value), name
    resumed = trained(
        replace(config, output=config.output + "2", resume=str(whole.checkpoint.with_name("step-000003")))
    )
    assert resumed.losses == whole.losses[3:]
    assert resumed.validation == whole.validation
    text = sample(
        whole.checkpoint, Run.prepare(replace(config, output=config.output + "3")).tokenizer, SampleConfig("7?", 3)
    )
    assert text.startswith("7?")


def test_a_model_is_trained_from_its_weights_and_the_checkpoint_is_one_of_its_family(config, folder):
    run = Run.prepare(config)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    built = run.model.build(0, torch.float32)
    assert all(torch.equal(value, built.state_dict()[name]) for name, value in before.state_dict().items())
    summary = trained(replace(config, steps=4, save_every=2))
    saved = transformers.AutoModelForCausalLM.from_pretrained(summary.checkpoint)
    assert type(saved) is type(before)
    assert transformers.AutoTokenizer.from_pretrained(summary.checkpoint).eos_token_id == 256
    resume = str(summary.checkpoint.with_name("step-000002"))
    resumed = trained(replace(config, output=config.output + "2", steps=4, resume=resume))
    assert resumed.losses == summary.losses[2:]


def test_shares_that_are_handed_out_are_what_a_whole_model_has(config):
    """Of files in another dtype with an index; adapters and rotary frequencies among them. No copy is left behind."""
    path = Path(config.output).with_name("other")
    before = transformers.AutoModelForCausalLM.from_pretrained(config.model["name"], dtype=torch.bfloat16)
    before.save_pretrained(path, max_shard_size="20KB")
    assert (path / "model.safetensors.index.json").is_file()
    data = replace(config.data, tokenizer=config.model["name"])
    config = replace(config, engine="fsdp2", lora=LoraConfig(rank=4), model={"name": str(path)}, data=data)
    run = Run.prepare(config)
    expected, ranks = run.model.build(run.config.seed, torch.float32), Ranks.join(run.config)
    built = run.build_model(ranks)
    assert all(parameter.is_meta for parameter in built.model.parameters())
    model = start_engine(built, run.config, ranks).model
    assert not any(parameter.numel() for parameter in built.weights.parameters())
    for name, value in expected.named_parameters(remove_duplicate=False):
        found = model.get_parameter(name)
        assert torch.equal(found.full_tensor(), value), name
        assert found.requires_grad == value.requires_grad
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(torch.equal(buffers[name], value) for name, value in expected.named_buffers())


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "lack model.norm.weight"),
        (lambda weights: weights.update(score=torch.ones(1)), "hold, beyond what the model has, score"),
    ],
)
def test_files_that_are_not_the_models_are_refused_by_the_name_of_the_weight(config, folder, change, said, engine):
    path = Path(config.output).with_name("other")
    shutil.copytree(folder, path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = replace(config, engine=engine, model={"name": str(path)})
    run, ranks = Run.prepare(config), Ranks.join(config)
    with pytest.raises(ValueError, match=f"the weights of model.name=.*other.* cannot be read: .* {said}$"):
        run.build_model(ranks)


def test_weights_that_the_configuration_ties_and_the_files_do_not_are_not_handed_out(config, folder):
    """transformers unties them: shares of a model made from the configuration would lack one."""
    path = Path(config.output).with_name("other")
    shutil.copytree(folder, path)
    told = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(told))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(path / "model.safetensors").keys()
    config = replace(config, engine="fsdp2", model={"name": str(path)})
    run, ranks = Run.prepare(config), Ranks.join(config)
    with pytest.raises(ValueError, match=r"files and configuration differ in lm_head\.weight, which one of them ties"):
        run.build_model(ranks)


def test_from_scratch_takes_the_configuration_alone_with_other_fields(config, folder):
    fields = {"name": folder, "from_scratch": True, "intermediate_size": 96}
    plan = ModelPlan.make(fields, LoraConfig(), ByteTokenizer())
    assert (plan.config.intermediate_size, plan.weights) == (96, None)
    one, two, three = (plan.build(seed, torch.float32).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "{folder}", "hidden_size": 64}, "has its own hidden_size: model.from_scratch = true"),
        ({"name": "{folder}", "from_scratch": True, "hiden_size": 64}, "unknown fields of the model: hiden_size"),
        ({"name": "{folder}", "from_scratch": "yes"}, "from_scratch must be true or false, got 'yes'"),
        ({"name": "{empty}"}, "is a folder without a config.json"),
        ({"name": 3}, "must name a folder or a model of the hub, got 3"),
        ({"name": "{bert}", "from_scratch": True}, "no model can be built|is not verified"),
        ({"name": "{folder}", "from_scratch": True, "vocab_size": 9}, "vocab_size=9 is less than the tokenizer's 257"),
        ({"kind": "transformer"}, 'must be "linear_llama", or model.name name another'),
        ({"from_scratch": True}, 'must be "linear_llama", or model.name name another'),
    ],
)
def test_models_that_cannot_be_are_refused(folder, tmp_path, fields, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "no_such_family"}')
    places = {"folder": folder, "empty": tmp_path / "empty", "bert": tmp_path / "bert"}
    fields = {name: value.format(**places) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(ValueError, match=said if "bert" not in str(fields.get("name")) else "cannot be read") as caught:
        ModelPlan.make(fields, LoraConfig(), ByteTokenizer())
    assert "\n" not in str(caught.value)


def test_adapters_for_modules_that_are_not_there_are_refused(folder):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="no model can be built"):
        ModelPlan.make({"name": folder}, LoraConfig(rank=2, target_modules=["nowhere"]), ByteTokenizer())


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])
def test_every_optimizer_takes_each_parameter_once_and_resumes(config, name):
    fields: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    fields |= {"num_attention_heads": 2, "mixer": "gated_deltanet", "tie_word_embeddings": True}
    optimizer = OptimizerConfig(name, lr=1e-2, warmup_steps=0, schedule="wsd", decay_steps=2)
    data = replace(config.data, field="text", source="text.txt")
    config = replace(config, model=fields, optimizer=optimizer, save_every=3, data=data, validation=ValidationConfig())
    Path(config.output).parent.joinpath("text.txt").write_text("To be, or not to be.\n" * 60)
    config = replace(config, data=replace(data, source=str(Path(config.output).parent / "text.txt")))
    model = Run.prepare(config).model.build(0, torch.float32)
    made = build_optimizers(model, optimizer)
    held = [id(p) for o in made for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    whole = trained(config)
    assert whole.losses[-1] < whole.losses[0] - 0.1
    resume = str(whole.checkpoint.with_name("step-000003"))
    assert trained(replace(config, output=config.output + "2", resume=resume)).losses == whole.losses[3:]


def test_lion_steps_by_the_sign_of_a_mean_that_is_ahead_of_its_moment():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    lion = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.2)
    for gradient in ([1.0, -4.0, 0.0], [-1.0, 0.5, -1.0]):
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        lion.step()
    # Moments of 0.5, -2 and 0 outweigh a tenth of the new gradient, or do not.
    expected = [(0.98 - 0.1) * 0.98 - 0.1, (0.98 + 0.1) * 0.98 + 0.1, 0.98 * 0.98 + 0.1]
    torch.testing.assert_close(weight.detach(), torch.tensor(expected, dtype=torch.float64))
    moment = torch.tensor([-0.25, -0.75, -0.5], dtype=torch.float64)
    torch.testing.assert_close(lion.state[weight]["exp_avg"], moment)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_levers_on_memory_leave_the_curve_as_it_is(config, rank):
    levers = MemoryConfig(fuse_loss=True, mlp_tile=7, checkpoint_every=1, offload=True)
    config = replace(config, steps=3, lora=LoraConfig(rank=rank))
    plain = trained(config)
    pulled = trained(replace(config, output=config.output + "2", memory=levers))
    assert pulled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert pulled.validation == pytest.approx(plain.validation, rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"engine": "fsdp2", "fsdp2": Fsdp2Config(reshard=False)},
        {"engine": "fsdp2", "fsdp2": Fsdp2Config(offload=True)},
        pytest.param({"compile": True}, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
    ids=["kept", "offloaded", "compiled"],
)
def test_how_a_model_is_held_leaves_the_curve_as_it_is(config, fields):
    config = replace(config, steps=3)
    plain = trained(config)
    other = trained(replace(config, output=config.output + "2", **fields))
    assert other.losses == pytest.approx(plain.losses, rel=1e-4)
    assert other.validation == pytest.approx(plain.validation, rel=1e-4)
