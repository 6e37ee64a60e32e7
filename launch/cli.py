"""The command `lasp`: finds the subcommand and leaves the rest to it."""

import sys
from importlib import import_module

from lasp import __version__

USER_ERROR = 2
"""Exit code of a command, and of a rank, that failed because of what the user asked for."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 and the signal's number, as shells have it."""

COMMANDS = {
    "train": ("lasp.launch.train", "train a model with the sequence cut over ranks"),
    "verify": ("lasp.launch.verify", "prove that a kind of model is parallel and exact"),
    "tune": ("lasp.launch.tune", "measure how this GPU likes the Triton kernels cut into tiles"),
    "bench": ("lasp.launch.bench", "measure speed and memory"),
}
"""Name of a subcommand: (module with its `main(argv)`, what it does)."""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code; 2 when there is no such subcommand."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"lasp {__version__}")
        return 0
    if name not in COMMANDS:
        print_error(f"unknown command {name!r}; choose from {', '.join(COMMANDS)}")
        return USER_ERROR
    # Imported here: each subcommand needs its own extras, and `lasp --help` needs none.
    return int(import_module(COMMANDS[name][0]).main(arguments))


def print_error(message: str) -> None:
    """Say on stderr, in one line, what went wrong."""
    print(f"lasp: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _usage() -> str:
    lines = [f"  {name:8}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: lasp COMMAND ...", "", *lines, "", "`lasp COMMAND --help` tells more."])


if __name__ == "__main__":
    sys.exit(main())
