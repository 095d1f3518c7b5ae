"""What `train`, `online` and `reward` answer to `--help` and `--help-all`.

Their options are the fields of a config, and a config is a `TrainingArguments`, whose import takes five seconds. So what
`--help` prints is kept in help/*.txt, written by `make help-pages`; a test compares it with the options.
"""

from __future__ import annotations

import argparse

from .common import Help, Parser

PAGES = ("train", "online", "reward")

USUAL = {
    "learning_rate": None,
    "num_train_epochs": "passes over the data",
    "max_steps": "optimizer steps, in place of num_train_epochs; -1: as many as the epochs have",
    "per_device_train_batch_size": "rows of a micro-batch on each device",
    "gradient_accumulation_steps": "micro-batches of an optimizer step",
    "lr_scheduler_type": "shape of the learning rate: linear, cosine, constant, ...",
    "warmup_steps": "steps until the peak of the learning rate; below 1, a share",
    "bf16": "compute in bfloat16 (default: on a GPU that can)",
    "gradient_checkpointing": "recompute activations: less memory, more time (default: on a GPU)",
    "eval_strategy": "when to evaluate beside the end: no, steps or epoch",
    "eval_steps": "steps between evaluations (default: logging_steps)",
    "save_strategy": "when to save a checkpoint: no, steps, epoch or best",
    "save_steps": "steps between checkpoints; below 1, a share of all steps",
    "save_total_limit": "checkpoints to keep (default: all)",
    "resume_from_checkpoint": "true, for the newest checkpoint of output_dir, or a checkpoint's folder",
    "report_to": "tensorboard, wandb, mlflow, ..., or none (default: that of the installed transformers)",
    "logging_steps": "steps between log lines; below 1, a share of all steps",
    "seed": "of everything that is drawn",
    "use_cpu": "train on the CPU even where there is a GPU",
}
"""The options of `TrainingArguments` that most runs set, with a line in place of its paragraph; None: the config's own."""

GROUPS = {
    "loss_type": "objective",
    "desirable_weight": "classes",
    "model_dtype": "loading the model",
    "load_in_4bit": "quantisation and adapter",
    "disable_dropout": "batches and memory",
    "max_length": "lengths and reading",
    "cache_dir": "reference",
    "backend": "fused head",
    "steps_per_round": "rounds and sampling",
}
"""Titles in the order in which a config declares its options, by the first of each group."""


def wants_help(arguments: list[str]) -> bool | None:
    """Whether the arguments ask for all options (--help-all) or for ours (--help); None: for no help."""
    if {"--help-all", "--help_all"} & set(arguments):
        return True
    return False if {"-h", "--help"} & set(arguments) else None


def help_text(
    command: str, about: str, own: Parser, required, known: Parser, config_class: type, *, whole: bool
) -> str:
    """The help of a command that trains.

    Args:
        own, required: the command's own options, and those of them that must be given.
        known: its own options and the config's.
        whole: with every option of `TrainingArguments`, each with its paragraph.
    """
    from transformers import TrainingArguments

    inherited = TrainingArguments.__dataclass_fields__
    # each option once, without the --no_ twins of those that are on
    actions = {a.dest: a for a in known._actions if not a.option_strings[0].startswith("--no_")}
    first = [*dict.fromkeys(action.dest for action in own._actions), "output_dir", "overwrite_output_dir"]
    sections: dict[str, list[argparse.Action]] = {"model and data": [actions[name] for name in first]}
    sections["training"] = [_usual(actions[name]) for name in USUAL if not whole]
    title = "objective"
    for name, action in actions.items():
        title = GROUPS.get(name, title) if "loss_type" in actions else "reward model"
        if name not in first and (name not in inherited or name in GROUPS):
            sections.setdefault(title, []).append(action)
    if whole:
        shown = {action.dest for part in sections.values() for action in part}
        sections["of transformers.TrainingArguments"] = [a for name, a in actions.items() if name not in shown]
    formatter = Help(f"bco-fast {command}")
    needed = " ".join(f"--{action.dest} {action.metavar}" for action in own._actions if action.dest in required)
    formatter.add_usage(f"bco-fast {command} {needed} --output_dir DIR [--config FILE] [--OPTION VALUE ...]", [], [])
    formatter.add_text(f"{about} Dashes and underscores in options are the same.")
    for title, part in sections.items():
        formatter.start_section(title)
        formatter.add_arguments(part)
        formatter.end_section()
    if not whole:
        formatter.add_text(
            f"`bco-fast {command} --help-all` adds every other option of transformers.TrainingArguments."
        )
    return formatter.format_help()


def _usual(action: argparse.Action) -> argparse.Action:
    short = argparse.Action(action.option_strings, action.dest, action.nargs, None, action.default, action.type)
    short.help = USUAL[action.dest] or action.help
    return short
