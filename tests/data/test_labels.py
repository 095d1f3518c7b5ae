"""Thumbs as product logs write them; no class is lost without a word."""

import json
import logging

import pytest
import tiny
from small_runs import TOKENIZER

from bco_fast import FeedbackError, cli
from bco_fast.data.labels import parse_labels
from bco_fast.data.rows import read_rows
from bco_fast.data.tokenize import load_feedback

ROW = {"prompt": "p", "completion": "c"}


def _csv(path, values):
    lines = [f"p{i},c{i},{value}" for i, value in enumerate(values)]
    path.write_text("\n".join(["prompt,completion,label", *lines]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        ("up=1,down=-1", ["1", "-1", "1.0"]),
        ("up=1,down=0", ["1", "0", "1"]),
        ("up=👍,down=👎", ["👍", "👎", "👍"]),
        ("up=positive,down=negative", ["Positive", "negative", " POSITIVE "]),
        ("up=4|5,down=1|2,ignore=3", ["4", "2", "3", "5", "3"]),
        ("up=true,down=false", ["true", "FALSE", "True"]),
    ],
)
def test_a_stated_mapping_reads_labels_from_csv_and_json(tmp_path, labels, values, caplog):
    caplog.set_level(logging.INFO)
    expected = [True, False, True]
    assert [row.label for row in read_rows(_csv(tmp_path / "f.csv", values), labels=labels)] == expected
    typed = [json.loads(value) if value.lstrip("-").replace(".", "").isdigit() else value for value in values]
    assert [row.label for row in read_rows([{**ROW, "label": value} for value in typed], labels=labels)] == expected
    assert ("2 rows are left out" in caplog.text) is ("ignore" in labels)


def test_a_mapping_reads_renamed_columns_and_turns():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "label": -1}]
    assert [row.label for row in read_rows([{"messages": turns}], labels={"up": 1, "down": -1})] == [False]
    rows = [{**ROW, "stars": 5}]
    assert [row.label for row in read_rows(rows, labels="up=5,down=1", columns="label=stars")] == [True]


@pytest.mark.parametrize(
    "labels", ["", "up=1", "up=1,down", "up=1,down=1", "up=1,up=2,down=0", "1=up,-1=down", "up=,down=1"]
)
def test_a_mapping_that_cannot_be_read(labels):
    with pytest.raises(ValueError, match="labels"):
        parse_labels(labels)


def test_a_value_outside_the_mapping_is_a_bad_row():
    with pytest.raises(FeedbackError, match="row 1: label '7' is none of those in labels: 1, -1"):
        read_rows([{**ROW, "label": 1}, {**ROW, "label": 7}], labels="up=1,down=-1")


def test_skipping_does_not_take_a_class_away(tmp_path):
    """1 is read as true, as it always was; -1 is not: all thumbs down would be left out."""
    path = _csv(tmp_path / "f.csv", ["1", "-1"] * 10)
    with pytest.raises(FeedbackError, match="labels up=VALUE,down=VALUE says what other values mean"):
        read_rows(path)
    with pytest.raises(
        FeedbackError, match=r"no thumbs down would be left with on_bad_row=skip: 10 rows are bad, the first .*f\.csv:3"
    ):
        read_rows(path, on_bad_row="skip")
    rows = [{**ROW, "label": i % 2 == 0, "prompt": f"p{i}"} for i in range(60)]
    for i in range(1, 13, 2):
        rows[i]["completion"] = ""
    with pytest.raises(
        FeedbackError, match="up to 6 of 30 thumbs down would be left out with on_bad_row=skip, more than a tenth"
    ):
        read_rows(rows, on_bad_row="skip")
    assert len(read_rows(rows[13:] + rows[:9], on_bad_row="skip")) == 52  # 4 of 28


def test_truncation_does_not_take_a_class_away_either():
    rows = tiny.rows(20)
    long = [{**row, "prompt": row["prompt"] if row["label"] else " ".join([row["prompt"]] * 9)} for row in rows]
    options = {"max_length": 12, "max_prompt_length": 12}
    with pytest.raises(FeedbackError, match="no thumbs down would be left with on_bad_row=skip"):
        load_feedback(long, TOKENIZER, on_bad_row="skip", **options)


def test_train_says_the_classes_and_refuses_one_class(tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO)
    command = [
        "train",
        "--model",
        "nowhere",
        "--output_dir",
        str(tmp_path / "o"),
        "--use_cpu",
        "true",
        "--eval_fraction",
        "0",
    ]
    data = tiny.write(tmp_path / "f.jsonl", [{**row, "label": True} for row in tiny.rows(6)])
    assert cli.main([*command, "--data", str(data)]) == 2
    assert "--data: all 6 training rows are thumbs up; bco compares the two" in capfd.readouterr().err
    data = _csv(tmp_path / "f.csv", ["1", "-1"] * 3)
    assert cli.main([*command, "--data", str(data), "--labels", "up=1,down=-1"]) == 2  # there is no such model
    assert "training rows: 3 thumbs up, 3 thumbs down" in caplog.text
    assert "fewer than 20 of a class" in caplog.text
