"""What `lasp linearize` finds: the errors of layers, and losses from the teacher to the trained model."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lasp.train.files import regular, replaced
from lasp.train.ranks import Ranks

STAGES = ("teacher", "converted", "transferred", "trained")


@dataclass
class Report:
    """`report.json` and `report.png` of an output folder."""

    folder: Path

    asked: dict[str, Any]
    """The options that make a difference to what is found."""

    found: dict[str, Any]
    """So far: the losses of `STAGES` in nats per token of what is held out, and under "errors before" and "errors
    after" the transfer a share of each layer."""

    @classmethod
    def open(cls, folder: Path, asked: dict[str, Any]) -> "Report":
        """What is known so far. ValueError where another command has begun it, or it cannot be read."""
        path = folder / "report.json"
        if not os.path.lexists(path):
            return cls(folder, asked, {})
        try:
            with open(path, encoding="utf-8", opener=regular) as file:
                found = json.load(file)
            before = dict(found.pop("asked"))
        except Exception as error:  # what was written may be anything
            raise ValueError(
                f"cannot read {str(path)!r} of the linearisation: {error}; choose another output"
            ) from error
        if changed := sorted(name for name in asked if before.get(name) != asked[name]):
            told = ", ".join(f"{name} was {before.get(name)!r}" for name in changed)
            raise ValueError(f"{str(path)!r} is of another linearisation: {told}; choose another output")
        return cls(folder, asked, found)

    def note(self, ranks: Ranks, found: dict[str, Any]) -> None:
        """Add to what is found, the same on every rank, and write it; all ranks call this."""
        self.found |= found
        if ranks.is_main:
            with replaced(self.folder / "report.json") as partial:
                partial.write_text(json.dumps({"asked": self.asked, **self.found}, indent=2) + "\n", encoding="utf-8")
            self._draw()
        ranks.barrier()

    def tell(self) -> None:
        """Print what a finished run found."""
        found = self.found
        for stage in STAGES:
            if stage in found:
                print(f"{stage:12}perplexity {math.exp(found[stage]):.3f} (loss {found[stage]:.4f})")
        cost = found["converted"] - found["teacher"]
        last = found.get("trained", found["transferred"])
        if cost > 0:
            print(f"{'recovered':12}{(found['converted'] - last) / cost:.1%} of what the conversion cost")
        print(f"report      {self.folder / 'report.json'}\nplot        {self.folder / 'report.png'}")
        print(f"model       {self.folder / 'model'}")

    def _draw(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        layers, losses = figure.subplots(1, 2)
        for name, marker in (("errors before", "o"), ("errors after", "s")):
            if errors := self.found.get(name):
                layers.plot(list(map(int, errors)), list(errors.values()), marker=marker, label=name)
        layers.set(xlabel="layer", ylabel="squared error / square of the output", yscale="log")
        layers.legend()
        stages = [stage for stage in STAGES if stage in self.found]
        losses.bar(stages, [math.exp(self.found[stage]) for stage in stages])
        losses.set(ylabel="perplexity of what is held out")
        figure.savefig(self.folder / "report.png", dpi=120)
