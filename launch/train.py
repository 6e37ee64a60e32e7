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
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lasp.launch.cli import SAVED, STUCK, USER_ERROR, print_error
from lasp.launch.configuration import read_config
from lasp.launch.lock import locked
from lasp.launch.outcome import Failure
from lasp.launch.place import run_command
from lasp.launch.rank import importing
from lasp.launch.ranks import loopback, run_ranks
from lasp.launch.stop import Stop
from lasp.parallel.group import join_world
from lasp.train.config import TrainConfig
from lasp.train.ranks import Ranks, agree_on_config, check_device, fitted, replicas

# Models take seconds to import: a mistake in a configuration is told before that.
if TYPE_CHECKING:
    from lasp.train.loop import Summary
    from lasp.train.run import Run, Tell


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


def _start(arguments: list[str]) -> int:
    """Train in this process, or in as many new ones as the configuration asks for."""
    config = read_config(arguments)
    ranks = config.sp * config.tp * (config.dp or replicas(config.device, config.sp * config.tp))
    check_device(config.device, ranks)
    with importing():
        from lasp.train.run import Run

    with locked(Path(config.output)):
        run = Run.prepare(config, print)
        if run.is_over:
            return _conclude(run)
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


def _train(config: TrainConfig, tell: "Tell | None" = None) -> int:
    """Train as one of the ranks that a launcher, or `_start`, brought up, or as the only one. tell: as `Run.prepare`
    takes it, where nobody has called that before."""
    with importing():
        from transformers.utils.logging import disable_progress_bar

        from lasp.train.loop import StepError, train
        from lasp.train.run import Run

    disable_progress_bar()  # transformers shows one for every file it reads or writes
    config = fitted(config, join_world().size)
    ranks = Ranks.join(config)
    run = Run.prepare_together(config, ranks.everyone, tell)
    if run.is_over:
        ranks.leave()
        return _conclude(run) if ranks.is_main else 0
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


def _conclude(run: "Run") -> int:
    """Say that a run is over, and see to what it left undone if it was killed after its last checkpoint."""
    from lasp.train.loop import conclude

    print(f"nothing is left to do: {conclude(run)} has done the {run.config.steps} steps of this run")
    return 0


def _report(run: "Run", summary: "Summary") -> None:
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
        from lasp.train.sample import sample

        print(f"\nThe model continues {run.config.sample.prompt!r}:\n")
        print(sample(summary.checkpoint, run.tokenizer, run.config.sample, run.config.seed))


if __name__ == "__main__":
    sys.exit(main())
