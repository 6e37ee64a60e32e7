"""DeepSpeed's launcher: ranks of this machine, or of several that it reaches by ssh (pdsh)."""

import argparse
import re
import sys
from pathlib import Path

from lasp.launch.job import Job, Plan

_PLAIN = re.compile(r"[\w./:=,@+-]+", re.ASCII)
"""What neither a shell nor pdsh makes anything of."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", help="comma-separated, one per node, the first with rank 0; for several nodes")
    parser.add_argument("--port", type=int, default=29500, help="of rank 0, where the ranks meet")


def plan(job: Job, options: argparse.Namespace) -> Plan:
    """A hostfile in the output folder, and the launcher's command. ValueError for hosts that are not one per node."""
    hosts = ["localhost"] if job.nodes == 1 and not options.hosts else (options.hosts or "").split(",")
    if len(hosts) != job.nodes or len(set(hosts)) != job.nodes:
        raise ValueError(f"--hosts must name {job.nodes} different hosts, one per node, got {options.hosts!r}")
    if wrong := [host for host in hosts if not re.fullmatch(r"[\w.-]+", host) or host.startswith("-")]:
        raise ValueError(f"--hosts: {wrong[0]!r} is no host")
    if not 0 < options.port < 1 << 16:
        raise ValueError(f"--port {options.port} is no port")
    words = [str(Path.cwd()), sys.executable, *job.arguments] if job.nodes > 1 else []
    if wrong := [word for word in words if not _PLAIN.fullmatch(word)]:
        raise ValueError(
            f"DeepSpeed's launcher hands words to the shells of other hosts as they are: {wrong[0]!r} would be another "
            "one there; such a value may stand in the configuration file"
        )
    path = job.folder / "hostfile"
    first = "127.0.0.1" if job.nodes == 1 else hosts[0]
    where = ["--hostfile", str(path), "--master_addr", first, "--master_port", str(options.port)]
    alone = ["--no_ssh", "--node_rank", "0"] if job.nodes == 1 else []
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *where, *alone, "--no_local_rank", "--module"]
    text = "".join(f"{host} slots={job.gpus}\n" for host in hosts)
    return Plan([*command, *job.module], files={path: text}, package="deepspeed")
