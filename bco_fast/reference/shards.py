"""One file of reference log-probabilities, and how a file reaches the disk whole.

    8 bytes     length of the header, little-endian
    header      JSON; together with the length it makes the file an ordinary safetensors file
    index       sum_logps [R] float64, offsets [R + 1] int64, keys [R, 16] uint8, digests [R, 8] uint8
    values      token_logps [T] float32; those of row r are offsets[r] to offsets[r + 1]

The file is named after the sha256 of everything before the values, and digests[r] is the blake2b of row r's values.
So opening a file hashes 40 bytes a row and checks its size, however many gigabytes of values there are, and a row's
values are checked when they are read: what has changed is noticed before it is used.

Values are read by position, not mapped: a mapping of a file that somebody truncates kills the process, and holds a file
descriptor for each of thousands of shards.
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
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

KEY_BYTES = 16
DIGEST_BYTES = 8
MAX_ROWS = 1 << 16  # of a shard: what its index may take in memory is bounded before it is read
MAX_ROW_TOKENS = 1 << 24
STALE_SECONDS = 3600  # a file is written in seconds; a temporary one of this age has lost its writer
SHARD_NAME = re.compile(r"shard-([0-9a-f]{64})\.safetensors")
_TEMPORARY_NAME = re.compile(r"\.[\w.-]+\.\d+\.[0-9a-f]{32}\.tmp")
_HEADER_LIMIT = 4096
_PIECE = 8 << 20  # bytes of one write
_SPAN = 4 << 20  # bytes of values that are verified at a time


class BadShard(Exception):
    """The file cannot be used, and why.

    `damaged`: its bytes are not those it was written with; otherwise it is something that was never a shard of here.
    """

    def __init__(self, reason: str, *, damaged: bool = True):
        super().__init__(reason)
        self.damaged = damaged


def encode(keys: Sequence[bytes], values: Sequence[np.ndarray], metadata: Mapping[str, str]) -> tuple[str, bytes]:
    """-> (name, content) of a shard; equal rows give equal bytes."""
    data = [np.ascontiguousarray(row, dtype="<f4").tobytes() for row in values]
    index = b"".join(
        [
            np.array([row.sum(dtype=np.float64) for row in values], dtype="<f8").tobytes(),
            np.cumsum([0, *map(len, values)], dtype="<i8").tobytes(),
            b"".join(keys),
            b"".join(map(_digest, data)),
        ]
    )
    head = _header(len(keys), sum(map(len, values)), metadata) + index
    return f"shard-{hashlib.sha256(head).hexdigest()}.safetensors", b"".join([head, *data])


def _header(rows: int, tokens: int, metadata: Mapping[str, str]) -> bytes:
    table: dict = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, size in (
        ("sum_logps", "F64", [rows], 8 * rows),
        ("offsets", "I64", [rows + 1], 8 * (rows + 1)),
        ("keys", "U8", [rows, KEY_BYTES], KEY_BYTES * rows),
        ("digests", "U8", [rows, DIGEST_BYTES], DIGEST_BYTES * rows),
        ("token_logps", "F32", [tokens], 4 * tokens),
    ):
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # every table starts on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _index_bytes(rows: int) -> int:
    return (8 + 8 + KEY_BYTES + DIGEST_BYTES) * rows + 8


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class Shard:
    """One file whose index has been verified. What the lookup needs (`keys`, `sums`) is handed over once by `take`."""

    def __init__(self, path: Path, metadata: Mapping[str, str]):
        """Raises BadShard or OSError."""
        self.path = path
        with _opened(path) as file:
            header, self.rows, self.tokens = _read_header(file)
            index = _read(file, _index_bytes(self.rows), len(header))
        if hashlib.sha256(header + index).hexdigest() != SHARD_NAME.fullmatch(path.name)[1]:
            raise BadShard("its content does not match its name")
        if header != _header(self.rows, self.tokens, metadata):
            raise BadShard("it belongs to another reference", damaged=False)
        self._values_at = len(header) + len(index)
        bounds = np.cumsum([0, 8, 8, KEY_BYTES, DIGEST_BYTES]) * self.rows + np.array([0, 0, 8, 8, 8])
        sums, offsets, keys, digests = (index[a:b] for a, b in itertools.pairwise(bounds))
        self._offsets = np.array(np.frombuffer(offsets, "<i8"))
        self._digests = digests
        self._lookup = np.frombuffer(keys, ">u8").reshape(-1, 2).astype(np.uint64), np.array(np.frombuffer(sums, "<f8"))
        lengths = np.diff(self._offsets)
        if (
            (self._offsets[0], self._offsets[-1]) != (0, self.tokens)
            or (lengths < 0).any()
            or (lengths > MAX_ROW_TOKENS).any()
            or not np.isfinite(self._lookup[1]).all()
        ):
            raise BadShard("its tables do not fit together", damaged=False)

    def take(self) -> tuple[np.ndarray, np.ndarray]:  # [R, 2] uint64, [R] float64
        """Keys as pairs of big-endian integers, and sums; this object forgets them."""
        lookup, self._lookup = self._lookup, None
        return lookup

    def token_logps(self, row: int) -> np.ndarray:  # [tokens] float32
        """Values of one row, read and verified. Raises BadShard or OSError."""
        with _opened(self.path) as file:
            return self._row(file, row)

    def verify(self) -> None:
        """Read the values of all rows. Raises BadShard or OSError if one has changed."""
        with _opened(self.path) as file:
            row = 0
            while row < self.rows:  # many small rows at a time
                end = int(np.searchsorted(self._offsets, self._offsets[row] + _SPAN // 4, side="right")) - 1
                end = max(end, row + 1)
                bounds = 4 * self._offsets[row : end + 1]
                data = memoryview(_read(file, int(bounds[-1] - bounds[0]), self._values_at + int(bounds[0])))
                inside = (bounds - bounds[0]).tolist()
                found = b"".join([_digest(data[a:b]) for a, b in itertools.pairwise(inside)])
                if found != self._digests[DIGEST_BYTES * row : DIGEST_BYTES * end]:
                    raise BadShard("its values have changed")
                row = end

    def read(self, rows: Iterable[int]) -> Iterator[np.ndarray]:
        """Values of these rows, verified, with the file opened once. Raises BadShard or OSError."""
        with _opened(self.path) as file:
            for row in rows:
                yield self._row(file, int(row))

    def _row(self, file: int, row: int) -> np.ndarray:
        first, last = (int(offset) for offset in self._offsets[row : row + 2])
        data = _read(file, 4 * (last - first), self._values_at + 4 * first)
        if _digest(data) != self._digests[DIGEST_BYTES * row : DIGEST_BYTES * (row + 1)]:
            raise BadShard("its values have changed")
        return np.array(np.frombuffer(data, "<f4"))


def _read_header(file: int) -> tuple[bytes, int, int]:
    """-> (length and header as they stand, rows, tokens); the file is as long as they say."""
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
    if size != len(header) + _index_bytes(rows) + 4 * tokens:
        raise BadShard("it is shorter or longer than its header says")
    return header, rows, tokens


def _read(file: int, size: int, start: int) -> bytes:
    data = os.pread(file, size, start)
    if len(data) != size:
        raise BadShard("it ends too early")
    return data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A regular file for reading: no link is followed, and a pipe does not make us wait."""
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


def failpoint(name: str) -> None:
    """Called at every step of a commit; tests put something here that kills the process."""


def commit(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, it is there whole or as it was before.

    After this returns it survives a crash of the machine. Raises OSError, and then leaves no temporary file.
    """
    failpoint("begin")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            failpoint("created")
            rest = memoryview(data)
            while rest:
                written = os.write(file, rest[:_PIECE])
                if not written:
                    raise OSError(errno.EIO, "nothing was written")
                rest = rest[written:]
                failpoint("wrote a piece")
            os.fsync(file)
            failpoint("synced")
        finally:
            os.close(file)
        failpoint("closed")
        os.replace(temporary, path)
        failpoint("renamed")
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    failpoint("folder synced")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, and make their names survive a crash of the machine."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def stale_files(folder: Path, age: float = STALE_SECONDS) -> list[Path]:
    """Temporary files whose writer was killed: those not touched for `age` seconds.

    By age and not by process id, because a writer may sit in another container or on another machine.
    """
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if _TEMPORARY_NAME.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > age:
                found.append(Path(entry.path))
    return found
