"""Kill two ranks again and again while they save: `python -m tests.killed_saves FOLDER KILLS`.

Every attempt goes on from the newest checkpoint, every other one saves in the background. Writes found.json there.
"""

import json
import os
import random
import select
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from lasp.parallel.group import create_world
from lasp.train.checkpoints.export import read_weights
from lasp.train.checkpoints.folders import checkpoint_folder, checkpoint_step, list_checkpoints
from lasp.train.checkpoints.manifest import Manifest
from lasp.train.checkpoints.search import newest_whole
from lasp.train.config import DataConfig, OptimizerConfig, TrainConfig
from lasp.train.loop import Trainer
from lasp.train.ranks import Ranks
from lasp.train.run import Run

MODEL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}


def main(folder: Path, kills: int) -> None:
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
    data = DataConfig(str(folder / "text.txt"), seq_len=64, cache=str(folder))
    config = TrainConfig(
        output=str(folder / "run"), device="cpu", steps=1_000_000, save_every=1, keep_last=3, sp=2, resume="latest",
        engine="fsdp2", model=MODEL, data=data, save_minutes=0,
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
    )  # fmt: skip
    generator, found = random.Random(0), {"kills": 0, "in a save": 0, "lost": 0, "damaged": 0}
    for number in range(kills):
        attempt = replace(config, async_save=number % 2 == 1)
        acknowledged = kill(attempt, folder / f"store-{number}", generator)
        checkpoints = checkpoint_folder(config.output)
        whole, damaged = newest_whole(list_checkpoints(checkpoints))
        found["kills"] += 1
        found["in a save"] += any(checkpoints.glob(".step-*"))
        found["damaged"] += len(damaged)
        found["lost"] += whole is None or checkpoint_step(whole) < acknowledged
    last = list_checkpoints(checkpoint_folder(config.output))[-1]
    found["steps"] = checkpoint_step(last)
    undisturbed = replace(config, output=str(folder / "undisturbed"), steps=found["steps"], save_every=None)
    for pid in start(undisturbed, folder / "store", os.open(os.devnull, os.O_WRONLY)):
        assert os.waitpid(pid, 0)[1] == 0
    one, two = (
        read_weights(Manifest.read(Path(path))) for path in (last, checkpoint_folder(undisturbed.output) / last.name)
    )
    found["equal"] = all(torch.equal(value, two[name]) for name, value in one.items())
    (folder / "found.json").write_text(json.dumps(found) + "\n")


def kill(config: TrainConfig, store: Path, generator: random.Random) -> int:
    """Start the ranks, and kill them a little after their first steps; returns the last step that was acknowledged."""
    reading, writing = os.pipe()
    pids = start(config, store, writing)
    os.close(writing)
    assert select.select([reading], [], [], 100)[0], "the ranks did not start"
    time.sleep(generator.uniform(0, 0.3))
    for pid in generator.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    with os.fdopen(reading) as said:
        return max(map(int, said.read().split()))


def start(config: TrainConfig, store: Path, writing: int) -> list[int]:
    """Two ranks, forked: importing takes longer than all they do."""
    pids = []
    for rank in range(2):
        if not (pid := os.fork()):
            try:
                work(config, store, rank, writing)
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    return pids


def work(config: TrainConfig, store: Path, rank: int, writing: int) -> None:
    torch.set_num_threads(1)
    create_world(dist.FileStore(str(store), 2), rank, 2)
    ranks = Ranks.join(config)
    trainer = Trainer.start(Run.prepare_together(config, ranks.everyone), ranks)
    begun = trainer.steps_done
    for result in trainer.rest():
        # The save of the step before has returned; in the background it began, and that before it is complete.
        complete = result.step - (2 if config.async_save else 1)
        if rank == 0 and complete > begun:
            os.write(writing, f"{complete}\n".encode())
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
