"""What the subcommands share: errors, the parser, options of a training run, loading a model."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..data.sources import one_line

logger = logging.getLogger("bco_fast")


class UsageError(Exception):
    """An error that the user can fix; printed as one line, exit code 2."""


@contextlib.contextmanager
def usage_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Errors of these kinds become a `UsageError` of one line."""
    try:
        yield
    except kinds as error:
        raise UsageError(f"{prefix}{one_line(error)}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class _Help(argparse.HelpFormatter):
    """Each option under its first spelling, with a short metavar and its default, unless the text tells the default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        word = "true|false" if action.nargs == "?" else {int: "INT", float: "NUMBER"}.get(action.type, "VALUE")
        words = self._format_args(action, word)
        if action.choices:
            words = "{" + ",".join(map(str, action.choices)) + "}" if len(action.choices) <= 6 else "NAME"
        return f"{action.option_strings[0]} {words}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip().replace("%%", "%").replace("%", "%%")
        if action.required or action.nargs == 0 or "default:" in text.lower() or text.endswith("required"):
            return text
        default = getattr(action.default, "value", action.default)
        shown = "none" if default in (None, "") else str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """Its errors are `UsageError`s; options are spelt with dashes or underscores, and never abbreviated."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, formatter_class=_Help, **options)

    def add_argument(self, *flags, **options):
        dashed = [flag.replace("_", "-") for flag in flags if flag.startswith("--")]
        return super().add_argument(*dict.fromkeys([*flags, *dashed]), **options)

    def error(self, message: str):
        raise UsageError(one_line(message))


def config_parser(config_class: type, **options) -> Parser:
    """A parser of the fields of a config."""
    from transformers import HfArgumentParser

    return type("ConfigParser", (Parser, HfArgumentParser), {})(config_class, add_help=False, **options)


def add_fields(parser: Parser, config_class: type, names: Iterable[str]) -> None:
    """Options that are fields of a config, with its types, defaults and help."""
    for action in config_parser(config_class)._actions:
        if action.dest in names:
            parser._add_action(action)


def add_run_options(parser: Parser) -> None:
    """Options of `train` and `online` alike. What is required may come from --config too."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags win over it (default: none)")
    parser.add_argument(
        "--model", metavar="PATH", help="folder of a Hugging Face causal language model, or a Hub name; required"
    )


def parse_run(command: str, about: str, own: Parser, required: tuple[str, ...], config_class: type, arguments: list):
    """Options of a command that trains: its own and the fields of a config, from flags and a --config file.

    Args:
        own: the command's own options, without help.
        required: those of them that must be given, here or in the file.

    Returns:
        (namespace of `own`, config)
    """
    known = config_parser(config_class, parents=[own])
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_run_help(command, about, own, required, known, config_class))
        raise SystemExit(0)
    path = own.parse_known_args(arguments)[0].config
    if path is not None:
        from .config_file import read_config

        with usage_errors(UsageError, ValueError, prefix=f"--config {path}: "):
            from_file = read_config(path, known, config_class)
            known.parse_args(from_file)
        arguments = [*from_file, *arguments]
    namespace, unknown = known.parse_known_args(arguments)
    if unknown:
        hint = nearest(unknown[0].split("=")[0], known._option_string_actions)
        raise UsageError(f"unknown argument {unknown[0]!r}{hint}")
    missing = [f"--{name}" for name in (*required, "output_dir") if getattr(namespace, name) is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
    values = vars(namespace)
    options = argparse.Namespace(**{action.dest: values.pop(action.dest) for action in own._actions})
    with usage_errors(ValueError, TypeError, ImportError):
        return options, config_class(**values)


def _run_help(command: str, about: str, own: Parser, required: tuple[str, ...], known: Parser, config_class) -> str:
    from transformers import TrainingArguments

    inherited = TrainingArguments.__dataclass_fields__
    changed = {
        name
        for name, option in config_class.__dataclass_fields__.items()
        if name not in inherited or option.metadata != inherited[name].metadata
    }
    owned = {action.dest for action in own._actions} | {"output_dir"}
    # each option once, without the --no_ twins of those that are on
    actions = [action for action in known._actions if not action.option_strings[0].startswith("--no_")]
    sections = {
        "model and data": [a for a in actions if a.dest in owned],
        "objective, data and reference": [a for a in actions if a.dest in changed - owned],
        "of transformers.TrainingArguments": [a for a in actions if a.dest not in changed | owned],
    }
    formatter = _Help(f"bco-fast {command}")
    needed = " ".join(f"--{action.dest} {action.metavar}" for action in own._actions if action.dest in required)
    formatter.add_usage(f"bco-fast {command} {needed} --output_dir DIR [--config FILE] [--OPTION VALUE ...]", [], [])
    formatter.add_text(f"{about} Dashes and underscores in options are the same.")
    for title, part in sections.items():
        formatter.start_section(title)
        formatter.add_arguments(part)
        formatter.end_section()
    return formatter.format_help()


def add_model_options(parser: Parser, dtype: str = "auto") -> None:
    """Options of commands that only run a model; with them the namespace is a config for `load_model`."""
    parser.add_argument(
        "--model_dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default=dtype,
        help="dtype of the weights; auto: as stored",
    )
    parser.add_argument(
        "--attn_implementation", help="attention backend (default: FlashAttention if it fits, else SDPA)"
    )
    parser.add_argument(
        "--chat_template", help="chat template: the path of a Jinja file, or the template (default: the tokenizer's)"
    )
    # use_peft: frozen weights keep their stored dtype under "auto"
    parser.set_defaults(use_peft=True, load_in_4bit=False, load_in_8bit=False, bf16=False, fp16=False)


def load_model_and_tokenizer(path: str, config, *, to_accelerator: bool = False):
    """A model and its tokenizer with the chosen chat template."""
    from transformers import AutoTokenizer

    from ..data.chat import with_template
    from ..models.load import load_model

    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1):
        raise UsageError(f"--model {path}: no such folder")
    with usage_errors(OSError, ValueError, ImportError, prefix=f"--model {path}: "):
        model, tokenizer = load_model(path, config), AutoTokenizer.from_pretrained(path)
    with usage_errors(ValueError, prefix="--"):
        tokenizer = with_template(tokenizer, config.chat_template)
    return model.to(accelerator()) if to_accelerator else model, tokenizer


def accelerator():
    """The device of the accelerator, or of the CPU where there is none."""
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    with usage_errors(OSError, ValueError, ImportError, prefix=f"{path}: no tokenizer: "):
        return AutoTokenizer.from_pretrained(path)


def checkpoint_to_resume(config) -> str | bool | None:
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


def check_output_dir(folder: str) -> None:
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"--output_dir {folder} is a file")


def run_summary(trainer, start: float) -> dict:
    """The first entries of the line of JSON that a training command prints."""
    import time

    from ..models.memory import peak_memory_mb

    seconds = round(time.perf_counter() - start, 1)
    return {"steps": trainer.state.global_step, "seconds": seconds, "peak_memory_mb": round(peak_memory_mb(), 1)}
