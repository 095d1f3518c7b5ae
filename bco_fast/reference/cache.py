"""Reference log-probabilities on disk: computed once, found again by content.

    <cache_dir>/<reference digest>/manifest.json
                                   shard-<sha256>.safetensors         see shards.py

The key of a row is what the reference model sees: the token ids after truncation and the mask of completion tokens.
Learning rate, loss, order, batch size and the file's path are not in the key, so changing them recomputes nothing.
A folder belongs to one reference: weights, config, dtype, attention. Nothing is pickled.

A shard is written atomically and named by the hash of its content, so a torn, altered or foreign shard is recognised
and left out. Several processes may fill one folder without a lock: equal rows make equal shards of equal names, and
each process looks for the others' shards before it computes one. The manifest says how the rows were cut into batches,
and lists the shards for people to read; shards are found and verified without it.
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
from typing import NamedTuple

import numpy as np

from .. import files
from ..data.keys import KEY_BYTES
from .key_index import KeyIndex
from .shards import MAX_ROW_TOKENS, MAX_ROWS, SHARD_NAME, BadShard, Shard, encode, read_file

SCHEMA = 2
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 8 << 20
_DIGEST = re.compile(r"[0-9a-f]{32}")


class CacheError(RuntimeError):
    """The cache cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ReferenceId:
    """What decides a reference log-probability besides the tokens.

    weights: digest of the weights in use; config: digest of the model's config (rope, softcap, scales); dtype: of the
    computation, autocast included; attention: attention backend.
    """

    weights: str
    config: str
    dtype: str
    attention: str

    @property
    def digest(self) -> str:
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class FillPlan:
    """How rows are cut into batches and shards. An interrupted build that keeps its plan ends with the same bytes.

    rows: distinct rows requested; rows_sha256: of their sorted keys, so that the same request finds its plan again;
    tokens_per_batch: limit on the padded tokens of one forward pass, which a single row may exceed.
    """

    rows: int
    rows_sha256: str
    rows_per_shard: int
    tokens_per_batch: int


def default_cache_dir() -> str:
    """$BCO_FAST_CACHE, or bco_fast/ in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return os.environ.get("BCO_FAST_CACHE") or str(Path(base) / "bco_fast")


class _LeftOut(NamedTuple):
    """A file that cannot be used. `state`: inode, size and time of change, to notice that it has been replaced."""

    reason: str
    damaged: bool
    state: tuple[int, int, int]


class ReferenceCache:
    """The rows of one reference. Opening it verifies the index of every shard; bad ones are left out with a warning.

    Args:
        cache_dir: the folder that holds all references; created when the first shard is written.
        reference: which one; tools that only read may give its digest.

    Attributes:
        model_name: for people who read the manifest; decides nothing.
        plan: of the last build, None if there is none.

    Raises:
        CacheError: the folder exists and cannot be read, is not a folder, or leads outside of cache_dir.
    """

    def __init__(self, cache_dir: str | os.PathLike, reference: ReferenceId | str):
        self.reference = None if isinstance(reference, str) else reference
        self.digest = reference if isinstance(reference, str) else reference.digest
        if not _DIGEST.fullmatch(self.digest):
            raise CacheError(f"{self.digest!r} is not the name of a reference, which is 32 hexadecimal digits")
        self.model_name = ""
        self.plan: FillPlan | None = None
        root = Path(cache_dir).expanduser()
        self.folder = root / self.digest
        if not self.folder.resolve().is_relative_to(root.resolve()):
            raise CacheError(f"{self.folder} leads outside of the cache. Remove that link or choose another cache_dir.")
        self._left_out: dict[str, _LeftOut] = {}
        self._listed: set[str] | None = None  # shards in the manifest, as far as we know
        self._forget()
        self.refresh()
        self._read_manifest()

    def _forget(self) -> None:
        self.shards: list[Shard] = []
        self._names: set[str] = set()
        self._index = KeyIndex()
        self._sums = np.array([np.nan])  # of the rows of all shards, end to end, and last NaN for unknown rows (-1)
        self._starts = np.zeros(1, np.int64)  # number of each shard's first row, and of the next shard's

    def __len__(self) -> int:
        return len(self._index)

    @property
    def problems(self) -> dict[str, str]:
        """Name of each shard that was left out, and why."""
        return {name: left_out.reason for name, left_out in self._left_out.items()}

    def find(self, keys: Sequence[bytes]) -> np.ndarray:  # [K, 2] int64
        """(shard, row) of each key, (-1, -1) where it is not cached."""
        numbers = self._index.find(keys)
        shards = np.searchsorted(self._starts, numbers, side="right") - 1  # -1 where the number is
        return np.stack([shards, np.where(numbers < 0, -1, numbers - self._starts[shards])], axis=1)

    def sums(self, keys: Sequence[bytes]) -> np.ndarray:  # [K] float64
        """Summed completion log-probabilities in nats, NaN where a key is not cached."""
        return self._sums[self._index.find(keys)]

    def token_logps(self, key: bytes) -> np.ndarray:  # [tokens] float32
        """Per-token log-probabilities of one row's completion, read from disk and verified.

        Raises:
            KeyError: the row is not in the cache.
            CacheError: the file has changed since it was written, or is gone.
        """
        number, row = self.find([key])[0]
        if row < 0:
            raise KeyError(f"row {key.hex()} is not in the cache")
        shard = self.shards[number]
        try:
            return next(shard.read([row]))
        except (BadShard, OSError) as error:
            remedy = "Delete that file and run again: its rows will be recomputed."
            raise CacheError(f"{shard.path}: {error}. {remedy}") from None

    def make_plan(self, keys: Sequence[bytes], *, rows_per_shard: int, tokens_per_batch: int) -> FillPlan:
        """The plan to fill these rows by, after writing it into the manifest.

        If a build of the same rows and batches was interrupted it is that build's plan, whatever rows_per_shard it has.
        """
        distinct = sorted(set(keys))
        digest = hashlib.sha256(b"".join(distinct)).hexdigest()
        plan = FillPlan(len(distinct), digest, rows_per_shard, tokens_per_batch)
        if not 0 < rows_per_shard <= MAX_ROWS or tokens_per_batch < 1:
            raise ValueError(f"rows_per_shard must be 1 to {MAX_ROWS}, tokens_per_batch at least 1; not {plan}")
        old = self.plan
        if old is None or old != FillPlan(plan.rows, digest, old.rows_per_shard, tokens_per_batch):
            self.plan = plan
            with self._writing():
                for path in files.stale_files(self.folder):
                    path.unlink(missing_ok=True)
                self._write_manifest()
        return self.plan

    def build(
        self,
        order: Sequence[bytes],
        compute: Callable[[list[bytes]], list[np.ndarray]],
        *,
        rows_per_shard: int,
        share: tuple[int, int] = (0, 1),
        found: Callable[[Sequence[bytes]], None] = lambda keys: None,
    ) -> int:
        """Compute and commit missing rows shard by shard; returns how many were computed here.

        Args:
            order: the keys of all missing rows. Equal orders make equal shards, interrupted or not.
            compute: per-token log-probabilities of the rows with these keys, as for `write_shard`.
            share: (rank, ranks). A rank computes its part first and then the others' parts from the end, skipping what
                they have committed. No rank waits for another, so a rank that dies costs its last shard.
            found: called with the keys of rows that another process has computed in the meantime.
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
            files.failpoint("next shard")
        return computed

    def write_shard(self, keys: Sequence[bytes], token_logps: Sequence[np.ndarray]) -> Path:
        """Write rows atomically; when this returns they survive a crash of the machine.

        Args:
            keys: one `row_key` per row; at most 65,536 rows.
            token_logps: the completion's per-token log-probabilities of each row, float32, nats.

        Raises:
            CacheError: a value is not finite, or the file cannot be written. Nothing has changed then.
        """
        if not 0 < len(keys) <= MAX_ROWS or len(keys) != len(token_logps):
            raise ValueError(f"a shard has 1 to {MAX_ROWS} rows and a key each, not {len(token_logps)} and {len(keys)}")
        values = [np.asarray(row, dtype=np.float32) for row in token_logps]
        for key, row in zip(keys, values, strict=True):
            if len(key) != KEY_BYTES or row.ndim != 1 or len(row) > MAX_ROW_TOKENS:
                raise ValueError(f"row {key.hex()}: a key has {KEY_BYTES} bytes, values are [tokens], not {row.shape}")
            if not np.isfinite(row).all():
                raise CacheError(f"row {key.hex()} has a reference log-probability that is not finite; not cached")
        name, data = encode(keys, values, self._metadata())
        files.failpoint("encoded")
        with self._writing():
            files.write_bytes(self.folder / name, data)
            self._left_out.pop(name, None)
            if name not in self._names:
                self._add([self.open_shard(name)])
        files.failpoint("indexed")
        return self.folder / name

    def open_shard(self, name: str) -> Shard:
        """One shard, its index verified anew. Raises BadShard or OSError."""
        return Shard(self.folder / name, self._metadata())

    def refresh(self) -> None:
        """Add the shards that other processes have committed since the last look."""
        try:
            entries = [e for e in os.scandir(self.folder) if SHARD_NAME.fullmatch(e.name) and e.name not in self._names]
        except FileNotFoundError:
            return
        except OSError as error:
            raise CacheError(f"cannot read the cache {self.folder}: {error}. Choose another cache_dir.") from None
        new, bad = [], {}
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
                bad[entry.path] = f"{error}; its rows will be computed again"
        _warn_of(bad)
        self._add(new)

    def drop_damaged(self, keys: Sequence[bytes]) -> None:
        """Remove shards whose bytes have changed, so that `build` computes their rows again.

        Verifies the per-token values of the shards that hold these rows. A shard with a changed value is removed whole,
        with a warning that names it; so are shards that were left out because their index has changed.
        """
        damaged = [self.folder / name for name, left_out in self._left_out.items() if left_out.damaged]
        places, bad = self.find(keys), {}
        for index in np.unique(places[places[:, 0] >= 0, 0]):
            shard = self.shards[index]
            try:
                shard.verify()
            except FileNotFoundError:
                damaged.append(shard.path)  # only our index still knows it
            except BadShard as error:
                bad[shard.path] = f"{error}; the rows of this shard will be computed again"
                damaged.append(shard.path)
        _warn_of(bad)
        if damaged:
            with self._writing():
                for path in damaged:
                    path.unlink(missing_ok=True)
            self._left_out = {name: left_out for name, left_out in self._left_out.items() if not left_out.damaged}
            self._forget()
            self.refresh()

    def settle(self) -> None:
        """Bring the manifest up to date, including shards of a killed or concurrent writer.

        The last of several writers to settle lists everybody's shards, because it looks again after it has written.
        """
        self.refresh()
        while self._names and self._listed != self._names:
            with self._writing():
                self._write_manifest()
            self.refresh()
        with suppress(OSError):  # on a read-only disk `prune` sees an older time, and all else works
            os.utime(self.folder / MANIFEST)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            files.make_folder(self.folder)
            yield
        except (OSError, BadShard) as error:
            raise CacheError(
                f"cannot write the reference cache {self.folder}: {error}. Its content is unchanged; free space or "
                "choose another cache_dir, and run again."
            ) from error

    def _metadata(self) -> dict[str, str]:
        return {"bco_fast": f"reference log-probabilities, schema {SCHEMA}", "reference": self.digest}

    def _add(self, shards: Sequence[Shard]) -> None:
        if not shards:
            return
        self._index.add(b"".join([shard.keys for shard in shards]))
        self._sums = np.concatenate([self._sums[:-1], *(shard.sums for shard in shards), self._sums[-1:]])
        ends = self._starts[-1] + np.cumsum([shard.rows for shard in shards])
        self._starts = np.append(self._starts, ends)
        self.shards += shards
        self._names.update(shard.path.name for shard in shards)

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        try:
            manifest = _parse_manifest(read_file(path, MANIFEST_LIMIT), self.digest)
        except FileNotFoundError:
            return
        except (BadShard, OSError, ValueError) as error:
            _warn_of(
                {path: f"{error}; it will be written anew"}
            )  # shards are verified without it: only the plan is lost
            return
        self.reference = self.reference or ReferenceId(**manifest["reference"])
        self.model_name = manifest["model"]
        self.plan = None if manifest["plan"] is None else FillPlan(**manifest["plan"])
        self._listed = {shard["name"] for shard in manifest["shards"]}

    def _write_manifest(self) -> None:
        if self.reference is None:
            raise CacheError(f"{self.folder} was opened by its name only, so it cannot be written")
        shards = [{"name": s.path.name, "rows": s.rows, "tokens": s.tokens} for s in self.shards]
        manifest = {
            "schema": SCHEMA,
            "model": self.model_name,
            "reference": asdict(self.reference),
            "plan": None if self.plan is None else asdict(self.plan),
            "shards": sorted(shards, key=lambda shard: shard["name"]),
        }
        files.write_bytes(self.folder / MANIFEST, _render(manifest))
        self._listed = {shard["name"] for shard in shards}


def _state(entry: os.DirEntry) -> tuple[int, int, int]:
    status = entry.stat(follow_symlinks=False)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _warn_of(bad: dict[str | os.PathLike, str]) -> None:
    """One warning, however many files there are."""
    for path, reason in list(bad.items())[:1]:
        others = f" (and so for {len(bad) - 1} other files in that folder)" if len(bad) > 1 else ""
        warnings.warn(f"{os.fspath(path)}: {reason}{others}", RuntimeWarning, stacklevel=4)


def _render(manifest: dict) -> bytes:
    """The manifest as JSON, one shard a line, with a checksum of the rest."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in manifest.items() if k != "shards"]
    shards = ",\n".join("  " + json.dumps(shard, sort_keys=True) for shard in manifest["shards"])
    text = ",\n".join([*lines, f' "shards": [\n{shards}\n ]'])
    return f'{{\n{text},\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'.encode()


def _parse_manifest(data: bytes, digest: str) -> dict:
    """The manifest of the reference with this digest. Raises ValueError unless `_render` wrote exactly these bytes."""
    try:
        manifest = json.loads(data)
        reference = ReferenceId(**manifest["reference"])
        plan = manifest["plan"] and FillPlan(**manifest["plan"])
        whole = _render({key: value for key, value in manifest.items() if key != "sha256"}) == data
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
        raise ValueError("its plan is invalid")
    return manifest
