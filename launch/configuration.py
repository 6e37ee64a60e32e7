"""The configuration of a training run as a command line gives it: a TOML file, or a recipe's name, and overrides."""

import tomllib
from itertools import pairwise
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from lasp.train.config import SECTIONS, TrainConfig

RECIPES = Path(__file__).with_name("configs")
"""The configurations that ship with the package; a recipe's name is its file's."""


def read_config(arguments: list[str]) -> TrainConfig:
    """The configuration that `CONFIG [--key value ...]` describes; ValueError for an unknown key or a bad value."""
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--config={_find_file(arguments[0])}", *arguments[1:]]
    arguments = ["--allow_change=true" if word == "--allow-change" else word for word in arguments]
    parser = _parser()
    if not {"-h", "--help"} & set(arguments):
        _check_files(arguments)
    try:
        values = parser.parse_args(arguments).as_dict()
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    del values["config"]
    for section, kind in SECTIONS.items():
        values[section] = kind(**values[section])
    return TrainConfig(**values)


def _parser() -> ArgumentParser:
    """Of the command line. What its help says about a field is the text under it in `lasp.train.config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="lasp train CONFIG", parser_mode="toml", exit_on_error=False, print_config=None)
    parser.add_argument("--config", action="config", help="a further TOML file, which overrides CONFIG")
    parser.add_class_arguments(TrainConfig)
    return parser


def _check_files(arguments: list[str]) -> None:
    """ValueError unless there is a configuration, and every file of one can be read and sets something."""
    names = [value for name, value in pairwise(arguments) if name == "--config"]
    names += [name.removeprefix("--config=") for name in arguments if name.startswith("--config=")]
    if not names:
        raise ValueError(f"CONFIG is missing, a TOML file or the name of a recipe; recipes: {_recipes()}")
    for name in names:
        if not Path(name).is_file():
            raise ValueError(f"no configuration file {name!r}")
        try:
            values = tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"cannot read the configuration file {name!r}: {error}") from error
        if not values:
            raise ValueError(f"the configuration file {name!r} sets nothing: a run has a model and data at least")


def _find_file(name: str) -> Path:
    """The file of a configuration that is given by its path or, without a folder and suffix, by a recipe's name."""
    path, recipe = Path(name), RECIPES / f"{name}.toml"
    if not path.is_file() and path.name == name and recipe.is_file():
        return recipe
    if not path.is_file():
        raise ValueError(f"no configuration file {name!r}, and no recipe of that name; recipes: {_recipes()}")
    return path


def _recipes() -> str:
    return ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
