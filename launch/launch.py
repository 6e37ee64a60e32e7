"""`lasp launch torchrun|slurm|deepspeed CONFIG --nodes N --gpus G`: training, handed to what starts ranks on a cluster.

    lasp launch torchrun CONFIG --nodes 2 --gpus 8 --endpoint first:29500 --sp 16
    lasp launch slurm CONFIG --nodes 2 --gpus 8 --time 12:00:00 --submit
    lasp launch deepspeed CONFIG --nodes 2 --gpus 8 --hosts first,second --dry-run

What is no option of `lasp launch` is `lasp train`'s. `lasp launch LAUNCHER --help` tells the options.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

from lasp.launch import deepspeed, slurm, torchrun
from lasp.launch.cli import Parser
from lasp.launch.configuration import read_config
from lasp.launch.job import Job, Plan
from lasp.launch.outcome import Outcome


class Launcher(NamedTuple):
    """A way to start ranks: its own options, and the plan that it makes of a job and them."""

    add_options: Callable[..., None]
    plan: Callable[..., Plan]


LAUNCHERS = {
    "torchrun": Launcher(torchrun.add_options, torchrun.plan),
    "slurm": Launcher(slurm.add_options, slurm.plan),
    "deepspeed": Launcher(deepspeed.add_options, deepspeed.plan),
}


def main(argv: list[str] | None = None) -> int:
    """Launch. The launcher takes this process's place, and its exit code is the command's; 2 for a user error."""
    arguments = sys.argv[1:] if argv is None else argv
    return Outcome.of(lambda: _launch(arguments)).tell()


def _launch(arguments: list[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in LAUNCHERS:
        raise ValueError(f"unknown launcher {name!r}; choose from {', '.join(LAUNCHERS)}")
    launcher = LAUNCHERS[name]
    parser = Parser(prog=f"lasp launch {name} CONFIG", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, help="ranks of each, by default dp x sp x tp / nodes")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written and run, and do nothing")
    launcher.add_options(parser)
    options, training = parser.parse_known_args(rest)
    plan = launcher.plan(Job.of(training, read_config(training), options.nodes, options.gpus), options)
    if options.dry_run:
        print(plan)
        return 0
    return plan.carry_out()


if __name__ == "__main__":
    sys.exit(main())
