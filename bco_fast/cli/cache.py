"""bco-fast cache: manage the cache of reference log-probabilities.

build      compute the reference log-probabilities of a feedback file
inspect    list the contents: reference, rows, tokens, disk, age
verify     read everything again and compare it with its checksums
export     write the values to a Parquet file
prune      remove damaged and old files; only lists them unless --yes is given
"""

from __future__ import annotations

import argparse
import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import atomic_path, stale_files
from ..losses import OBJECTIVES, Objective
from ..losses.sums import find_objective
from ..reference.cache import MANIFEST, CacheError, ReferenceCache, default_cache_dir
from ..reference.seen import SeenShards
from ..reference.shards import SHARD_NAME, BadShard
from .common import (
    Parser,
    UsageError,
    accelerator,
    add_fields,
    add_objective_option,
    check_input,
    check_writable,
    load_model_and_tokenizer,
    load_objectives,
    nearest,
    usage_errors,
)
from .gpu_defaults import bfloat16

_REFERENCE_NAME = re.compile(r"[0-9a-f]{32}")


def cache(arguments: list[str]) -> None:
    commands = {"build": build, "inspect": inspect, "verify": verify, "export": export, "prune": prune}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            __doc__ + "\n`bco-fast cache build --help` lists the options of build; the other commands have --help too."
        )
        return
    if arguments[0] not in commands:
        raise UsageError(f"unknown command 'cache {arguments[0]}'{nearest(arguments[0], commands)}")
    with usage_errors(CacheError):
        commands[arguments[0]](arguments[1:])


def _parser(command: str, *, one_reference: bool = True) -> Parser:
    parser = Parser(prog=f"bco-fast cache {command}")
    parser.add_argument(
        "--cache_dir",
        default=default_cache_dir(),
        help="folder of the cache (default: $BCO_FAST_CACHE, or bco_fast in the user's cache folder)",
    )
    if one_reference:
        parser.add_argument("--reference", default="", help="beginning of a reference's name (default: all references)")
    return parser


_AS_TRAIN = ("on_bad_row", "columns", "score_scale", "labels", "chat_template", "model_dtype", "attn_implementation", "trust_remote_code", "use_peft", "load_in_4bit", "load_in_8bit", "reference_tokens_per_batch", "share_prompts", "max_length", "max_prompt_length", "max_completion_length")  # fmt: skip
"""Options of `build` that are `train`'s: those that decide what the reference computes, and of which tokens."""


def _build_options(arguments: list[str]) -> tuple[argparse.Namespace, Objective, tuple[int, int]]:
    """-> (options, the objective that will train, part I of N); refuses what can be refused before anything is loaded."""
    from ..reference.adapter import check_adapter_folder
    from ..training.config import FeedbackConfig
    from ..training.values import check_numbers

    parser = _parser("build", one_reference=False)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face causal language model, or a Hub name")
    parser.add_argument("--data", required=True, help="feedback, as for train")
    parser.add_argument(
        "--adapter", metavar="PATH", help="folder of an adapter on the model, as --ref_adapter of train (default: none)"
    )
    parser.add_argument(
        "--autocast",
        choices=["no", "bf16", "fp16"],
        help="as training: fp16 if it is given --fp16 true, no if --bf16 false (default: bf16 on a GPU that can, else no)",
    )
    parser.add_argument(
        "--loss_type",
        nargs="+",
        choices=OBJECTIVES,
        default=["bco"],
        help="objectives that will train: they decide which columns are read and whether kto's mismatched rows are computed",
    )
    parser.add_argument(
        "--shard",
        default="1/1",
        metavar="I/N",
        help="compute part I of N; the parts of several machines are merged by copying their files into one folder",
    )
    add_fields(parser, FeedbackConfig, _AS_TRAIN)
    add_objective_option(parser)
    load_objectives(arguments)
    options = parser.parse_args(arguments)
    numbers = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    part, parts = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= part <= parts:
        raise UsageError(f"--shard {options.shard}: must be I/N with I from 1 to N")
    options.autocast = options.autocast or ("bf16" if bfloat16() else "no")
    options.bf16, options.fp16 = options.autocast == "bf16", options.autocast == "fp16"
    with usage_errors(ValueError):
        objective = find_objective("+".join(options.loss_type))
        check_numbers(options)
        if options.adapter is not None:
            check_adapter_folder("--adapter", options.adapter)
    if not objective.reference:
        raise UsageError(f"--loss_type {' '.join(options.loss_type)} reads no reference")
    check_input("--data", options.data)
    check_writable("--cache_dir", options.cache_dir)
    return options, objective, (part, parts)


def build(arguments: list[str]) -> None:
    """Fill the cache as training on this model and file would; training then computes nothing."""
    import torch

    from ..data.samplers import mismatched
    from ..data.sources import FeedbackError
    from ..data.tokenize import load_feedback
    from ..data.tokenizer import pad_or_eos, positions
    from ..models.patch import patch_model
    from ..reference.adapter import load_reference_adapter
    from ..reference.fill import fill
    from ..reference.identity import reference_id
    from ..training.sharing import choose_layout

    options, objective, (part, parts) = _build_options(arguments)
    model, tokenizer = load_model_and_tokenizer(options.model, options)
    with_adapter = options.adapter is not None
    if with_adapter:
        with usage_errors(ValueError):
            model = load_reference_adapter("--adapter", options.adapter, model, options)
    if options.max_length > (positions(model) or options.max_length):
        raise UsageError(f"--max_length is {options.max_length}, but the model has {positions(model)} positions")
    limits = {name: getattr(options, name) for name in ("max_length", "max_prompt_length")}
    names = ("columns", "score_scale", "labels", "on_bad_row", "max_completion_length")
    reading = {name: getattr(options, name) for name in names}
    with usage_errors(ValueError, TypeError), usage_errors(FeedbackError, prefix="--data "):
        dataset = load_feedback(options.data, tokenizer, needs=objective.data, **reading, **limits)
        examples = dataset.examples
        if objective.mismatched:
            examples = examples + mismatched(dataset, **limits).examples
        examples = sorted(examples, key=lambda example: example.key)[part - 1 :: parts]
        patch_model(model)
    device = accelerator()
    model.to(device)
    batches = argparse.Namespace(
        share_prompts=options.share_prompts, tokens_per_batch=options.reference_tokens_per_batch,
        padding_free=False, batch_composition="random", data_seed=0,
    )  # fmt: skip
    with usage_errors(ValueError):
        layout = choose_layout(model, batches, dataset, pad_or_eos(tokenizer))
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.autocast]
    cache = ReferenceCache(options.cache_dir, reference_id(model, autocast=options.autocast, adapter=with_adapter))
    report = fill(
        cache,
        examples,
        model,
        pad_token_id=pad_or_eos(tokenizer),
        tokens_per_batch=options.reference_tokens_per_batch,
        autocast=None if dtype is None else torch.autocast(device.type, dtype),
        layout=layout if layout == "shared" else None,
        adapter=with_adapter,
    )
    print(report, flush=True)


def _references(cache_dir: str, prefix: str = "") -> Iterator[ReferenceCache]:
    """Every reference of a cache, opened without warnings; links to folders are skipped."""
    root = Path(cache_dir).expanduser()
    if not root.is_dir():
        raise UsageError(f"--cache_dir {cache_dir}: no such folder")
    names = sorted(p.name for p in root.iterdir() if _REFERENCE_NAME.fullmatch(p.name) and not p.is_symlink())
    chosen = [name for name in names if name.startswith(prefix)]
    if prefix and not chosen:
        raise UsageError(f"--reference {prefix}: no such reference in {cache_dir}{nearest(prefix, names)}")
    for name in chosen:
        if (root / name).is_dir():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # each command reports problems itself
                yield ReferenceCache(root, name)


def _files(folder: Path) -> dict[Path, os.stat_result]:
    return {path: path.lstat() for path in sorted(folder.iterdir())}


def inspect(arguments: list[str]) -> None:
    """Print a table of the references."""
    options = _parser("inspect", one_reference=False).parse_args(arguments)
    table = [("reference", "model", "computed in", "attention", "rows", "tokens", "disk", "written", "used")]
    problems = rows = disk = 0
    for cache in _references(options.cache_dir):
        reference, files = cache.reference, _files(cache.folder)
        written = max([s.st_mtime for path, s in files.items() if SHARD_NAME.fullmatch(path.name)], default=0.0)
        used = max([written, *(s.st_mtime for path, s in files.items() if path.name == MANIFEST)])
        size = sum(status.st_size for status in files.values())
        names = (_dtype(reference.dtype), reference.attention) if reference else ("?", "?")
        counts = f"{len(cache):,}", f"{sum(shard.tokens for shard in cache.shards):,}", _bytes(size)
        table.append((cache.digest[:12], cache.model_name or "-", *names, *counts, _age(written), _age(used)))
        rows, disk, problems = rows + len(cache), disk + size, problems + len(cache.problems)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table if len(table) > 1 else []:
        cells = zip(line, widths, strict=True)
        print("  ".join(cell.rjust(w) if 4 <= i < 7 else cell.ljust(w) for i, (cell, w) in enumerate(cells)).rstrip())
    print(f"{_count(len(table) - 1, 'reference')}, {_count(rows, 'row')}, {_bytes(disk)} in {options.cache_dir}")
    if problems:
        print(
            f"{_count(problems, 'file')} left out: `bco-fast cache verify` says why, `bco-fast cache prune` removes them"
        )


def _dtype(dtype: str) -> str:
    weights, _, autocast = dtype.partition(", autocast ")
    return weights.removeprefix("torch.") + (f", {autocast} autocast" if autocast not in ("", "no") else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _age(when: float) -> str:
    seconds = time.time() - when
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{_count(int(seconds // length), unit)} ago"
    return "just now"


def _bad_shards(cache: ReferenceCache) -> dict[str, str]:
    """Read every byte; -> name and problem of each shard that is not as written."""
    bad = dict(cache.problems)
    for shard in cache.shards:
        try:
            again = cache.open_shard(shard.path.name)
            read = np.array([values.sum(dtype=np.float64) for values in again.read(range(again.rows))])
            if not np.allclose(read, again.sums, rtol=1e-9, atol=1e-9):
                bad[shard.path.name] = "its sums do not match its values"
        except (BadShard, OSError) as error:
            bad[shard.path.name] = str(error)
    return bad


def verify(arguments: list[str]) -> None:
    """Read everything again. Exit code 2 if a file is not as written."""
    options = _parser("verify").parse_args(arguments)
    damaged = 0
    for cache in _references(options.cache_dir, options.reference):
        bad = _bad_shards(cache)
        damaged += len(bad)
        for name, reason in bad.items():
            print(f"{cache.folder / name}: {reason}")
        whole = sum(shard.rows for shard in cache.shards if shard.path.name not in bad)
        print(f"{cache.digest[:12]}: {_count(len(cache.shards), 'shard')} read, {_count(whole, 'row')} whole")
    if damaged:
        raise UsageError(
            f"{_count(damaged, 'file')} of {options.cache_dir} cannot be used; the next training or `bco-fast cache "
            "build` recomputes their rows, `bco-fast cache prune` removes them"
        )


def export(arguments: list[str]) -> None:
    """Write one row of Parquet for each cached row; the file appears only when it is complete."""
    parser = _parser("export")
    parser.add_argument("--output", required=True, help="the Parquet file; must not exist")
    options = parser.parse_args(arguments)
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError("export needs pyarrow: pip install 'bco_fast[data]'") from None
    output = Path(options.output)
    if output.exists():
        raise UsageError(f"--output {output} exists already")
    caches = list(_references(options.cache_dir, options.reference))
    types = [arrow.string(), arrow.string(), arrow.int32(), arrow.float64(), arrow.list_(arrow.float32())]
    names = ("reference", "key", "tokens", "sum_logps", "token_logps")
    schema = arrow.schema(list(zip(names, types, strict=True)))
    rows = 0
    try:
        with atomic_path(output) as partial, parquet.ParquetWriter(partial, schema) as writer:
            for cache in caches:
                for index in range(len(cache.shards)):
                    keys, sums, values = _shard_rows(cache, index)
                    lengths, hexes = [len(v) for v in values], [k.hex() for k in keys]
                    columns = [[cache.digest] * len(keys), hexes, lengths, sums, values]
                    writer.write_table(arrow.table(columns, schema=schema))
                    rows += len(keys)
    except (BadShard, OSError) as error:
        raise UsageError(f"{error}; `bco-fast cache verify` says what is damaged") from None
    print(f"{_count(rows, 'row')} written to {output}")


def _shard_rows(cache: ReferenceCache, index: int) -> tuple[list[bytes], list[float], list[np.ndarray]]:
    """Keys, sums and verified values of the rows that the cache reads from this shard; others may hold them too."""
    shard = cache.open_shard(cache.shards[index].path.name)
    keys = shard.row_keys()
    ours = np.flatnonzero(cache.find(keys)[:, 0] == index)
    return [keys[row] for row in ours], shard.sums[ours].tolist(), list(shard.read(ours))


def _removals(cache: ReferenceCache, older_than: float | None) -> Iterator[tuple[Path, str, int]]:
    """(path, reason, bytes) of what `prune` removes from a reference: files that we named, never a link's target."""
    files = _files(cache.folder)
    ours = {p: s for p, s in files.items() if SHARD_NAME.fullmatch(p.name) or p.name == MANIFEST}
    used = max((status.st_mtime for status in ours.values()), default=time.time())
    if older_than is not None and time.time() - used > older_than * 86400:
        reasons = dict.fromkeys(ours, f"used {_age(used)}")
    else:
        reasons = {cache.folder / name: reason for name, reason in _bad_shards(cache).items()}
        reasons |= dict.fromkeys(stale_files(cache.folder), "left by a killed writer")
    for path, reason in reasons.items():
        if path in files and not stat.S_ISDIR(files[path].st_mode):
            yield path, reason, files[path].st_size


def prune(arguments: list[str]) -> None:
    """List files that cannot be used, and with --older_than whole references; remove them with --yes."""
    parser = _parser("prune")
    parser.add_argument(
        "--older_than",
        type=float,
        metavar="DAYS",
        help="also remove references unused for this many days (default: none)",
    )
    parser.add_argument("--yes", action="store_true", help="remove; without it nothing is changed")
    options = parser.parse_args(arguments)
    if options.older_than is not None and not options.older_than >= 0:
        raise UsageError(f"--older_than must be a number of days >= 0, not {options.older_than}")
    count = size = 0
    for cache in _references(options.cache_dir, options.reference):
        for path, reason, taken in list(_removals(cache, options.older_than)):
            print(f"{'removed' if options.yes else 'would remove'} {path}: {reason}")
            count, size = count + 1, size + taken
            if options.yes:
                with usage_errors(OSError, prefix="cannot remove: "):
                    path.unlink(missing_ok=True)
        if options.yes and not any(cache.folder.iterdir()):
            cache.folder.rmdir()
            SeenShards(cache.folder).path.unlink(missing_ok=True)
    done = "removed" if options.yes else "nothing was removed; --yes removes them" if count else "nothing to remove"
    print(f"{_count(count, 'file')}, {_bytes(size)}: {done}")
