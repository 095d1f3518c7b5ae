"""Files that appear whole or not at all, and survive a crash of the machine once they are there.

The order is the same everywhere: write under a temporary name, fsync the file, rename it, fsync its folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

STALE_SECONDS = 3600
"""A file takes seconds to write; the writer of a temporary file of this age is dead."""
_TEMPORARY_NAME = re.compile(r"\.[\w.-]+\.\d+\.[0-9a-f]{32}\.tmp")
_PIECE = 8 << 20  # bytes per write


def final_name(path: str | os.PathLike) -> str:
    """The path that a temporary file of `atomic_path` would become; any other path unchanged."""
    folder, name = os.path.split(os.fsdecode(path))
    if _TEMPORARY_NAME.fullmatch(name):
        name = name.removeprefix(".").rsplit(".", 3)[0]
    return os.path.join(folder, name)


def failpoint(name: str) -> None:
    """Called between the steps of a write; tests replace it with one that kills the process."""


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends, and is removed when the block raises."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    failpoint("begin")
    try:
        yield temporary
        failpoint("written")
        sync(temporary)
        failpoint("synced")
        os.replace(temporary, path)
        failpoint("renamed")
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)  # write(2) does not tell which file was too large
        raise
    sync(path.parent)
    failpoint("folder synced")


@contextlib.contextmanager
def atomic_text(path: str | os.PathLike) -> Iterator[IO[str]]:
    """A text file that appears under `path` when the block ends, and not at all when it raises."""
    with atomic_path(path) as temporary, temporary.open("x", encoding="utf-8") as file:
        yield file


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file atomically. Raises OSError; the old file, or none, is then still there."""
    with atomic_path(path) as temporary:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            failpoint("created")
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest[:_PIECE]) :]  # a write may be short
                failpoint("wrote a piece")
        finally:
            os.close(file)


def json_numbers(value):
    """A value of dicts, lists and numbers for JSON, which has no infinity and no NaN: they become None."""
    if isinstance(value, dict):
        return {key: json_numbers(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_numbers(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync(path: str | os.PathLike) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; their names are on the disk when this returns."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync(path.parent)


def stale_files(folder: Path, age: float = STALE_SECONDS) -> list[Path]:
    """Temporary files that have not been touched for `age` seconds: their writer was killed.

    Age decides, not the process id: the writer may run in another container or on another machine.
    """
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if _TEMPORARY_NAME.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > age:
                found.append(Path(entry.path))
    return found
