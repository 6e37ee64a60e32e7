"""What saves cost: `python -m tests.saving_cost FOLDER`. Medians of five, of a model of 26 M parameters with AdamW.

What training waits for of a save in the background, and what comparing every bit takes, as shares of a save.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lasp.train.checkpoints.folders import checkpoint_path
from lasp.train.checkpoints.manifest import Manifest
from lasp.train.config import DataConfig, TrainConfig
from lasp.train.loop import Trainer
from lasp.train.ranks import Ranks
from lasp.train.run import Run

MODEL = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}


def main(folder: Path) -> str:
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    data = DataConfig(str(folder / "text.txt"), seq_len=64, cache=str(folder))
    config = TrainConfig(output=str(folder / "run"), device="cpu", steps=99, keep_last=1, model=MODEL, data=data)
    saved, looked, size = [], [], 0
    for trainer in trainers(config):
        for step in range(1, 6):
            began = time.perf_counter()
            trainer.checkpoints.save(step, trainer.engine, False, trainer.kept)
            saved.append(time.perf_counter() - began)
            trainer.checkpoints._wait()
            manifest = Manifest.read(checkpoint_path(trainer.run.config.output, step))
            began = time.perf_counter()
            manifest.check()
            looked.append(time.perf_counter() - began)
            size = sum(entry.size for entry in manifest.files.values())
    save, waits, look = (statistics.median(times) for times in (saved[:5], saved[5:], looked))
    return (
        f"{size / 1e6:.0f} MB: a save {save:.2f} s; one in the background keeps training {waits:.2f} s "
        f"({waits / save:.0%}); comparing every bit {look:.2f} s ({look / save:.0%})"
    )


def trainers(config: TrainConfig) -> list[Trainer]:
    """One that waits for its saves, and one that does not; both have moments."""
    made = []
    for background in (False, True):
        of = replace(config, async_save=background, output=f"{config.output}-{background}")
        made.append(Trainer.start(Run.prepare(of), Ranks.join(of)))
        made[-1].step()
    return made


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as place:
        sys.stdout.write(main(Path(place)) + "\n")
