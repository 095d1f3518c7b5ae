"""`bco-fast cache`: build what training needs, and see, check, export and clean what is there."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pyarrow import parquet

import bco_fast.reference.fill
from bco_fast import ReferenceCache, cli
from bco_fast.reference.cache import MANIFEST


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny.model().save_pretrained(root / "tiny-llama")
    tiny.build_tokenizer().save_pretrained(root / "tiny-llama")
    return root / "tiny-llama", tiny.write(root / "feedback.jsonl", tiny.rows(40))


@pytest.fixture
def say(capfd):
    """-> a function that runs a command: (exit code, lines of stdout, last line of stderr)."""

    def run(*arguments):
        code = cli.main(["cache", *map(str, arguments)])
        streams = capfd.readouterr()
        assert "Traceback" not in streams.err
        return code, streams.out.splitlines(), (streams.err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture
def built(inputs, tmp_path, say, monkeypatch):
    """A cache of five shards."""
    monkeypatch.setattr(bco_fast.reference.fill, "ROWS_PER_SHARD", 8)
    model, data = inputs
    code, lines, _ = say(
        "build", "--model", model, "--data", data, "--max-length", 64, "--cache-dir", tmp_path / "cache"
    )
    assert (code, lines[-1]) == (0, "40 rows: 0 cached, 40 computed")
    return tmp_path / "cache"


def _shards(folder):
    return sorted(folder.glob("*/shard-*"))


def _damage(path, position=-3):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def _train(inputs, tmp_path, *more):
    model, data = inputs
    options = ["--model", model, "--data", data, "--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache"]
    fixed = ["--max_length", 64, "--max_steps", 1, "--save_strategy", "no", "--use_cpu", "true"]
    return cli.main(["train", *map(str, [*options, *fixed, *more])])


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bf16 autocast"])
def test_build_leaves_nothing_for_training_to_compute(inputs, tmp_path, say, capfd, low):
    model, data = inputs
    options = ["--model", model, "--data", data, "--max_length", 64, "--cache_dir", tmp_path / "cache"]
    code, lines, _ = say("build", *options, *(["--autocast", "bf16"] if low else []))
    assert (code, lines) == (0, ["40 rows: 0 cached, 40 computed"])
    every_row = ["--max_steps", 5]  # fewer steps read the rows of their batches alone
    assert _train(inputs, tmp_path, *every_row, *(["--bf16", "true"] if low else [])) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["cache_hits"], summary["cache_computed"]) == (40, 0)


def test_build_computes_only_what_is_new(inputs, built, tmp_path, say):
    model, _ = inputs
    longer = tiny.write(tmp_path / "longer.jsonl", [*tiny.rows(40), *tiny.rows(60)[50:]])
    options = ["--model", model, "--max_length", 64, "--cache_dir", built]
    _, first, _ = say("build", *options, "--data", inputs[1])
    assert first[-1] == "40 rows: 40 cached, 0 computed"
    _, second, _ = say("build", *options, "--data", longer)
    assert re.fullmatch(r"(\d+) rows: 40 cached, (\d+) computed", second[-1])
    assert second[-1] == f"{len(set(_keys(longer)))} rows: 40 cached, {len(set(_keys(longer))) - 40} computed"


def _keys(data):
    from bco_fast import load_feedback

    return [example.key for example in load_feedback(data, tiny.build_tokenizer(), max_length=64).examples]


def test_parts_of_several_machines_are_merged_by_copying(inputs, tmp_path, say):
    model, data = inputs
    options = ["--model", model, "--data", data, "--max_length", 64]
    for part in (1, 2, 3):
        _, lines, _ = say("build", *options, "--cache_dir", tmp_path / f"part{part}", "--shard", f"{part}/3")
        assert lines == [f"{14 - (part > 1)} rows: 0 cached, {14 - (part > 1)} computed"]
        shutil.copytree(tmp_path / f"part{part}", tmp_path / "whole", dirs_exist_ok=True)
    assert say("build", *options, "--cache_dir", tmp_path / "whole")[1] == ["40 rows: 40 cached, 0 computed"]
    for wrong in ("0/2", "3/2", "1", "a/b"):
        code, _, error = say("build", *options, "--cache_dir", tmp_path, "--shard", wrong)
        assert code == 2
        assert f"--shard {wrong}: must be I/N" in error


def test_inspect_prints_a_table(built, say):
    os.utime(next(built.glob("*/" + MANIFEST)), (time.time() - 7300,) * 2)
    for path in _shards(built):
        os.utime(path, (time.time() - 3 * 86400,) * 2)
    code, lines, _ = say("inspect", "--cache_dir", built)
    assert code == 0
    header, line, footer = lines
    assert header.split() == [
        "reference",
        "model",
        "computed",
        "in",
        "attention",
        "rows",
        "tokens",
        "disk",
        "written",
        "used",
    ]
    (folder,) = filter(Path.is_dir, built.iterdir())
    cache = ReferenceCache(built, folder.name)
    tokens = sum(shard.tokens for shard in cache.shards)
    assert line.split() == [
        *(folder.name[:12], "tiny-llama", "float32", "sdpa", "40", f"{tokens}"),
        *f"{sum(p.stat().st_size for p in folder.iterdir()) / 1000:.3g} kB 3 days ago 2 hours ago".split(),
    ]
    assert footer.startswith("1 reference, 40 rows, ")
    assert footer.endswith(f" in {built}")
    _damage(_shards(built)[0], 500)
    assert "1 file left out" in say("inspect", "--cache-dir", built)[1][-1]


def test_inspect_of_an_empty_cache(tmp_path, say):
    assert say("inspect", "--cache-dir", tmp_path)[:2] == (0, [f"0 references, 0 rows, 0 B in {tmp_path}"])


def test_verify_reads_everything_again(built, say):
    (folder,) = filter(Path.is_dir, built.iterdir())
    assert say("verify", "--cache-dir", built)[:2] == (0, [f"{folder.name[:12]}: 5 shards read, 40 rows whole"])
    values, index = _shards(built)[:2]
    _damage(values)
    _damage(index, 500)
    code, lines, error = say("verify", "--cache-dir", built)
    assert code == 2
    assert sorted(lines[:2]) == sorted(
        [f"{index}: its content does not match its name", f"{values}: its values have changed"]
    )
    assert lines[2].endswith(": 4 shards read, 24 rows whole")
    assert error.startswith(f"bco-fast: error: 2 files of {built} cannot be used")


def test_export_writes_parquet(built, tmp_path, say):
    output = tmp_path / "values.parquet"
    assert say("export", "--cache-dir", built, "--output", output)[:2] == (0, [f"40 rows written to {output}"])
    rows = parquet.read_table(output).to_pylist()
    (folder,) = filter(Path.is_dir, built.iterdir())
    cache = ReferenceCache(built, folder.name)
    assert {row["key"] for row in rows} == {key.hex() for key in _keys_of(cache)}
    for row in rows:
        key = bytes.fromhex(row["key"])
        values = cache.token_logps(key)
        assert row["reference"] == folder.name
        assert row["tokens"] == len(values)
        assert row["sum_logps"] == cache.sums([key])[0]
        assert np.array_equal(np.array(row["token_logps"], np.float32), values)
    code, _, error = say("export", "--cache-dir", built, "--output", output)
    assert (code, error) == (2, f"bco-fast: error: --output {output} exists already")
    _damage(_shards(built)[0])
    code, _, error = say("export", "--cache-dir", built, "--output", tmp_path / "second.parquet")
    assert code == 2
    assert "its values have changed" in error
    assert [path.name for path in tmp_path.glob("*second*")] == []


def _keys_of(cache):
    for shard in cache.shards:
        yield from shard.row_keys()


def test_prune_is_a_dry_run_unless_told_otherwise(built, say):
    (folder,) = filter(Path.is_dir, built.iterdir())
    values, index = _shards(built)[:2]
    _damage(values)
    _damage(index, 500)
    left = folder / f".{MANIFEST}.1.{'a' * 32}.tmp"
    left.write_text("half")
    os.utime(left, (0, 0))
    link = folder / f"shard-{'c' * 64}.safetensors"
    link.symlink_to(built.parent)
    mine = [folder / "notes.txt", built / "notes.txt", folder / f"shard-{'d' * 64}.safetensors"]
    mine[0].write_text("mine")
    mine[1].write_text("mine")
    mine[2].mkdir()
    before = sorted(built.rglob("*"))
    code, lines, _ = say("prune", "--cache-dir", built)
    assert code == 0
    assert sorted(built.rglob("*")) == before
    assert {line.split(": ")[0].removeprefix("would remove ") for line in lines[:-1]} == {
        str(path) for path in (values, index, left, link)
    }
    assert lines[-1].startswith("4 files, ")
    assert lines[-1].endswith("nothing was removed; --yes removes them")
    assert say("prune", "--cache-dir", built, "--yes")[1][-1].endswith(": removed")
    assert sorted(built.rglob("*")) == sorted(set(before) - {values, index, left, link})
    assert built.parent.is_dir()
    assert say("prune", "--cache-dir", built)[1] == ["0 files, 0 B: nothing to remove"]


def test_prune_by_age_removes_references_that_nobody_used(built, inputs, say):
    (folder,) = filter(Path.is_dir, built.iterdir())
    for path in folder.iterdir():
        os.utime(path, (time.time() - 10 * 86400,) * 2)
    assert say("prune", "--cache-dir", built, "--older-than", 11)[1] == ["0 files, 0 B: nothing to remove"]
    assert say("prune", "--cache-dir", built, "--older-than", 9)[1][-1].startswith("6 files, ")
    model, data = inputs
    say("build", "--model", model, "--data", data, "--max-length", 64, "--cache-dir", built)  # uses it
    assert say("prune", "--cache-dir", built, "--older-than", 9)[1] == ["0 files, 0 B: nothing to remove"]
    os.utime(folder / MANIFEST, (time.time() - 10 * 86400,) * 2)
    assert say("prune", "--cache-dir", built, "--older_than", 9, "--yes")[1][-1].endswith(": removed")
    assert list(built.iterdir()) == []


BAD = {
    "no command": (["tidy"], "unknown command 'cache tidy'"),
    "a misspelt command": (["prun"], "did you mean 'prune'?"),
    "no model": (["build", "--data", "x.jsonl"], "required: --model"),
    "a missing model": (["build", "--data", __file__, "--model", "./nowhere"], "--model ./nowhere: no such folder"),
    "a missing file": (["build", "--data", "nowhere.jsonl", "--model", "MODEL", "--max-length", 64], "nowhere.jsonl: "),
    "no room": (
        ["build", "--data", "DATA", "--model", "MODEL"],
        "--max-length is 1024, but the model has 64 positions",
    ),
    "no batch": (
        ["build", "--data", "DATA", "--model", "MODEL", "--max-length", 64, "--reference-tokens-per-batch", 0],
        "at least 1",
    ),
    "a missing cache": (["inspect", "--cache-dir", "nowhere"], "--cache_dir nowhere: no such folder"),
    "another reference": (["verify", "--cache-dir", ".", "--reference", "abc"], "no such reference in ."),
    "no output": (["export", "--cache-dir", "."], "required: --output"),
    "a negative age": (["prune", "--cache-dir", ".", "--older-than", -1], "a number of days >= 0"),
    "an age of words": (["prune", "--cache-dir", ".", "--older-than", "nan"], "a number of days >= 0"),
    "a wrong flag": (["prune", "--cache-dir", ".", "--force"], "unrecognized arguments: --force"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(inputs, say, kind):
    arguments, message = BAD[kind]
    places = {"MODEL": inputs[0], "DATA": inputs[1]}
    code, lines, error = say(*(places.get(argument, argument) for argument in arguments))
    assert (code, lines) == (2, [])
    assert error.startswith("bco-fast: error: ")
    assert message.replace("--max-length is", "--max_length is") in error


def test_help(say):
    assert "inspect" in "".join(say()[1])
    with pytest.raises(SystemExit) as stopped:
        say("build", "--help")
    assert stopped.value.code == 0


@pytest.mark.parametrize("loss_type", ["bco", "kto", "dpo", "bnf"])
def test_what_build_computes_is_what_train_finds(tmp_path, capsys, loss_type):
    """The same dtype, truncation, sides and mismatched rows: training computes nothing."""
    tiny.model().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tiny.build_tokenizer().save_pretrained(tmp_path / "m")
    data = tiny.write(tmp_path / "data.jsonl", tiny.feedback_for(loss_type, 12))
    common = ["--model", str(tmp_path / "m"), "--data", str(data), "--max_length", "64", "--cache_dir", str(tmp_path / "c"), "--loss_type", loss_type]  # fmt: skip
    assert cli.main(["cache", "build", *common]) == 0
    capsys.readouterr()
    assert cli.main(["train", *common, "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--eval_fraction", "0", "--use_cpu", "true", "--save_strategy", "no"]) == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert summary["cache_computed"] == 0
    assert summary["cache_hits"] > 0
