"""One file of reference log-probabilities.

    8 bytes     length of the header, little-endian
    header      JSON; with the length it makes the file an ordinary safetensors file
    index       sum_logps [R] float64, offsets [R + 1] int64, keys [R, 16] uint8, digests [R, 8] uint8
    values      token_logps [T] float32; row r has offsets[r] to offsets[r + 1]

The file name holds the sha256 of everything before the values, and digests[r] is the blake2b of row r's values. Opening
a file hashes 40 bytes a row and compares sizes, however large the values are; a row's values are verified when they are
read. So no changed byte is ever used.

Values are read by position, not mapped: truncating a mapped file kills the process that maps it, and each mapping of
thousands of shards would hold a file descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.keys import KEY_BYTES

DIGEST_BYTES = 8
MAX_ROWS = 1 << 16  # of a shard: bounds the memory its index takes before it is read
MAX_ROW_TOKENS = 1 << 24
SHARD_NAME = re.compile(r"shard-([0-9a-f]{64})\.safetensors")
_HEADER_LIMIT = 4096
_SPAN = 1 << 20  # values that are verified at a time


class BadShard(Exception):
    """The file cannot be used, and why.

    `damaged`: its bytes have changed since it was written. Otherwise it was never a shard of this reference.
    """

    def __init__(self, reason: str, *, damaged: bool = True):
        super().__init__(reason)
        self.damaged = damaged


def encode(keys: Sequence[bytes], values: Sequence[np.ndarray], metadata: Mapping[str, str]) -> tuple[str, bytes]:
    """Name and content of a shard; equal rows give equal bytes."""
    data = [np.ascontiguousarray(row, dtype="<f4").tobytes() for row in values]
    index = [
        np.array([row.sum(dtype=np.float64) for row in values], dtype="<f8").tobytes(),
        np.cumsum([0, *map(len, values)], dtype="<i8").tobytes(),
        *keys,
        *map(_digest, data),
    ]
    head = b"".join([_header(len(keys), sum(map(len, values)), metadata), *index])
    return f"shard-{hashlib.sha256(head).hexdigest()}.safetensors", b"".join([head, *data])


def _tables(rows: int, tokens: int) -> dict[str, tuple[str, list[int], int]]:
    """Name -> (dtype, shape, bytes), in file order."""
    return {
        "sum_logps": ("F64", [rows], 8 * rows),
        "offsets": ("I64", [rows + 1], 8 * (rows + 1)),
        "keys": ("U8", [rows, KEY_BYTES], KEY_BYTES * rows),
        "digests": ("U8", [rows, DIGEST_BYTES], DIGEST_BYTES * rows),
        "token_logps": ("F32", [tokens], 4 * tokens),
    }


def _header(rows: int, tokens: int, metadata: Mapping[str, str]) -> bytes:
    table: dict = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape, size) in _tables(rows, tokens).items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # every table starts on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class Shard:
    """A file whose index has been verified: `rows`, `tokens`, `keys` end to end and `sums` ([R] float64, nats)."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        """Raises BadShard or OSError."""
        self.path = path
        with _opened(path) as file:
            header, self.rows, self.tokens = _read_header(file)
            sizes = [size for *_, size in _tables(self.rows, self.tokens).values()]
            index = _read(file, sum(sizes[:-1]), len(header))
        if hashlib.sha256(header + index).hexdigest() != SHARD_NAME.fullmatch(path.name)[1]:
            raise BadShard("its content does not match its name")
        if header != _header(self.rows, self.tokens, metadata):
            raise BadShard("it belongs to another reference", damaged=False)
        self._values_at = len(header) + len(index)
        view, ends = memoryview(index), itertools.accumulate(sizes[:-1], initial=0)
        sums, offsets, self.keys, self._digests = (view[a:b] for a, b in itertools.pairwise(ends))
        self.sums, self._offsets = np.frombuffer(sums, "<f8"), np.frombuffer(offsets, "<i8")
        lengths = np.diff(self._offsets)
        if (
            (self._offsets[0], self._offsets[-1]) != (0, self.tokens)
            or (lengths < 0).any()
            or (lengths > MAX_ROW_TOKENS).any()
            or not np.isfinite(self.sums).all()
        ):
            raise BadShard("its tables contradict each other", damaged=False)

    def row_keys(self) -> list[bytes]:
        return [bytes(self.keys[at : at + KEY_BYTES]) for at in range(0, len(self.keys), KEY_BYTES)]

    def read(self, rows: Iterable[int]) -> Iterator[np.ndarray]:  # [tokens] float32 each
        """Values of these rows, verified. Raises BadShard or OSError."""
        with _opened(self.path) as file:
            for row in rows:
                yield np.array(np.frombuffer(self._verified(file, int(row), int(row) + 1), "<f4"))

    def verify(self) -> None:
        """Read all values. Raises BadShard or OSError."""
        with _opened(self.path) as file:
            row = 0
            while row < self.rows:  # many small rows at a time
                end = int(np.searchsorted(self._offsets, self._offsets[row] + _SPAN, side="right")) - 1
                end = max(end, row + 1)
                self._verified(file, row, end)
                row = end

    def _verified(self, file: int, row: int, end: int) -> bytes:
        """Values of rows `row` to `end`."""
        bounds = (4 * self._offsets[row : end + 1]).tolist()
        data = _read(file, bounds[-1] - bounds[0], self._values_at + bounds[0])
        view = memoryview(data)
        found = b"".join([_digest(view[a - bounds[0] : b - bounds[0]]) for a, b in itertools.pairwise(bounds)])
        if found != self._digests[DIGEST_BYTES * row : DIGEST_BYTES * end]:
            raise BadShard("its values have changed")
        return data


def _read_header(file: int) -> tuple[bytes, int, int]:
    """(length and header as in the file, rows, tokens), after comparing the file's size with them."""
    size = os.fstat(file).st_size
    length = int.from_bytes(_read(file, 8, 0), "little")
    if length > _HEADER_LIMIT:
        raise BadShard(f"its header claims {length} bytes")
    header = _read(file, 8 + length, 0)
    try:
        table = json.loads(header[8:])
        (rows, _), (tokens,) = table["keys"]["shape"], table["token_logps"]["shape"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadShard("its header cannot be read") from None
    if not (type(rows) is type(tokens) is int and 0 < rows <= MAX_ROWS and tokens >= 0):
        raise BadShard("its header cannot be read")
    if size != len(header) + sum(bytes_ for *_, bytes_ in _tables(rows, tokens).values()):
        raise BadShard("it is shorter or longer than its header says")
    return header, rows, tokens


def _read(file: int, size: int, start: int) -> bytes:
    data = os.pread(file, size, start)
    if len(data) != size:
        raise BadShard("it ends too early")
    return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A regular file for reading: links are not followed, and a pipe does not block."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise BadShard("it is not a regular file", damaged=False) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise BadShard("it is not a regular file", damaged=False)
        yield file
    finally:
        os.close(file)


def read_file(path: Path, limit: int) -> bytes:
    """A small regular file. Raises BadShard when it is something else or larger than `limit` bytes, or OSError."""
    with _opened(path) as file:
        size = os.fstat(file).st_size
        if size > limit:
            raise BadShard(f"it has {size} bytes")
        return _read(file, size, 0)
