"""Where feedback is read from: JSON Lines, a JSON array, CSV, Parquet, the Hub, or any iterable of dicts.

A source is a stream of (where, record): the place to name in a complaint, and the row as it was found, or a `Flaw` when
it could not be read. Lines count from 1, rows (of an array, a table or a list) from 0. One row is in memory at a time.

Nothing is unpacked: a compressed file is refused. No row may take more than MAX_ROW_BYTES. The network is used only for
a name of the form owner/dataset that is no file here.
"""

from __future__ import annotations

import csv
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_ROW_BYTES = 64 << 20
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<split>\w[\w.-]*))?")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}  # fmt: skip
_PARQUET = b"PAR1"
_SUFFIXES = frozenset((".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt", ".gz", ".zip", ".zst", ".bz2", ".xz"))
# A row group that claims to be larger than this and this many times its size on disk is a bomb, not text.
_BOMB_BYTES, _BOMB_RATIO = 256 << 20, 1000


class FeedbackError(ValueError):
    """Feedback that cannot be trained on; names the file, the row and the reason."""


class Flaw(Exception):
    """Why one row cannot be trained on, without the place."""


@dataclass(frozen=True)
class Source:
    """Records one after another."""

    records: Iterator[tuple[str, Any]]
    """(where, record or `Flaw`)."""
    columns: tuple[str, ...] | None = None
    """All columns, where the records hold only those that were asked for."""
    typed: bool = True
    """False: every value is a string, as in CSV."""


def is_hub_name(source) -> bool:
    """Whether this is read from the Hub: owner/dataset or owner/dataset:split, no file here, no suffix of one."""
    match = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    return bool(match) and Path(match["name"]).suffix.lower() not in _SUFFIXES and not Path(source).exists()


def open_source(source: str | os.PathLike | Iterable[Mapping], wanted: Iterable[str]) -> Source:
    """Open a file, a Hub dataset or an iterable of dicts.

    Args:
        wanted: the columns that matter, by the names they have in the source; Parquet reads no others.

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
        return _parquet(path, frozenset(wanted))
    return Source({"csv": _csv, "array": _array, "lines": _json_lines}[kind](path), typed=kind != "csv")


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
    if head.startswith(_PARQUET) or path.suffix.lower() == ".parquet":
        return "parquet"
    if path.suffix.lower() == ".csv":
        return "csv"
    # .json is an array for some, JSON Lines for others
    return "array" if path.suffix.lower() == ".json" and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[" else "lines"  # fmt: skip


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


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Flaw(f"not JSON ({error})")


def _too_long() -> Flaw:
    return Flaw(f"longer than {MAX_ROW_BYTES >> 20} MiB")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in _lines(file):
            if line is None:
                yield f"{path}:{number}", _too_long()
            elif line.strip():
                yield f"{path}:{number}", _parsed(line)


# ---- a JSON array

_STRUCTURE = re.compile(rb'[\[\]{},"]')


def _array(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of the array one by one, each parsed by itself: a bad one is named and the others are still read."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        row, at = 0, data.find(b"[") + 1
        while True:
            start, (at, last) = at, _element(path, row, data, at)
            if at - 1 - start > MAX_ROW_BYTES:
                yield f"{path}: row {row}", _too_long()
            elif text := data[start : at - 1].strip():
                yield f"{path}: row {row}", _parsed(text)
            elif not last or row:
                yield f"{path}: row {row}", Flaw("not JSON (nothing between two commas)")
            if last:
                break
            row += 1
        if data[at : at + 4096].strip():
            raise FeedbackError(f"{path}: something follows the array; one object a line is .jsonl")


def _element(path: Path, row: int, data: mmap.mmap, at: int) -> tuple[int, bool]:
    """(just behind the comma or bracket that ends the element which starts at `at`, whether it was the last)."""
    depth = 0
    while match := _STRUCTURE.search(data, at):
        at, sign = match.end(), match[0]
        if sign == b'"':
            at = _string_end(data, at)
            if at < 0:
                break
        elif sign in b"[{":
            depth += 1
        elif sign in b"]}":
            if depth == 0:
                return at, True
            depth -= 1
        elif depth == 0:
            return at, False
    raise FeedbackError(f"{path}: row {row}: the file ends within it")


def _string_end(data: mmap.mmap, start: int) -> int:
    """Just behind the quote that closes a string, or -1. A quote after an odd number of backslashes is text."""
    at = start
    while (at := data.find(b'"', at)) >= 0:
        first = at
        while first > start and data[first - 1] == 0x5C:
            first -= 1
        at += 1
        if (at - first) % 2:
            return at
    return -1


# ---- CSV


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    """RFC 4180, UTF-8, a header line. A cell may hold line breaks; the row is named by its first line."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # process-wide, so it is only ever raised

    def lines(file: BinaryIO) -> Iterator[str]:
        for number, line in _lines(file):
            if line is None:  # it may open or close a quote, so nothing behind it can be trusted
                raise FeedbackError(f"{path}:{number}: longer than {MAX_ROW_BYTES >> 20} MiB")
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", errors="surrogateescape")

    with path.open("rb") as file:
        reader = csv.reader(lines(file), strict=True)
        header = _header(path, reader)
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield where, Flaw(f"not CSV ({error})")
                continue
            if cells is None:
                return
            if cells:
                yield where, _csv_record(header, cells)


def _header(path: Path, reader) -> list[str]:
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise FeedbackError(f"{path}:1: not CSV ({error})") from None
    if not header:
        raise FeedbackError(f"{path}: no usable row")
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    if twice:
        raise FeedbackError(f"{path}:1: column {twice[0]!r} occurs twice")
    return header


def _csv_record(header: list[str], cells: list[str]) -> dict[str, str] | Flaw:
    if len(cells) != len(header):
        return Flaw(f"{len(cells)} cells under a header of {len(header)} columns")
    if sum(map(len, cells)) > MAX_ROW_BYTES:
        return _too_long()
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 came in as lone surrogates
        return Flaw("not UTF-8")
    return dict(zip(header, cells, strict=True))


# ---- Parquet and the Hub


def _missing_library(what, library: str) -> FeedbackError:
    return FeedbackError(f"{what}: reading it needs {library}: pip install 'bco_fast[data]'")


def _parquet(path: Path, wanted: frozenset[str]) -> Source:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise _missing_library(path, "pyarrow") from None
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except (OSError, ValueError) as error:
        raise FeedbackError(f"{path}: {_first_line(error)}") from None
    for index in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(index)
        packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        if group.total_byte_size > _BOMB_BYTES and group.total_byte_size > _BOMB_RATIO * packed:
            raise FeedbackError(f"{path}: row group {index} unpacks {packed} bytes to {group.total_byte_size}")
    columns = tuple(file.schema_arrow.names)
    read = [name for name in columns if name in wanted]

    def records() -> Iterator[tuple[str, Any]]:
        row = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=read):
                for record in batch.to_pylist():
                    yield f"{path}: row {row}", record
                    row += 1
        except (OSError, ValueError) as error:
            raise FeedbackError(f"{path}: behind row {row}: {_first_line(error)}") from None

    return Source(records(), columns=columns)


def _from_hub(name: str) -> Iterable[Mapping]:
    try:
        import datasets
    except ImportError:
        raise _missing_library(name, "datasets") from None
    match = _HUB_NAME.fullmatch(name)
    try:
        return datasets.load_dataset(match["name"], split=match["split"] or "train")
    except Exception as error:  # what this library raises comes from half a dozen others
        raise FeedbackError(
            f"{name}: no such file, and not loaded from the Hub ({type(error).__name__}: {_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def shortened(names: Iterable, most: int = 12) -> str:
    names = list(map(str, names))
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])[:300] or "none"
