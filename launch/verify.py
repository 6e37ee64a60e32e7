"""`lasp verify`: a tiny model of the same kind as a given one, on the ranks of this machine and on one."""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lasp.launch.cli import USER_ERROR, print_error
from lasp.launch.place import run_command
from lasp.launch.ranks import run_ranks
from lasp.parallel.group import SequenceGroup, init_mesh, shutdown
from lasp.verify import Report, compare
from lasp.wrap.parallelize import parallelize
from lasp.wrap.refusal import check_model
from lasp.wrap.shrink import shrink

# More would mean that `shrink` does not know how this kind names its sizes.
MOST_PARAMETERS = 20_000_000


def main(argv: list[str]) -> int:
    """Exit code 0 where the model is parallel and exact, 1 where it is not, 2 where it is refused or unknown."""
    options = _parser().parse_args(argv)
    if options.sp < 1 or options.seq_len < options.sp:
        print_error(f"--sp must be at least 1 and --seq-len at least --sp, got {options.sp} and {options.seq_len}")
        return USER_ERROR

    def alone() -> int:
        _quiet()
        return _refused(options.model) or run_ranks("lasp.launch.verify", argv, options.sp)

    return run_command(alone, lambda: as_rank(argv))


def as_rank(argv: list[str]) -> int:
    """Probe a model as one of several ranks; the first one prints the report."""
    options = _parser().parse_args(argv)
    _quiet()
    group = SequenceGroup.from_mesh(init_mesh(sp=options.sp, dp=1, device="cpu"), layout=options.layout)
    report = probe(options.model, group, options.seq_len)
    shutdown()
    if group.rank == 0:
        print(report)
    return 0 if report.exact else 1


def _quiet() -> None:
    """Without the notes of every rank that slower code runs than a GPU's: here it is the reference, or replaced."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"fla\.")


def _refused(name: str) -> int:
    """What needs no ranks: `USER_ERROR` for a model that is unknown or refused, said once, and otherwise 0."""
    try:
        check_model(tiny_model(configuration(name)))
    except ValueError as error:
        print_error(str(error))
        return USER_ERROR
    return 0


def probe(name: str, group: SequenceGroup, seq_len: int) -> Report:
    """The report on a tiny model of a kind. Raises ValueError where it is unknown, cannot be made, or is refused."""
    plain = tiny_model(configuration(name))
    own = parallelize(copy.deepcopy(plain), group)
    return compare(plain, own, group, seq_len)


def configuration(name: str) -> Any:
    """The configuration of a folder or a hub's id, or the default one of a model type ("qwen3_next").

    Only what can be an id, with its owner, is asked for at the hub: a mistyped type is none.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    make = partial(AutoConfig.from_pretrained, name)
    if not Path(name).exists() and "/" not in name:
        if name not in CONFIG_MAPPING:
            close = get_close_matches(name.lower(), list(CONFIG_MAPPING.keys()), n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "an id of the hub is owner/name"
            raise ValueError(f"{name!r}: no model type of transformers, and no folder; {hint}")
        make = CONFIG_MAPPING[name]
    try:
        return make()
    except Exception as error:  # every kind has its own ways to reject what it reads, or its own defaults
        raise ValueError(f"{name!r}: no valid configuration, here or at the hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """What an error says, without the names of all classes that transformers knows."""
    return str(error).strip().partition("\n")[0][:300]


def tiny_model(config: Any) -> Any:
    """A causal language model of `shrink`'s configuration, the same on every rank, in fp32."""
    from transformers import AutoModelForCausalLM

    try:
        small = shrink(config)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(small).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"a tiny one has {size} parameters")
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(small, attn_implementation="eager").float()
    except Exception as error:  # every kind has its own ways to reject sizes that do not fit
        told = f"{type(error).__name__}: {_first_line(error)}"
        raise ValueError(f"cannot make a tiny {config.model_type} ({told}): try lasp.verify on one of yours") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lasp verify", description=__doc__)
    parser.add_argument(
        "model", help="a folder, an id (owner/name) of the Hugging Face hub, or a model type; weights are not read"
    )
    parser.add_argument("--sp", type=int, default=2, help="ranks that share the sequence")
    parser.add_argument("--seq-len", type=int, default=64, help="tokens over all ranks")
    parser.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
