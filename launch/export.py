"""`lasp export RUN|CHECKPOINT FOLDER`: the model of a checkpoint in the files of Hugging Face.

RUN is the output folder of a run, whose newest whole checkpoint is taken; CHECKPOINT is one of its `step-…` folders.
FOLDER is new; `from_pretrained`, and `name` in `[model]` of a further training, read it. Adapters are written for peft.
"""

import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from lasp.launch.cli import Parser, print_error
from lasp.launch.outcome import Outcome
from lasp.train.checkpoints.export import export
from lasp.train.checkpoints.folders import checkpoint_folder, list_checkpoints
from lasp.train.checkpoints.manifest import FILE
from lasp.train.checkpoints.search import newest_whole


def main(argv: list[str] | None = None) -> int:
    """Export. Exit code 2 for what is no checkpoint, or a damaged one."""
    return Outcome.of(lambda: _export(sys.argv[1:] if argv is None else argv)).tell()


def _export(arguments: list[str]) -> int:
    parser = Parser(prog="lasp export", description=__doc__)
    parser.add_argument("source", metavar="RUN|CHECKPOINT")
    parser.add_argument("folder", metavar="FOLDER")
    options = parser.parse_args(arguments)
    disable_progress_bar()  # transformers shows one for every file it writes
    checkpoint = _find(Path(options.source))
    export(checkpoint, Path(options.folder))
    print(f"{checkpoint} -> {options.folder}")
    return 0


def _find(source: Path) -> Path:
    """The checkpoint that is meant."""
    folder = checkpoint_folder(source)
    if not folder.is_dir():
        if not (source / FILE).exists():
            raise ValueError(f"{str(source)!r} is neither a run nor a checkpoint")
        return source
    whole, damaged = newest_whole(list_checkpoints(folder))
    if whole is None:
        raise ValueError(f"{str(source)!r} holds no checkpoints")
    for reason in damaged.values():
        print_error(f"{reason}: {whole.name} is exported")
    return whole


if __name__ == "__main__":
    sys.exit(main())
