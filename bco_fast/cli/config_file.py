"""Options of `bco-fast train` from a YAML file: flat, typed, and read as if they stood on the command line.

A file written for TRL's KTO script is read too, see `trl_yaml`.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path

import yaml

from .trl_yaml import from_trl

MAX_BYTES = 1 << 20


class ConfigError(ValueError):
    """A configuration file that cannot be used; names the file, the key and the reason."""


def read_config(
    path: str, hints: Mapping[str, object], choices: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """A YAML file of options as command-line arguments, in the order of the file.

    Args:
        path: the file; `yaml.safe_load` reads it, so it can build no objects and run no code.
        hints: option -> type, as the annotations of a dataclass have them.
        choices: option -> the words it takes, where they are few: `no` is then a word, not YAML's false.

    Returns:
        `["--learning_rate=5e-07", ...]`; a key that is null where the option may be empty is left out.

    Raises:
        ConfigError: the file cannot be read or is not one flat mapping; a key is unknown (the nearest one is named), given
            twice or nested; a value is not of the option's type.
    """
    try:
        options = from_trl(_load(path))
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{path}: {error}") from None
    arguments: list[str] = []
    for key, value in options.items():
        name = key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, list(hints), n=1)
            raise ConfigError(f"{path}: unknown key {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        kinds = _kinds(hints[name])
        if value is None:
            if type(None) not in kinds:
                raise ConfigError(f"{path}: {key} is empty; expected {_expected(kinds)}")
            continue
        if isinstance(value, bool) and not value and "no" in (choices or {}).get(name, ()):
            value = "no"  # YAML 1.1 reads the word as false
        if name == "resume_from_checkpoint" and value is True:
            value = "true"  # the newest checkpoint, as on the command line
        try:
            words = _words(value, kinds)
        except TypeError:
            nested = " (nested keys are not read)" if isinstance(value, dict) else ""
            raise ConfigError(f"{path}: {key} is {_short(value)}; expected {_expected(kinds)}{nested}") from None
        arguments += [f"--{name}={words}"] if isinstance(words, str) else [f"--{name}", *words]
    return arguments


def _load(path: str) -> dict[str, object]:
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, not a configuration")
    try:
        # the safe loader's nodes: of a key given twice safe_load would keep the last without a word
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        options = yaml.safe_load(text)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply, not a configuration") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{path}: expected lines of `option: value`, found {_short(options)}")
    keys = [key.value for key, _ in node.value]
    for key in options:
        if not isinstance(key, str):
            raise ConfigError(f"{path}: key {_short(key)} is not the name of an option")
        if keys.count(key) > 1:
            raise ConfigError(f"{path}: {key} is given twice")
    return options


def _kinds(hint: object) -> tuple:
    """The types of an annotation, its unions and optionals taken apart."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    origin = typing.get_origin(hint)
    return (origin if origin in (list, dict) else hint,)


def _words(value: object, kinds: tuple) -> str | list[str]:
    """A value as the command line has it: one word, or several of a list."""
    if isinstance(value, bool):
        if bool in kinds:
            return str(value).lower()
    elif isinstance(value, (int, float)):
        if float in kinds or (int in kinds and isinstance(value, int)):
            return repr(value)
        if str in kinds and not any(k in kinds for k in (int, bool)):
            return str(value)
    elif isinstance(value, str):
        if str in kinds or any(isinstance(kind, type) and issubclass(kind, Enum) for kind in kinds):
            return value
        if float in kinds:  # YAML 1.1 reads 5e-7, without a point, as text
            try:
                return repr(float(value))
            except ValueError:
                raise TypeError from None
    elif isinstance(value, list):
        words = [str(part) for part in value if isinstance(part, (str, int, float))]
        if list in kinds and value and len(words) == len(value) and not any(w.startswith("-") for w in words):
            return words
    elif isinstance(value, dict):
        scalars = all(isinstance(part, (str, int, float, type(None))) for part in [*value, *value.values()])
        if dict in kinds and scalars:
            return json.dumps(value)
    raise TypeError


_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def _expected(kinds: tuple) -> str:
    names = [_NAMES.get(kind, "text") for kind in kinds if kind is not type(None)]
    return " or ".join(dict.fromkeys(names)) or "text"


def _short(value: object) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
