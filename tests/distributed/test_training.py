"""Training on four ranks: the same batches give the same curve, however the ranks share them."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn

from lasp.models import LinearLlamaForCausalLM
from lasp.parallel.group import SequenceGroup
from lasp.parallel.parameters import local_part
from lasp.train.config import DataConfig, OptimizerConfig, TrainConfig
from lasp.train.data.batches import Batches, Share
from lasp.train.loop import StepError, Trainer, train
from lasp.train.metrics import read_metrics
from lasp.train.optimizer import build_optimizers, learning_rate
from lasp.train.ranks import Ranks, agree_on_config
from lasp.train.run import Run
from lasp.train.unfinite import blame

pytestmark = [pytest.mark.mpi(min_size=4), pytest.mark.usefixtures("own_groups")]
WORLD = 4


@pytest.fixture
def config(world: MPI.Comm, tmp_path: Path) -> TrainConfig:
    """A run whose sequences no number of ranks divides, in a folder that all ranks see."""
    folder = Path(world.bcast(str(tmp_path)))
    if world.rank == 0:
        (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 100)
    world.barrier()
    return TrainConfig(
        output=str(folder / "run"),
        device="cpu",
        steps=20,
        dtype="float64",
        model={"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2},
        data=DataConfig(str(folder / "text.txt"), seq_len=67, batch_size=4),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=5),
    )


def plain_losses(run: Run) -> list[float]:
    """The run written down once more, without ranks: what any cut of it must reproduce."""
    config, dtype = run.config, getattr(torch, run.config.dtype)
    torch.manual_seed(config.seed)
    model = LinearLlamaForCausalLM(run.model.config).to(dtype)
    (optimizer,) = build_optimizers(model, config.optimizer)
    share = Share(lambda length: [slice(0, length)], batch_size=4)
    batches = Batches([(run.training[0], 1.0)], share, seed=config.seed)
    losses = []
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.optimizer)
        (batch,) = batches.read(step)
        loss = model(**batch.tensors, cu_seqlens=torch.tensor(batch.bounds)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


SHARES = [(1, "contiguous"), (2, "zigzag"), (4, "contiguous")]


@pytest.mark.parametrize(
    ("dtype", "tolerance", "shares"),
    [("float64", 1e-9, SHARES), pytest.param("float32", 1e-4, SHARES, marks=pytest.mark.slow)],
)
def test_any_share_of_dp_and_sp_has_the_curve_of_a_plain_loop(config, once, dtype, tolerance, shares):
    lr = 1e-2 if dtype == "float64" else 5e-3  # steps of 1e-2 make 1e-4 of what fp32 rounds off in ten of them
    config = replace(config, steps=10, optimizer=OptimizerConfig(lr=lr, min_lr=1e-3, warmup_steps=2))
    expected = None
    for sp, layout in shares:
        dp = WORLD // sp
        shared = replace(
            config,
            dtype=dtype,
            sp=sp,
            layout=layout,
            output=f"{config.output}-{sp}-{layout}",
            data=replace(config.data, batch_size=4 // dp, cache=config.output),
        )
        ranks = Ranks.join(shared)
        run = Run.prepare_together(shared, ranks.everyone)
        expected = expected or once(plain_losses, run)
        summary = train(run, ranks)
        assert summary.losses == pytest.approx(expected, rel=tolerance)
        assert [metrics.loss for metrics in read_metrics(summary.metrics)] == summary.losses
    assert expected[-1] < expected[0] - 1


def test_an_error_of_one_rank_is_raised_by_all(config, world, monkeypatch):
    def refuse(_: object) -> None:
        raise ValueError("no tokenizer here")

    ranks = Ranks.join(config)
    wrong = replace(config, data=replace(config.data, source="nowhere.txt")) if world.rank == 2 else config
    with pytest.raises(ValueError, match=r"ranks disagree on data.source: rank 0: '.*text.txt', .*, rank 2: 'nowhere"):
        Run.prepare_together(wrong, ranks.everyone)
    with pytest.raises(ValueError, match=r"disagree on seed: rank 0: 0, rank 1: 1, rank 2: 2, rank 3: 3$"):
        Run.prepare_together(replace(config, seed=world.rank), ranks.everyone)
    if world.rank == 2:
        monkeypatch.setattr("lasp.train.run.load_tokenizer", refuse)
    with pytest.raises(ValueError, match=r"no tokenizer here \(rank 2 of 4\)"):
        Run.prepare_together(config, ranks.everyone)
    other = {**config.model, "pattern": "LN"} if world.rank == 1 else config.model
    with pytest.raises(
        ValueError, match=r"disagree on the fields of model: rank 0: num_hidden_layers, .*rank 1: .*pattern"
    ):
        agree_on_config(ranks.everyone, replace(config, model=other))


def test_a_checkpoint_that_one_rank_cannot_read_is_refused_by_all(config, world):
    """As on machines that share no folder."""
    ranks = Ranks.join(replace(config, sp=4))
    config = replace(config, steps=1, save_every=1)
    train(Run.prepare_together(config, ranks.everyone), ranks)
    again = Run.prepare_together(replace(config, steps=2, resume="latest"), ranks.everyone)
    assert again.checkpoint is not None
    if world.rank == 2:
        again = replace(again, checkpoint=again.checkpoint.with_name("step-000007"))
    with pytest.raises(ValueError, match=r"step-000007.*\(rank 2 of 4\)"):
        Trainer.start(again, ranks)


def test_a_mesh_that_does_not_fit_is_refused_by_all(config):
    with pytest.raises(ValueError, match="4"):
        Ranks.join(replace(config, sp=3))


TWENTY = range(20)


@pytest.mark.parametrize(
    ("engine", "places"),
    [
        ("ddp", (0, 5, 10, 15, 17)),
        pytest.param("ddp", TWENTY, marks=pytest.mark.slow),
        pytest.param("fsdp2", TWENTY, marks=pytest.mark.slow),
    ],
    ids=["ddp", "ddp everywhere", "fsdp2 everywhere"],
)
def test_what_is_not_finite_on_one_rank_is_skipped_by_all_and_named_and_a_drift_is_found(config, world, engine, places):
    """Places of four ranks in turn: a weight, an activation, a state, a gradient, a loss."""
    config = replace(config, sp=2, engine=engine, steps=2 * len(places), skips=100)
    ranks = Ranks.join(config)
    trainer = Trainer.start(Run.prepare_together(config, ranks.everyone), ranks)
    model, told = trainer.engine.model, []
    trainer._tell_skipped = lambda loss, norm: told.append(blame(trainer.engine, ranks))
    mixer = model.model.layers[0].mixer
    for number in places:
        trainer.step()
        before = [local_part(value).clone() for value in model.parameters()]
        culprit, what = number % WORLD, number // WORLD
        handle = None
        if world.rank == culprit:
            handle = [
                lambda: spoil_weight(model.lm_head.weight),
                lambda: model.model.layers[1].mlp.register_forward_hook(lambda *_: _[-1] * torch.nan),
                lambda: mixer.k_proj.register_forward_hook(lambda *_: _[-1] * torch.inf),
                lambda: model.model.norm.register_full_backward_hook(lambda m, i, o: (i[0] * torch.inf,)),
                lambda: model.lm_head.register_forward_hook(lambda *_: _[-1] * torch.inf),
            ][what]()
        assert trainer.step().skipped == 1
        if handle is not None:
            handle.remove()
        for value, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(local_part(value), old)
        assert told[-1].startswith("not finite are ")
        if engine == "ddp":
            assert f"rank {culprit} (first " in told[-1], told[-1]
    assert len(told) == len(places)
    if engine == "fsdp2":
        trainer._compare_replicas()  # it has none
        return
    trainer._compare_replicas()
    for number in places:
        name, parameter = list(model.named_parameters())[number % len(list(model.parameters()))]
        kept = parameter.detach().clone()
        culprit = number % WORLD
        if world.rank == culprit:
            flip_bit(parameter, number)
        told = f"after step {config.steps} the ranks hold other models: {name} differs on rank {culprit} from rank "
        with pytest.raises(StepError, match=re.escape(told)):
            trainer._compare_replicas()
        with torch.no_grad():
            parameter.copy_(kept)


class spoil_weight:
    """NaN in this rank's part of a weight, until it is removed."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.part = local_part(weight.detach())
        self.kept = self.part.clone()
        self.part[0, 0] = torch.nan

    def remove(self) -> None:
        self.part.copy_(self.kept)


def flip_bit(parameter: torch.Tensor, number: int) -> None:
    """Flip one bit of an fp64 parameter."""
    bits = parameter.detach().view(torch.int64).flatten()
    bits[number % bits.numel()] ^= 1 << (3 * number)


@pytest.mark.slow
def test_ranks_wait_for_the_first_longer_than_a_collective_does(world):
    everyone = SequenceGroup.from_group(dist.new_group(timeout=timedelta(seconds=4)))
    with everyone.first("long work") as first:
        assert first == (world.rank == 0)
        if first:
            time.sleep(6)
    everyone.agree("after it", {}).wait()
