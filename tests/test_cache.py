"""The reference cache: found by content, committed whole or not at all, never trusted further than its hash."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from bco_fast import CacheError, ReferenceCache
from bco_fast.cache import MANIFEST, ReferenceId, row_key

REFERENCE = ReferenceId(weights="w", config="c", dtype="float32", attention="sdpa")


def _rows(n, seed=0):
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(n)]
    return keys, [rng.normal(-2, 1, rng.integers(1, 9)).astype(np.float32) for _ in range(n)]


def _filled(tmp_path, n=20):
    keys, values = _rows(n)
    cache = ReferenceCache(tmp_path, REFERENCE)
    cache.make_plan(keys, rows_per_shard=8, tokens_per_batch=64)
    for i in range(0, n, 8):
        cache.write_shard(keys[i : i + 8], values[i : i + 8])
    return cache, keys, values


def test_what_is_written_is_found(tmp_path):
    cache, keys, values = _filled(tmp_path)
    for opened in (cache, ReferenceCache(tmp_path, REFERENCE)):
        assert len(opened) == 20
        assert np.array_equal(opened.sums(keys), [v.sum(dtype=np.float64) for v in values])
        for key, value in zip(keys, values, strict=True):
            assert np.array_equal(opened.token_logps(key), value)
        unknown = b"\0" * 16
        assert np.isnan(opened.sums([unknown, keys[0]])[0])
        with pytest.raises(KeyError):
            opened.token_logps(unknown)


def test_keys_depend_on_content_alone():
    ids, mask = np.array([5, 6, 7, 8]), np.array([False, False, True, True])
    key = row_key(ids, mask)
    assert len(key) == 16
    for same in (
        row_key(ids.astype(np.int32), mask),
        row_key(ids[::1].copy(), mask.copy()),
        row_key(list(ids), list(mask)),
    ):
        assert same == key
    others = [
        row_key(np.array([5, 6, 7, 9]), mask),  # one token
        row_key(ids, np.array([False, True, True, True])),  # the mask
        row_key(ids[:3], mask[:3]),  # truncation
        row_key(np.array([0, 5, 6, 7, 8]), np.array([False, *mask])),  # padding is not content, a token is
        row_key(ids[[1, 0, 2, 3]], mask),
    ]
    assert len({key, *others}) == 6
    with pytest.raises(ValueError, match="must both be"):
        row_key(ids, mask[:2])


def test_each_reference_has_its_folder(tmp_path):
    _filled(tmp_path)
    for change in ("weights", "config", "dtype", "attention"):
        other = ReferenceCache(tmp_path, replace(REFERENCE, **{change: "another"}))
        assert len(other) == 0


def test_equal_rows_make_equal_files_and_repeats_are_harmless(tmp_path):
    first, _, _ = _filled(tmp_path / "a")
    second, _, _ = _filled(tmp_path / "b")
    third, _, _ = _filled(tmp_path / "a")
    folders = [{p.name: p.read_bytes() for p in c.folder.iterdir()} for c in (first, second, third)]
    assert folders[0] == folders[1] == folders[2]
    assert len(folders[0]) == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "append", "empty"])
def test_a_damaged_shard_is_left_out_and_named(tmp_path, damage):
    cache, keys, values = _filled(tmp_path)
    shard = sorted(cache.folder.glob("shard-*"))[0]
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[-3] ^= 1  # one bit of a log-probability
    shard.write_bytes({"flip": data, "truncate": data[:-1], "append": data + b"x", "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=shard.name):
        damaged = ReferenceCache(tmp_path, REFERENCE)
    assert 0 < len(damaged) < 20
    sums = damaged.sums(keys)
    whole = np.array([v.sum(dtype=np.float64) for v in values])
    assert np.array_equal(sums[~np.isnan(sums)], whole[~np.isnan(sums)])
    missing = np.isnan(sums)
    damaged.write_shard(
        [k for k, m in zip(keys, missing, strict=True) if m], [v for v, m in zip(values, missing, strict=True) if m]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(ReferenceCache(tmp_path, REFERENCE).sums(keys), whole)


def test_every_flipped_bit_is_noticed(tmp_path):
    cache, keys, _ = _filled(tmp_path, n=3)
    (shard,) = cache.folder.glob("shard-*")
    data = shard.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(data) * 8, 300, replace=False):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << (bit % 8)
        shard.write_bytes(changed)
        with pytest.warns(RuntimeWarning):
            assert np.isnan(ReferenceCache(tmp_path, REFERENCE).sums(keys)).all()


def test_a_shard_of_another_reference_is_left_out(tmp_path):
    ours, _keys, _ = _filled(tmp_path)
    other = ReferenceCache(tmp_path, replace(REFERENCE, weights="another"))
    path = other.write_shard(*_rows(4, seed=9))
    os.replace(path, ours.folder / path.name)
    with pytest.warns(RuntimeWarning, match="another reference"):
        assert len(ReferenceCache(tmp_path, REFERENCE)) == 20


def test_a_symlinked_shard_is_left_out(tmp_path):
    ours, _, _ = _filled(tmp_path)
    shard = sorted(ours.folder.glob("shard-*"))[0]
    outside = tmp_path / "elsewhere"
    os.replace(shard, outside)
    shard.symlink_to(outside)
    with pytest.warns(RuntimeWarning, match="regular file"):
        assert len(ReferenceCache(tmp_path, REFERENCE)) < 20


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 99}', '{"schema": 1, "reference": {}, "plan": null}', "[" * 100_000]
)
def test_a_broken_manifest_costs_only_the_plan(tmp_path, text):
    cache, keys, _ = _filled(tmp_path)
    (cache.folder / MANIFEST).write_text(text)
    with pytest.warns(RuntimeWarning, match=MANIFEST):
        opened = ReferenceCache(tmp_path, REFERENCE)
    assert len(opened) == 20
    opened.make_plan(keys, rows_per_shard=8, tokens_per_batch=64)
    assert json.loads((cache.folder / MANIFEST).read_text())["plan"]["rows"] == 20


def test_a_lost_manifest_is_written_again_from_the_shards(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    before = (cache.folder / MANIFEST).read_bytes()
    (cache.folder / MANIFEST).unlink()
    ReferenceCache(tmp_path, REFERENCE).make_plan(keys, rows_per_shard=8, tokens_per_batch=64)
    assert (cache.folder / MANIFEST).read_bytes() == before


def test_a_shard_that_the_manifest_misses_is_adopted(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    whole = (cache.folder / MANIFEST).read_bytes()
    manifest = json.loads(whole)
    manifest["shards"].pop()
    (cache.folder / MANIFEST).write_text(json.dumps(manifest))
    opened = ReferenceCache(tmp_path, REFERENCE)
    assert not np.isnan(opened.sums(keys)).any()
    opened.settle()
    assert (cache.folder / MANIFEST).read_bytes() == whole


def test_the_manifest_lists_every_shard(tmp_path):
    cache, _, values = _filled(tmp_path)
    manifest = json.loads((cache.folder / MANIFEST).read_text())
    assert manifest["reference"]["attention"] == "sdpa"
    assert sum(s["rows"] for s in manifest["shards"]) == 20
    assert sum(s["tokens"] for s in manifest["shards"]) == sum(map(len, values))
    assert {s["name"] for s in manifest["shards"]} == {p.name for p in cache.folder.glob("shard-*")}


def test_the_interrupted_plan_is_taken_up_again(tmp_path):
    _cache, keys, _ = _filled(tmp_path)
    again = ReferenceCache(tmp_path, REFERENCE)
    assert again.make_plan(list(reversed(keys)), rows_per_shard=99, tokens_per_batch=9).rows_per_shard == 8
    assert again.make_plan(keys[:-1], rows_per_shard=99, tokens_per_batch=9).rows_per_shard == 99


def test_values_that_are_not_finite_are_refused(tmp_path):
    cache = ReferenceCache(tmp_path, REFERENCE)
    with pytest.raises(CacheError, match="not finite"):
        cache.write_shard([b"k" * 16], [np.array([np.nan], dtype=np.float32)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failing_disk_leaves_old_or_new_and_no_temporary_file(tmp_path, monkeypatch, call):
    cache, _keys, _ = _filled(tmp_path)
    before = {p.name: p.read_bytes() for p in cache.folder.iterdir()}

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    if call == "write":
        real = open

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def write(self, data):
                self.file.write(data[: len(data) // 2])
                fail()

        monkeypatch.setattr("builtins.open", lambda *a, **k: Full(real(*a, **k)))
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        cache.write_shard(*_rows(5, seed=3))
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in cache.folder.iterdir()} == before
    assert len(ReferenceCache(tmp_path, REFERENCE)) == 20


KILLED = """
import os, sys, numpy as np
from bco_fast import cache as module
from bco_fast.cache import ReferenceCache, ReferenceId
calls = 0
def dying(name):
    real = getattr(os, name)
    def call(*a, **k):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
        return real(*a, **k)
    return call
for name in ("fsync", "replace", "open", "close"):
    setattr(os, name, dying(name))
rng = np.random.default_rng(0)
cache = ReferenceCache(sys.argv[1], ReferenceId("w", "c", "float32", "sdpa"))
keys = [rng.bytes(16) for _ in range(12)]
values = [rng.normal(-2, 1, 5).astype(np.float32) for _ in range(12)]
cache.make_plan(keys, rows_per_shard=4, tokens_per_batch=64)
for i in range(0, 12, 4):
    if cache.find(keys[i : i + 4])[0, 0] < 0:
        cache.write_shard(keys[i : i + 4], values[i : i + 4])
cache.settle()
"""


def test_killed_at_any_step_of_a_commit_it_ends_with_the_same_bytes(tmp_path):
    def run(folder, step):
        return subprocess.run([sys.executable, "-c", KILLED, folder, str(step)], capture_output=True, text=True)

    def content(folder):
        return {p.name: p.read_bytes() for p in (folder / REFERENCE.digest).iterdir() if not p.name.startswith(".")}

    assert run(tmp_path / "whole", 0).returncode == 0
    whole = content(tmp_path / "whole")
    assert len(whole) == 4
    for step in range(1, 36, 3):
        folder = tmp_path / f"killed{step}"
        assert run(folder, step).returncode == -9
        second = run(folder, 0)
        assert second.returncode == 0, second.stderr
        assert "Warning" not in second.stderr
        assert content(folder) == whole


def test_a_folder_that_is_a_file_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / REFERENCE.digest).write_text("not a folder")
    with pytest.raises(CacheError, match="cache_dir"):
        ReferenceCache(tmp_path, REFERENCE)
