"""How the work of a command, or of one rank of it, ended: an exit code, and what there is to tell."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from lasp.launch.cli import INTERRUPTED, USER_ERROR, print_error
from lasp.parallel.collectives import is_lost_peer


class Failure(Exception):
    """What went wrong, in one line, where it is nothing that the user could put right."""


@dataclass(frozen=True)
class Outcome:
    """What is left of some work when it is over."""

    code: int
    """Exit code: 0, 2 for what the user can put right, 130 after Ctrl-C, 1 for anything else."""

    message: str = ""
    """The error in one line; empty where the work ran to its end, whatever its code."""

    details: str = ""
    """The traceback, where one line would not do."""

    alike: bool = False
    """Whether every rank raises this error, as those before the first step and a loss that is not finite are."""

    lost_peer: bool = False
    """Whether the work failed because another rank was gone, as far as this one can tell."""

    @classmethod
    def of(cls, work: Callable[[], int]) -> Self:
        """Do some work, which returns its exit code. An error that speaks for itself becomes one line."""
        try:
            return cls(work())
        except KeyboardInterrupt:
            return cls(INTERRUPTED, "stopped by SIGINT")
        except ValueError as error:
            return cls(USER_ERROR, str(error), alike=True)
        except FloatingPointError as error:
            return cls(1, str(error), alike=True)
        except (Failure, OSError) as error:
            return cls(1, str(error))
        except Exception as error:
            return cls(1, f"{type(error).__name__}: {error}", traceback.format_exc(), lost_peer=is_lost_peer(error))

    def tell(self, prefix: str = "") -> int:
        """Say on stderr what there is to tell; returns the code."""
        if self.details:
            print(self.details, end="", file=sys.stderr, flush=True)
        if self.message:
            print_error(prefix + self.message)
        return self.code

    def tell_as(self, rank: int, speaks: bool) -> int:
        """`tell` of a rank that has no launcher of ours, in one line where another rank, which has more to say, was
        lost; what all ranks say alike those that `speak` say. An error ends its process here and now."""
        if self.lost_peer:
            print_error(f"rank {rank} lost another one, which says why unless it was killed: {self.message}")
        elif self.alike and speaks:
            self.tell()
        elif not self.alike:
            self.tell(f"rank {rank}: ")
        if self.message:
            # The other ranks may be anywhere, and an orderly exit would wait for them (or be aborted by gloo).
            sys.stdout.flush()
            os._exit(self.code)
        return self.code
