"""`lasp train CONFIG [--key value ...]`: one training run, described by a TOML file or the name of a recipe.

    lasp train demo --sp 2 --steps 300 --optimizer.lr 5e-4
    torchrun --nproc-per-node 4 -m lasp.launch.train CONFIG --sp 2

On its own, the command checks all that can be checked, starts sp x dp ranks of itself on this machine and waits for
them. Started as one of several ranks, it trains.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser
from transformers.utils.logging import disable_progress_bar

from lasp.launch.cli import INTERRUPTED, USER_ERROR, print_error
from lasp.launch.torchrun import launched_rank, run_ranks
from lasp.parallel.group import join_world
from lasp.train.config import TrainConfig
from lasp.train.loop import Summary, train
from lasp.train.ranks import Ranks
from lasp.train.run import Run
from lasp.train.sample import sample

RECIPES = Path(__file__).with_name("configs")
"""The configurations that ship with the package; a recipe's name is its file's."""


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0; 2 for what the user can put right, after one line on stderr; 1 for a training that failed."""
    arguments = sys.argv[1:] if argv is None else argv
    disable_progress_bar()  # transformers shows one for every file it reads or writes
    rank = launched_rank()
    if rank is None:
        return _guarded(lambda: _start(arguments))
    # A rank alone may have been given something else than the others: nobody goes on before all have agreed.
    code = _guarded(lambda: _train(_agree_on_config(arguments)), quiet=rank != 0)
    if code:
        # The other ranks may be anywhere, and an orderly exit would wait for them (or be aborted by gloo).
        sys.stdout.flush()
        os._exit(code)
    return 0


def read_config(arguments: list[str]) -> TrainConfig:
    """The configuration that `CONFIG [--key value ...]` describes; ValueError for an unknown key or a bad value."""
    parser = ArgumentParser(prog="lasp train CONFIG", parser_mode="toml", exit_on_error=False)
    parser.add_argument("--config", action="config", help="a further TOML file, which overrides CONFIG")
    parser.add_class_arguments(TrainConfig)
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--config={_find_file(arguments[0])}", *arguments[1:]]
    try:
        values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    del values["config"]
    return TrainConfig(**values)


def _agree_on_config(arguments: list[str]) -> TrainConfig:
    """`read_config` on every rank: the same ValueError on all when one of them cannot, or when they differ."""
    config, error = None, None
    try:
        config = read_config(arguments)
    except ValueError as found:
        error = str(found)
    told = {"configuration": hashlib.sha256(repr(config).encode()).hexdigest()[:8]}
    join_world().agree(told, error).wait()
    assert config is not None, "or there was an error, and everyone has raised it"
    return config


def _find_file(name: str) -> Path:
    """The file of a configuration that is given by its path or, without a folder and suffix, by a recipe's name."""
    path, recipe = Path(name), RECIPES / f"{name}.toml"
    if not path.is_file() and path.name == name and recipe.is_file():
        return recipe
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ValueError(f"no configuration file {name!r}, and no recipe of that name; recipes: {known}")
    return path


def _start(arguments: list[str]) -> int:
    """Train in this process, or in as many new ones as the configuration asks for."""
    config = read_config(arguments)
    Run.prepare(config)
    ranks = config.sp * (config.dp or 1)
    return run_ranks("lasp.launch.train", arguments, ranks) if ranks > 1 else _train(config)


def _train(config: TrainConfig) -> int:
    """Train as one of the ranks that torchrun, or `_start`, brought up, or as the only one."""
    ranks = Ranks.join(config)
    run = Run.prepare_together(config, ranks.everyone)
    summary = train(run, ranks)
    ranks.leave()
    if ranks.is_main:
        _report(run, summary)
    return 0


def _guarded(work: Callable[[], int], quiet: bool = False) -> int:
    """The exit code of some work; an error that speaks for itself becomes one line instead of a traceback.

    quiet: leave out what every rank raises alike, and another one says.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, FloatingPointError, OSError) as error:
        if not quiet or isinstance(error, OSError):
            print_error(str(error))
        return USER_ERROR if isinstance(error, ValueError) else 1


def _report(run: Run, summary: Summary) -> None:
    """Say how training went, where its results lie, and what the model writes."""
    recent = summary.losses[-20:]
    print(f"first loss  {summary.losses[0]:.3f}")
    # One batch alone may be an easy or a hard one.
    print(f"last loss   {recent[-1]:.3f} (mean of the last {len(recent)} steps: {sum(recent) / len(recent):.3f})")
    print(f"metrics     {summary.metrics}")
    print(f"loss plot   {summary.plot}")
    print(f"checkpoint  {summary.checkpoint}")
    if run.config.sample.prompt is not None:
        print(f"\nThe model continues {run.config.sample.prompt!r}:\n")
        print(sample(summary.checkpoint, run.tokenizer, run.config.sample, run.config.seed))


if __name__ == "__main__":
    sys.exit(main())
