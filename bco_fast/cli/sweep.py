"""`bco-fast sweep`: trainings over values of options and over seeds, with one reference for all, and a table with intervals.

    bco-fast sweep --config run.yaml --output_dir sweeps/a --beta 0.05 0.1 --learning_rate 5e-7 1e-6 --seeds 0 1 2 --jobs 2

Every run is a process and has a folder, a log and, once it is finished, a record:

    DIR/beta=0.05,learning_rate=5e-7,seed=0/    what `bco-fast train` writes
    DIR/logs/NAME.log   DIR/records/NAME.json
    DIR/results.csv, settings.csv, results.md, plots/, report.html    see `evaluation.sweep`

The same call again skips finished runs, continues interrupted ones from their last whole checkpoint, and repeats failed ones.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..files import make_folder
from .common import Parser, UsageError, check_input, check_writable, usage_errors
from .config_file import load_mapping, recipe_path
from .sweep_runs import SweepRun, run_all

OURS = ("config", "output_dir", "seeds", "jobs", "launcher")
NOT_SWEPT = {
    "seed": "use --seeds",
    "overwrite_output_dir": "a sweep continues what is there; choose another --output_dir to start again",
    "resume_from_checkpoint": "a sweep continues interrupted runs by itself",
    "cache_dir": "one reference serves all runs; give one folder",
}
_OF_A_SUM = ("loss_type", "loss_weights")
"""Options whose value may be several words, for a sum of objectives; quoted, they are one value of the sweep."""
_OF_THE_REFERENCE = (
    "model", "data", "eval_data", "eval_fraction", "max_samples", "max_steps", "loss_type", "pairing_ratio", "max_length",
    "max_prompt_length", "max_completion_length", "chat_template", "columns", "labels", "score_scale", "on_bad_row",
    "model_dtype", "attn_implementation", "load_in_4bit", "load_in_8bit", "bf16", "fp16",
)  # fmt: skip
"""Options that decide which rows the reference sees, and which model it is."""


def sweep(arguments: list[str]) -> dict:
    options, given = _parse(arguments)
    check_writable("--output_dir", options.output_dir)
    folder = Path(options.output_dir)
    config = {} if options.config is None else _config(options)
    runs = list(_runs(options, given, config))
    _check(runs)

    with usage_errors(ImportError, prefix="bco-fast sweep needs matplotlib: pip install 'bco_fast[train]': "):
        from ..evaluation.report import write_report
        from ..evaluation.sweep import Planned, write_results
    for name in ("logs", "records"):
        make_folder(folder / name)
    problems = run_all(runs, options.jobs, shlex.split(options.launcher))
    planned = [Planned(r.name, r.folder, r.options, r.seed, problems.get(r.name, "")) for r in runs]
    table, done = write_results(folder, planned)
    if done:
        write_report([run.folder for run in done.values()], folder / "report.html", each=False)
    print(table, flush=True)
    if problems:
        name, problem = next(iter(problems.items()))
        raise UsageError(
            f"{len(problems)} of {len(runs)} runs failed, the first {name}: {problem}; the others are in {folder}. The same "
            "call repeats those that failed."
        )
    return {"runs": len(runs), "results": str(folder / "results.csv"), "report": str(folder / "report.html")}


def _parse(arguments: list[str]):
    """-> (our options, {option of train: its values})."""
    parser = Parser(
        prog="bco-fast sweep",
        usage="bco-fast sweep [--config FILE] --output_dir DIR [--seeds 0 1 2] [--jobs N] --OPTION VALUE [VALUE ...] ...",
        description="Train with every combination of the given values, over seeds; every other option is one of "
        "`bco-fast train`, with one value or several.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="options of all runs: a YAML file, or the name of a recipe (default: none)"
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="folder of the runs and their results")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="each setting is trained with each seed"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; several GPUs are dealt out in turn")
    parser.add_argument("--launcher", default="", help="starts each run, as in 'accelerate launch --num_processes 8'")
    own: list[str] = []
    swept: dict[str, list[str]] = {}
    for flag, values in _groups(arguments):
        name = flag.removeprefix("--").replace("-", "_")
        if name in OURS or flag in ("-h", "--help"):
            own += [flag, *values]
        elif name in swept:
            raise UsageError(f"{flag} is given twice; give its values once, one after another")
        elif name in NOT_SWEPT and (name != "cache_dir" or len(values) > 1):
            raise UsageError(f"{flag}: {NOT_SWEPT[name]}")
        elif len(set(values)) < len(values):
            hint = '; quote the weights of one sum: "1 1 0.5"' if name == "loss_weights" else ""
            raise UsageError(f"{flag} has a value twice: {' '.join(values)}{hint}")
        else:
            swept[name] = values
    options = parser.parse_args(own)
    if len(set(options.seeds)) < len(options.seeds) or not all(0 <= seed < 2**32 for seed in options.seeds):
        raise UsageError(f"--seeds must be different numbers in [0, 2^32), not {options.seeds}")
    if options.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, not {options.jobs}")
    return options, swept


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the words up to the next one."""
    flag, values = None, []
    for word in arguments:
        if word.startswith("--") or word == "-h":
            if flag is not None:
                yield flag, values
            flag, equals, value = word.partition("=")
            values = [value] if equals else []
        elif flag is None:
            raise UsageError(f"unknown argument {word!r}: options begin with --")
        else:
            values = [*values, word]
    if flag is not None:
        yield flag, values


def _config(options) -> Mapping[str, object]:
    options.config = recipe_path(options.config)
    check_input("--config", options.config)
    with usage_errors(ValueError, prefix=f"--config {options.config}: "):
        config = load_mapping(options.config)
    for name in config:
        if name in ("overwrite_output_dir", "resume_from_checkpoint"):
            raise UsageError(f"--config {options.config}: {name}: {NOT_SWEPT[name]}")
    return config


def _runs(options, given: Mapping[str, list[str]], config: Mapping[str, object]) -> Iterator[SweepRun]:
    several = [name for name, values in given.items() if len(values) > 1]
    fixed = [word for name, values in given.items() if name not in several for word in _words(name, *values)]
    start = () if options.config is None else ("--config", options.config)
    taken: set[str] = set()
    for values in itertools.product(*(given[name] for name in several)):
        setting = dict(zip(several, values, strict=True))
        for seed in options.seeds:
            name = _name(setting, seed, taken)
            folder = Path(options.output_dir, name)
            swept = [word for key, value in setting.items() for word in _words(key, value, joined=True)]
            command = ("train", *start, *fixed, *swept, "--seed", str(seed), "--output_dir", str(folder))
            reference = tuple(value for key, value in setting.items() if key in _OF_THE_REFERENCE)
            yield SweepRun(name, folder, command, setting, seed, reference, config)


def _words(name: str, *value: str, joined: bool = False) -> Sequence[str]:
    if name in _OF_A_SUM:
        return (f"--{name}", *" ".join(value).split())
    return (f"--{name}={' '.join(value)}",) if joined else (f"--{name}", *value)


def _name(setting: Mapping[str, str], seed: int, taken: set[str]) -> str:
    """A folder's name that tells the run apart."""
    parts = {
        key: re.sub(r"[^\w.+-]+", "-", value.rstrip("/").rpartition("/")[2]).strip("-")[:40]
        for key, value in setting.items()
    }
    base = ",".join(f"{key}={value}" for key, value in (parts | {"seed": seed}).items())
    name = next(name for i in itertools.count(1) if (name := base if i == 1 else f"{base},{i}") not in taken)
    taken.add(name)
    return name


def _check(runs: Sequence[SweepRun]) -> None:
    """Refuse what `train` would refuse, before the first run: an option that it does not know, or a value out of range."""
    from .train import parse

    seen: set[str] = set()
    for run in runs:
        if (setting := json.dumps(run.options)) not in seen:  # seeds are numbers, and those have been checked
            seen.add(setting)
            options, _ = parse(list(run.command[1:]))
            check_input("--data", options.data)
            check_input("--eval_data", options.eval_data)
