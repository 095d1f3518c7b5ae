"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from ..files import json_numbers
from .common import Terminated, UsageError, nearest, with_dashes, write_failure
from .help_text import PAGES, wants_help

COMMANDS = {
    "check": ("DATA --model PATH", "what is in a feedback file, and what training on it takes"),
    "train": ("--model PATH --data FILE --output_dir DIR", "align a model from feedback"),
    "sweep": (
        "--config FILE --output_dir DIR --beta 0.05 0.1 --seeds 0 1 2",
        "train over values and seeds, and compare",
    ),
    "plan": ("--model PATH --max_length N --gpu_memory GB", "what a step takes, before a GPU is rented"),
    "online": ("--model PATH --prompts FILE --reward REWARD --output_dir DIR", "align it on its own completions"),
    "cache": ("build|inspect|verify|export|prune", "the reference log-probabilities on disk"),
    "demo": ("[--output_dir DIR]", "the whole method on a tiny model, in half a minute"),
    "convert": ("--data FILE --recipe NAME --to KIND --output FILE", "a public dataset as feedback"),
    "udm": ("--data FILE --embedder tfidf --output FILE", "weights that match the prompts of both classes"),
    "merge": ("--model ADAPTER --output_dir DIR", "an adapter and its base as one model, for serving"),
    "export": ("--model RUN --output_dir DIR", "weights and GGUF to serve, and the commands of vLLM and the Hub"),
    "recipes": ("[NAME]", "the papers' recipes for --config, and files for accelerate launch"),
    "report": ("RUN [RUN ...] [--output FILE.html]", "plots and a table of runs, on one page"),
    "bench": ("[--model PATH]", "what the fused head saves on this machine"),
    "generate": ("--model PATH --prompts FILE --output FILE", "completions, as AlpacaEval or Arena-Hard"),
    "reward": ("--model PATH --data PAIRS --output_dir DIR", "a reward model from pairs"),
    "judge": ("A B --reward PATH|module:function", "win rate of completions A against B"),
    "reproduce": ("NAME [--seeds 0 1 2]", "a paper's experiment over seeds: fine-tune, align, generate, judge"),
    "shifts": ("--model A --ref_model B --data FILE --output_dir DIR", "what training did to the tokens"),
}
"""Each is the function of that name in the module of that name: its arguments in, what it prints as JSON out."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; -> its exit code: 0, 2 for what the user can fix, 130 for Ctrl-C and 143 for SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal in ASCII prints the help too
    try:
        with _sigterm():
            return _run(arguments)
    except KeyboardInterrupt as stop:
        word, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        if os.environ.get("RANK", "0") == "0":
            print(f"\nbco-fast: {word}; {stop or 'nothing was left half written'}", file=sys.stderr)
        return code
    except BrokenPipeError:  # as in `bco-fast train --help | head`: the reader has what it wanted
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        reason = write_failure(error)
        if reason is None:
            raise
        print(f"bco-fast: error: {reason}", file=sys.stderr)
        return 2


_EXTRAS = {
    "train": ("transformers", "accelerate", "peft", "tokenizers", "matplotlib", "yaml"),
    "data": ("datasets", "pyarrow", "sklearn"),
}
"""Packages of our extras in pyproject.toml, by the names that are imported."""


@contextlib.contextmanager
def _extras(command: str) -> Iterator[None]:
    """A package of an extra that is not installed is named with the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in _EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        raise UsageError(f"bco-fast {command} needs {package}: pip install 'bco_fast[{extra}]'") from None


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated` where the command is, so that files are closed and temporary ones removed."""

    def stop(*_):
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: its owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("bco_fast").setLevel(logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"    {f'bco-fast {name} {usage}':80}{about}" for name, (usage, about) in COMMANDS.items()]
        print("\n".join([__doc__, "", *lines, "", "`bco-fast train --help` lists the options of a command."]))
        return 0
    if arguments[0] == "--version":
        from .. import __version__

        print(f"bco_fast {__version__}")
        return 0
    command, *rest = arguments
    if command in ("train", "online") and sys.platform == "linux":  # read when the first GPU memory is allocated
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if command in PAGES and wants_help(rest) is False:
        print((Path(__file__).parent / "help" / f"{command}.txt").read_text(encoding="utf-8"), end="")
        return 0
    try:
        if command not in COMMANDS:
            raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
        with _extras(command):
            summary = getattr(importlib.import_module(f".{command}", __name__), command)(rest)
    except UsageError as error:
        if not error.of_all_ranks or os.environ.get("RANK", "0") == "0":
            print(f"bco-fast: error: {with_dashes(str(error))}", file=sys.stderr)
        return error.exit_code
    if summary is not None:
        print(json.dumps(json_numbers(summary)), flush=True)
    return 0
