"""`lasp data build CONFIG [--key value ...]`: tokenize what `lasp train` with the same words would read."""

import sys

from lasp.launch.configuration import read_config
from lasp.launch.outcome import Outcome
from lasp.train.config import TrainConfig
from lasp.train.data.tokenizer import load_tokenizer
from lasp.train.run import prepare_data

USAGE = "usage: lasp data build CONFIG [--key value ...]; CONFIG and keys are those of `lasp train`"


def main(argv: list[str] | None = None) -> int:
    """Build. Returns 0; 2 for what the user can put right, after one line on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(arguments[:1]):
        print(USAGE)
        return 0
    return Outcome.of(lambda: _start(arguments)).tell()


def _start(arguments: list[str]) -> int:
    if arguments[:1] != ["build"]:
        raise ValueError(USAGE)
    return _build(read_config(arguments[1:]))


def _build(config: TrainConfig) -> int:
    """Build, or read and check, all that a run reads, and say where it lies."""
    training, validation = prepare_data(config, load_tokenizer(config.tokenizer), print)
    for role, found in (("data", training), ("held out", validation)):
        for data in found:
            print(f"{role:<9} {data.corpus.source}: {len(data.rows):,} sequences of {data.seq_len:,}")
    folders = {str(shard.path.parent): None for data in (*training, *validation) for shard in data.corpus.shards}
    print(f"tokens    {', '.join(folders)}", f"checksum  {training[0].corpus.checksum}", sep="\n")
    return 0
