"""The command `lasp`: finds the subcommand and leaves the rest to it."""

import argparse
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, NoReturn

from lasp import __version__

USER_ERROR = 2
"""Exit code of a command, and of a rank, that failed because of what the user asked for."""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended: 128 and the signal's number, as shells have it."""


STUCK = 70
"""Exit code of a rank whose watchdog ended it: a step took too long, on it or on another (EX_SOFTWARE, sysexits.h)."""

SAVED = 75
"""Exit code of a training that was told to stop, and has saved: started again, it goes on (EX_TEMPFAIL, sysexits.h)."""


class Command(NamedTuple):
    """A subcommand: the module with its `main(argv)`, what it does, and which packages of which extra it needs."""

    module: str
    purpose: str
    extra: str = ""
    packages: tuple[str, ...] = ()


TRAIN = (
    "transformers",
    "safetensors",
    "tokenizers",
    "jsonargparse",
    "docstring_parser",
    "matplotlib",
    "numpy",
    "rich",
)
COMMANDS = {
    "train": Command("lasp.launch.train", "train a model with the sequence cut over ranks", "train", TRAIN),
    "data": Command("lasp.launch.data", "tokenize what a training will read, ahead of it", "train", TRAIN),
    "launch": Command("lasp.launch.launch", "train on a cluster: torchrun, Slurm or DeepSpeed", "train", TRAIN),
    "runs": Command("lasp.launch.runs", "list runs: the state of each and how far it is", "train", TRAIN),
    "export": Command("lasp.launch.export", "write a checkpoint's model in the files of Hugging Face", "train", TRAIN),
    "plot": Command("lasp.launch.plot", "draw the losses of runs into one picture", "train", TRAIN),
    "linearize": Command("lasp.launch.linearize", "turn a softmax model into a linear one, over ranks", "train", TRAIN),
    "verify": Command(
        "lasp.launch.verify", "prove that a kind of model is parallel and exact", "hf", ("transformers",)
    ),
    "doctor": Command("lasp.launch.doctor", "look at the machines of a run and the links between their ranks"),
    "tune": Command("lasp.launch.tune", "measure how this GPU likes the Triton kernels cut into tiles"),
    "plan": Command("lasp.launch.plan", "find the layout that trains a model on given machines", "train", TRAIN),
    "bench": Command("lasp.launch.bench", "measure speed and memory", "bench", (*TRAIN, "ring_attention_pytorch")),
}


class Parser(argparse.ArgumentParser):
    """One whose errors are ValueErrors."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code; 2 when there is no such subcommand."""
    fill_descriptors()
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
    command = COMMANDS[name]
    if missing := [package for package in command.packages if find_spec(package) is None]:
        print_error(f'lasp {name} needs {", ".join(missing)}: pip install "lasp2[{command.extra}]"')
        return USER_ERROR
    # Imported here: each subcommand needs its own extras, and `lasp --help` needs none.
    try:
        return int(import_module(command.module).main(arguments))
    except KeyboardInterrupt:
        print_error("stopped by SIGINT")
        return INTERRUPTED


def fill_descriptors() -> None:
    """Give what was started without standard input, output or error (`>&-`) those that lead nowhere: the next file that
    it opened would be one of them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def print_error(message: str) -> None:
    """Say on stderr, in one line, what went wrong."""
    print(f"lasp: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _usage() -> str:
    lines = [f"  {name:10}{command.purpose}" for name, command in COMMANDS.items()]
    told = "`lasp COMMAND --help` tells more, `lasp --version` the version."
    return "\n".join(["usage: lasp COMMAND ...", "", *lines, "", told])


if __name__ == "__main__":
    sys.exit(main())
