"""Reference log-probabilities on disk: computed once, found again by content.

    <cache_dir>/<reference digest>/manifest.json
                                   shard-<sha256 of its bytes>.safetensors

A row is keyed by what the reference model saw: the token ids after truncation and the mask of completion tokens.
Learning rate, loss, order, batch size or the file's path are not in the key, so changing them computes nothing again.
A folder belongs to one reference: weights, config, dtype, attention. Nothing here is pickled.

A shard appears under its name only when it is whole (temporary file, fsync, rename, fsync of the folder), and its
name is the hash of its bytes, so a torn, altered or foreign shard is recognised and left out. Several processes may
fill one folder: equal shards have equal names, and a shard that the manifest misses is adopted when it is found.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

SCHEMA = 1
KEY_BYTES = 16
MANIFEST = "manifest.json"
_SHARD = re.compile(r"shard-([0-9a-f]{64})\.safetensors")
_COLUMNS = {"keys": np.uint8, "sum_logps": np.float64, "offsets": np.int64, "token_logps": np.float32}


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


def row_key(
    token_ids: np.ndarray,  # [T] integers
    completion_mask: np.ndarray,  # [T] bool
) -> bytes:
    """128-bit content hash of one row: the ids after truncation, and which of them are completion."""
    ids = np.ascontiguousarray(token_ids, dtype="<i8")
    mask = np.asarray(completion_mask, dtype=bool)
    if ids.ndim != 1 or ids.shape != mask.shape:
        raise ValueError(f"token_ids {ids.shape} and completion_mask {mask.shape} must both be [T]")
    content = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=KEY_BYTES, person=b"bco_fast.row.v1")
    content.update(ids.tobytes())
    content.update(np.packbits(mask).tobytes())
    return content.digest()


class ReferenceCache:
    """The rows of one reference. Opening it reads and verifies every shard; bad ones are left out with a warning.

    Args:
        cache_dir: the folder that holds all references; created when the first shard is written.
        reference: which one.

    Raises:
        CacheError: the folder exists and cannot be read, or is not a folder.
    """

    def __init__(self, cache_dir: str | os.PathLike, reference: ReferenceId):
        self.reference = reference
        self.folder = Path(cache_dir).expanduser() / reference.digest
        self._keys = np.empty(0, dtype=f"S{KEY_BYTES}")  # sorted
        self._places = np.empty((0, 2), dtype=np.int64)  # shard, row; in the order of _keys
        self._shards: list[_Shard] = []
        self._plan: FillPlan | None = None
        self._listed: set[str] = set()
        self._load()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def plan(self) -> FillPlan | None:
        return self._plan

    def find(self, keys: Sequence[bytes]) -> np.ndarray:  # [K, 2]
        """(shard, row) of each key, (-1, -1) where it is not cached."""
        wanted = np.frombuffer(b"".join(keys), dtype=f"S{KEY_BYTES}") if len(keys) else self._keys[:0]
        if not len(self._keys):
            return np.full((len(wanted), 2), -1, dtype=np.int64)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where((self._keys[at] == wanted)[:, None], self._places[at], -1)

    def sums(self, keys: Sequence[bytes]) -> np.ndarray:  # [K] float64
        """Summed completion log-probabilities in nats, NaN where a key is not cached."""
        places = self.find(keys)
        out = np.full(len(places), np.nan)
        for index, shard in enumerate(self._shards):
            here = places[:, 0] == index
            out[here] = shard.sum_logps[places[here, 1]]
        return out

    def token_logps(self, key: bytes) -> np.ndarray:  # [tokens] float32
        """Per-token log-probabilities of one row's completion, read from disk."""
        shard, row = self.find([key])[0]
        if shard < 0:
            raise KeyError(f"row {key.hex()} is not in the cache")
        return self._shards[shard].token_logps(int(row))

    def make_plan(self, keys: Sequence[bytes], *, rows_per_shard: int, tokens_per_batch: int) -> FillPlan:
        """The plan to fill these rows by, written into the manifest first: the interrupted one if they are its rows."""
        distinct = sorted(set(keys))
        plan = FillPlan(len(distinct), hashlib.sha256(b"".join(distinct)).hexdigest(), rows_per_shard, tokens_per_batch)
        if self._plan is None or (self._plan.rows, self._plan.rows_sha256) != (plan.rows, plan.rows_sha256):
            self._plan = plan
            self._write_manifest()
        return self._plan

    def settle(self) -> None:
        """List shards that a killed or concurrent writer committed without reaching the manifest."""
        if self._listed != {shard.path.name for shard in self._shards}:
            self._write_manifest()

    def write_shard(self, keys: Sequence[bytes], token_logps: Sequence[np.ndarray]) -> Path:
        """Commit rows atomically; after this returns they survive a crash of the machine.

        Args:
            keys: one `row_key` per row.
            token_logps: the completion's per-token log-probabilities of each row, float32, nats.
        """
        if not keys or len(keys) != len(token_logps):
            raise ValueError(f"a shard needs as many rows as keys, and at least one: {len(token_logps)}, {len(keys)}")
        values = [np.asarray(row, dtype=np.float32) for row in token_logps]
        for key, row in zip(keys, values, strict=True):
            if not np.isfinite(row).all():
                raise CacheError(f"row {key.hex()} has a reference log-probability that is not finite; not cached")
        tensors = {
            "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, KEY_BYTES),
            "sum_logps": np.array([row.sum(dtype=np.float64) for row in values]),
            "offsets": np.cumsum([0, *map(len, values)], dtype=np.int64),
            "token_logps": np.concatenate(values),
        }
        # One metadata entry: safetensors writes several in no fixed order, and equal rows must give equal bytes.
        data = save(tensors, metadata={"bco_fast": self._metadata()})
        path = self.folder / f"shard-{hashlib.sha256(data).hexdigest()}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        _commit(path, data)
        self._add(_Shard(path, self._metadata()))
        self._write_manifest()
        return path

    def _metadata(self) -> str:
        return json.dumps({"schema": SCHEMA, "reference": self.reference.digest}, sort_keys=True)

    def _add(self, shard: _Shard) -> None:
        if any(shard.path == known.path for known in self._shards):
            return
        rows = len(shard.keys)
        places = np.stack([np.full(rows, len(self._shards)), np.arange(rows)], axis=1)
        self._shards.append(shard)
        keys = np.concatenate([self._keys, shard.keys])
        self._keys, first = np.unique(keys, return_index=True)
        self._places = np.concatenate([self._places, places])[first]

    def _load(self) -> None:
        if not self.folder.exists():
            return
        try:
            names = sorted(entry.name for entry in os.scandir(self.folder) if _SHARD.fullmatch(entry.name))
        except OSError as error:
            raise CacheError(
                f"cannot read the reference cache {self.folder}: {error}. Choose another cache_dir."
            ) from None
        for name in names:
            path = self.folder / name
            try:
                self._add(_Shard(path, self._metadata()))
            except (_BadShard, OSError) as error:
                warnings.warn(f"{path}: {error}; its rows will be computed again", RuntimeWarning, stacklevel=3)
        self._read_manifest()

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            return
        try:
            manifest = json.loads(path.read_text())
            if manifest["schema"] != SCHEMA or manifest["reference"] != asdict(self.reference):
                raise ValueError("it belongs to another reference")
            self._plan = None if manifest["plan"] is None else FillPlan(**manifest["plan"])
            self._listed = {str(shard["name"]) for shard in manifest["shards"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            # Only the plan is lost with it: shards vouch for themselves.
            warnings.warn(f"{path}: {error}; it will be written anew", RuntimeWarning, stacklevel=4)

    def _write_manifest(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = [
            {
                "name": shard.path.name,
                "sha256": _SHARD.fullmatch(shard.path.name)[1],
                "rows": len(shard.keys),
                "tokens": shard.tokens,
            }
            for shard in sorted(self._shards, key=lambda shard: shard.path.name)
        ]
        manifest = {
            "schema": SCHEMA,
            "reference": asdict(self.reference),
            "plan": None if self._plan is None else asdict(self._plan),
            "shards": shards,
        }
        _commit(self.folder / MANIFEST, (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
        self._listed = {shard["name"] for shard in shards}


class _BadShard(Exception):
    pass


class _Shard:
    """One verified file. Sums and keys are in memory, per-token values stay on disk."""

    def __init__(self, path: Path, metadata: str):
        self.path = path
        if path.is_symlink() or not path.is_file():
            raise _BadShard("it is not a regular file")
        if _sha256(path) != _SHARD.fullmatch(path.name)[1]:
            raise _BadShard("its content does not match its name")
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("bco_fast") != metadata:
                    raise _BadShard("it belongs to another reference")
                keys, self.sum_logps, self.offsets = (file.get_tensor(n) for n in ("keys", "sum_logps", "offsets"))
                self.tokens = file.get_slice("token_logps").get_shape()[0]
        except (SafetensorError, OSError, ValueError, IndexError) as error:
            raise _BadShard(f"it cannot be read ({error})") from None
        rows = len(keys)
        if (
            any(t.dtype != _COLUMNS[n] for n, t in (("keys", keys), ("sum_logps", self.sum_logps)))
            or keys.shape != (rows, KEY_BYTES)
            or self.sum_logps.shape != (rows,)
            or self.offsets.shape != (rows + 1,)
            or self.offsets.dtype != _COLUMNS["offsets"]
            or (self.offsets[0], self.offsets[-1]) != (0, self.tokens)
            or (np.diff(self.offsets) < 0).any()
            or not np.isfinite(self.sum_logps).all()
        ):
            raise _BadShard("its tables do not fit together")
        self.keys = np.ascontiguousarray(keys).view(f"S{KEY_BYTES}")[:, 0]

    def token_logps(self, row: int) -> np.ndarray:
        with safe_open(self.path, framework="numpy") as file:
            return file.get_slice("token_logps")[int(self.offsets[row]) : int(self.offsets[row + 1])]


def _sha256(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def _commit(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, it is there whole or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
