"""What a launcher is to run, and what it makes of that."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from lasp.train.config import TrainConfig
from lasp.train.ranks import fitted


@dataclass(frozen=True)
class Job:
    """A training, and how many ranks it has: nodes machines with gpus ranks each."""

    arguments: tuple[str, ...]
    """Those of `lasp train`."""

    config: TrainConfig
    """What they describe."""

    nodes: int
    gpus: int

    @classmethod
    def of(cls, arguments: Sequence[str], config: TrainConfig, nodes: int, gpus: int | None) -> Self:
        """gpus=None: as many as the configuration's ranks need. ValueError where numbers do not fit together."""
        if nodes < 1 or (gpus is not None and gpus < 1):
            raise ValueError(f"--nodes and --gpus must be at least 1, got {nodes} and {gpus}")
        replica = config.sp * config.tp
        ranks = replica * (config.dp or 1) if gpus is None else nodes * gpus
        if ranks % nodes:
            raise ValueError(
                f"the configuration has dp x sp x tp = {ranks} ranks, which {nodes} nodes cannot share: set --gpus"
            )
        if ranks % replica or (config.dp is not None and ranks != replica * config.dp):
            told = f"{nodes} nodes x {ranks // nodes} gpus = {ranks} ranks"
            axes = f"sp = {config.sp}{f', tp = {config.tp}' * (config.tp > 1)} and dp = {config.dp}"
            raise ValueError(f"{told}, but the configuration has {axes}")
        return cls(tuple(arguments), config, nodes, ranks // nodes)

    def repeatable(self) -> Self:
        """The same training such that starting it again goes on where it was. ValueError where it would not."""
        if self.config.overwrite:
            raise ValueError(
                "overwrite = true deletes the checkpoints at every start, also when the job starts again: "
                "add --overwrite false"
            )
        if self.config.resume not in (None, "latest"):
            raise ValueError(
                f"resume = {self.config.resume!r} names one checkpoint, also when the job starts again: "
                'resume = "latest" takes the newest of the output folder'
            )
        return self if self.config.resume else replace(self, arguments=(*self.arguments, "--resume", "latest"))

    def elastic(self, least: int) -> Self:
        """The same training such that it goes on by fewer ranks when no more than so many nodes are left. ValueError
        where that is more than there are, or where a number of nodes in between cannot share the steps out."""
        if not 1 <= least <= self.nodes:
            raise ValueError(f"--least-nodes must lie in 1..{self.nodes}, the number of nodes, got {least}")
        dp = self.nodes * self.gpus // (self.config.sp * self.config.tp)
        for nodes in range(least, self.nodes):
            try:
                fitted(replace(self.config, elastic=True, dp=dp), nodes * self.gpus)
            except ValueError as error:
                raise ValueError(f"--least-nodes {least}: with {nodes} of {self.nodes} nodes, {error}") from error
        return replace(self, arguments=(*self.arguments, "--elastic", "true", "--dp", str(dp)))

    @property
    def module(self) -> list[str]:
        """What each rank runs, as arguments of `python -m`."""
        return ["lasp.launch.train", *self.arguments]

    @property
    def name(self) -> str:
        """The output folder's, as far as schedulers take it."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(self.config.output).name).lstrip("-") or "lasp"

    @property
    def folder(self) -> Path:
        """The output folder, where what a launcher writes goes."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Plan:
    """Files to write, and then a command that takes this process's place; an empty one says `then` instead."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)
    then: str = ""
    package: str = ""
    """What the command needs, which is also the name of the extra that brings it."""

    warning: str = ""
    """What who runs it should know."""

    def __str__(self) -> str:
        told = [f"# {path}\n{text}" for path, text in self.files.items()]
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return "\n".join(
            [*told, " ".join([*variables, shlex.join(self.command)]) if self.command else f"# {self.then}"]
        )

    def carry_out(self) -> int:
        """Do it; does not return where there is a command. ValueError where that is not here."""
        if self.package and find_spec(self.package) is None:
            raise ValueError(f'{self.package} is not here: pip install "lasp2[{self.package}]"')
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if not self.command:
            print(self.then)
            return 0
        sys.stdout.flush()
        if self.warning:
            print(f"lasp: warning: {self.warning}", file=sys.stderr, flush=True)
        try:
            os.execvpe(self.command[0], self.command, {**os.environ, **self.environment})
        except FileNotFoundError as error:
            raise ValueError(f"there is no {self.command[0]!r} here") from error
