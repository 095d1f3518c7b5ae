"""`bco-fast merge`: an adapter and its base as one model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from .common import (
    Parser,
    UsageError,
    add_code_option,
    check_writable,
    load_model_and_tokenizer,
    usage_errors,
    write_failure,
)


def merge(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast merge", description="Add an adapter to its base's weights and save the model.")
    parser.add_argument("--model", required=True, help="folder of the adapter, as train --use_peft leaves it")
    parser.add_argument("--output_dir", required=True, help="new folder for the model and its tokenizer")
    add_merge_options(parser)
    options = parser.parse_args(arguments)

    from ..models.adapters import holds_adapter

    if not holds_adapter(options.model):
        raise UsageError(
            f"--model {options.model}: no adapter there (adapter_config.json); a full model needs no merge"
        )
    check_merge(options.model, options.output_dir)
    return write_merged(options)


def add_merge_options(parser: Parser) -> None:
    parser.add_argument(
        "--model_dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype of the merged weights; auto: the base's, as stored",
    )
    add_code_option(parser)
    # as it is loaded for training, but on no device and with weights in their own dtype
    parser.set_defaults(use_peft=True, load_in_4bit=False, load_in_8bit=False, bf16=False, fp16=False)
    parser.set_defaults(attn_implementation=None, chat_template=None)


def check_merge(model: str, output_dir: str) -> None:
    """Refuse an adapter without its base and a folder that is in use, before anything is loaded."""
    from ..models.adapters import base_of

    with usage_errors(ValueError, prefix=f"--model {model}: "):
        base_of(model)
    check_writable("--output_dir", output_dir)
    target = Path(output_dir)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"--output_dir {output_dir} is not empty: choose another folder")


def write_merged(options) -> dict:
    """The model is written to a temporary folder, so output_dir holds all of it or is not there."""
    from ..models.adapters import merged

    target = Path(options.output_dir).absolute()
    model, tokenizer = load_model_and_tokenizer(options.model, options)
    base = model.config._name_or_path
    with usage_errors(ValueError):
        model = merged(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            whole = Path(folder) / "model"
            model.save_pretrained(whole)
            tokenizer.save_pretrained(whole)
            if (record := Path(options.model, "run.json")).is_file():  # `generate` reads in it what rows were
                shutil.copyfile(record, whole / "run.json")
                _write_card(record, whole)
            os.replace(whole, target)
    except Exception as error:  # a writer's own kinds
        if (reason := write_failure(error)) is None:
            raise
        raise UsageError(f"--output_dir {options.output_dir}: {reason}") from None
    return {
        "base": base,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "output_dir": options.output_dir,
    }


def _write_card(record: Path, folder: Path) -> None:
    """The run's model card, of a whole model instead of an adapter; none if the record is not one of a run."""
    from ..training.model_card import model_card

    try:
        card = model_card(json.loads(record.read_bytes()) | {"merged": True})
    except (ValueError, LookupError, TypeError, AttributeError):  # somebody else's run.json
        return
    (folder / "README.md").write_text(card, encoding="utf-8")
