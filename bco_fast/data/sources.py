"""Where feedback is read from: JSON Lines, a JSON array, CSV, Parquet, the Hub, or any iterable of dicts.

A source is a stream of (where, record): the place to name in an error, and the row as found, or a `RowError` if it could
not be read. Lines count from 1; rows of an array, a table or a list count from 0. One row is in memory at a time.

Compressed files are refused, never unpacked. No row may take more than MAX_ROW_BYTES. The network is used only for a name
of the form owner/dataset that is not a local file.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_ROW_BYTES = 16 << 20
"""About 4 million tokens. A tokenizer takes 130 bytes of memory for each byte of text, before anything is truncated."""
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>\w[\w.-]*))?")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # fmt: skip
_PARQUET = b"PAR1"
_SUFFIXES = frozenset(
    (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zip", ".zst", ".bz2", ".xz")
)
# A row group that claims to be larger than this, and this many times its size on disk, is a bomb.
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 1000


class FeedbackError(ValueError):
    """Feedback that cannot be used; names the file, the row and the reason."""


class RowError(Exception):
    """Why one row cannot be used, without its place."""


@dataclass(frozen=True)
class Source:
    records: Iterator[tuple[str, Any]]
    """(where, record or `RowError`)."""
    columns: tuple[str, ...] | None = None
    """All columns of a table whose records hold only the columns that were asked for."""


def as_record(record) -> Mapping:
    """A record of a source as a mapping. Raises `RowError` if it is none."""
    if isinstance(record, RowError):
        raise record
    if not isinstance(record, Mapping):
        raise RowError(f"a row must be an object, not {type(record).__name__}")
    return record


def is_hub_name(source) -> bool:
    """Whether a source is read from the Hub: owner/dataset or owner/dataset:split, not a file here, no file suffix."""
    match = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    return bool(match) and Path(match["name"]).suffix.lower() not in _SUFFIXES and not Path(source).exists()


def open_source(
    source: str | os.PathLike | Iterable[Mapping],
    wanted: Iterable[str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> Source:
    """Open a file, a Hub dataset or an iterable of dicts.

    Args:
        wanted: the columns that matter, by their names in the source; Parquet reads no others. None for all.
        renamed: our name -> the name in the source. Records keep the source's names; CSV cells are typed by ours.

    Raises:
        FeedbackError: it cannot be opened, now or while reading.
    """
    if not isinstance(source, (str, os.PathLike)):
        if isinstance(source, Mapping):
            keys = shortened(source)
            raise FeedbackError(f"feedback must be rows, not one mapping (keys: {keys}); of several splits, pass one")
        return Source((f"row {index}", record) for index, record in enumerate(source))
    if is_hub_name(source):
        return Source((f"{source}: row {index}", record) for index, record in enumerate(_from_hub(source)))
    path = Path(source)
    kind = _kind(path)
    if kind == "parquet":
        return _parquet(path, None if wanted is None else frozenset(wanted))
    if kind == "csv":
        return Source(_csv(path, {theirs: ours for ours, theirs in (renamed or {}).items()}))
    return Source(_array(path) if kind == "array" else _json_lines(path))


def _kind(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        hint = "; pass one file of it" if path.is_dir() else ""
        raise FeedbackError(f"{path}: {error.strerror or error}{hint}") from None
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise FeedbackError(f"{path}: compressed files ({name}) are not opened; unpack it first")
    suffix = path.suffix.lower()
    if head.startswith(_PARQUET) or suffix == ".parquet":
        return "parquet"
    if suffix in (".csv", ".tsv"):
        return "csv"
    # .json is an array for some and JSON Lines for others; a line of JSON Lines never begins with "["
    array = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    return "array" if array and suffix not in (".jsonl", ".ndjson") else "lines"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `json` alone silently keeps the last value of a key that is given twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return record


def _too_long() -> RowError:
    return RowError(f"longer than {MAX_ROW_BYTES >> 20} MiB")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line), None in place of a line that is too long."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) <= MAX_ROW_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(1 << 20)
        yield number, None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in _lines(file):
            if line is None:
                yield f"{path}:{number}", _too_long()
            elif line.strip():
                try:
                    record = json.loads(line, object_pairs_hook=_unique)
                except RowError as error:
                    record = error
                except (ValueError, RecursionError) as error:
                    record = RowError(f"not JSON ({error})")
                yield f"{path}:{number}", record


_SPACE = re.compile(r"[ \t\r\n]*")
_WINDOW = 1 << 18


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON array, decoded one by one from a window of the file that grows only up to MAX_ROW_BYTES.

    `json.load` would hold every object at once, several times the file. An element that is not JSON ends the reading:
    nothing behind it can be trusted.
    """
    decode, row, at = json.JSONDecoder(object_pairs_hook=_unique).raw_decode, 0, 0
    # Bytes that are not UTF-8 come in as lone surrogates, which a row's own check refuses.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        window = file.read(_WINDOW).lstrip()[1:].lstrip()
        if window.startswith("]"):
            return
        while True:
            try:
                record, end = decode(window, _SPACE.match(window, at).end())
                end = _SPACE.match(window, end).end()
                if window[end : end + 1] not in list(",]"):
                    raise ValueError("a comma or the closing bracket is missing")
            except RowError as error:
                raise FeedbackError(f"{path}: row {row}: {error}") from None
            except (ValueError, RecursionError) as error:
                held = len(window) - at
                more = file.read(max(_WINDOW, held)) if held <= MAX_ROW_BYTES else ""
                if not more:
                    reason = _too_long() if held > MAX_ROW_BYTES else f"not JSON ({getattr(error, 'msg', error)})"
                    raise FeedbackError(f"{path}: row {row}: {reason}") from None
                window, at = window[at:] + more, 0
                continue
            yield f"{path}: row {row}", record
            row, at = row + 1, end + 1
            if window[end] == "]":
                break
        if (window[at:] + file.read(4096)).strip():
            raise FeedbackError(f"{path}: something follows the array; one object a line is .jsonl")


def _csv(path: Path, ours: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """RFC 4180, UTF-8, a header line. A cell may hold line breaks; a row is named by its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # process-wide, so it is only ever raised

    def lines(file: BinaryIO) -> Iterator[str]:
        for number, line in _lines(file):
            if line is None:  # it may open or close a quote, so nothing behind it can be trusted
                raise FeedbackError(f"{path}:{number}: {_too_long()}")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")

    header: list[str] = []
    with path.open("rb") as file:
        reader = csv.reader(lines(file), strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if not header:
                    raise FeedbackError(f"{where}: not CSV ({error})") from None
                yield where, RowError(f"not CSV ({error})")
                continue
            if cells is None:
                return
            if header and cells:
                yield where, _csv_record(header, cells, ours)
            elif not header:
                header = cells
                if len(header) == 1 and (other := next((mark for mark in (";", "\t", ",") if mark in header[0]), None)):
                    name = {";": "semicolons", "\t": "tabs", ",": "commas"}[other]
                    raise FeedbackError(
                        f"{where}: the columns are separated by {name}: .csv has commas (and decimal points), .tsv has tabs"
                    )
                twice = [name for index, name in enumerate(header) if name in header[:index]]
                if twice or not header:
                    raise FeedbackError(f"{where}: column {twice[0]!r} occurs twice" if twice else f"{path}: no header")


def _csv_record(header: list[str], cells: list[str], ours: Mapping[str, str]) -> dict | RowError:
    if len(cells) != len(header):
        return RowError(f"{len(cells)} cells under a header of {len(header)} columns")
    if sum(map(len, cells)) > MAX_ROW_BYTES:
        return _too_long()
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8 came in as lone surrogates
        return RowError("not UTF-8")
    try:
        return {name: _typed(ours.get(name, name), cell) for name, cell in zip(header, cells, strict=True)}
    except RowError as error:
        return error


_CHATS = "a chat in CSV is a column messages with a JSON list; JSON Lines and Parquet hold chats in every column"
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
_MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


def _typed(column: str, cell: str) -> Any:
    """A cell of CSV by its column: empty is null, as in Parquet; what is neither a truth value nor a number stays text.

    Raises:
        RowError: chat messages, which only `messages` holds, as JSON: a string there cannot be a prompt.
    """
    if column == "messages" and cell.strip():
        try:
            return json.loads(cell, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise RowError(f"messages is not JSON ({one_line(error)[:120]}); {_CHATS}") from None
    if column in ("prompt", "completion", "chosen", "rejected") and _MESSAGES.match(cell):
        raise RowError(f"{column} holds chat messages as text, which would be trained as they stand; {_CHATS}")
    if column in ("label", "kto_tag", "score", "weight", "chosen", "rejected") and not cell:
        return None
    if column in ("label", "kto_tag"):
        return _TRUTH.get(cell.lower(), cell)
    return as_number(cell) if column in ("score", "weight") else cell


def as_number(value):
    """Text that reads as a decimal number, as that number; anything else as it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _missing_library(what, library: str) -> FeedbackError:
    return FeedbackError(f"{what}: reading it needs {library}: pip install 'bco_fast[data]'")


def _parquet(path: Path, wanted: frozenset[str] | None) -> Source:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _missing_library(path, "pyarrow") from None
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise FeedbackError(f"{path}: {one_line(error)[:300]}") from None
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if group.total_byte_size > max(_BOMB_BYTES, _BOMB_RATIO * packed):
            raise FeedbackError(f"{path}: row group {index} unpacks {packed} bytes to {group.total_byte_size}")
    columns = tuple(file.schema_arrow.names)

    def records() -> Iterator[tuple[str, Any]]:
        row = 0
        try:
            for batch in file.iter_batches(256, columns=[c for c in columns if wanted is None or c in wanted]):
                for record in batch.to_pylist():
                    yield f"{path}: row {row}", record
                    row += 1
        except (OSError, ValueError) as error:
            raise FeedbackError(f"{path}: after row {row}: {one_line(error)[:300]}") from None

    return Source(records(), columns)


def _from_hub(name: str) -> Iterable[Mapping]:
    try:
        import datasets
    except ImportError:
        raise _missing_library(name, "datasets") from None
    match = _HUB_NAME.fullmatch(name)
    try:
        return datasets.load_dataset(match["name"], split=match["split"] or "train")
    except Exception as error:  # this library passes on the errors of half a dozen others
        raise FeedbackError(
            f"{name}: no such file, and not loaded from the Hub ({type(error).__name__}: {one_line(error)[:300]})"
        ) from None


def name_of(source: object) -> str:
    """A file's name without its folder, or the name on the Hub; empty for rows that come from neither."""
    if not isinstance(source, (str, os.PathLike)):
        return ""
    return source if is_hub_name(source) else Path(source).name


def one_line(error: object) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())


def shortened(names: Iterable, most: int = 12) -> str:
    names = list(map(str, names))
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])[:300] or "none"
