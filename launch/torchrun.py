"""Starting the ranks of one machine, as torchrun does."""

import logging
import os

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from lasp.launch.cli import USER_ERROR, print_error


def launched_rank() -> int | None:
    """This process's rank when torchrun or the like started it, None when it is on its own."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def run_ranks(module: str, arguments: list[str], ranks: int) -> int:
    """Run `python -m module arguments` on `ranks` processes of this machine and wait for them.

    The cores are shared out among the ranks, unless OMP_NUM_THREADS says otherwise. Returns 0 when all ranks do, 2 when
    a rank reported a user error, 1 for any other failure, which is named on stderr, and 128 + n after signal n.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    # A failing rank has said why itself; the agent's own report of it takes a page.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(["--standalone", f"--nproc-per-node={ranks}", "-m", module, *arguments]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if USER_ERROR in codes.values():
            return USER_ERROR
        print_error("; ".join(f"rank {rank} failed with exit code {code}" for rank, code in sorted(codes.items())))
        return 1
    except SignalException as error:
        return 128 + error.sigval
    return 0
