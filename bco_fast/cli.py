"""bco-fast: the command line. The last line of `train`, `online` and `demo` on standard output is one line of JSON."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import logging
import sys
import time
from pathlib import Path


class UsageError(Exception):
    """Something the user can mend; printed as one line, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(" ".join(message.split()))


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {
        "train": train,
        "online": online,
        "demo": demo,
        "cache": cache,
        "convert": convert,
        "udm": udm,
        "generate": generate,
        "report": report,
        "bench": bench,
        "judge": judge,
        "shifts": shifts,
    }
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("bco_fast").setLevel(logging.INFO)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(__doc__ + "\n    bco-fast train --model PATH --data FILE --output_dir DIR   align a model from feedback"
                  "\n    bco-fast online --model PATH --prompts FILE --reward REWARD --output_dir DIR   align it on its own completions"
                  "\n    bco-fast cache build|inspect|verify|export|prune           the reference log-probabilities on disk"
                  "\n    bco-fast demo [--output_dir DIR]                            the whole story on a tiny model"
                  "\n    bco-fast convert --data FILE --recipe NAME --to KIND --output FILE   a public dataset as feedback"
                  "\n    bco-fast udm --data FILE --embedder tfidf --output FILE     weights that match the classes' prompts"
                  "\n    bco-fast report RUN [RUN ...] [--output FILE.html]          plots and a table of runs, on one page"
                  "\n    bco-fast bench [--model PATH]                               what the fused head saves on this machine"
                  "\n    bco-fast generate --model PATH --prompts FILE --output FILE   completions, as AlpacaEval or Arena-Hard"
                  "\n    bco-fast judge A B --reward PATH|module:function            win rate of completions A against B"
                  "\n    bco-fast shifts --model A --ref_model B --data FILE --output_dir DIR   what training did to the tokens"
                  "\n\n`bco-fast train --help` lists every option.")  # fmt: skip
            return 0
        if arguments[0] == "--version":
            from . import __version__

            print(f"bco_fast {__version__}")
            return 0
        if arguments[0] not in commands:
            raise UsageError(f"unknown command {arguments[0]!r}{_nearest(arguments[0], commands)}")
        summary = commands[arguments[0]](arguments[1:])
    except UsageError as error:
        print(f"bco-fast: error: {error}", file=sys.stderr)
        return 2
    if summary is not None:
        print(json.dumps(summary), flush=True)
    return 0


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _own_train_parser() -> _Parser:
    """Options of `train` that are no field of `FeedbackConfig`. What is required may come from --config too."""
    own = _Parser(prog="bco-fast train", add_help=False, allow_abbrev=False)
    own.add_argument("--config", help="YAML file of options, this one excepted; flags win over it")
    own.add_argument(
        "--model", metavar="PATH", help="folder of a Hugging Face causal language model, or a Hub name; required"
    )
    own.add_argument(
        "--data", metavar="FILE",
        help="feedback: prompt, completion and label or score; or prompt, chosen, rejected; weight is optional. A file "
        "(JSONL, JSON, CSV, Parquet) or a Hub name, owner/dataset:split; required",
    )  # fmt: skip
    own.add_argument("--eval_data", "--eval-data", help="held-out feedback; default: a share of --data")
    own.add_argument(
        "--eval_fraction", "--eval-fraction", type=float, default=0.1,
        help="share of the prompts of --data that is held out when --eval_data is not given; 0 for none",
    )  # fmt: skip
    return own


def _parse_train(arguments: list[str]):
    """-> (namespace of our own options, FeedbackConfig)."""
    from .config import FeedbackConfig

    about = "Align a language model from thumbs up and down."
    return _parse_run("train", about, _own_train_parser(), ("model", "data"), FeedbackConfig, arguments)


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

    from .chat import with_template
    from .loading import load_model

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


def train(arguments: list[str]) -> dict:
    """Align a model from a file of thumbs up and down. Everything is read and checked before anything is written."""
    start = time.perf_counter()
    options, config = _parse_train(arguments)

    from .data import FeedbackError, read_rows, split_by_prompt, tokenize_rows, unpair
    from .sources import is_hub_name

    for flag, path in (("--data", options.data), ("--eval_data", options.eval_data)):
        if path is not None and not is_hub_name(path) and not Path(path).is_file():
            raise UsageError(f"{flag} {path}: no such file")
    config.resume_from_checkpoint = _checkpoint(config)
    _check_output(config.output_dir)
    try:
        reading = {
            "needs": config.objective.data,
            "on_bad_row": config.on_bad_row,
            "columns": config.columns,
            "score_scale": config.score_scale,
        }
        rows = read_rows(options.data, **reading)
        held_out = read_rows(options.eval_data, **reading) if options.eval_data else []
        if not held_out and options.eval_fraction:
            rows, held_out = split_by_prompt(rows, options.eval_fraction)
        if config.objective.data != "pairs":
            rows, held_out = unpair(rows, config.pairing_ratio), unpair(held_out)
        model, tokenizer = _load_model(options.model, config)
        limits = {
            "max_length": config.max_length,
            "max_prompt_length": config.max_prompt_length,
            "on_bad_row": config.on_bad_row,
            "progress": not config.disable_tqdm,
        }
        datasets = [tokenize_rows(part, tokenizer, **limits) if part else None for part in (rows, held_out)]
    except (FeedbackError, ValueError) as error:
        raise UsageError(str(error)) from None
    return run_training(model, tokenizer, config, *datasets, start=start)


def online(arguments: list[str]) -> dict:
    """Align a model on completions that it samples and a reward judges."""
    from .online_cli import online as run

    return run(arguments)


def _checkpoint(config) -> str | bool | None:
    """What to resume from: a folder, or True for the newest whole checkpoint of output_dir."""
    from .checkpoints import candidates

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


def run_training(model, tokenizer, config, train_dataset, eval_dataset, *, start: float) -> dict:
    """Train, evaluate, save; -> what `train` prints."""
    from .cache import CacheError
    from .checkpoints import CheckpointError
    from .memory import peak_memory_mb
    from .trainer import FeedbackTrainer

    try:
        trainer = FeedbackTrainer(model, config, train_dataset, eval_dataset, processing_class=tokenizer)
    except (CacheError, ValueError, TypeError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except CheckpointError as error:
        raise UsageError(str(error)) from None
    metrics = trainer.evaluate() if eval_dataset is not None else {}
    trainer.save_model(config.output_dir)
    trainer.save_state()
    report = trainer.reference_report
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mb": round(peak_memory_mb(), 1),
        "rows": len(train_dataset),
        "cache_rows": report.rows,
        "cache_hits": report.hits,
        "cache_computed": report.computed,
        "delta": round(trainer._delta(), 4),
        "held_out_rows": 0 if eval_dataset is None else len(eval_dataset),
        "held_out_margin": metrics.get("eval_rewards/margins"),
        "held_out_auc": metrics.get("eval_rewards/auc"),
        "output_dir": config.output_dir,
    }


def demo(arguments: list[str]) -> dict:
    """Build a tiny model from a seed, teach it from noisy demonstrations, then align it from thumbs up and down."""
    parser = _Parser(prog="bco-fast demo", allow_abbrev=False)
    parser.add_argument("--output_dir", "--output-dir", default="runs/demo", help="where results are written")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the training")
    parser.add_argument("--online", action="store_true", help="then online UNA on the policy's own completions")
    options = parser.parse_args(arguments)

    from .demo import run, run_online

    return (run_online if options.online else run)(Path(options.output_dir), seed=options.seed)


def cache(arguments: list[str]) -> None:
    """Build, show, check, export or clean the reference cache."""
    from .cache_cli import run

    run(arguments)


def convert(arguments: list[str]) -> dict:
    """Write the rows of a public dataset as feedback."""
    from .recipes import FORMATS, RECIPES, convert_file

    parser = _Parser(prog="bco-fast convert", allow_abbrev=False, description="Write a dataset's rows as feedback.")
    parser.add_argument(
        "--data", required=True, help="JSONL, JSON, CSV or Parquet file, or the name of a dataset on the Hub"
    )
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(RECIPES)}")
    parser.add_argument("--to", required=True, help="pairs, binary or score")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--threshold", type=float, help="score from which a completion is a thumbs up")
    parser.add_argument("--split", help="of a dataset on the Hub (default: train)")
    parser.add_argument(
        "--format", default="auto", choices=FORMATS,
        help="chat: every row as messages; text: none, conversations are left out; auto: one turn as text (default)",
    )  # fmt: skip
    parser.add_argument(
        "--on_bad_row", "--on-bad-row", default="error", choices=("error", "skip"),
        help="a row of another schema: error names it and writes nothing (default), skip leaves it out",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {options.recipe!r}{_nearest(options.recipe, RECIPES)}")
    try:
        report = convert_file(
            options.data, options.output, options.recipe, options.to, threshold=options.threshold, split=options.split,
            format=options.format, on_bad_row=options.on_bad_row,
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    return {**dataclasses.asdict(report), "output": options.output}


def udm(arguments: list[str]) -> dict:
    """Underlying distribution matching: write a weight column."""
    from .udm import as_summary, describe, match_file

    parser = _Parser(
        prog="bco-fast udm", allow_abbrev=False, description="Weigh thumbs down to the prompts of thumbs up."
    )
    parser.add_argument("--data", required=True, help="thumbs up and down, JSONL, JSON, CSV or Parquet: prompt, label")
    parser.add_argument(
        "--embedder", help="tfidf, or the folder of a Hugging Face model; not needed with --state of tfidf"
    )
    parser.add_argument("--output", required=True, help="JSONL file to write; OUTPUT.udm.json is the state")
    parser.add_argument("--state", help="OUTPUT.udm.json of an earlier call: weigh by it, fit nothing")
    for bound, default in (("min", 0.5), ("max", 10.0)):
        name = f"{bound}_density_ratio"
        parser.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", type=float, help=f"of a thumbs down's weight; default {default}"
        )
    parser.add_argument("--seed", type=int, help="of the folds; default 0")
    options = vars(parser.parse_args(arguments))
    try:
        report = match_file(options.pop("data"), options.pop("output"), **options)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    print(describe(report))
    return as_summary(report)


def report(arguments: list[str]) -> dict:
    """Plots of runs on one page."""
    from .report import ReportError, write_report

    parser = _Parser(
        prog="bco-fast report", allow_abbrev=False, description="Plots and a table of runs, on one HTML page."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, finished or still training")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="the page; PNG files are written beside it (default: report.html in the run's folder; of several runs, here)",
    )
    options = parser.parse_args(arguments)
    try:
        from .report import ReportError, write_report
    except ImportError as error:
        raise UsageError(f"{error}; bco-fast report needs matplotlib: pip install 'bco_fast[train]'") from None
    try:
        return write_report(options.runs, options.output)
    except ReportError as error:
        raise UsageError(" ".join(str(error).split())) from None


def bench(arguments: list[str]) -> dict:
    """Measure the fused head against plain PyTorch, here and at a model's sizes."""
    parser = _Parser(
        prog="bco-fast bench",
        allow_abbrev=False,
        description="The fused lm-head against plain PyTorch on this machine.",
    )
    parser.add_argument("--model", help="folder or Hub name of a model; only its config is read")
    parser.add_argument("--hidden", type=int, help="hidden size, without --model (default: 896, Qwen2.5-0.5B's)")
    parser.add_argument("--vocab", type=int, help="vocabulary size, without --model (default: 151936)")
    parser.add_argument("--tokens", type=int, help="completion tokens of a batch (default: what the time allows)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to measure for, about (default: 10)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32"
    )
    options = parser.parse_args(arguments)
    if options.model is not None and (options.hidden or options.vocab):
        raise UsageError("--hidden and --vocab are for no --model")
    for flag in ("hidden", "vocab", "tokens", "seconds"):
        value = getattr(options, flag)
        if value is not None and value <= 0:
            raise UsageError(f"--{flag} must be > 0, not {value}")

    import torch

    from .bench import HeadSize, compare, describe, head_size

    if options.model is not None:
        try:
            size = head_size(options.model)
        except (OSError, ValueError, ImportError) as error:
            raise UsageError(f"--model {options.model}: {' '.join(str(error).split())}") from None
    elif options.hidden or options.vocab:
        size = HeadSize("the given sizes", options.hidden or 896, options.vocab or 151936)
    else:
        size = HeadSize("Qwen2.5-0.5B", 896, 151936)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    found = compare(size, tokens=options.tokens, seconds=options.seconds, dtype=dtype)
    print(describe(found, size))
    return found


def generate(arguments: list[str]) -> dict:
    """Write a model's completions of a prompts file."""
    from .judge_cli import generate as run

    return run(arguments)


def judge(arguments: list[str]) -> dict:
    """Compare two files of completions by a reward."""
    from .judge_cli import judge as run

    return run(arguments)


def shifts(arguments: list[str]) -> dict:
    """Report what training did to the tokens of a feedback file."""
    from .judge_cli import shifts as run

    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
