"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import argparse
import copy
import difflib
import logging
from pathlib import Path


class UsageError(Exception):
    """Something the user can mend; printed as one line, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(" ".join(message.split()))


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _parse_run(command: str, about: str, own: _Parser, required: tuple[str, ...], config_class: type, arguments: list):
    """Options of a command that trains: its own and the fields of a config, from flags and a --config file.

    Args:
        required: options of `own` that must be given, here or in the file.

    Returns:
        (namespace of `own`, config)
    """
    import typing

    from transformers import HfArgumentParser

    class Parser(_Parser, HfArgumentParser):
        pass

    known = Parser(config_class, allow_abbrev=False, add_help=False)
    if any(a in ("-h", "--help") for a in arguments):
        print(_run_help(command, about, own, required, known, config_class))
        raise SystemExit(0)
    path = own.parse_known_args(arguments)[0].config
    if path is not None:
        from .config_file import ConfigError, read_config

        types = {action.dest: action.type or str for action in own._actions if action.dest != "config"}
        choices = {action.dest: action.choices for action in known._actions if action.choices}
        try:
            from_file = read_config(path, types | typing.get_type_hints(config_class), choices)
            known.parse_args(own.parse_known_args(from_file)[1])
        except ConfigError as error:
            raise UsageError(f"--config {error}") from None
        except UsageError as error:
            raise UsageError(f"--config {path}: {error}") from None
        arguments = [*from_file, *arguments]
    options, rest = own.parse_known_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, str) and name != "config" and value.startswith("-"):
            raise UsageError(f"{value!r} is not a path")
    namespace, unknown = known.parse_known_args(rest)
    if unknown:
        flags = [flag for parser in (own, known) for flag in parser._option_string_actions]
        raise UsageError(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].split('=')[0], flags)}")
    given = {**{name: getattr(options, name) for name in required}, "output_dir": namespace.output_dir}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
    fields = {name for name, option in config_class.__dataclass_fields__.items() if option.init}
    try:
        return options, config_class(**{name: value for name, value in vars(namespace).items() if name in fields})
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None


def _run_help(command, about, own, required, known, config_class) -> str:
    """Our own options first; a default is shown unless the text says it."""
    from transformers import TrainingArguments

    theirs = set(TrainingArguments.__dataclass_fields__)
    changed = {
        name
        for name, option in config_class.__dataclass_fields__.items()
        if name not in theirs or option.metadata != TrainingArguments.__dataclass_fields__[name].metadata
    }
    # each option once: under its first spelling, without the --no_ twins of those that are on
    actions = [action for action in known._actions if not action.option_strings[0].startswith("--no_")]
    sections = {
        "model and data": [a for a in known._actions if a.dest == "output_dir"] + own._actions,
        "objective, data and reference": [a for a in actions if a.dest in changed],
        "of transformers.TrainingArguments": [a for a in actions if a.dest not in changed | {"output_dir"}],
    }
    formatter = argparse.HelpFormatter(f"bco-fast {command}", max_help_position=32, width=110)
    metavars = {action.dest: action.metavar or "FILE" for action in own._actions}
    needed = " ".join(f"--{name} {metavars[name]}" for name in required)
    formatter.add_usage(f"bco-fast {command} {needed} --output_dir DIR [--config FILE] [--OPTION VALUE ...]", [], [])
    formatter.add_text(f"{about} Dashes and underscores in options are the same.")
    for title, part in sections.items():
        formatter.start_section(title)
        for action in part:
            formatter.add_argument(_described(action))
        formatter.end_section()
    return formatter.format_help()


def _described(action: argparse.Action) -> argparse.Action:
    """A copy that shows one spelling, a short metavar and the default."""
    action, text = copy.copy(action), action.help or ""
    action.option_strings = action.option_strings[:1]
    if action.choices is None and not action.metavar:
        action.metavar = {int: "INT", float: "NUMBER"}.get(action.type, "VALUE")
    elif action.choices:
        action.metavar = "{" + ",".join(map(str, action.choices)) + "}" if len(action.choices) <= 6 else "NAME"
    if action.nargs == "?":
        action.metavar = "true|false"
    if action.dest == "output_dir":
        text = "folder for checkpoints, the model, its card and the log; required"
    if "default:" not in text.lower() and "required" not in text:
        default = getattr(action.default, "value", action.default)
        shown = "none" if default in (None, "") else str(default).lower() if isinstance(default, bool) else str(default)
        text = f"{text.rstrip()} (default: {shown})".replace("%%", "%").replace("%", "%%")
    action.help = text
    return action


def _load_model(path: str, config):
    from transformers import AutoTokenizer

    from ..data.chat import with_template
    from ..models.load import load_model

    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1):
        raise UsageError(f"--model {path}: no such folder")
    try:
        model, tokenizer = load_model(path, config), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model {path}: {' '.join(str(error).split())}") from None
    try:
        return model, with_template(tokenizer, config.chat_template)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def _checkpoint(config) -> str | bool | None:
    """What to resume from: a folder, or True for the newest whole checkpoint of output_dir."""
    from ..training.checkpoints import candidates

    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if str(wanted).lower() == "true":
        if not candidates(True, config.output_dir):
            raise UsageError(f"--resume_from_checkpoint true: no checkpoint in {config.output_dir}")
        return True
    if not any(Path(wanted, name).is_file() for name in ("trainer_state.json", "manifest.json")):
        raise UsageError(f"--resume_from_checkpoint {wanted}: not a checkpoint")
    return str(wanted)


def _check_output(folder: str) -> None:
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"--output_dir {folder} is a file")


logger = logging.getLogger("bco_fast")


def _model_options(parser: _Parser, dtype: str = "auto") -> None:
    parser.add_argument(
        "--model_dtype", "--model-dtype", choices=["auto", "float32", "bfloat16", "float16"], default=dtype,
        help="of the weights; auto: as they are stored (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--attn_implementation", "--attn-implementation")
    parser.add_argument(
        "--chat_template",
        "--chat-template",
        help="in place of the tokenizer's: the path of a Jinja file, or the template",
    )


def _model_and_tokenizer(path: str, options: argparse.Namespace):
    """On the accelerator if there is one."""
    import torch

    # use_peft: the weights are frozen, so "auto" leaves them in their stored dtype
    config = argparse.Namespace(
        model_dtype=options.model_dtype,
        attn_implementation=options.attn_implementation,
        chat_template=options.chat_template,
        use_peft=True,
        load_in_4bit=False,
        load_in_8bit=False,
        bf16=False,
        fp16=False,
    )
    model, tokenizer = _load_model(path, config)
    return model.to(torch.accelerator.current_accelerator() or torch.device("cpu")), tokenizer


def _tokenizer(path: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{path}: no tokenizer ({' '.join(str(error).split())})") from None
