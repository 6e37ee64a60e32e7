"""Slurm: a batch file whose ranks srun starts, and which goes on after preemption, the time limit, and failures."""

import argparse
import re
import shlex
import sys

from lasp.launch.cli import SAVED, USER_ERROR
from lasp.launch.job import Job, Plan

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_WORD = re.compile(r"[\w./@:+=,-]+", re.ASCII)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--time", default="24:00:00", help="time limit of one attempt, as sbatch takes it")
    parser.add_argument("--notice", type=int, default=300, help="seconds ahead of it at which ranks are told to save")
    parser.add_argument("--attempts", type=int, default=5, help="attempts after failures, one after another")
    parser.add_argument("--partition", help="as sbatch takes it, like the next ones")
    parser.add_argument("--account")
    parser.add_argument("--qos")
    parser.add_argument("--cpus", type=int, help="cores of each rank")
    parser.add_argument("--setup", action="append", default=[], metavar="LINE", help="a line of shell that comes first")
    parser.add_argument("--submit", action="store_true", help="hand the file to sbatch")


def plan(job: Job, options: argparse.Namespace) -> Plan:
    """The batch file in the output folder, for sbatch. ValueError for what a directive cannot hold."""
    path = job.folder / "job.sbatch"
    text = _file(job.repeatable(), options)
    if options.submit:
        return Plan(["sbatch", str(path)], files={path: text})
    return Plan([], files={path: text}, then=f"submit it with: sbatch {shlex.quote(str(path))}")


def _file(job: Job, options: argparse.Namespace) -> str:
    directives = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.gpus,
        "gres": None if job.config.device == "cpu" else f"gpu:{job.gpus}",
        "cpus-per-task": _at_least_1("--cpus", options.cpus),
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "time": _time(options.time, options.notice),
        "signal": f"USR1@{_at_least_1('--notice', options.notice)}",
    }
    lines = [f"#SBATCH --{name}={_word(name, value)}" for name, value in directives.items() if value is not None]
    lines.append(f"#SBATCH --array=1-{_at_least_1('--attempts', options.attempts)}%1")
    # Killed at the first exit, ranks that have saved would hide its code; and nobody waits long for one that is gone.
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=300", "--distribution=block:block"]
    threads = []
    if options.cpus:
        srun.append(f"--cpus-per-task={options.cpus}")  # which srun does not take from sbatch since Slurm 22.05
        threads = [f"export OMP_NUM_THREADS={options.cpus}"]
    return "\n".join(
        [
            "#!/bin/bash",
            "# Written by `lasp launch slurm`. The array's elements are attempts: one at a time, each goes on from the",
            "# last checkpoint. Slurm itself requeues an attempt that is preempted or loses a node.",
            *lines,
            f"#SBATCH --output={_word('output', job.folder)}/slurm-%A_%a.out",
            "#SBATCH --requeue",
            "#SBATCH --open-mode=append",
            "",
            *options.setup,
            *threads,
            shlex.join([*srun, sys.executable, "-m", *job.module]),
            "code=$?",
            "case $code in",
            f"  {SAVED})  # told to stop ahead of the time limit, and has saved: the same attempt goes on",
            '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" ;;',
            f"  0 | {USER_ERROR})  # done, or what no attempt can put right: no further ones",
            '    scancel --state=PENDING "$SLURM_ARRAY_JOB_ID" ;;',
            "esac",
            "exit $code",
            "",
        ]
    )


def _word(name: str, value: object) -> str:
    """A directive's value, which ends at the first space."""
    if not _WORD.fullmatch(str(value)):
        raise ValueError(
            f"a batch file of Slurm cannot hold --{name}={str(value)!r}: letters, digits and ./@:+=,-_ only"
        )
    return str(value)


def _time(text: str, notice: int) -> str:
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"--time must be minutes, hours:minutes:seconds or days-hours:..., got {text!r}")
    days, *numbers = (int(number or 0) for number in found.groups())
    # One number is minutes, two are minutes and seconds; behind days, hours come first.
    if found[1] is None and found[4] is None:
        numbers = [0, *numbers[:2]]
    hours, minutes, seconds = numbers
    limit = ((24 * days + hours) * 60 + minutes) * 60 + seconds
    if 0 < limit <= notice:  # 0 is no limit
        raise ValueError(
            f"--time {text} is over {limit} s after its begin, and ranks are told {notice} s (--notice) ahead"
        )
    return text


def _at_least_1(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
