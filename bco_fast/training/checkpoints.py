"""Checkpoints that are whole or are not used.

    checkpoint-12/manifest.json    {"schema": 1, "files": {"optimizer.pt": {"bytes": 4242, "sha256": "..."}, ...}}
    checkpoint-12/.incomplete      until the manifest is there

The manifest is written last, after every file has reached the disk: it is what commits a checkpoint. A folder that has
the mark and no manifest was cut short; one that has neither was saved by another Trainer, and cannot be verified.

The Trainer itself skips an optimizer, a scheduler or a random state that is missing without a word, takes the folder
with the highest number whatever is in it, and may delete the last whole checkpoint before the next one is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from ..files import atomic_text

SCHEMA = 1
MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"
THREADS = 8
"""Files hashed at a time, at most."""

_NAME = re.compile(r"checkpoint-(\d+)(\.replaced)?")
_DELETED = re.compile(r"checkpoint-\d+(\.replaced)?\.deleted")
_PICKLED = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|(optimizer|pytorch_model|adapter_model)\.bin|rng_state(_\d+)?\.pth"
)
_READ = re.compile(_PICKLED.pattern + r"|(model|adapter_model)\.safetensors(\.index\.json)?|trainer_state\.json")

# What a run cannot go on from without; the patterns are of paths in the folder. DeepSpeed keeps its own under global_step*.
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
    """What `examine` found."""

    problem: str | None
    """The damage, naming the file; None for a checkpoint that can be resumed."""
    verified: bool
    """Every file was compared with the manifest."""


def _failpoint(name: str) -> None:
    """Called between the steps of a save; tests put a kill here."""


# ---- writing


def begin(folder: str | os.PathLike) -> None:
    """An empty folder with the mark of an unfinished save. What stood there before is kept beside it until `commit`."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.iterdir():
        if _DELETED.fullmatch(path.name):  # a deletion that was cut short
            shutil.rmtree(path, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.replaced")
    if os.path.lexists(folder):
        if (folder / INCOMPLETE).exists() and not (folder / MANIFEST).exists():
            _delete(folder)
        else:
            if os.path.lexists(aside):
                _delete(aside)
            os.replace(folder, aside)
    _failpoint("set aside")
    folder.mkdir()
    with (folder / INCOMPLETE).open("x") as file:
        os.fsync(file.fileno())
    _sync_folder(folder)
    _sync_folder(folder.parent)
    _failpoint("begun")


def commit(folder: str | os.PathLike) -> None:
    """Bring every file in the folder to the disk, then write the manifest of their sizes and hashes."""
    folder = Path(folder)
    names = _files(folder)
    described = dict(zip(names, _map(_describe_and_sync, [folder / name for name in names]), strict=True))
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
    _failpoint("files on disk")
    with atomic_text(folder / MANIFEST) as file:
        json.dump({"schema": SCHEMA, "files": described}, file, indent=1)
        file.flush()
        _failpoint("manifest half written")
    _failpoint("manifest written")
    _sync_folder(folder)
    (folder / INCOMPLETE).unlink(missing_ok=True)
    _failpoint("committed")
    aside = folder.with_name(f"{folder.name}.replaced")
    if os.path.lexists(aside):
        _delete(aside)


def rotate(run_dir: str | os.PathLike, limit: int | None, keep: Sequence[str | os.PathLike]) -> None:
    """Delete checkpoints until `limit` are left: first those without a manifest, then the oldest.

    Args:
        run_dir: where the checkpoints are.
        limit: how many stay, or None or 0 for all.
        keep: those that stay in any case: the one just committed, so that a whole one is always left, and the best.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path).resolve() for path in keep}
    found = [path for path in Path(run_dir).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    others = sorted((path for path in found if path.resolve() not in kept), key=_age)
    for path in others[: max(0, len(found) - max(limit, len(kept)))]:
        _delete(path)
        _failpoint("one deleted")


def _age(folder: Path) -> tuple[bool, int, int]:
    """By the time of the commit, not the number: numbers restart when a run is resumed from an earlier step."""
    manifest = folder / MANIFEST
    whole = manifest.exists()
    return whole, (manifest if whole else folder).stat().st_mtime_ns, _step(folder)


def _delete(path: Path) -> None:
    """Out of the way in one step, so that a deletion that is cut short leaves no half checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    trash = path.with_name(f"{path.name}.deleted")
    if trash.exists():
        shutil.rmtree(trash)
    os.replace(path, trash)
    _failpoint("renamed for deletion")
    shutil.rmtree(trash, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    """Relative paths of all files, but for the manifest and the mark."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if name not in (MANIFEST, INCOMPLETE) and not name.endswith(".tmp"))


def _map(function: Callable, paths: Sequence[Path]) -> list:
    """In threads: hashing lets go of the interpreter. The largest first, so that none is left over at the end."""
    order = sorted(range(len(paths)), key=lambda i: -paths[i].stat().st_size)
    with ThreadPoolExecutor(max(1, min(THREADS, os.cpu_count() or 1, len(paths)))) as pool:
        done = dict(zip(order, pool.map(function, [paths[i] for i in order]), strict=True))
    return [done[i] for i in range(len(paths))]


def _sha256(path: Path, sync: bool = False) -> tuple[int, str]:
    """(bytes, hash)"""
    content, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(buffer):
            content.update(buffer[:read])
            size += read
        if sync:
            os.fsync(file.fileno())
    return size, content.hexdigest()


def _describe_and_sync(path: Path) -> dict:
    size, digest = _sha256(path, sync=True)
    return {"bytes": size, "sha256": digest}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading


def examine(folder: str | os.PathLike) -> Verdict:
    """Whether training can go on from this folder, exactly. Reads every byte of it; runs no code that it holds."""
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
        _read_state(folder / "trainer_state.json")
        for name in names:
            if _PICKLED.fullmatch(name):
                _read_pickled(folder / name)
            elif not verified and name.endswith((".safetensors", ".safetensors.index.json")):
                _read_safetensors(folder / name)
    except _Damage as damage:
        return Verdict(str(damage), verified)
    except OSError as error:
        return Verdict(f"it cannot be read ({error})", verified)
    return Verdict(None, verified)


class _Damage(Exception):
    pass


def _read_manifest(path: Path) -> dict[str, dict]:
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["schema"] != SCHEMA:
            raise _Damage(f"{MANIFEST} has schema {manifest['schema']!r}, and this version reads {SCHEMA}")
        for name, file in manifest["files"].items():
            place = PurePosixPath(name)
            if place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name:
                raise ValueError(f"{name!r} is outside the checkpoint")
            if not (isinstance(file["bytes"], int) and isinstance(file["sha256"], str)):
                raise ValueError(f"{name!r} has no size or hash")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damage(f"{MANIFEST} cannot be read ({error})") from None
    return manifest["files"]


def _compare(folder: Path, files: dict[str, dict]) -> list[str]:
    """Sizes before hashes: a missing gigabyte need not be waited for."""
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            raise _Damage(f"{name} is missing")
        if path.stat().st_size != file["bytes"]:
            raise _Damage(f"{name} has {path.stat().st_size} bytes, not {file['bytes']}")
    for name in _files(folder):
        if name not in files and _READ.fullmatch(name):
            raise _Damage(f"{name} does not belong to it: it is not in {MANIFEST}")
    for name, (_, digest) in zip(files, _map(_sha256, [folder / name for name in files]), strict=True):
        if digest != files[name]["sha256"]:
            raise _Damage(f"{name} was altered: its hash is not that in {MANIFEST}")
    return list(files)


def _read_state(path: Path) -> None:
    try:
        state = json.loads(path.read_bytes())
        step = state["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Damage(f"{path.name} cannot be read ({type(error).__name__}: {error})") from None
    if not isinstance(step, int):
        raise _Damage(f"{path.name} has no step")


def _read_pickled(path: Path) -> None:
    """Tensors stay on disk (mmap); what is not tensors, numbers and containers is refused before anything of it runs."""
    try:
        with safe_globals():
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive raises whatever the damage leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _Damage(f"{path.name} cannot be read ({reason})") from None


def _read_safetensors(path: Path) -> None:
    try:
        if path.suffix == ".json":
            for shard in set(json.loads(path.read_bytes())["weight_map"].values()):
                if not (path.parent / shard).is_file():
                    raise _Damage(f"{shard} is missing")
        else:
            with safe_open(path, framework="pt"):  # compares the header with the size of the file
                pass
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damage(f"{path.name} cannot be read ({error})") from None


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def candidates(wanted: str | os.PathLike | bool, output_dir: str | os.PathLike) -> list[Path]:
    """Folders to resume from, in the order in which to try them; none of them opened.

    Args:
        wanted: True for all in output_dir, the highest step first; or a folder, which the earlier ones beside it follow.
            Never a later one: who names a step does not want what came after it.
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
    """The first whole checkpoint, and what to tell the user about it and about those before it.

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
