"""`bco-fast train` with fewer rows and with samples, as a user starts it."""

import json
import logging
from pathlib import Path

import pytest
import tiny
from small_runs import command_folder

from bco_fast import cli
from bco_fast.cli.train import _drawn

RUN = "train --model m --data f.jsonl --output_dir out --cache_dir cache --max_length 32 --use_cpu true --report_to none --disable_tqdm true --save_strategy no"  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    command_folder(tmp_path, monkeypatch, 60)
    tiny.write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in tiny.rows(2)])


def test_a_small_try(world, capfd, caplog):
    options = (
        "--max_samples 30 --max_steps 2 --per_device_train_batch_size 4 --sample_prompts p.jsonl --sample_tokens 3"
    )
    with caplog.at_level(logging.INFO, logger="bco_fast"):
        assert cli.main([*RUN.split(), *options.split()]) == 0
    assert "--max_samples: 30 of 60 rows of --data" in caplog.text
    assert "max_steps=2 reads" in caplog.text
    assert caplog.text.count("sample at step 2: ") == 2
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert summary["rows"] + summary["held_out_rows"] == 30
    assert summary["cache_rows"] <= 2 * 4 + 4 + summary["held_out_rows"]
    record = json.loads(Path("out/run.json").read_text())
    assert record["data"]["train"]["rows_read"] == 60
    assert record["data"]["train"]["source"] == record["data"]["held_out"]["source"] == "f.jsonl"
    rows = [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert "60 rows in the file" in Path("out/README.md").read_text()


def test_a_draw_keeps_the_order_and_needs_no_seed():
    rows = list(range(100))
    drawn = _drawn(rows, 10)
    assert len(drawn) == 10
    assert drawn == sorted(drawn) == _drawn(rows, 10)
    assert _drawn(rows, 100) is rows


def test_the_last_evaluation_is_not_repeated(world, capsys):
    assert (
        cli.main(
            [
                *RUN.split(),
                "--max_steps",
                "4",
                "--eval_fraction",
                "0.3",
                "--eval_strategy",
                "steps",
                "--eval_steps",
                "2",
            ]
        )
        == 0
    )
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    evaluations = [line for line in history if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert summary["held_out_auc"] == evaluations[-1]["eval_rewards/auc"]
    assert summary["held_out_margin"] == evaluations[-1]["eval_rewards/margins"]
