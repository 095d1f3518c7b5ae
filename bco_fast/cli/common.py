"""What the subcommands share: errors, the parser, loading a model."""

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

    of_all_ranks = False
    """Every rank raises it, so that rank 0 alone prints it."""


@contextlib.contextmanager
def usage_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Errors of these kinds become a `UsageError` of one line."""
    try:
        yield
    except kinds as error:
        refused = UsageError(f"{prefix}{one_line(error)}")
        refused.of_all_ranks = getattr(error, "of_all_ranks", False)
        raise refused from None


def nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


class Help(argparse.HelpFormatter):
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
        super().__init__(*args, allow_abbrev=False, formatter_class=Help, **options)

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

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    with usage_errors(OSError, ValueError, ImportError, prefix=f"{path}: no tokenizer: "):
        return AutoTokenizer.from_pretrained(path)


def check_output_dir(folder: str) -> None:
    if Path(folder).exists() and not Path(folder).is_dir():
        raise UsageError(f"--output_dir {folder} is a file")
