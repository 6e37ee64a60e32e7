"""`lasp verify`: a tiny model of the same kind as a given one, on the ranks of this machine and on one.

With --simulate N the ranks are threads of one process; without a model, operations and mixers are compared.
"""

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

from lasp.launch.cases import cases
from lasp.launch.cases import compare as compare_case
from lasp.launch.cli import USER_ERROR, print_error
from lasp.launch.outcome import Outcome
from lasp.launch.place import run_command
from lasp.launch.ranks import run_ranks
from lasp.launch.threads import run
from lasp.parallel.group import SequenceGroup, init_mesh, shutdown
from lasp.verify import Report, compare
from lasp.wrap.parallelize import parallelize
from lasp.wrap.refusal import check_model
from lasp.wrap.shrink import shrink

# More would mean that `shrink` does not know how this kind names its sizes.
MOST_PARAMETERS = 20_000_000
MOST_SIMULATED = 64


def main(argv: list[str]) -> int:
    """Exit code 0 where the model is parallel and exact, 1 where it is not, 2 where it is refused or unknown."""
    options = _options(argv)
    if reason := _wrong(options):
        print_error(reason)
        return USER_ERROR
    if options.simulate is not None:
        _quiet()
        return Outcome.of(lambda: _simulate(options)).tell()

    def alone() -> int:
        _quiet()
        return _refused(options.model) or run_ranks("lasp.launch.verify", argv, options.ranks)

    return run_command(alone, lambda: as_rank(argv))


def as_rank(argv: list[str]) -> int:
    """Probe a model as one of several ranks; the first one prints the report."""
    options = _options(argv)
    _quiet()
    group = SequenceGroup.from_mesh(init_mesh(sp=options.ranks, dp=1, device="cpu"), layout=options.layout)
    report = probe(options.model, group, options.seq_len)
    shutdown()
    if group.rank == 0:
        print(report)
    return 0 if report.exact else 1


def _options(argv: list[str]) -> argparse.Namespace:
    """With the ranks and tokens that follow from the others."""
    options = _parser().parse_args(argv)
    ranks = options.sp if options.simulate is None else options.simulate
    if options.seq_len is None:
        options.seq_len = max(64, 2 * (ranks or 2))
    options.ranks = 2 if ranks is None else ranks
    return options


def _wrong(options: argparse.Namespace) -> str | None:
    """What cannot be, in a line."""
    if options.simulate is not None and options.sp is not None:
        return f"--simulate {options.simulate} plays its ranks in one process, and --sp {options.sp} starts processes"
    if options.simulate is not None and not 2 <= options.simulate <= MOST_SIMULATED:
        return f"--simulate must be from 2 to {MOST_SIMULATED}, got {options.simulate}"
    if options.simulate is None and options.model is None:
        return "verify needs a model, or --simulate N for operations and mixers"
    if options.ranks < 1 or options.seq_len < options.ranks:
        name = "--sp" if options.simulate is None else "--simulate"
        return f"{name} must be at least 1 and --seq-len at least {name}, got {options.ranks} and {options.seq_len}"
    return None


def _simulate(options: argparse.Namespace) -> int:
    """Ranks in one process: a line per case, or the report of a model."""
    exact = True
    if options.model is not None:
        plain = tiny_model(configuration(options.model))
        found = run(options.ranks, partial(_probe, plain, options.seq_len), options.layout, checks=True)
        print(found[0])
        return 0 if found[0].exact else 1
    for case in cases(options.ranks, options.seq_len):
        verdict = compare_case(case, options.ranks, options.seq_len, options.layout)
        print(verdict, flush=True)
        exact = exact and verdict.exact
    return 0 if exact else 1


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
    return _probe(tiny_model(configuration(name)), seq_len, group)


def _probe(model: Any, seq_len: int, group: SequenceGroup) -> Report:
    own = parallelize(copy.deepcopy(model), group)
    return compare(copy.deepcopy(model), own, group, seq_len)


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
        "model",
        nargs="?",
        help="a folder, an id (owner/name) of the Hugging Face hub, or a model type; weights are not read",
    )
    parser.add_argument("--sp", type=int, help="ranks that share the sequence, 2 by default")
    parser.add_argument(
        "--simulate", type=int, metavar="N", help="so many ranks in one process; without a model all operations"
    )
    parser.add_argument("--seq-len", type=int, help="tokens over all ranks, by default 64, or two of each rank")
    parser.add_argument("--layout", choices=("contiguous", "zigzag"), default="zigzag")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
