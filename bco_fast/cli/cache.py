"""bco-fast cache: what a person does with the reference cache.

build      compute the reference log-probabilities of a feedback file
inspect    what is there: reference, rows, tokens, disk, age
verify     read everything again and compare it with its checksums
export     write the values to a Parquet file
prune      remove damaged and old files; only lists them unless --yes is given
"""

from __future__ import annotations

import os
import re
import stat
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import atomic_path, stale_files
from ..losses import OBJECTIVES
from ..reference.cache import MANIFEST, CacheError, ReferenceCache, default_cache_dir
from ..reference.shards import SHARD_NAME, BadShard
from .common import UsageError, _load_model, _nearest, _Parser

_REFERENCE_NAME = re.compile(r"[0-9a-f]{32}")


def cache(arguments: list[str]) -> None:
    """Carry out `bco-fast cache ARGUMENTS`. Raises UsageError for what the user can mend."""
    commands = {"build": build, "inspect": inspect, "verify": verify, "export": export, "prune": prune}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__ + "\n`bco-fast cache build --help` lists the options of build, and so on.")
        return
    if arguments[0] not in commands:
        raise UsageError(f"unknown command 'cache {arguments[0]}'{_nearest(arguments[0], commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except CacheError as error:
        raise UsageError(" ".join(str(error).split())) from None


def _parser(command: str, *, one_reference: bool = True) -> _Parser:
    parser = _Parser(prog=f"bco-fast cache {command}", allow_abbrev=False)
    parser.add_argument(
        "--cache_dir", "--cache-dir", default=default_cache_dir(), help="folder of the cache (default: %(default)s)"
    )
    if one_reference:
        parser.add_argument("--reference", default="", help="only references whose name begins so")
    return parser


def build(arguments: list[str]) -> None:
    """Fill the cache as training on this model and file would; training then computes nothing."""
    parser = _parser("build", one_reference=False)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face causal language model, or a Hub name")
    parser.add_argument("--data", required=True, help="feedback, as for train")
    parser.add_argument(
        "--max_length", "--max-length", type=int, default=1024, help="tokens of prompt and completion together"
    )
    parser.add_argument(
        "--max_prompt_length", "--max-prompt-length", type=int, help="tokens a prompt keeps in a row that is too long"
    )
    parser.add_argument("--on_bad_row", "--on-bad-row", choices=["error", "skip"], default="error")
    parser.add_argument("--columns", help="as for train")
    parser.add_argument("--score_scale", "--score-scale", help="as for train")
    parser.add_argument("--chat_template", "--chat-template", help="as for train")
    parser.add_argument(
        "--reference_tokens_per_batch", "--reference-tokens-per-batch", type=int, default=8192,
        help="padded tokens in one forward pass",
    )  # fmt: skip
    parser.add_argument(
        "--autocast", choices=["no", "bf16", "fp16"], default="no",
        help="what training will compute in: bf16 if it is given --bf16 true",
    )  # fmt: skip
    parser.add_argument(
        "--loss_type", "--loss-type", choices=list(OBJECTIVES), default="bco", metavar="NAME",
        help="objective that will train: what it reads of the rows, and kto's mismatched completions",
    )  # fmt: skip
    # The reference's dtype and attention are part of what it computes, so they are chosen as `train` chooses them.
    parser.add_argument(
        "--model_dtype", "--model-dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )
    parser.add_argument("--attn_implementation", "--attn-implementation")
    for flag in ("use_peft", "load_in_4bit", "load_in_8bit"):
        parser.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", action="store_true", help="as for train")
    options = parser.parse_args(arguments)
    options.bf16, options.fp16 = options.autocast == "bf16", options.autocast == "fp16"
    objective = OBJECTIVES[options.loss_type]
    if not objective.reference:
        raise UsageError(f"--loss_type {options.loss_type} reads no reference")
    if options.reference_tokens_per_batch < 1:
        raise UsageError("--reference_tokens_per_batch must be at least 1")

    import torch

    from ..data.samplers import mismatched
    from ..data.tokenize import load_feedback
    from ..models.patch import patch_model
    from ..reference.fill import fill
    from ..reference.identity import reference_id

    model, tokenizer = _load_model(options.model, options)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and options.max_length > positions:
        raise UsageError(f"--max_length is {options.max_length}, but the model has {positions} positions")
    limits = {name: getattr(options, name) for name in ("max_length", "max_prompt_length", "on_bad_row")}
    try:
        columns = {"columns": options.columns, "score_scale": options.score_scale}
        dataset = load_feedback(options.data, tokenizer, needs=objective.data, **columns, **limits)
        examples = dataset.examples
        if options.loss_type == "kto":
            del limits["on_bad_row"]
            examples = examples + mismatched(dataset, **limits).examples
        patch_model(model)
    except (ValueError, TypeError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model.to(device)
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.autocast]
    cache = ReferenceCache(options.cache_dir, reference_id(model, autocast=options.autocast))
    report = fill(
        cache,
        examples,
        model,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        tokens_per_batch=options.reference_tokens_per_batch,
        autocast=None if dtype is None else torch.autocast(device.type, dtype),
    )
    print(report, flush=True)


def _references(cache_dir: str, prefix: str = "") -> Iterator[ReferenceCache]:
    """Every reference of a cache, opened quietly; folders that are links are left alone."""
    root = Path(cache_dir).expanduser()
    if not root.is_dir():
        raise UsageError(f"--cache_dir {cache_dir}: no such folder")
    names = sorted(p.name for p in root.iterdir() if _REFERENCE_NAME.fullmatch(p.name) and not p.is_symlink())
    chosen = [name for name in names if name.startswith(prefix)]
    if prefix and not chosen:
        raise UsageError(f"--reference {prefix}: no such reference in {cache_dir}{_nearest(prefix, names)}")
    for name in chosen:
        if (root / name).is_dir():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # we say it in our own words
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
        times = [status.st_mtime for path, status in files.items() if SHARD_NAME.fullmatch(path.name)] or [0.0]
        used = max([*times, *(status.st_mtime for path, status in files.items() if path.name == MANIFEST)])
        size = sum(status.st_size for status in files.values())
        table.append(
            (
                cache.digest[:12],
                cache.model_name or "-",
                _dtype(reference.dtype) if reference else "?",
                reference.attention if reference else "?",
                f"{len(cache):,}",
                f"{sum(shard.tokens for shard in cache.shards):,}",
                _bytes(size),
                _age(max(times)),
                _age(used),
            )
        )
        rows, disk, problems = rows + len(cache), disk + size, problems + len(cache.problems)
    if len(table) > 1:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            cells = zip(line, widths, strict=True)
            print(
                "  ".join(cell.rjust(w) if 4 <= i < 7 else cell.ljust(w) for i, (cell, w) in enumerate(cells)).rstrip()
            )
    print(f"{_count(len(table) - 1, 'reference')}, {_count(rows, 'row')}, {_bytes(disk)} in {options.cache_dir}")
    if problems:
        print(f"{_count(problems, 'file')} left out: `bco-fast cache verify` says why, `bco-fast cache prune` removes")


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
    """Read every byte; -> name and complaint of each shard that is not as it was written."""
    bad = dict(cache.problems)
    for shard in cache.shards:
        try:
            again = cache.open_shard(shard.path.name)
            read = np.array([values.sum(dtype=np.float64) for values in again.read(range(again.rows))])
            if not np.allclose(read, again.sums, rtol=1e-9, atol=1e-9):
                bad[shard.path.name] = "its sums are not those of its values"
        except (BadShard, OSError) as error:
            bad[shard.path.name] = str(error)
    return bad


def verify(arguments: list[str]) -> None:
    """Read everything again. Exit code 2 if a file is not as it was written."""
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
            "build` computes their rows again, `bco-fast cache prune` removes them"
        )


def export(arguments: list[str]) -> None:
    """Write one row of Parquet for each cached row; the file appears when it is whole."""
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
    schema = arrow.schema(
        [
            ("reference", arrow.string()),
            ("key", arrow.string()),
            ("tokens", arrow.int32()),
            ("sum_logps", arrow.float64()),
            ("token_logps", arrow.list_(arrow.float32())),
        ]
    )
    rows = 0
    try:
        with atomic_path(output) as partial, parquet.ParquetWriter(partial, schema) as writer:
            for cache in caches:
                for index in range(len(cache.shards)):
                    keys, sums, values = _shard_rows(cache, index)
                    columns = [
                        [cache.digest] * len(keys),
                        [k.hex() for k in keys],
                        [len(v) for v in values],
                        sums,
                        values,
                    ]
                    writer.write_table(arrow.table(columns, schema=schema))
                    rows += len(keys)
    except (BadShard, OSError) as error:
        raise UsageError(f"{error}; `bco-fast cache verify` says what is damaged") from None
    print(f"{_count(rows, 'row')} written to {output}")


def _shard_rows(cache: ReferenceCache, index: int) -> tuple[list[bytes], list[float], list[np.ndarray]]:
    """Keys, sums and verified values of the rows that the cache takes from this shard: another may hold them too."""
    shard = cache.open_shard(cache.shards[index].path.name)
    keys = shard.row_keys()
    ours = np.flatnonzero(cache.find(keys)[:, 0] == index)
    return [keys[row] for row in ours], shard.sums[ours].tolist(), list(shard.read(ours))


@dataclass(frozen=True)
class _Removal:
    path: Path
    reason: str
    size: int


def _removals(cache: ReferenceCache, older_than: float | None) -> list[_Removal]:
    """What `prune` would remove from one reference. Only files with names of ours, never what a link points to."""
    files = _files(cache.folder)
    ours = {p: s for p, s in files.items() if SHARD_NAME.fullmatch(p.name) or p.name == MANIFEST}
    used = max((status.st_mtime for status in ours.values()), default=time.time())
    if older_than is not None and time.time() - used > older_than * 86400:
        return [_Removal(path, f"used {_age(used)}", status.st_size) for path, status in ours.items()]
    reasons = {cache.folder / name: reason for name, reason in _bad_shards(cache).items()}
    reasons |= dict.fromkeys(stale_files(cache.folder), "left by a writer that was killed")
    there = {
        path: reason for path, reason in reasons.items() if path in files and not stat.S_ISDIR(files[path].st_mode)
    }
    return [_Removal(path, reason, files[path].st_size) for path, reason in there.items()]


def prune(arguments: list[str]) -> None:
    """List what can go - files that cannot be used, and with --older_than whole references - and remove it with --yes."""
    parser = _parser("prune")
    parser.add_argument(
        "--older_than", "--older-than", type=float, metavar="DAYS", help="also references not used for so many days"
    )
    parser.add_argument("--yes", action="store_true", help="remove; without it nothing is changed")
    options = parser.parse_args(arguments)
    if options.older_than is not None and not options.older_than >= 0:
        raise UsageError(f"--older_than must be a number of days >= 0, not {options.older_than}")
    count = size = 0
    for cache in _references(options.cache_dir, options.reference):
        for removal in _removals(cache, options.older_than):
            print(f"{'removed' if options.yes else 'would remove'} {removal.path}: {removal.reason}")
            count, size = count + 1, size + removal.size
            if options.yes:
                _remove(removal.path)
        if options.yes and not any(cache.folder.iterdir()):
            cache.folder.rmdir()
    done = "removed" if options.yes else "nothing was removed; --yes removes them" if count else "nothing to remove"
    print(f"{_count(count, 'file')}, {_bytes(size)}: {done}")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot remove {path}: {error.strerror}") from None
