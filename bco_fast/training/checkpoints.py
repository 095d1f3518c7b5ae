"""Checkpoints that are whole or are not used.

    checkpoint-12/manifest.json    {"schema": 2, "files": {"model.safetensors": {"bytes": 4242, "crc32": "..."}, ...}}
    checkpoint-12/.incomplete      until the manifest is there

The manifest is written last, when every file is on the disk: it commits the checkpoint. A folder with the mark and
without a manifest was cut short; a folder with neither was saved by another Trainer and cannot be verified.

A large file of `torch.save` has no "crc32" in the manifest: its records carry CRC-32 sums already. The other files are
summed while the disk is flushed. So a save waits for the disk, and hardly for the sums.

The stock Trainer skips a missing optimizer, scheduler or random state silently, takes the folder with the highest number
whatever is in it, and may delete the last whole checkpoint before the next one is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers.trainer import safe_globals

from .. import files
from .fingerprint import FILE as FINGERPRINT
from .fingerprint import read_fingerprint

SCHEMA = 2  # 1 had the SHA-256 of every file; it is still read
MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"
MANIFEST_LIMIT = 16 << 20  # bytes; about 150,000 files
ARCHIVE_SIZE = 1 << 20  # bytes; archives up to this size are summed like other files
_THREADS = min(8, os.cpu_count() or 1)

_NAME = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_DELETED = re.compile(r"checkpoint-\d+(\.replaced)?\.deleted")
_PICKLED = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|(optimizer|pytorch_model|adapter_model)\.bin|rng_state(_\d+)?\.pth"
)
_READ = re.compile(
    _PICKLED.pattern + r"|(model|adapter_model)\.safetensors(\.index\.json)?|(trainer_state|fingerprint)\.json"
)

# Files without which a run cannot be resumed; the patterns match paths in the folder. DeepSpeed's are under global_step*.
_NEEDED = {
    "trainer_state.json": r"trainer_state\.json",
    "model.safetensors": r"([^/]+/)?(model|adapter_model|pytorch_model)[^/]*\.(safetensors|bin)|pytorch_model_fsdp_\d+/.+|global_step\d+/.+",
    "optimizer.pt": r"optimizer\.(pt|bin)|optimizer_\d+/.+|rank\d+-of-\d+-optimizer\.pt|global_step\d+/.+",
    "scheduler.pt": r"scheduler\.pt|global_step\d+/.+",
    "rng_state.pth": r"rng_state(_\d+)?\.pth",
}  # fmt: skip


class CheckpointError(ValueError):
    """There is no whole checkpoint to resume from; the message names what is wrong with each."""


class Verdict(NamedTuple):
    """What `examine` found.

    problem: the damage, naming the file; None for a checkpoint that can be resumed.
    verified: every file was compared with the manifest.
    """

    problem: str | None
    verified: bool


class _Damage(Exception):
    pass


# ---- writing


def begin(folder: str | os.PathLike) -> None:
    """Create the folder, empty and marked as incomplete. An earlier one is kept beside it until `commit`."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.iterdir():
        if _DELETED.fullmatch(path.name):  # an interrupted deletion
            shutil.rmtree(path, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.replaced")
    if os.path.lexists(folder):
        if (folder / INCOMPLETE).exists() and not (folder / MANIFEST).exists():
            _delete(folder)
        else:
            if os.path.lexists(aside):
                _delete(aside)
            os.replace(folder, aside)
    files.failpoint("set aside")
    folder.mkdir()
    (folder / INCOMPLETE).touch()
    for path in (folder / INCOMPLETE, folder, folder.parent):
        files.sync(path)
    files.failpoint("begun")


def commit(folder: str | os.PathLike) -> None:
    """Flush every file in the folder to the disk, then write the manifest."""
    folder = Path(folder)
    names = _files(folder)
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(_THREADS) as disk, ThreadPoolExecutor(_THREADS) as pool:
        flushed = disk.map(files.sync, paths)
        described = dict(zip(names, pool.map(_describe, paths), strict=True))
        list(flushed)  # raises what failed
    for path in folder.rglob("*"):
        if path.is_dir():
            files.sync(path)
    files.failpoint("files on disk")
    with files.atomic_text(folder / MANIFEST) as file:
        json.dump({"schema": SCHEMA, "files": described}, file, indent=1)
        file.flush()
        files.failpoint("manifest half written")
    files.failpoint("manifest written")
    (folder / INCOMPLETE).unlink(missing_ok=True)
    files.failpoint("committed")
    aside = folder.with_name(f"{folder.name}.replaced")
    if os.path.lexists(aside):
        _delete(aside)


def rotate(run_dir: str | os.PathLike, limit: int | None, keep: Sequence[str | os.PathLike]) -> None:
    """Delete checkpoints until `limit` are left: first those without a manifest, then the oldest.

    Args:
        run_dir: where the checkpoints are.
        limit: how many to keep; None or 0 for all.
        keep: never deleted: the checkpoint just committed, so that a whole one is always left, and the best one.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path).resolve() for path in keep}
    found = [path for path in Path(run_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    others = sorted((path for path in found if path.resolve() not in kept), key=_age)
    for path in others[: max(0, len(found) - max(limit, len(kept)))]:
        _delete(path)
        files.failpoint("one deleted")


def _age(folder: Path) -> tuple[bool, int, int]:
    """By the time of the commit, not the number: a run that is resumed from an earlier step repeats numbers."""
    manifest = folder / MANIFEST
    whole = manifest.exists()
    return whole, (manifest if whole else folder).stat().st_mtime_ns, _step(folder)


def _delete(path: Path) -> None:
    """Rename before deleting, so that an interrupted deletion leaves no half checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    trash = path.with_name(f"{path.name}.deleted")
    if trash.exists():
        shutil.rmtree(trash)
    os.replace(path, trash)
    files.failpoint("renamed for deletion")
    shutil.rmtree(trash, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Relative paths of all files except the manifest and the mark."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name not in (MANIFEST, INCOMPLETE) and not name.endswith(".tmp"))


def _describe(path: Path) -> dict:
    size = path.stat().st_size
    if size > ARCHIVE_SIZE and torch.serialization.get_crc32_options() and zipfile.is_zipfile(path):
        return {"bytes": size}
    return {"bytes": size, "crc32": _checksum(path, "crc32")}


def _checksum(path: Path, kind: str) -> str:
    """In hexadecimal. CRC-32 is twice as fast as SHA-256 and enough against accidents; schema 1 had SHA-256."""
    sha256, crc32 = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            if kind == "crc32":
                crc32 = zlib.crc32(piece, crc32)
            else:
                sha256.update(piece)
    return f"{crc32:08x}" if kind == "crc32" else sha256.hexdigest()


# ---- reading


def examine(folder: str | os.PathLike) -> Verdict:
    """Whether training can be resumed from this folder exactly. Reads every byte, runs no code that is in it."""
    folder = Path(folder)
    if not folder.is_dir():
        return Verdict("there is no such folder", False)
    verified = (folder / MANIFEST).is_file()
    try:
        if verified:
            names = _compare(folder, _read_manifest(folder / MANIFEST))
        elif (folder / INCOMPLETE).exists():
            raise _Damage(f"{MANIFEST} is missing, because its save was cut short")
        else:
            names = _files(folder)
        for name, pattern in _NEEDED.items():
            if not any(re.fullmatch(pattern, found) for found in names):
                raise _Damage(f"{name} is missing")
        for name in names:
            with _reading(folder / name):
                _parse(folder / name, name, verified)
    except _Damage as damage:
        return Verdict(str(damage), verified)
    except OSError as error:
        return Verdict(f"it cannot be read ({error})", verified)
    return Verdict(None, verified)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except _Damage:
        raise
    except Exception as error:  # damage makes a parser raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Damage(f"{path.name} cannot be read ({reason})") from None


def _parse(path: Path, name: str, verified: bool) -> None:
    """Raise if the Trainer could not read a file. A checksum vouches for tensors, but not for what a pickle asks for."""
    if name == "trainer_state.json":
        if not isinstance(json.loads(path.read_bytes())["global_step"], int):
            raise ValueError("it has no step")
    elif name == FINGERPRINT:
        read_fingerprint(path.parent)
    elif _PICKLED.fullmatch(name):
        if zipfile.is_zipfile(path):
            _read_archive(path, checksums=False)
        with (
            safe_globals()
        ):  # mmap leaves tensors on the disk; a pickle that is more than data is refused before it runs
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    elif verified:
        return
    elif name.endswith(".safetensors"):
        with safe_open(path, framework="pt"):  # compares the header with the size of the file
            pass
    elif name.endswith(".safetensors.index.json"):
        for shard in set(json.loads(path.read_bytes())["weight_map"].values()):
            if not (path.parent / shard).is_file():
                raise _Damage(f"{shard} is missing")


def _read_archive(path: Path, checksums: bool) -> None:
    """The records of a `torch.save` archive, which are never compressed, so that they take no more memory than disk."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        if not stored or sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are compressed")
        if checksums and archive.testzip() is not None:
            raise _Damage(f"{path.name} was altered: {archive.testzip()} in it does not match its checksum")


def _read_manifest(path: Path) -> dict[str, dict]:
    with _reading(path):
        if path.stat().st_size > MANIFEST_LIMIT:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        manifest = json.loads(path.read_bytes())
        if manifest["schema"] not in (1, SCHEMA):
            raise _Damage(f"{MANIFEST} has schema {manifest['schema']!r}; this version reads 1 and {SCHEMA}")
        for name, file in manifest["files"].items():
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name:
                raise ValueError(f"{name!r} is outside the checkpoint")
            if not isinstance(file["bytes"], int):
                raise ValueError(f"{name!r} has no size")
        return manifest["files"]


def _compare(folder: Path, described: dict[str, dict]) -> list[str]:
    """Sizes first, because they take no time. Returns the names of the manifest's files."""
    for name, file in described.items():
        path = folder / name
        if not path.is_file():
            raise _Damage(f"{name} is missing")
        if path.stat().st_size != file["bytes"]:
            raise _Damage(f"{name} has {path.stat().st_size} bytes, not {file['bytes']}")
    for name in _files(folder):
        if name not in described and _READ.fullmatch(name):
            raise _Damage(f"{name} does not belong to it: it is not in {MANIFEST}")

    def check(name: str) -> None:
        kind = next((kind for kind in ("crc32", "sha256") if kind in described[name]), None)
        if kind is None:
            with _reading(folder / name):
                _read_archive(folder / name, checksums=True)
        elif _checksum(folder / name, kind) != described[name][kind]:
            raise _Damage(f"{name} was altered: its {kind} is not that in {MANIFEST}")

    with ThreadPoolExecutor(_THREADS) as pool:  # summing releases the interpreter lock
        list(pool.map(check, described))
    return list(described)


# ---- choosing


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def candidates(wanted: str | os.PathLike | bool, output_dir: str | os.PathLike) -> list[Path]:
    """Folders to resume from, in the order to try them. None of them is opened.

    Args:
        wanted: True for all in output_dir, highest step first; or a folder, followed by the earlier ones beside it. Later
            ones are left out, because a user who names a step does not want what came after it.
    """
    parent = Path(output_dir) if wanted is True else Path(wanted).absolute().parent
    found = [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()] if parent.is_dir() else []
    found.sort(key=lambda p: (_step(p), p.suffix != ".replaced"), reverse=True)
    if wanted is True:
        return found
    wanted = Path(wanted)
    twin = wanted.with_name(f"{wanted.name}.replaced")
    earlier = [p for p in found if _step(p) < _step(wanted) or p.name == twin.name]
    return [wanted, *earlier]


def choose(folders: Sequence[Path], examine: Callable[[Path], Verdict] = examine) -> tuple[Path, str | None]:
    """The first whole checkpoint, and what to tell the user about it and about those passed over.

    Raises:
        CheckpointError: none is whole.
    """
    damaged = []
    for folder in folders:
        verdict = examine(folder)
        if verdict.problem is not None:
            damaged.append(f"{folder}: {verdict.problem}")
            continue
        notes = [f"damaged checkpoints are passed over ({'; '.join(damaged)})"] if damaged else []
        if not verdict.verified:
            notes.append(f"{folder} has no {MANIFEST}: it looks complete, but it cannot be verified")
        return folder, f"resuming from {folder}: {', and '.join(notes)}" if notes else None
    raise CheckpointError(f"no whole checkpoint to resume from ({'; '.join(damaged)})")
