"""The reference cache: found by content, committed whole or not at all, never trusted further than its hash."""

import hashlib
import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from bco_fast import CacheError, ReferenceCache, files
from bco_fast.data.keys import row_key
from bco_fast.reference.cache import MANIFEST, MANIFEST_LIMIT, ReferenceId
from bco_fast.reference.key_index import KeyIndex

REFERENCE = ReferenceId(weights="w", config="c", dtype="float32", attention="sdpa")


def _rows(n, seed=0):
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(n)]
    return keys, [rng.normal(-2, 1, rng.integers(1, 9)).astype(np.float32) for _ in range(n)]


def _flipped(data, position, bit=1):
    changed = bytearray(data)
    changed[position] ^= bit
    return bytes(changed)


def _content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _filled(tmp_path, n=20):
    keys, values = _rows(n)
    cache = ReferenceCache(tmp_path, REFERENCE)
    cache.make_plan(keys, rows_per_shard=8, tokens_per_batch=64)
    by_key = dict(zip(keys, values, strict=True))
    missing = [key for key, shard in zip(keys, cache.find(keys)[:, 0], strict=True) if shard < 0]
    cache.build(missing, lambda some: [by_key[key] for key in some], rows_per_shard=8)
    cache.settle()
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


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path):
    cache, keys, values = _filled(tmp_path, n=5)
    (path,) = cache.folder.glob("shard-*")
    table = load_file(path)
    assert table["keys"].tobytes() == b"".join(keys)
    assert np.array_equal(table["token_logps"], np.concatenate(values))
    assert np.array_equal(table["offsets"], np.cumsum([0, *map(len, values)]))
    assert np.array_equal(table["sum_logps"], [v.sum(dtype=np.float64) for v in values])
    assert len(path.read_bytes()) % 4 == 0
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["reference"] == REFERENCE.digest


def test_the_format_on_disk_has_not_changed(tmp_path):
    """The bytes of a small cache, as the first version with this schema wrote them: both read each other's files."""
    keys = [bytes([i]) * 16 for i in range(5)]
    values = {key: -np.arange(1, 2 + i, dtype=np.float32) / 4 for i, key in enumerate(keys)}
    cache = ReferenceCache(tmp_path, REFERENCE)
    cache.make_plan(keys, rows_per_shard=3, tokens_per_batch=64)
    cache.build(keys, lambda some: [values[key] for key in some], rows_per_shard=3)
    cache.settle()
    assert cache.folder.name == "c5bf656f995422eaa3489c1e83fa70a6"
    assert {name: hashlib.sha256(data).hexdigest()[:32] for name, data in _content(cache.folder).items()} == {
        "manifest.json": "31face57358914b2307710dcc1bda988",
        "shard-3094568abbfe772d70e20d7459669157d9c9949935c60e79971a38a8631e69c4.safetensors": "856727524205c27c654a59e05618b787",
        "shard-35398cb92fc490cd2a61aae66afbd10a9f59f5f2b12411f86165319348444695.safetensors": "ca83035b03dd3c60e318e5da8417c993",
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["flip the index", "truncate", "append", "empty"])
def test_a_damaged_shard_is_left_out_and_named(tmp_path, damage):
    cache, keys, values = _filled(tmp_path)
    shard = sorted(cache.folder.glob("shard-*"))[0]
    good = shard.read_bytes()
    shard.write_bytes(
        {"flip the index": _flipped(good, 500), "truncate": good[:-1], "append": good + b"x", "empty": b""}[damage]
    )
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
    assert shard.read_bytes() == good
    assert damaged.problems == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(ReferenceCache(tmp_path, REFERENCE).sums(keys), whole)


def test_a_changed_value_is_noticed_when_it_is_read(tmp_path):
    cache, keys, values = _filled(tmp_path)
    shard = cache.shards[0].path
    good = shard.read_bytes()
    shard.write_bytes(_flipped(good, len(good) - 3))
    opened = ReferenceCache(tmp_path, REFERENCE)
    assert np.array_equal(opened.sums(keys), cache.sums(keys))  # the index is whole
    complaints = []
    for key, value in zip(keys, values, strict=True):
        try:
            assert np.array_equal(opened.token_logps(key), value)
        except CacheError as error:
            complaints.append(str(error))
    assert len(complaints) == 1
    assert shard.name in complaints[0]
    shard.unlink()
    with pytest.raises(CacheError, match="run again"):
        [opened.token_logps(key) for key in keys]


def test_a_damaged_shard_is_dropped_and_built_again_with_the_same_bytes(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    whole = _content(cache.folder)
    first, second = sorted(cache.folder.glob("shard-*"))[:2]
    first.write_bytes(_flipped(first.read_bytes(), first.stat().st_size - 3))
    second.write_bytes(_flipped(second.read_bytes(), 500))
    with pytest.warns(RuntimeWarning, match=second.name):
        opened = ReferenceCache(tmp_path, REFERENCE)
    with pytest.warns(RuntimeWarning, match=first.name):
        opened.drop_damaged(keys)
    assert not first.exists()
    assert not second.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened.drop_damaged(keys)
        _filled(tmp_path)
    assert _content(cache.folder) == whole


def test_every_flipped_bit_of_an_index_is_noticed(tmp_path):
    cache, keys, values = _filled(tmp_path, n=3)
    (shard,) = cache.folder.glob("shard-*")
    data = shard.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice((len(data) - 4 * sum(map(len, values))) * 8, 300, replace=False):
        shard.write_bytes(_flipped(data, bit // 8, 1 << (bit % 8)))
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


MANIFESTS = {
    "empty": "",
    "torn": "{",
    "another JSON": "[]",
    "another schema": '{"schema": 99}',
    "no reference": '{"schema": 2, "reference": {}, "plan": null}',
    "nested": "[" * 100_000,
    "too long": " " * (MANIFEST_LIMIT + 1),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_broken_manifest_costs_only_the_plan(tmp_path, kind):
    cache, keys, _ = _filled(tmp_path)
    whole = _content(cache.folder)
    (cache.folder / MANIFEST).write_text(MANIFESTS[kind])
    with pytest.warns(RuntimeWarning, match=MANIFEST):
        opened = ReferenceCache(tmp_path, REFERENCE)
    assert len(opened) == 20
    opened.make_plan(keys, rows_per_shard=8, tokens_per_batch=64)
    assert _content(cache.folder) == whole


def test_a_lost_manifest_is_written_again_from_the_shards(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    before = (cache.folder / MANIFEST).read_bytes()
    (cache.folder / MANIFEST).unlink()
    ReferenceCache(tmp_path, REFERENCE).make_plan(keys, rows_per_shard=8, tokens_per_batch=64)
    assert (cache.folder / MANIFEST).read_bytes() == before


def test_a_shard_that_the_manifest_misses_is_adopted(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    whole = _content(cache.folder)
    path = cache.shards[1].path
    good = path.read_bytes()
    path.unlink()
    ReferenceCache(tmp_path, REFERENCE).settle()
    path.write_bytes(good)
    assert _content(cache.folder) != whole
    opened = ReferenceCache(tmp_path, REFERENCE)
    assert not np.isnan(opened.sums(keys)).any()
    opened.settle()
    assert _content(cache.folder) == whole


def test_a_shard_that_somebody_else_commits_is_found_without_opening_again(tmp_path):
    keys, values = _rows(6)
    ours, theirs = ReferenceCache(tmp_path, REFERENCE), ReferenceCache(tmp_path, REFERENCE)
    theirs.write_shard(keys[:3], values[:3])
    computed = []

    def compute(some):
        computed.extend(some)
        return [values[keys.index(key)] for key in some]

    found = []
    assert ours.build(keys, compute, rows_per_shard=3, found=found.extend) == 3
    assert (computed, found) == (keys[3:], keys[:3])
    ours.settle()
    assert not np.isnan(ours.sums(keys)).any()


def test_who_settles_last_has_seen_every_shard(tmp_path, monkeypatch):
    keys, values = _rows(6)
    ours, theirs = ReferenceCache(tmp_path, REFERENCE), ReferenceCache(tmp_path, REFERENCE)
    ours.write_shard(keys[:3], values[:3])

    def write_bytes(path, data):
        monkeypatch.undo()
        theirs.write_shard(keys[3:], values[3:])  # after we looked, before our manifest is there
        theirs.settle()
        files.write_bytes(path, data)

    monkeypatch.setattr(files, "write_bytes", write_bytes)
    ours.settle()
    manifest = json.loads((ours.folder / MANIFEST).read_text())
    assert len(manifest["shards"]) == 2


def test_a_healed_shard_is_taken_in(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    path = cache.shards[0].path
    good = path.read_bytes()
    path.write_bytes(b"torn")
    with pytest.warns(RuntimeWarning, match=path.name):
        opened = ReferenceCache(tmp_path, REFERENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened.refresh()  # once is enough
        files.write_bytes(path, good)
        opened.refresh()
    assert not np.isnan(opened.sums(keys)).any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_share_the_shards_and_make_the_same_files(tmp_path, ranks):
    keys, values = _rows(23)
    by_key = dict(zip(keys, values, strict=True))
    whole = ReferenceCache(tmp_path / "one", REFERENCE)
    whole.make_plan(keys, rows_per_shard=4, tokens_per_batch=64)
    whole.build(keys, lambda some: [by_key[key] for key in some], rows_per_shard=4)
    whole.settle()
    caches = [ReferenceCache(tmp_path / "many", REFERENCE) for _ in range(ranks)]
    computed = [
        cache.build(keys, lambda some: [by_key[key] for key in some], rows_per_shard=4, share=(rank, ranks))
        for rank, cache in enumerate(caches)
    ]
    assert sum(computed) == 23
    shards = {name: data for name, data in _content(whole.folder).items() if name != MANIFEST}
    assert _content(caches[0].folder) == shards


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
    assert again.make_plan(list(reversed(keys)), rows_per_shard=99, tokens_per_batch=64).rows_per_shard == 8
    smaller = again.make_plan(keys, rows_per_shard=99, tokens_per_batch=32)  # the first one may have been too large
    assert (smaller.rows_per_shard, smaller.tokens_per_batch) == (99, 32)
    assert again.make_plan(keys[:-1], rows_per_shard=98, tokens_per_batch=32).rows_per_shard == 98


def test_what_a_killed_writer_left_is_swept_up_when_it_is_old(tmp_path):
    cache, keys, _ = _filled(tmp_path)
    left = [cache.folder / f".{MANIFEST}.{os.getpid()}.{digit * 32}.tmp" for digit in "ab"]
    other = cache.folder / ".mine.tmp"
    for path in (*left, other):
        path.write_text("half")
    for path in (left[0], other):
        os.utime(path, (0, 0))
    cache.make_plan(keys[1:], rows_per_shard=8, tokens_per_batch=64)
    assert [path.exists() for path in (*left, other)] == [False, True, True]


def test_values_that_are_not_finite_are_refused(tmp_path):
    cache = ReferenceCache(tmp_path, REFERENCE)
    with pytest.raises(CacheError, match="not finite"):
        cache.write_shard([b"k" * 16], [np.array([np.nan], dtype=np.float32)])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / REFERENCE.digest).write_text("not a folder")
    with pytest.raises(CacheError, match="cache_dir"):
        ReferenceCache(tmp_path, REFERENCE)


def test_a_folder_that_leads_outside_is_refused(tmp_path):
    _filled(tmp_path / "outside")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / REFERENCE.digest).symlink_to(tmp_path / "outside" / REFERENCE.digest)
    with pytest.raises(CacheError, match="leads outside"):
        ReferenceCache(tmp_path / "out", REFERENCE)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "", "A" * 32, "0" * 31])
def test_a_reference_is_named_by_its_digest(tmp_path, name):
    with pytest.raises(CacheError, match="hexadecimal"):
        ReferenceCache(tmp_path, name)


def test_rows_that_share_half_a_key_are_kept_apart(tmp_path):
    cache = ReferenceCache(tmp_path, REFERENCE)
    keys = [b"same half" + bytes(6) + bytes([i]) for i in range(20)] + [b"\xff" * 16, b"\0" * 16]
    for i, key in enumerate(keys):
        cache.write_shard([key], [np.full(1 + i % 3, -i, dtype=np.float32)])
    for opened in (cache, ReferenceCache(tmp_path, REFERENCE)):
        assert np.array_equal(opened.sums(keys), [-i * (1 + i % 3) for i in range(22)])
        assert np.isnan(opened.sums([b"same half" + bytes(6) + b"\x21", b"same halg" + bytes(7)])).all()
        assert len(opened) == 22


def test_the_index_agrees_with_a_dictionary():
    rng = np.random.default_rng(0)
    index, known, added = KeyIndex(), {}, 0
    assert index.find([b"a" * 16]).tolist() == [-1]
    for _ in range(60):
        rows = int(rng.integers(1, 40))
        keys = [pair.tobytes() for pair in rng.integers(0, 12, (rows, 2))]  # many repeats; many share a half; zeros
        index.add(b"".join(keys))
        for number, key in enumerate(keys, added):
            known.setdefault(key, number)
        added += rows
        wanted = [np.array([a, b]).tobytes() for a in range(13) for b in range(13)]
        assert index.find(wanted).tolist() == [known.get(key, -1) for key in wanted]
        assert len(index) == len(known)
    with pytest.raises(ValueError, match="16 bytes"):
        index.find([b"short"])
