"""What the subcommands share: errors, the parser, loading a model."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import logging
import os
import re
import runpy
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

from ..data.sources import is_hub_name, one_line
from ..files import final_name

logger = logging.getLogger("bco_fast")


class UsageError(Exception):
    """An error that the user can fix; printed as one line, exit code 2."""

    exit_code = 2
    of_all_ranks = False
    """Every rank raises it, so that rank 0 alone prints it."""


class DivergedError(UsageError):
    """Training has diverged and was stopped; one line, exit code 3."""

    exit_code = 3


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a scheduler sends before it takes the machine away."""


_NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))  # never of a read
# What safetensors' and torch's writers make of the same errors.
_NO_ROOM_TEXT = re.compile(r"No space left|File too large|Read-only file system|Input/output error|quota exceeded|unexpected pos \d+ vs \d+|PytorchStreamWriter failed|file write failed", re.IGNORECASE)  # fmt: skip


def write_failure(error: BaseException) -> str | None:
    """What could not be written and why, if this error is a disk's: full, read-only or broken."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    own = [cause for cause in chain if isinstance(cause, OSError) and cause.errno in _NO_ROOM]
    if own:
        cause = next((cause for cause in own if cause.filename), own[-1])
        return f"cannot write{f' {final_name(cause.filename)}' if cause.filename else ''} ({cause.strerror})"
    if any(_NO_ROOM_TEXT.search(str(cause)) for cause in chain):
        return "cannot write (the disk is full, read-only or broken)"
    return None


@contextlib.contextmanager
def usage_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Errors of these kinds become a `UsageError` of one line."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UsageError) and UsageError not in kinds:
            raise
        # some libraries list everything they know
        reason = write_failure(error) if isinstance(error, OSError) else None
        refused = UsageError(f"{prefix}{reason or one_line(error)[:600] or type(error).__name__}")
        refused.of_all_ranks = getattr(error, "of_all_ranks", False)
        raise refused from None


def with_dashes(message: str) -> str:
    """The library's errors name a field, `beta must be > 0`; on the command line it is the flag `--beta`."""
    words = "|".join(sorted(map(re.escape, Parser.names), key=len, reverse=True))
    snakes = "|".join(sorted((name for name in Parser.names if "_" in name), key=len, reverse=True))
    if words:
        message = re.sub(rf"^({words})(?![\w/.-])", r"--\1", message)
    if snakes:
        message = re.sub(rf"(?<![\w/.='\"-])({snakes})(?![\w/-])", r"--\1", message)
    return message


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
            name = "{" + ",".join(map(str, action.choices)) + "}" if len(action.choices) <= 6 else "NAME"
            words = f"{name} [{name} ...]" if action.nargs == "+" else name
        return f"{action.option_strings[0]} {words}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip().replace("%%", "%").replace("%", "%%")
        if action.required or action.nargs == 0 or "default:" in text.lower() or text.endswith("required"):
            return text
        default = getattr(action.default, "value", action.default)
        default = " ".join(map(str, default)) if isinstance(default, list) else default
        shown = "none" if default in (None, "") else str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """Its errors are `UsageError`s; options are spelt with dashes or underscores, and never abbreviated."""

    names: ClassVar[list[str]] = []
    """Options of the parser that parsed last: those that an error may be about."""

    def parse_known_args(self, *args, **options):
        Parser.names = [action.dest for action in self._actions if action.option_strings]
        return super().parse_known_args(*args, **options)

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, formatter_class=Help, **options)

    def add_argument(self, *flags, **options):
        dashed = [flag.replace("_", "-") for flag in flags if flag.startswith("--")]
        return super().add_argument(*dict.fromkeys([*flags, *dashed]), **options)

    def error(self, message: str):
        message = one_line(message)
        raise UsageError(message if len(message) <= 400 else f"{message[:400]} ...")


def config_parser(config_class: type, **options) -> Parser:
    """A parser of the fields of a config."""
    from transformers import HfArgumentParser

    parser = type("ConfigParser", (Parser, HfArgumentParser), {})(config_class, add_help=False, **options)
    for action in parser._actions:
        if action.dest == "loss_type":  # HfArgumentParser drops the default of a list
            action.default = config_class.__dataclass_fields__["loss_type"].default
    return parser


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
        "--attn_implementation",
        help="attention backend; flash: FlashAttention for this card (default: flash-attn if installed, else SDPA)",
    )
    parser.add_argument(
        "--chat_template", help="chat template: the path of a Jinja file, or the template (default: the tokenizer's)"
    )
    add_code_option(parser)
    # use_peft: frozen weights keep their stored dtype under "auto"
    parser.set_defaults(use_peft=True, load_in_4bit=False, load_in_8bit=False, bf16=False, fp16=False)


def add_code_option(parser: Parser) -> None:
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the Python code in the folder of a model or tokenizer"
    )


def add_objective_option(parser: Parser) -> None:
    parser.add_argument(
        "--objective_file",
        metavar="FILE",
        help="Python file that is run and calls register_objective, for a --loss_type of your own (default: none)",
    )


def load_objectives(arguments: list[str]) -> None:
    """Run the file of --objective_file, so that --loss_type knows what it registers."""
    parser = Parser(add_help=False)
    add_objective_option(parser)
    path = parser.parse_known_args(arguments)[0].objective_file
    if path is None:
        return
    if not Path(path).is_file():
        raise UsageError(f"--objective_file {path}: {'a folder' if Path(path).is_dir() else 'no such file'}")
    logger.info("--objective_file %s runs as Python", path)
    with usage_errors(Exception, SystemExit, prefix=f"--objective_file {path}: "):  # it may raise anything
        runpy.run_path(path, run_name="objective_file")


def load_model_and_tokenizer(path: str, config, *, to_accelerator: bool = False):
    """A model and its tokenizer with the chosen chat template."""
    from ..data.chat import with_template
    from ..models.load import load_model, load_tokenizer

    if not Path(path).is_dir() and (Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1):
        raise UsageError(f"--model {path}: no such folder")
    attention = f", --attn_implementation {config.attn_implementation}" if config.attn_implementation else ""
    with usage_errors(Exception, prefix=f"--model {path}: "):  # a damaged folder raises anything
        tokenizer = load_tokenizer(path, config.trust_remote_code)
    with usage_errors(ValueError):
        tokenizer = with_template(tokenizer, config.chat_template)
    with usage_errors(Exception, prefix=f"--model {path}{attention}: "):
        model = load_model(path, config)
    most, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if most >= rows:
        raise UsageError(f"--model {path}: the tokenizer has the id {most}, but the model has {rows} embeddings")
    return model.to(accelerator()) if to_accelerator else model, tokenizer


def accelerator():
    """The device of the accelerator, or of the CPU where there is none."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def open_tokenizer(flag: str, path: str, trust_remote_code: bool):
    from ..models.load import load_tokenizer

    with usage_errors(Exception, prefix=f"{flag} {path}: no tokenizer: "):
        return load_tokenizer(path, trust_remote_code)


def check_input(flag: str, path: str | None) -> None:
    """Refuse a file that is not there, before anything is loaded; a name on the Hub is tried later."""
    if path is not None and not is_hub_name(path) and not Path(path).is_file():
        raise UsageError(f"{flag} {path}: {'a folder; pass one file of it' if Path(path).is_dir() else 'no such file'}")


def check_output(flag: str, path: str, source: str | None = None) -> None:
    """Refuse a file that cannot be written, or is the file that is read."""
    if not path:
        raise UsageError(f"{flag} is empty")
    if Path(path).is_dir():
        raise UsageError(f"{flag} {path} is a folder")
    if source is not None and Path(path).exists() and Path(source).exists() and Path(path).samefile(source):
        raise UsageError(f"{flag} {path} is the input; write to another file")
    check_writable(flag, Path(path).parent)


def check_writable(flag: str, folder: str | os.PathLike) -> None:
    """Refuse a folder that cannot be created or written to, before anything is loaded. Leaves nothing behind."""
    if not os.fspath(folder):
        raise UsageError(f"{flag} is empty")
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UsageError(f"{flag} {folder}: {there} is a file")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"1")
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot write to {there} ({error.strerror or error})") from None
