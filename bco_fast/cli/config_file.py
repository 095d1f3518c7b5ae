"""Options of a training command from a flat YAML file, read as if they were on the command line.

A file written for TRL's KTO script is accepted too, see `trl_yaml`.
"""

from __future__ import annotations

import json
import re
import types
import typing
from pathlib import Path

import yaml

from .common import Parser, nearest
from .trl_yaml import from_trl

MAX_BYTES = 1 << 20
RECIPES = Path(__file__).parents[1] / "configs"
"""The papers' recipes, and experiments of several of them."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the numbers of YAML 1.2: 1:30 is no number (in 1.1 it is 90), 010 is ten (in 1.1 eight)."""

    def number(self, node: yaml.ScalarNode) -> int | float:
        text = self.construct_scalar(node)
        if re.fullmatch(r"0[ox][0-9a-fA-F]+", text):
            return int(text, 0)
        return (
            int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text.replace(".inf", "inf").replace(".nan", "nan"))
        )


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$|0o[0-7]+$|0x[0-9a-fA-F]+$|[-+]?\.inf$|\.nan$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.number)


def recipe_path(name: str, kind: str = "") -> str:
    """The file of that name, or the recipe that comes with bco_fast: `bco_ultrafeedback`, with or without configs/ and .yaml.

    Args:
        kind: a folder of recipes, such as experiments.
    """
    if Path(name).is_file() or Path(name).parent not in (Path(), Path("configs"), Path("configs", kind)):
        return name
    recipe = RECIPES / kind / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    return str(recipe) if recipe.is_file() else name


def read_config(path: str, parser: Parser, config_class: type) -> list[str]:
    """A YAML file of options as command-line arguments, in the order of the file.

    Args:
        path: the file; read with a safe loader, so it can build no objects and run no code.
        parser: knows the options; it checks the words that come back, as it checks flags.
        config_class: its annotations tell where a switch, a list or a mapping fits, which as a word would pass for text.

    Returns:
        `["--learning_rate=5e-07", ...]`; a key that is null where the option's default is none is left out.

    Raises:
        ValueError: the file cannot be read or is not one flat mapping; a key is unknown (the nearest one is named), given
            twice, nested or empty; a switch, list or mapping where the option takes none.
    """
    options = from_trl(load_mapping(path))
    hints = typing.get_type_hints(config_class)
    actions = {action.dest: action for action in parser._actions if action.dest != "config"}
    arguments: list[str] = []
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in actions:
            raise ValueError(f"unknown key {key!r}{nearest(name, actions)}")
        if value is None:
            if actions[name].default is not None:
                raise ValueError(f"{key} is empty")
            continue
        if value is False and "no" in (actions[name].choices or ()):
            value = "no"  # YAML 1.1 reads the word as false
        if value is True and name == "resume_from_checkpoint":
            value = "true"  # the newest checkpoint, as on the command line
        kind = type(value)
        words = [str(part) for part in value] if kind is list else []
        if kind in (bool, list, dict) and (
            kind not in _kinds(hints.get(name, str)) or any(word.startswith("-") for word in words)
        ):
            raise ValueError(f"{key} cannot be {'a list' if words else 'a mapping' if kind is dict else value}")
        word = json.dumps(value) if kind in (bool, dict) else str(value)
        arguments += [f"--{name}", *words] if words else [f"--{name}={word}"]
    return arguments


def load_mapping(path: str) -> dict[str, object]:
    """A YAML file as a mapping. Raises `ValueError` if it cannot be read, is none, or gives a key twice."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror or error) from None
    if len(text) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES} bytes, not a configuration")
    try:
        # safe_load alone silently keeps the last value of a key that is given twice
        node, options = yaml.compose(text, Loader=_Loader), _Loader(text).get_single_data()
    except RecursionError:
        raise ValueError("nested too deeply, not a configuration") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"not YAML ({error})") from None
    if not isinstance(options, dict):
        raise ValueError(f"expected lines of `option: value`, found {type(options).__name__}")
    keys = [key.value for key, _ in node.value]
    for key in options:
        if not isinstance(key, str):
            raise ValueError(f"key {key!r} is not the name of an option")
        if keys.count(key) > 1:
            raise ValueError(f"{key} is given twice")
    return options


def _kinds(hint: object) -> set:
    """The types of an annotation, its unions and optionals taken apart."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(hint) for kind in _kinds(part)}
    return {typing.get_origin(hint) or hint}
