"""Reference log-probabilities on disk: computed once, found again by content.

    <cache_dir>/<reference digest>/manifest.json
                                   shard-<sha256>.safetensors         see _shards.py

A row is keyed by what the reference model saw: the token ids after truncation and the mask of completion tokens.
Learning rate, loss, order, batch size or the file's path are not in the key, so changing them computes nothing again.
A folder belongs to one reference: weights, config, dtype, attention. Nothing here is pickled.

A shard appears under its name only when it is whole (temporary file, fsync, rename, fsync of the folder), and its
name is the hash of its content, so a torn, altered or foreign shard is recognised and left out. Several processes may
fill one folder without a lock: equal rows make equal shards of equal names, each process looks for the others' shards
before it computes one, and what a killed process left half done blocks nobody. The manifest says how the rows were cut
into batches and what is there for a person to read; shards vouch for themselves and are found without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .key_index import KeyIndex
from .shards import (
    KEY_BYTES,
    MAX_ROW_TOKENS,
    MAX_ROWS,
    SHARD_NAME,
    BadShard,
    Shard,
    commit,
    encode,
    failpoint,
    make_folder,
    read_file,
    stale_files,
)

SCHEMA = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 8 << 20
_SHARDS_AT_ONCE = 256  # that enter the index together: bounds the memory that opening takes beside the index
_DIGEST = re.compile(r"[0-9a-f]{32}")


class CacheError(RuntimeError):
    """The cache cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ReferenceId:
    """What decides a reference log-probability beside the tokens."""

    weights: str
    """Digest of the weights that are used."""
    config: str
    """Digest of the model's config: rope, softcap, scales."""
    dtype: str
    """Of the computation, autocast included."""
    attention: str
    """Attention backend."""

    @property
    def digest(self) -> str:
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class FillPlan:
    """How rows are cut into batches and shards. With it an interrupted build ends with the bytes of a whole one."""

    rows: int
    """Distinct rows that were asked for."""
    rows_sha256: str
    """Of their sorted keys: the same request finds its plan again."""
    rows_per_shard: int
    tokens_per_batch: int
    """Padded tokens of one forward pass, at most; one row may exceed it."""


def default_cache_dir() -> str:
    """$BCO_FAST_CACHE, or bco_fast/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return os.environ.get("BCO_FAST_CACHE") or str(Path(base) / "bco_fast")


@dataclass(frozen=True)
class _LeftOut:
    """A file that cannot be used."""

    reason: str
    damaged: bool
    state: tuple[int, int, int]
    """inode, size, time of change: another process may put the right file in its place."""


class ReferenceCache:
    """The rows of one reference. Opening it verifies the index of every shard; bad ones are left out with a warning.

    Args:
        cache_dir: the folder that holds all references; created when the first shard is written.
        reference: which one; tools that only read may give its digest.

    Raises:
        CacheError: the folder exists and cannot be read, is not a folder, or leads outside of cache_dir.
    """

    def __init__(self, cache_dir: str | os.PathLike, reference: ReferenceId | str):
        self.reference = None if isinstance(reference, str) else reference
        self.digest = reference if isinstance(reference, str) else reference.digest
        if not _DIGEST.fullmatch(self.digest):
            raise CacheError(f"{self.digest!r} is not the name of a reference: 32 hexadecimal digits are")
        self.model_name = ""
        """For people who read the manifest; decides nothing."""
        root = Path(cache_dir).expanduser()
        self.folder = root / self.digest
        if not self.folder.resolve().is_relative_to(root.resolve()):
            raise CacheError(
                f"{self.folder} leads outside of the cache. Remove that link, or choose another cache_dir."
            )
        self.shards: list[Shard] = []
        self._names: set[str] = set()
        self._left_out: dict[str, _LeftOut] = {}
        self._index = KeyIndex()
        self._plan: FillPlan | None = None
        self._listed: set[str] | None = None
        """Shards in the manifest, as far as we know."""
        self.refresh()
        self._index.compact()
        self._read_manifest()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def plan(self) -> FillPlan | None:
        return self._plan

    @property
    def problems(self) -> dict[str, str]:
        """Name of each shard that was left out, and why."""
        return {name: left_out.reason for name, left_out in self._left_out.items()}

    def find(self, keys: Sequence[bytes]) -> np.ndarray:  # [K, 2] int64
        """(shard, row) of each key, (-1, -1) where it is not cached."""
        places, _ = self._index.find(keys)
        return np.stack([places >> 32, np.where(places < 0, -1, places & 0xFFFFFFFF)], axis=1)  # -1 >> 32 is -1

    def sums(self, keys: Sequence[bytes]) -> np.ndarray:  # [K] float64
        """Summed completion log-probabilities in nats, NaN where a key is not cached."""
        return self._index.find(keys)[1]

    def token_logps(self, key: bytes) -> np.ndarray:  # [tokens] float32
        """Per-token log-probabilities of one row's completion, read from disk and verified.

        Raises:
            KeyError: the row is not in the cache.
            CacheError: the file has changed since it was written, or is gone.
        """
        place = int(self._index.find([key])[0][0])
        if place < 0:
            raise KeyError(f"row {key.hex()} is not in the cache")
        shard = self.shards[place >> 32]
        try:
            return shard.token_logps(place & 0xFFFFFFFF)
        except (BadShard, OSError) as error:
            raise CacheError(
                f"{shard.path}: {error}. Delete that file and run again: its rows will be recomputed."
            ) from None

    def make_plan(self, keys: Sequence[bytes], *, rows_per_shard: int, tokens_per_batch: int) -> FillPlan:
        """The plan to fill these rows by, written into the manifest first.

        It is the interrupted one, if that was for the same rows and batches: it may have cut its shards differently.
        """
        distinct = sorted(set(keys))
        digest = hashlib.sha256(b"".join(distinct)).hexdigest()
        plan = FillPlan(len(distinct), digest, rows_per_shard, tokens_per_batch)
        if not 0 < rows_per_shard <= MAX_ROWS or tokens_per_batch < 1:
            raise ValueError(f"rows_per_shard must be 1 to {MAX_ROWS}, tokens_per_batch at least 1; not {plan}")
        old = self._plan
        if old is None or old != FillPlan(plan.rows, digest, old.rows_per_shard, tokens_per_batch):
            self._plan = plan
            with self._writing():
                for path in stale_files(self.folder):
                    path.unlink(missing_ok=True)
                self._write_manifest()
        return self._plan

    def build(
        self,
        order: Sequence[bytes],
        compute: Callable[[list[bytes]], list[np.ndarray]],
        *,
        rows_per_shard: int,
        share: tuple[int, int] = (0, 1),
        found: Callable[[Sequence[bytes]], None] = lambda keys: None,
    ) -> int:
        """Compute and commit missing rows shard by shard; -> how many were computed here.

        Args:
            order: the keys of all missing rows. Equal orders make equal shards, interrupted or not.
            compute: per-token log-probabilities of the rows with these keys, as for `write_shard`.
            share: (rank, ranks). A rank begins with its part and then takes the others' from the end, skipping what
                they have committed; nobody waits for anybody, so a rank that dies costs its last shard.
            found: told of rows that somebody else has computed meanwhile.
        """
        shards = [list(order[first : first + rows_per_shard]) for first in range(0, len(order), rows_per_shard)]
        begin, end = (len(shards) * part // share[1] for part in (share[0], share[0] + 1))
        computed = 0
        for keys in [*shards[begin:end], *reversed(shards[:begin] + shards[end:])]:
            self.refresh()
            missing = [key for key, place in zip(keys, self.find(keys)[:, 0], strict=True) if place < 0]
            if len(missing) < len(keys):
                found([key for key in keys if key not in set(missing)])
            if missing:
                self.write_shard(missing, compute(missing))
                computed += len(missing)
            failpoint("next shard")
        return computed

    def write_shard(self, keys: Sequence[bytes], token_logps: Sequence[np.ndarray]) -> Path:
        """Commit rows atomically; after this returns they survive a crash of the machine.

        Args:
            keys: one `row_key` per row; at most 65,536 rows.
            token_logps: the completion's per-token log-probabilities of each row, float32, nats.

        Raises:
            CacheError: a value is not finite, or the file cannot be written; then nothing has changed.
        """
        if not 0 < len(keys) <= MAX_ROWS or len(keys) != len(token_logps):
            raise ValueError(f"a shard has 1 to {MAX_ROWS} rows and a key for each: {len(token_logps)}, {len(keys)}")
        values = [np.asarray(row, dtype=np.float32) for row in token_logps]
        for key, row in zip(keys, values, strict=True):
            if len(key) != KEY_BYTES or row.ndim != 1 or len(row) > MAX_ROW_TOKENS:
                raise ValueError(f"row {key.hex()}: a key has {KEY_BYTES} bytes, values are [tokens], not {row.shape}")
            if not np.isfinite(row).all():
                raise CacheError(f"row {key.hex()} has a reference log-probability that is not finite; not cached")
        name, data = encode(keys, values, self._metadata())
        failpoint("encoded")
        with self._writing():
            commit(self.folder / name, data)
            self._left_out.pop(name, None)
            if name not in self._names:
                self._add([self.open_shard(name)])
        failpoint("indexed")
        return self.folder / name

    def open_shard(self, name: str) -> Shard:
        """One shard, its index verified anew. Raises BadShard or OSError."""
        return Shard(self.folder / name, self._metadata())

    def refresh(self) -> None:
        """Take in the shards that others have committed since."""
        try:
            entries = [e for e in os.scandir(self.folder) if SHARD_NAME.fullmatch(e.name) and e.name not in self._names]
        except FileNotFoundError:
            return
        except OSError as error:
            raise CacheError(
                f"cannot read the reference cache {self.folder}: {error}. Choose another cache_dir."
            ) from None
        new = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            try:
                known = self._left_out.get(entry.name)
                if known is None or known.state != _state(entry):
                    new.append(self.open_shard(entry.name))
                    self._left_out.pop(entry.name, None)
            except FileNotFoundError:
                continue  # removed meanwhile
            except (BadShard, OSError) as error:
                self._left_out[entry.name] = _LeftOut(str(error), getattr(error, "damaged", False), _state(entry))
                _warn(entry.path, f"{error}; its rows will be computed again")
            if len(new) == _SHARDS_AT_ONCE:
                self._add(new)
                new = []
        self._add(new)

    def drop_damaged(self, keys: Sequence[bytes]) -> None:
        """Remove shards whose bytes have changed, so that their rows are missing and `build` makes them again.

        Verifies the per-token values of the shards that hold these rows; one with a changed value is removed whole, with a
        warning that names it. Shards that were already left out because their index has changed are removed as well.
        """
        damaged = [self.folder / name for name, left_out in self._left_out.items() if left_out.damaged]
        places = self.find(keys)
        for index in np.unique(places[places[:, 0] >= 0, 0]):
            shard = self.shards[index]
            try:
                shard.verify()
            except FileNotFoundError:
                damaged.append(shard.path)  # only our index still knows it
            except BadShard as error:
                _warn(shard.path, f"{error}; the rows of this shard will be computed again")
                damaged.append(shard.path)
        if damaged:
            with self._writing():
                for path in damaged:
                    path.unlink(missing_ok=True)
            self._left_out = {name: left_out for name, left_out in self._left_out.items() if not left_out.damaged}
            self.shards, self._names, self._index = [], set(), KeyIndex()
            self.refresh()

    def settle(self) -> None:
        """Bring the manifest up to date, with the shards that a killed or concurrent writer has left out of it.

        The last of several writers to settle sees everybody's shards, because it looks again after it has written.
        """
        self.refresh()
        while self._names and self._listed != self._names:
            with self._writing():
                self._write_manifest()
            self.refresh()
        with suppress(OSError):  # a cache on a read-only disk is as good; `prune` sees an older time
            os.utime(self.folder / MANIFEST)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            make_folder(self.folder)
            yield
        except (OSError, BadShard) as error:
            raise CacheError(
                f"cannot write the reference cache {self.folder}: {error}. What it held is still there; free space or "
                "choose another cache_dir, and run again."
            ) from error

    def _metadata(self) -> dict[str, str]:
        return {"bco_fast": f"reference log-probabilities, schema {SCHEMA}", "reference": self.digest}

    def _add(self, shards: Sequence[Shard]) -> None:
        rows, places, sums = [], [], []
        for shard in shards:
            keys, values = shard.take()
            rows.append(keys)
            sums.append(values)
            places.append((len(self.shards) << 32) + np.arange(shard.rows))
            self.shards.append(shard)
            self._names.add(shard.path.name)
        self._index.add(rows, places, sums)

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        try:
            manifest = parse_manifest(read_file(path, MANIFEST_LIMIT), self.digest)
        except FileNotFoundError:
            return
        except (BadShard, OSError, ValueError) as error:
            # Only the plan is lost with it: shards vouch for themselves.
            _warn(path, f"{error}; it will be written anew")
            return
        self.reference = self.reference or ReferenceId(**manifest["reference"])
        self.model_name = manifest["model"]
        self._plan = None if manifest["plan"] is None else FillPlan(**manifest["plan"])
        self._listed = {shard["name"] for shard in manifest["shards"]}

    def _write_manifest(self) -> None:
        if self.reference is None:
            raise CacheError(f"{self.folder} was opened by its name only and is not written to")
        shards = [{"name": s.path.name, "rows": s.rows, "tokens": s.tokens} for s in self.shards]
        manifest = {
            "schema": SCHEMA,
            "model": self.model_name,
            "reference": asdict(self.reference),
            "plan": None if self._plan is None else asdict(self._plan),
            "shards": sorted(shards, key=lambda shard: shard["name"]),
        }
        commit(self.folder / MANIFEST, _render(manifest))
        self._listed = {shard["name"] for shard in shards}


def _state(entry: os.DirEntry) -> tuple[int, int, int]:
    status = entry.stat(follow_symlinks=False)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _warn(path: str | os.PathLike, reason: str) -> None:
    warnings.warn(f"{os.fspath(path)}: {reason}", RuntimeWarning, stacklevel=4)


def _render(manifest: dict) -> bytes:
    """The manifest as JSON, one shard a line, with a checksum of the rest."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in manifest.items() if k != "shards"]
    shards = ",\n".join("  " + json.dumps(shard, sort_keys=True) for shard in manifest["shards"])
    text = ",\n".join([*lines, f' "shards": [\n{shards}\n ]'])
    return f'{{\n{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()


def parse_manifest(data: bytes, digest: str) -> dict:
    """The manifest of the reference with this digest; its content is exactly what `_render` once wrote.

    Raises:
        ValueError: it is not, or it belongs to another reference.
    """
    try:
        manifest = json.loads(data)
        reference = ReferenceId(**manifest["reference"])
        plan = manifest["plan"] and FillPlan(**manifest["plan"])
        checked = {key: value for key, value in manifest.items() if key != "sha256"}
        whole = _render(checked) == data
        names = all(SHARD_NAME.fullmatch(shard["name"]) for shard in manifest["shards"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("it is torn or altered") from None
    if not whole or not names or not isinstance(manifest["model"], str):
        raise ValueError("it is torn or altered")
    if manifest["schema"] != SCHEMA or reference.digest != digest:
        raise ValueError("it belongs to another reference")
    if plan and not (
        type(plan.rows_per_shard) is type(plan.tokens_per_batch) is int and 0 < plan.rows_per_shard <= MAX_ROWS
    ):
        raise ValueError("its plan makes no sense")
    return manifest
