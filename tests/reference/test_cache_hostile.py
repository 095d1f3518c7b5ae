"""What a cache finds on disk is never trusted: mutated, swapped, foreign and hostile files (C1, Security)."""

import hashlib
import json
import os
import pickle
import tempfile
import time
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bco_fast import CacheError, ReferenceCache
from bco_fast.reference import shards as _shards
from bco_fast.reference.cache import MANIFEST, MANIFEST_LIMIT, ReferenceId, _render

REFERENCE = ReferenceId(weights="w", config="c", dtype="float32", attention="sdpa")


def _filled(folder, reference=REFERENCE, seed=0):
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(4)]
    values = {key: rng.normal(-2, 1, rng.integers(1, 9)).astype(np.float32) for key in keys}
    cache = ReferenceCache(folder, reference)
    cache.make_plan(keys, rows_per_shard=3, tokens_per_batch=64)
    cache.build(keys, lambda some: [values[key] for key in some], rows_per_shard=3)
    cache.settle()
    return cache, values


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Mutants:
    """Damaged versions of a file: what broken disks, broken copies and people do, and what an attacker would try."""

    def __init__(self, files: dict[str, bytes], foreign: dict[str, bytes]):
        self.rng = np.random.default_rng(0)
        self.files, self.foreign = files, foreign
        self.kinds = [self.flip, self.cut, self.insert, self.delete, self.zero, self.repeat, self.swap, self.number]

    def make(self) -> dict[str, bytes]:
        """Files to write over the good ones."""
        name = str(self.rng.choice(list(self.files)))
        kind = self.kinds[self.rng.integers(len(self.kinds))]
        return kind(name, bytearray(self.files[name]))

    def at(self, data):
        return int(self.rng.integers(len(data)))

    def flip(self, name, data):
        for _ in range(self.rng.integers(1, 4)):
            data[self.at(data)] ^= 1 << int(self.rng.integers(8))
        return {name: data}

    def cut(self, name, data):
        return {name: data[: self.at(data)]}

    def insert(self, name, data):
        at = self.at(data)
        return {name: data[:at] + self.rng.bytes(self.rng.integers(1, 9)) + data[at:]}

    def delete(self, name, data):
        at = self.at(data)
        return {name: data[:at] + data[at + int(self.rng.integers(1, 9)) :]}

    def zero(self, name, data):
        at = self.at(data)
        return {name: data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]}

    def repeat(self, name, data):
        """A block of the same length from elsewhere in the file."""
        at, other, size = self.at(data), self.at(data), int(self.rng.integers(1, 65))
        block = data[other : other + size]
        return {name: data[:at] + block + data[at + len(block) :]}

    def swap(self, name, data):
        """Content of another file of here, or a file of another reference under its own name or ours."""
        there = self.foreign if self.rng.integers(2) else self.files
        other = str(self.rng.choice(list(there)))
        if there is self.files:
            return {name: there[other], other: data}
        return {(other if self.rng.integers(2) else name): there[other]}

    def number(self, name, data):
        """A digit of the JSON, in the header of a shard or in the manifest."""
        digits = [i for i, byte in enumerate(data[:600]) if chr(byte).isdigit()]
        data[self.rng.choice(digits)] = ord(str(self.rng.integers(10)))
        return {name: data}


def _plainly(folder, files, rounds=300):
    """Processor seconds to write a folder's files, list them and read them again, with nothing looked at."""
    begin = time.process_time()
    for _ in range(rounds):
        for name, data in files.items():
            (folder / name).write_bytes(data)
        for name in os.listdir(folder):
            (folder / name).read_bytes()
    return (time.process_time() - begin) / rounds


@pytest.mark.parametrize("mutants", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_mutant_is_accepted_with_a_changed_value(mutants):
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as root:  # noqa: S108
        cache, values = _filled(root)
        other, _ = _filled(Path(root) / "other", replace(REFERENCE, weights="another"), seed=1)
        files, keys = _content(cache.folder), list(values)
        whole = np.array([values[key].sum(dtype=np.float64) for key in keys])
        make = Mutants(files, _content(other.folder))
        accepted = noticed = 0
        begin = time.process_time()
        for number in range(mutants):
            changed = make.make()
            for name, data in changed.items():
                (cache.folder / name).write_bytes(data)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                opened = ReferenceCache(root, REFERENCE)  # may warn, may not raise
                sums = opened.sums(keys)
                assert ((sums == whole) | np.isnan(sums)).all(), (number, changed)
                refused = 0
                for key, there in zip(keys, ~np.isnan(sums), strict=True):
                    if there:
                        try:
                            accepted += np.array_equal(opened.token_logps(key), values[key])
                        except CacheError:
                            refused += 1
                noticed += bool(said or refused)
                if number % 20 == 0:  # and the next fill mends it
                    opened.drop_damaged(keys)
                    missing = [key for key in keys if np.isnan(opened.sums([key])[0])]
                    opened.build(missing, lambda some: [values[key] for key in some], rows_per_shard=3)
                    for key in keys:
                        assert np.array_equal(opened.token_logps(key), values[key])
            for name in changed.keys() - files.keys():
                (cache.folder / name).unlink(missing_ok=True)
            for name in (changed.keys() & files.keys()) if number % 20 else os.listdir(cache.folder):
                if name in files:
                    (cache.folder / name).write_bytes(files[name])
                else:
                    (cache.folder / name).unlink()
            for name in files.keys() - set(os.listdir(cache.folder)):
                (cache.folder / name).write_bytes(files[name])
        seconds = time.process_time() - begin
        plainly = _plainly(cache.folder, files)
    print(f"{mutants} mutants in {seconds:.1f} s, {noticed} noticed, {accepted} unchanged rows read")
    assert noticed > mutants * 0.9  # the others wrote what was there before
    assert accepted > mutants  # rows that were not touched stay usable
    assert seconds < 20 * mutants * plainly  # 8 to 12 times on an AMD EPYC, where 100,000 take 93 s


def _shard(header, body=b"", length=None):
    """A shard whose name fits its content, so that only what it says can give it away. -> {name: content}"""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    data = (len(text) if length is None else length).to_bytes(8, "little") + text + body
    return {f"shard-{hashlib.sha256(data[: len(data) - len(body)]).hexdigest()}.safetensors": data}


def _genuine(change):
    """A shard of three rows and six tokens that somebody has changed; its name fits."""
    metadata = ReferenceCache("unused", REFERENCE)._metadata()
    _, data = _shards.encode([bytes([i]) * 16 for i in range(3)], [np.ones(2, np.float32)] * 3, metadata)
    data = change(data)
    return {f"shard-{hashlib.sha256(data[:-24]).hexdigest()}.safetensors": data}


def _with_offsets(offsets):
    def change(data):
        start = 8 + int.from_bytes(data[:8], "little")
        return data[: start + 24] + np.array(offsets, "<i8").tobytes() + data[start + 56 :]

    return _genuine(change)


def _table(rows=1, tokens=1):
    sizes = {
        "sum_logps": 8 * rows,
        "offsets": 8 * rows + 8,
        "keys": 16 * rows,
        "digests": 8 * rows,
        "token_logps": 4 * tokens,
    }
    shapes = {
        "sum_logps": [rows],
        "offsets": [rows + 1],
        "keys": [rows, 16],
        "digests": [rows, 8],
        "token_logps": [tokens],
    }
    return {n: {"dtype": "F64", "shape": shapes[n], "data_offsets": [0, sizes[n]]} for n in sizes}


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


HOSTILE_SHARDS = {
    "a header of 2^63 bytes": lambda: _shard(b"{}", length=(1 << 63) + 1),
    "a header of 2^64 - 1 bytes": lambda: _shard(b"{}", length=(1 << 64) - 1),
    "a header of 100 MB": lambda: _shard(b"[" * 100_000_000),
    "a nested header": lambda: _shard(b"[" * 4000),
    "not a header": lambda: _shard(b"\xff" * 64),
    "negative offsets": lambda: _genuine(lambda data: data.replace(b"[24,56]", b"[-4,56]")),
    "overlapping offsets": lambda: _genuine(lambda data: data.replace(b"[24,56]", b"[16,48]")),
    "2^60 rows": lambda: _shard(_table(rows=1 << 60)),
    "-1 rows": lambda: _shard(_table(rows=-1)),
    "2^62 tokens": lambda: _shard(_table(tokens=1 << 62)),
    "true rows": lambda: _shard({"keys": {"shape": [True, 16]}, "token_logps": {"shape": [1]}}),
    "a list for a table": lambda: _shard([1, 2, 3]),
    "rows that go backwards": lambda: _with_offsets([0, 4, 2, 6]),
    "rows before the values": lambda: _with_offsets([-6, 0, 2, 6]),
    "rows past the end": lambda: _with_offsets([0, 2, 4, 1 << 40]),
    "a pickle": lambda: _shard(pickle.dumps(Bomb())),
    "only a pickle": lambda: {f"shard-{'a' * 64}.safetensors": pickle.dumps(Bomb())},
}


@pytest.fixture
def good(tmp_path, monkeypatch):
    """A cache that is well, and its values."""
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    return _filled(tmp_path / "cache")


def _opened(cache, values, named):
    """Open the cache beside something hostile: one warning that names it, the good rows, little memory, no code run."""
    tracemalloc.start()
    with pytest.warns(RuntimeWarning, match=named) as warned:
        opened = ReferenceCache(cache.folder.parent, REFERENCE)
    for key, value in values.items():
        assert np.array_equal(opened.token_logps(key), value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 << 20
    assert len(warned) == 1
    assert len(opened) == len(values)
    assert not Path(os.environ["BOMB"]).exists()
    return opened


@pytest.mark.parametrize("kind", HOSTILE_SHARDS)
def test_a_hostile_shard_is_left_out(good, kind):
    ((name, data),) = HOSTILE_SHARDS[kind]().items()
    (good[0].folder / name).write_bytes(data)
    _opened(*good, named=name)


@pytest.mark.parametrize("kind", ["symlink", "dangling symlink", "pipe", "folder", "a terabyte"])
def test_what_is_not_a_regular_shard_is_left_out(good, tmp_path, kind):
    path = good[0].folder / f"shard-{'b' * 64}.safetensors"
    if kind == "symlink":
        outside = tmp_path / "outside"
        outside.write_bytes(next(path.parent.glob("shard-*")).read_bytes())
        path.symlink_to(outside)
    elif kind == "dangling symlink":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.write(_shards._header(1, 1 << 38, {}))
            file.truncate(1 << 40)
    _opened(*good, named=path.name)


def _manifest(**changes):
    plan = {"rows": 4, "rows_sha256": "0" * 64, "rows_per_shard": 3, "tokens_per_batch": 64}
    reference = {"weights": "w", "config": "c", "dtype": "float32", "attention": "sdpa"}
    return _render({"schema": 2, "model": "", "reference": reference, "plan": plan, "shards": [], **changes})


HOSTILE_MANIFESTS = {
    "a name above the folder": lambda: _manifest(shards=[{"name": "../x", "rows": 1, "tokens": 1}]),
    "an absolute name": lambda: _manifest(shards=[{"name": "/etc/x", "rows": 1, "tokens": 1}]),
    "a name that is a number": lambda: _manifest(shards=[{"name": 7}]),
    "nested": lambda: b"[" * 100_000,
    "nested objects": lambda: b'{"a":' * 100_000,
    "many small objects": lambda: b"[" + b"{}," * (MANIFEST_LIMIT // 3 - 1) + b"{}]",
    "100 MB": lambda: b" " * 100_000_000,
    "a plan of no rows": lambda: _manifest(
        plan={"rows": 4, "rows_sha256": "", "rows_per_shard": 0, "tokens_per_batch": 1}
    ),
    "a plan of text": lambda: _manifest(
        plan={"rows": 4, "rows_sha256": "", "rows_per_shard": "3", "tokens_per_batch": 1}
    ),
    "a model that is none": lambda: _manifest(model={"a": 1}),
    "another reference": lambda: _manifest(reference={"weights": "x", "config": "c", "dtype": "d", "attention": "a"}),
    "not a number": lambda: _manifest().replace(b"64", b"NaN"),
    "a pickle": lambda: pickle.dumps(Bomb()),
}


@pytest.mark.parametrize("kind", HOSTILE_MANIFESTS)
def test_a_hostile_manifest_is_ignored(good, kind):
    (good[0].folder / MANIFEST).write_bytes(HOSTILE_MANIFESTS[kind]())
    assert _opened(*good, named=MANIFEST).plan is None


@pytest.mark.parametrize("kind", ["symlink", "pipe", "folder"])
def test_a_manifest_that_is_no_file_is_not_followed(good, tmp_path, kind):
    path = good[0].folder / MANIFEST
    outside = tmp_path / "outside"
    os.replace(path, outside)
    {"symlink": lambda: path.symlink_to(outside), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    opened = _opened(*good, named=MANIFEST)
    before = outside.read_bytes()
    if kind == "folder":
        with pytest.raises(CacheError, match="cannot write"):
            opened.settle()
    else:
        opened.settle()
        assert path.is_file()
        assert not path.is_symlink()
    assert outside.read_bytes() == before
