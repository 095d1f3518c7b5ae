"""`bco-fast export`: a trained model in the forms that servers read, and the commands that serve and publish it.

GGUF files are written by llama.cpp's own converter, which runs as a program of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .common import Parser, UsageError, check_writable, logger
from .merge import add_merge_options, check_merge, write_merged

CONVERTER = "convert_hf_to_gguf.py"
MERGED = "model"


def export(arguments: list[str]) -> dict:
    parser = Parser(
        prog="bco-fast export",
        description="Merge an adapter, write a GGUF file, and print the commands that serve and publish the model.",
    )
    parser.add_argument("--model", required=True, help="folder of a model or adapter, as train leaves it")
    parser.add_argument(
        "--output_dir", required=True, help=f"new folder; the merged weights of an adapter go to its folder {MERGED}"
    )
    parser.add_argument(
        "--gguf",
        choices=["auto", "none", "f32", "f16", "bf16", "q8_0"],
        default="auto",
        help="dtype of the GGUF file; auto: as stored, if llama.cpp's converter is there; none: no GGUF file",
    )
    parser.add_argument(
        "--converter", help=f"llama.cpp's {CONVERTER}, or llama.cpp's folder (default: the one on PATH)"
    )
    parser.add_argument("--name", help="the model's name in files and commands (default: the last part of --model)")
    add_merge_options(parser)
    options = parser.parse_args(arguments)

    from ..data.form import trained_form
    from ..models.adapters import holds_adapter

    source, target = options.model, Path(options.output_dir)
    if not Path(source).is_dir():
        raise UsageError(f"--model {source}: no such folder")
    if not (adapter := holds_adapter(source)) and not Path(source, "config.json").is_file():
        raise UsageError(f"--model {source}: neither a model (config.json) nor an adapter (adapter_config.json) there")
    check_writable("--output_dir", target)
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"--output_dir {target} is not empty: choose another folder")
    converter = _find_converter(options.converter, options.gguf)
    name = options.name or Path(source).absolute().name
    if adapter:
        options.output_dir = str(target / MERGED)
        check_merge(source, options.output_dir)
        write_merged(options)
        whole = target / MERGED
    else:
        whole = Path(source)
    gguf = converter and _convert(converter, whole, target / f"{name}.gguf", options.gguf)
    print("\n".join(_commands(whole, name, gguf, trained_form(source), run=not adapter)), flush=True)
    return {"model": str(whole), "merged": adapter, "gguf": gguf and str(gguf), "output_dir": str(target)}


def _find_converter(given: str | None, kind: str) -> Path | None:
    """The converter's path; None if no GGUF file was asked for by name and there is no converter."""
    if kind == "none":
        if given is not None:
            raise UsageError("--converter is not read with --gguf none: leave one out")
        return None
    if given is not None:
        path = Path(given, CONVERTER) if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise UsageError(f"--converter {given}: {CONVERTER} is not there")
        return path
    if (found := shutil.which(CONVERTER)) is not None:
        return Path(found)
    if kind != "auto":
        raise UsageError(
            f"--gguf {kind} needs llama.cpp's {CONVERTER}, which is not on PATH: clone llama.cpp, pip install gguf, and "
            "pass --converter PATH_OF_LLAMA_CPP"
        )
    logger.info("no GGUF file: llama.cpp's %s is not on PATH (--converter)", CONVERTER)
    return None


def _convert(converter: Path, model: Path, target: Path, kind: str) -> Path:
    """Run the converter; the file appears only if it is complete."""
    with converter.open("rb") as file:
        first = file.readline()
    # An installed program names its interpreter, which has its packages; a clone's `env python3` may be any.
    own = first.startswith(b"#!") and b"env" not in first and os.access(converter, os.X_OK)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=target.parent) as folder:
        written = Path(folder) / target.name
        command = [*([] if own else [sys.executable]), str(converter.absolute()), str(model.absolute())]
        command += ["--outfile", str(written), "--outtype", kind]
        logger.info("%s", shlex.join(command))
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603
        except OSError as error:
            raise UsageError(f"--converter {converter}: {error.strerror or error}") from None
        if done.returncode or not written.is_file() or not _is_gguf(written):
            said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            lacking = re.search(r"No module named '(\w+)", done.stderr)
            hint = f"; pip install {lacking[1]}" if lacking else ""
            raise UsageError(
                f"--converter {converter} failed (exit code {done.returncode}): "
                f"{said[-1][:300] if said else 'it wrote no GGUF file'}{hint}"
            )
        os.replace(written, target)
    return target


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _has_template(model: Path) -> bool:
    config = model / "tokenizer_config.json"
    inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8")
    return inside or (model / "chat_template.jinja").is_file()


def _commands(model: Path, name: str, gguf: Path | None, trained, *, run: bool) -> list[str]:
    """What to type next; the URL is that of the form the model was trained on.

    Args:
        trained: of `trained_form`.
        run: the model lies in its run's folder.
    """
    where = shlex.quote(str(model))
    chat = trained["form"] != "text" if trained else _has_template(model)
    path, body = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Hello"}]')
        if chat
        else ("completions", '"prompt": "Hello"')
    )
    body = shlex.quote(f'{{"model": "{name}", {body}}}')
    lines = [
        "serve with vLLM:",
        f"    vllm serve {where} --served-model-name {shlex.quote(name)}",
        "    curl http://localhost:8000/v1/" + path + " -H 'Content-Type: application/json' \\",
        f"      -d {body}",
    ]
    if gguf is not None:
        lines += ["serve with llama.cpp:", f"    llama-server -m {shlex.quote(str(gguf))}"]
    # of a run's folder, what continues training and nobody else reads
    without = " --exclude 'checkpoint-*' --exclude training_args.bin" if run else ""
    return [*lines, "push to the Hub:", f"    hf upload YOUR_NAME/{shlex.quote(name)} {where} . --private{without}"]
