"""The commands that train, `train` and `online`: their options, from flags and a YAML file, and what they print."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.sources import one_line
from .common import (
    DivergedError,
    Parser,
    UsageError,
    add_objective_option,
    config_parser,
    load_objectives,
    nearest,
    usage_errors,
    with_dashes,
    write_failure,
)
from .config_file import read_config, recipe_path
from .gpu_defaults import OPTIONS, gpu_defaults
from .help_text import help_text, wants_help


def add_run_options(parser: Parser) -> None:
    """Options of `train` and `online` alike. What is required may come from --config too."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options, or a recipe's name; flags win over it (default: none)",
    )
    parser.add_argument(
        "--model", metavar="PATH", help="folder of a Hugging Face causal language model, or a Hub name; required"
    )
    add_objective_option(parser)


def parse_run(command: str, about: str, own: Parser, required: tuple[str, ...], config_class: type, arguments: list):
    """Options of a command that trains: its own and the fields of a config, from flags and a --config file.

    Args:
        own: the command's own options, without help.
        required: those of them that must be given, here or in the file.

    Returns:
        (namespace of `own`, with `of_the_gpu`: what `gpu_defaults` turned on; config)
    """
    from transformers import set_seed

    known = config_parser(config_class, parents=[own])
    if (whole := wants_help(arguments)) is not None:
        print(help_text(command, about, own, required, known, config_class, whole=whole), end="")
        raise SystemExit(0)
    path = own.parse_known_args(arguments)[0].config
    if path is not None:
        path = recipe_path(path)
        with usage_errors(UsageError, ValueError, prefix=f"--config {path}: "):
            from_file = read_config(path, known, config_class)
        load_objectives([*from_file, *arguments])
        with usage_errors(UsageError, ValueError, prefix=f"--config {path}: "):
            known.parse_args(from_file)
        arguments = [*from_file, *arguments]
    else:
        load_objectives(arguments)
    defaults = {name: known.get_default(name) for name in OPTIONS}
    known.set_defaults(**dict.fromkeys(OPTIONS))  # None where none is given
    namespace, unknown = known.parse_known_args(arguments)
    if unknown:
        hint = nearest(unknown[0].split("=")[0], known._option_string_actions)
        raise UsageError(f"unknown argument {unknown[0]!r}{hint}")
    missing = [f"--{name}" for name in (*required, "output_dir") if getattr(namespace, name) is None]
    if missing:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
    values = vars(namespace)
    options = argparse.Namespace(**{action.dest: values.pop(action.dest) for action in own._actions})
    options.of_the_gpu = gpu_defaults(values, defaults)
    try:
        config = config_class(**values)
    except Exception as error:  # of three libraries
        with usage_errors(Exception, prefix=_blamed(config_class, values, str(error))):
            raise
    set_seed(config.seed)  # a weight that the model's files lack is drawn when they are loaded
    return options, config


def _blamed(config_class: type, values: dict, message: str) -> str:
    """The flag to blame for an error that names none: the one without which there is no error."""
    defaults = {name: field.default for name, field in config_class.__dataclass_fields__.items() if name in values}
    changed = [name for name, value in values.items() if value != defaults[name] and name != "output_dir"]
    if "--" in with_dashes(message):
        return ""
    for name in changed:
        with contextlib.suppress(Exception):
            config_class(**values | {name: defaults[name]})
            return f"--{name} {values[name]}: "
    return ""


def check_earlier_run(config) -> None:
    """Nothing that was trained before is replaced unless the user says so."""
    from ..training.record import earlier_run

    there = earlier_run(config.output_dir)
    if there is None or config.overwrite_output_dir or config.resume_from_checkpoint is not None:
        return
    raise UsageError(
        f"--output_dir {config.output_dir} holds {there}: continue it with --resume_from_checkpoint true, replace it with "
        "--overwrite_output_dir true, or choose another folder"
    )


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


def run(trainer, resume_from_checkpoint) -> None:
    """Train; what stops it and the user can fix is one line. A signal stops it with a checkpoint."""
    from ..training.checkpoints import CheckpointError
    from ..training.finite import TrainingDiverged
    from ..training.memory_watch import advice, out_of_memory
    from ..training.record import remove_run
    from .stopping import StopAfterStep

    if trainer.args.overwrite_output_dir and not resume_from_checkpoint and trainer.is_world_process_zero():
        remove_run(trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()
    try:
        with usage_errors(CheckpointError), StopAfterStep(trainer):
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except TrainingDiverged as error:
        raise DivergedError(str(error)) from None
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not out_of_memory(error):
            raise
        raise UsageError(advice(trainer)) from None


@contextlib.contextmanager
def resumable(config) -> Iterator[None]:
    """An interruption, or a disk that takes no more, says from where the run can continue."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        interruption.args = (how_to_continue(config.output_dir),)
        raise
    except Exception as error:
        reason = write_failure(error) or (one_line(error) if isinstance(error, OSError) else None)
        if reason is None:
            raise
        raise UsageError(f"{reason}; mend it, then {how_to_continue(config.output_dir)}") from None


def own_process(launcher: Sequence[str] = ()) -> list[str]:
    """The words before a command of bco-fast that is to run in a process of its own, started by the launcher if there is one."""
    return [*(launcher or (sys.executable,)), "-m", "bco_fast.cli"]


def way_on(output_dir: str | Path) -> list[str]:
    """Options of a training that was begun before: it resumes, or starts again where it had no whole checkpoint."""
    if not Path(output_dir).is_dir():
        return []
    return ["--resume_from_checkpoint", "true"] if _newest_whole(output_dir) else ["--overwrite_output_dir", "true"]


def _newest_whole(output_dir: str | Path) -> Path | None:
    from ..training.checkpoints import MANIFEST, candidates

    return next((folder for folder in candidates(True, output_dir) if (folder / MANIFEST).is_file()), None)


def how_to_continue(output_dir: str) -> str:
    whole = _newest_whole(output_dir)
    if whole is None:
        return f"start again with --overwrite_output_dir true: {output_dir} has no whole checkpoint"
    return f"continue from {whole} with --resume_from_checkpoint true"


def run_summary(trainer, start: float) -> dict:
    """The first entries of the line of JSON that a training command prints."""
    from ..models.memory import peak_memory_mb

    seconds = round(time.perf_counter() - start, 1)
    return {"steps": trainer.state.global_step, "seconds": seconds, "peak_memory_mb": round(peak_memory_mb(), 1)}
