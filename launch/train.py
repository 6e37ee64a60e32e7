"""`lasp train CONFIG [--key value ...]`: one training run, described by a TOML file or the name of a recipe.

    lasp train demo --sp 2 --steps 300 --optimizer.lr 5e-4
    torchrun --nproc-per-node 4 -m lasp.launch.train CONFIG --sp 2
    srun --ntasks 4 lasp train CONFIG --sp 2
    mpirun -n 4 lasp train CONFIG --sp 2

On its own, the command checks all that can be checked, starts dp x sp x tp ranks of itself on this machine and waits
for them. Started as one of several ranks, it trains. The output folder is locked meanwhile.
"""

import math
import os
import sys
import tomllib
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
from transformers.utils.logging import disable_progress_bar

from lasp.launch.cli import SAVED, STUCK, USER_ERROR, print_error
from lasp.launch.lock import locked
from lasp.launch.outcome import Failure
from lasp.launch.place import run_command
from lasp.launch.ranks import loopback, run_ranks
from lasp.launch.stop import Stop
from lasp.parallel.group import join_world
from lasp.train.config import SECTIONS, TrainConfig
from lasp.train.loop import StepError, Summary, train
from lasp.train.ranks import Ranks, agree_on_config, check_device, replicas
from lasp.train.run import Run, Tell
from lasp.train.sample import sample

RECIPES = Path(__file__).with_name("configs")
"""The configurations that ship with the package; a recipe's name is its file's."""


def main(argv: list[str] | None = None) -> int:
    """Train. Returns 0; 2 for what the user can put right, after one line on stderr; 1 for a training that failed; 75
    for one that was told to stop, and has saved; 70 for one whose watchdog ended it."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _start(arguments), lambda: _as_rank_of_others(arguments))


def as_rank(arguments: list[str]) -> int:
    """Train as one of the ranks that `_start` started, which holds the output folder."""
    return _train(_agree_on_config(arguments))


def _as_rank_of_others(arguments: list[str]) -> int:
    """Train as one of several ranks, which may have been given something else than the others; rank 0 locks."""
    config, error = _agree_on_config(arguments), None
    with ExitStack() as stack:
        everyone = join_world()
        if everyone.rank == 0:
            try:
                stack.enter_context(locked(Path(config.output)))
            except ValueError as found:
                error = str(found)
        everyone.agree("locking the output folder", {}, error).wait()
        return _train(config, print)


def read_config(arguments: list[str]) -> TrainConfig:
    """The configuration that `CONFIG [--key value ...]` describes; ValueError for an unknown key or a bad value."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--config={_find_file(arguments[0])}", *arguments[1:]]
    arguments = ["--allow_change=true" if word == "--allow-change" else word for word in arguments]
    parser = _parser()
    if not {"-h", "--help"} & set(arguments):
        _check_files(arguments)
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    del values["config"]
    for section, kind in SECTIONS.items():
        values[section] = kind(**values[section])
    return TrainConfig(**values)


def _parser() -> ArgumentParser:
    """Of the command line. What its help says about a field is the text under it in `lasp.train.config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="lasp train CONFIG", parser_mode="toml", exit_on_error=False, print_config=None)
    parser.add_argument("--config", action="config", help="a further TOML file, which overrides CONFIG")
    parser.add_class_arguments(TrainConfig)
    return parser


def _check_files(arguments: list[str]) -> None:
    """ValueError unless there is a configuration, and every file of one can be read and sets something."""
    names = [value for name, value in pairwise(arguments) if name == "--config"]
    names += [name.removeprefix("--config=") for name in arguments if name.startswith("--config=")]
    if not names:
        raise ValueError(f"CONFIG is missing, a TOML file or the name of a recipe; recipes: {_recipes()}")
    for name in names:
        if not Path(name).is_file():
            raise ValueError(f"no configuration file {name!r}")
        try:
            values = tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"cannot read the configuration file {name!r}: {error}") from error
        if not values:
            raise ValueError(f"the configuration file {name!r} sets nothing: a run has a model and data at least")


def _agree_on_config(arguments: list[str]) -> TrainConfig:
    """`read_config` on every rank: the same ValueError on all when one of them cannot, or when they differ."""
    config, error = None, None
    try:
        config = read_config(arguments)
        check_device(config.device)
    except ValueError as found:
        error = str(found)
    agree_on_config(join_world(), config, error)
    assert config is not None, "or there was an error, and everyone has raised it"
    return config


def _find_file(name: str) -> Path:
    """The file of a configuration that is given by its path or, without a folder and suffix, by a recipe's name."""
    path, recipe = Path(name), RECIPES / f"{name}.toml"
    if not path.is_file() and path.name == name and recipe.is_file():
        return recipe
    if not path.is_file():
        raise ValueError(f"no configuration file {name!r}, and no recipe of that name; recipes: {_recipes()}")
    return path


def _recipes() -> str:
    return ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))


def _start(arguments: list[str]) -> int:
    """Train in this process, or in as many new ones as the configuration asks for."""
    config = read_config(arguments)
    ranks = config.sp * config.tp * (config.dp or replicas(config.device, config.sp * config.tp))
    check_device(config.device, ranks)
    with locked(Path(config.output)):
        Run.prepare(config, print)
        if ranks > 1 or config.restarts:
            return _start_ranks(arguments, ranks, config.restarts)
        os.environ.update(loopback() | {"LOCAL_RANK": "0"})  # DeepSpeed asks for it
        return _train(config)


def _start_ranks(arguments: list[str], ranks: int, restarts: int) -> int:
    """Start ranks, and start them again from the last checkpoint when one of them has failed; returns the exit code."""
    for left in reversed(range(restarts + 1)):
        code = run_ranks("lasp.launch.train", arguments, ranks, patience=math.inf)
        if not left or code in (0, USER_ERROR, SAVED) or code > 128:
            break
        print(f"lasp: starting again from the last checkpoint; restarts left: {left - 1}", file=sys.stderr, flush=True)
        arguments = [*arguments, "--resume=latest"]
    return code


def _end(told: str) -> NoReturn:
    """End this process, as its watchdog wants."""
    if told:
        print_error(told)
    os._exit(STUCK)


def _train(config: TrainConfig, tell: Tell | None = None) -> int:
    """Train as one of the ranks that a launcher, or `_start`, brought up, or as the only one. tell: as `Run.prepare`
    takes it, where nobody has called that before."""
    disable_progress_bar()  # transformers shows one for every file it reads or writes
    ranks = Ranks.join(config)
    run = Run.prepare_together(config, ranks.everyone, tell)
    stop = Stop(config.time_limit)
    try:
        with stop.listening():  # also while ranks part: others may have been told first, and this one not yet
            summary = train(run, ranks, stop, _end)
            ranks.leave()
    except StepError as error:
        raise Failure(str(error)) from error
    if summary.stopped:
        if ranks.is_main:
            told = (
                f"told to stop by {stop.reason or 'another rank'}, saved {summary.checkpoint}: --resume latest goes on"
            )
            print(f"lasp: {told}", file=sys.stderr, flush=True)
        return SAVED
    if ranks.is_main:
        _report(run, summary)
    return 0


def _report(run: Run, summary: Summary) -> None:
    """Say how training went, where its results lie, and what the model writes."""
    recent = summary.losses[-20:]
    print(f"first loss  {summary.losses[0]:.3f}")
    # One batch alone may be an easy or a hard one.
    print(f"last loss   {recent[-1]:.3f} (mean of the last {len(recent)} steps: {sum(recent) / len(recent):.3f})")
    for source, loss in summary.validation.items():
        print(f"held out    {loss:.3f} ({source})")
    print(f"metrics     {summary.metrics}")
    print(f"loss plot   {summary.plot}")
    print(f"checkpoint  {summary.checkpoint}")
    if run.config.sample.prompt is not None:
        print(f"\nThe model continues {run.config.sample.prompt!r}:\n")
        print(sample(summary.checkpoint, run.tokenizer, run.config.sample, run.config.seed))


if __name__ == "__main__":
    sys.exit(main())
