"""The command line: one line of JSON at the end, one clear line and exit code 2 for what the user can mend."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from bco_fast import cli
from bco_fast.losses import OBJECTIVES

DATA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval_feedback.jsonl"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    tiny.build_tokenizer().save_pretrained(path)
    return path


def _arguments(model_dir, tmp_path, **changes):
    options = {
        "model": model_dir,
        "data": tiny.write(tmp_path / "feedback.jsonl", tiny.rows(60)),
        "output_dir": tmp_path / "out",
        "cache-dir": tmp_path / "cache",
        "max_length": 64,
        "max-steps": 3,
        "save_strategy": "no",
        "use_cpu": "true",
    } | changes
    return [
        "train",
        *(part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))),
    ]


def test_train_ends_with_one_line_of_json(model_dir, tmp_path, capfd):
    assert cli.main(_arguments(model_dir, tmp_path)) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert summary["steps"] == 3
    assert summary["rows"] + summary["held_out_rows"] == 60
    computed = summary["held_out_rows"] + 3 * 8  # of three steps, with or without the first four
    assert summary["cache_hits"] == 0
    assert computed <= summary["cache_computed"] <= computed + 4
    assert summary["seconds"] > 0
    assert summary["peak_memory_mb"] > 10
    assert 0 <= summary["held_out_auc"] <= 1
    assert isinstance(summary["held_out_margin"], float)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = _arguments(model_dir, tmp_path, beta=0.3)
    assert cli.main(again) == 2  # nothing is replaced silently
    assert cli.main([*again, "--overwrite_output_dir", "true"]) == 0
    again = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (again["cache_hits"], again["cache_computed"]) == (summary["cache_computed"], 0)


FIRST = {"bco", "kto", "bnf", "una_score", "una_reward", "dpo", "simpo"}  # of each kind of data and of loss


@pytest.mark.parametrize(
    "loss_type", [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in OBJECTIVES]
)
def test_every_objective_from_the_command_line(model_dir, tmp_path, capfd, loss_type):
    data = tiny.write(tmp_path / "other.jsonl", tiny.feedback_for(loss_type, 30))
    options = {"kto": {"desirable_weight": "auto"}, "bco": {"batch_composition": "stratified", "reduction": "class_mean"}, "dpo": {"beta": 0.2}}  # fmt: skip
    arguments = _arguments(
        model_dir, tmp_path, data=data, loss_type=loss_type, eval_fraction=0.2, **options.get(loss_type, {})
    )
    assert cli.main(arguments) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert summary["steps"] == 3
    assert 0 <= summary["held_out_auc"] <= 1
    assert (summary["cache_rows"] > 0) is OBJECTIVES[loss_type].reference


def test_an_unpaired_objective_takes_pairs(model_dir, tmp_path, capfd):
    data = tiny.write(tmp_path / "pairs.jsonl", tiny.pairs(40))
    assert cli.main(_arguments(model_dir, tmp_path, data=data, pairing_ratio=0.5)) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    pairs = summary["held_out_rows"] // 2  # held-out pairs keep both sides
    assert 40 - pairs < summary["rows"] < 2 * (40 - pairs)


def test_resume_from_the_newest_checkpoint(model_dir, tmp_path, capfd):
    options = {"save_strategy": "steps", "save_steps": 1}
    assert cli.main(_arguments(model_dir, tmp_path, **options, **{"max-steps": 2})) == 0
    assert cli.main(_arguments(model_dir, tmp_path, **options, resume_from_checkpoint="true")) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert summary["steps"] == 3
    assert {p.name for p in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


def test_a_separate_file_of_held_out_rows(model_dir, tmp_path, capfd):
    held_out = tiny.write(tmp_path / "held_out.jsonl", tiny.rows(7, seed=4))
    assert cli.main(_arguments(model_dir, tmp_path, eval_data=held_out)) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["rows"], summary["held_out_rows"]) == (60, 7)


BAD = {
    "a wrong flag": ({"lerning_rate": 1}, "unknown argument '--lerning_rate'; did you mean '--learning_rate'?"),
    "a wrong value": ({"max-steps": "many"}, "invalid int value: 'many'"),
    "a wrong choice": ({"loss_type": "bcp"}, "invalid choice: 'bcp'"),
    "a value out of range": ({"beta": -1}, "beta must be > 0"),
    "a missing model": ({"model": "./nowhere"}, "--model ./nowhere: no such folder"),
    "a folder without a model": ({"model": "tests"}, "--model tests: "),
    "a missing file": ({"data": "nowhere.jsonl"}, "--data nowhere.jsonl: no such file"),
    "a missing held-out file": ({"eval_data": "nowhere.jsonl"}, "--eval_data nowhere.jsonl: no such file"),
    "no output": ({"output_dir": None}, "required: --output_dir"),
    "no data": ({"data": None}, "required: --data"),
    "no room": ({"max_length": 65}, "64 positions"),
    "a checkpoint that is none": (
        {"resume_from_checkpoint": "tests"},
        "--resume_from_checkpoint tests: not a checkpoint",
    ),
    "no checkpoint yet": ({"resume_from_checkpoint": "true"}, "no checkpoint in"),
    "a held-out share of 2": ({"eval_fraction": 2}, "between 0 and 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(model_dir, tmp_path, capfd, kind):
    changes, message = BAD[kind]
    assert cli.main(_arguments(model_dir, tmp_path, **changes)) == 2
    streams = capfd.readouterr()
    line = streams.err.strip().splitlines()[-1]
    assert line.startswith("bco-fast: error: ")
    assert message in line
    assert "Traceback" not in streams.err
    assert streams.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "pack", "completion": "", "label": True}, "completion is empty"),
        ({"prompt": "pack", "completion": "apple"}, "column 'label' is missing"),
        ({"prompt": "pack", "completion": "apple", "label": 1}, "label must be true or false"),
    ],
)
def test_a_bad_row_writes_nothing_over(model_dir, tmp_path, capfd, row, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    data = tiny.write(tmp_path / "bad.jsonl", [*tiny.rows(20), row])
    assert cli.main(_arguments(model_dir, tmp_path, data=data, overwrite_output_dir="true")) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"bad.jsonl:21: {message}" in line
    assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_commands_and_help(capfd):
    assert cli.main([]) == 0
    assert "bco-fast demo" in capfd.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("bco_fast 0.")
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'?" in capfd.readouterr().err
    assert cli.main(["demo", "--seeds", "1"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_train_help_lists_options_with_their_meaning(capfd):
    assert cli.main(["train", "--help"]) == 0
    shown = capfd.readouterr().out
    for text in ("--data", "--beta", "Reward per nat", "--learning_rate", "--cache_dir", "--eval_fraction"):
        assert text in shown


def test_help_and_version_import_nothing_slow():
    """All take a tenth of a second; torch alone takes seconds."""
    code = (
        "import sys; from bco_fast import cli; cli.main(['--help']); cli.main(['--version']); cli.main(['train', '--help'])\n"
        "print(*{'torch', 'numpy', 'transformers', 'yaml', 'matplotlib'} & set(sys.modules), sep='', end='|')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "bco-fast shifts" in run.stdout, run.stderr
    assert run.stdout.endswith("\n|")


def test_the_package_runs_as_a_module(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bco_fast", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("bco_fast", run_name="__main__")
    assert capfd.readouterr().out.startswith("bco_fast ")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_file(), reason="the file of real feedback is not here")
def test_real_feedback_trains_from_the_command_line(tmp_path, capfd):
    """1,610 judged completions: the reference is computed once, and the held-out margin rises above the untrained
    model's, which is 0 because policy and reference start as one."""
    from transformers import LlamaConfig

    tokenizer = tiny.byte_pair_tokenizer(DATA, 4096)
    tiny.model(
        LlamaConfig, vocab_size=4096, hidden_size=64, intermediate_size=128, max_position_embeddings=256, std=0.02
    ).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    options = {
        "data": DATA, "max_length": 192, "max-steps": 40, "learning_rate": 2e-3, "per_device_train_batch_size": 16,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    summaries = []
    for again in ({}, {"max-steps": 1, "overwrite_output_dir": "true"}):
        assert cli.main(_arguments(tmp_path / "m", tmp_path, **options | again)) == 0
        summaries.append(json.loads(capfd.readouterr().out.strip().splitlines()[-1]))
    first, second = summaries
    assert first["rows"] + first["held_out_rows"] == 1610
    assert first["cache_hits"] == 0
    assert first["cache_computed"] == first["cache_rows"] > 40 * 16  # what 40 steps read, and the held-out rows
    assert second["cache_hits"] == second["cache_rows"] > first["held_out_rows"]
    assert first["held_out_margin"] > 0.05
    assert first["held_out_auc"] > 0.52
