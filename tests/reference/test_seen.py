"""Rows from elsewhere are checked in proportion, once per folder and model; our own by four."""

import shutil
import warnings

import numpy as np
import pytest
import tiny

import bco_fast.reference.fill
from bco_fast import CacheError, ReferenceCache, load_feedback, patch_model
from bco_fast.reference.fill import fill
from bco_fast.reference.identity import reference_id
from bco_fast.reference.seen import SeenShards


@pytest.fixture(scope="module")
def model():
    return patch_model(tiny.model())


@pytest.fixture(scope="module")
def examples():
    return load_feedback(tiny.rows(200), tiny.build_tokenizer()).examples


@pytest.fixture(scope="module")
def filled(model, examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bco_fast.reference.fill, "ROWS_PER_SHARD", 20)
        fill(ReferenceCache(folder, reference_id(model)), examples, model, progress=False)
    return folder


@pytest.fixture
def checked(monkeypatch):
    """Keys of the rows that are computed again."""
    keys = []
    real = bco_fast.reference.fill.token_logps

    def token_logps(model, rows, *args):
        keys.extend(row.key for row in rows)
        return real(model, rows, *args)

    monkeypatch.setattr(bco_fast.reference.fill, "token_logps", token_logps)
    return keys


def _fill(folder, model, examples):
    cache = ReferenceCache(folder, reference_id(model))
    assert fill(cache, examples, model, progress=False).computed == 0
    return cache


def test_a_copied_folder_is_checked_in_proportion_once(filled, tmp_path, model, examples, checked):
    _fill(filled, model, examples)
    assert len(checked) == 4  # this machine wrote it
    shutil.copytree(filled, tmp_path / "copy", copy_function=shutil.copy2)
    checked.clear()
    cache = _fill(tmp_path / "copy", model, examples)
    assert len(checked) == len(set(checked)) == 64
    shards = cache.find(checked)[:, 0]
    assert sorted(np.bincount(shards, minlength=10)) == [6] * 6 + [7] * 4
    checked.clear()
    _fill(tmp_path / "copy", model, examples)
    assert len(checked) == 4


def test_one_percent_of_many_rows(filled, tmp_path, model, examples, checked, monkeypatch):
    monkeypatch.setattr(bco_fast.reference.fill, "CHECKED_UNSEEN_ROWS", 1)
    shutil.copytree(filled, tmp_path / "copy")
    monkeypatch.setattr(bco_fast.reference.fill, "CHECKED_UNSEEN_SHARE", 0.06)
    _fill(tmp_path / "copy", model, examples)
    assert len(checked) == 12


def test_four_forged_rows_of_forty_are_always_found(tmp_path, model, examples):
    name, few = reference_id(model), examples[:40]
    honest = ReferenceCache(tmp_path / "honest", name)
    fill(honest, few, model, progress=False)
    right = [honest.token_logps(example.key) for example in few]
    for trial in range(5):
        wrong = [v + np.float32(0.5 if 8 * (i // 8) == i and i < 32 else 0) for i, v in enumerate(right)]
        forged = ReferenceCache(tmp_path / f"forged{trial}", name)
        forged.write_shard([example.key for example in few], wrong)
        for _ in range(2):  # what was refused is not trusted afterwards
            with pytest.raises(CacheError, match="does not agree with the reference model"):
                fill(ReferenceCache(tmp_path / f"forged{trial}", name), few, model, progress=False)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"shard": 3}', "[" * 100000])
def test_a_list_that_cannot_be_read_costs_a_check_and_no_more(filled, tmp_path, model, examples, checked, text):
    shutil.copytree(filled, tmp_path / "copy")
    cache = ReferenceCache(tmp_path / "copy", reference_id(model))
    SeenShards(cache.folder).path.write_text(text)
    _fill(tmp_path / "copy", model, examples)
    assert len(checked) == 64


def test_many_foreign_shards_are_one_warning(filled, tmp_path, model):
    shutil.copytree(filled, tmp_path / "copy")
    folder = ReferenceCache(tmp_path / "copy", reference_id(model)).folder
    for number in range(200):
        (folder / f"shard-{number:064x}.safetensors").write_bytes(b"not a shard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = ReferenceCache(tmp_path / "copy", reference_id(model))
    assert len(caught) == 1
    assert "199 other files" in str(caught[0].message)
    assert len(cache.problems) == 200
    assert len(cache) == 200
