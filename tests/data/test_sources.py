"""Where feedback is read from: every format gives the same rows, and hostile files give one named error."""

import csv
import gzip
import json
import random
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import tiny

from bco_fast import FeedbackError, cli, load_feedback
from bco_fast.data import sources
from bco_fast.data.prompts import read_prompts
from bco_fast.data.rows import read_rows
from bco_fast.data.sources import is_hub_name

TOKENIZER = tiny.build_tokenizer()
GOOD = {"prompt": "pack two fruit for anna :", "completion": "apple pear", "label": True}
TRICKY = [
    {"prompt": 'say "hi", {[\n', "completion": 'C:\\temp\\ "]},\\"', "label": True, "weight": 0.5},
    {"prompt": "ü 李 \u2028", "completion": "a\r\nb\t", "label": False, "weight": 2.0},
    {"prompt": "", "completion": "\\", "label": True, "weight": 1.0},
]


def _csv(path, records, columns=None):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def _parquet(path, records):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
    return path


def _json(path, records):
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False))
    return path


WRITERS = {"jsonl": tiny.write, "json": _json, "csv": _csv, "parquet": _parquet}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    for records in (TRICKY, tiny.rows(30)):
        path = WRITERS[suffix](tmp_path / f"feedback.{suffix}", records)
        assert [(r.prompt, r.completions, r.label, r.weight) for r in read_rows(path)] == [
            (r.prompt, r.completions, r.label, r.weight) for r in read_rows(records)
        ]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_chats_and_pairs_in_every_format_that_holds_them(tmp_path, suffix):
    user, up, down = ({"role": r, "content": c} for r, c in (("user", "pack"), ("assistant", "pear"), ("assistant", "plum")))  # fmt: skip
    records = [{"prompt": [user], "chosen": [up], "rejected": [down]}] * 3
    rows = read_rows(WRITERS[suffix](tmp_path / f"f.{suffix}", records), needs="pairs")
    assert [(r.prompt, r.completions) for r in rows] == [((user,), (up, down))] * 3


def test_a_dataset_and_a_generator_are_iterables_of_dicts():
    datasets = pytest.importorskip("datasets")
    records = tiny.rows(5)
    expected = [e.key for e in load_feedback(records, TOKENIZER).examples]
    assert [e.key for e in load_feedback(datasets.Dataset.from_list(records), TOKENIZER).examples] == expected
    assert [e.key for e in load_feedback(iter(records), TOKENIZER).examples] == expected
    with pytest.raises(FeedbackError, match=r"rows, not one mapping \(keys: train, test\)"):
        read_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(records), "test": None}))


def test_json_lines_in_a_json_file(tmp_path):
    assert len(read_rows(tiny.write(tmp_path / "f.json", tiny.rows(4)))) == 4


def test_an_array_is_cut_where_json_cuts_it(tmp_path):
    rng = random.Random(0)  # noqa: S311

    def value(depth):
        kind = rng.randrange(6 if depth else 3)
        if kind > 3:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        if kind == 3:
            return {text(): value(depth - 1) for _ in range(rng.randrange(3))}
        return text() if kind else rng.choice([True, None, -1.5])

    def text():
        return "".join(rng.choices('ab\\"[]{},: \nü', k=rng.randrange(8)))

    path = tmp_path / "f.json"
    for case in range(200):
        values = [value(3) for _ in range(rng.randrange(5))]
        path.write_text(json.dumps(values, indent=rng.choice([None, 0, 2]), ensure_ascii=bool(case % 2)))
        assert [record for _, record in sources.open_source(path).records] == values


# ---- bad rows, by format


def test_bad_rows_of_an_array_are_named_and_the_others_read(tmp_path):
    path = tmp_path / "f.json"
    path.write_text(json.dumps([GOOD, {**GOOD, "label": 1}, 7, None, [], GOOD]))
    with pytest.raises(
        FeedbackError, match=r"f\.json: row 1: label must be true or false, not 1; labels .*and 3 more bad rows"
    ):
        read_rows(path)
    assert [r.where for r in read_rows(path, on_bad_row="skip")] == [f"{path}: row 0", f"{path}: row 5"]


@pytest.mark.parametrize("bad", ["[" * 100_000 + "]" * 100_000, "{'a': 1}", "", '{"a" "b"}', "tru", "1 2", "\x00"])
def test_an_element_that_is_not_json_is_named_and_ends_the_reading(tmp_path, bad):
    path = tmp_path / "f.json"
    path.write_text(f"[{json.dumps(GOOD)}, {bad}, {json.dumps(GOOD)}]")
    tracemalloc.start()
    try:
        with pytest.raises(FeedbackError, match=r"f\.json: row 1: not JSON"):
            read_rows(path, on_bad_row="skip")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_array_larger_than_the_window_is_read_with_one_row_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_WINDOW", 64)
    path = tmp_path / "f.json"
    records = [{**GOOD, "n": n, "text": "ü" * (n * 37 % 501)} for n in range(400)]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    assert [record for _, record in sources.open_source(path).records] == records
    tracemalloc.start()
    try:
        assert sum(1 for _ in sources.open_source(path).records) == 400
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 4
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "row 0: not JSON"),
        ('[{"prompt": "a', "row 0: not JSON"),
        ('[{"prompt": "a\\"}]', "row 0: not JSON"),
        (f"[{json.dumps(GOOD)}, {{", "row 1: not JSON"),
        (f"[{json.dumps(GOOD)}", "row 0: not JSON .a comma or the closing bracket is missing"),
        (f"[{json.dumps(GOOD)}] []", "something follows the array"),
        ("[]", "no usable row"),
        ("[,]", "row 0: not JSON"),
    ],
)
def test_a_broken_array_is_one_error(tmp_path, text, message):
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(FeedbackError, match=message):
        read_rows(path)


BAD_CSV = {
    "too few cells": ("a,b\n", "2 cells under a header of 4 columns"),
    "too many cells": ("a,b,true,1,9\n", "5 cells under a header of 4 columns"),
    "a label in words": ("a,b,yes,1\n", "label must be true or false, not 'yes'"),
    "no label": ("a,b,,1\n", "label must be true or false, not None"),
    "a weight that Python reads": ("a,b,true,1_0\n", "weight must be a number >= 0, not '1_0'"),
    "an infinite weight": ("a,b,true,inf\n", "weight must be a number >= 0, not 'inf'"),
    "an empty completion": ('a," ",true,1\n', "completion is empty"),
    "text behind a quote": ('a,"b"c,true,1\n', "not CSV"),
    "bytes that are no text": (b"a,\xff\xfe,true,1\n", "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_a_bad_row_of_csv_is_named_by_its_first_line(tmp_path, kind):
    line, reason = BAD_CSV[kind]
    path = tmp_path / "f.csv"
    good = b'"two\nlines",b,TRUE,0.5\n'
    path.write_bytes(
        b"prompt,completion,label,weight\n" + good + (line if isinstance(line, bytes) else line.encode()) + good
    )
    with pytest.raises(FeedbackError, match=rf"f\.csv:4: {reason}"):
        read_rows(path)
    rows = read_rows(path, on_bad_row="skip")
    assert [(r.prompt, r.label, r.weight, r.where) for r in rows] == [
        ("two\nlines", True, 0.5, f"{path}:2"),
        ("two\nlines", True, 0.5, f"{path}:5"),
    ]


def test_csv_that_is_no_table(tmp_path):
    path = tmp_path / "f.csv"
    for text, message in (
        ("", "no usable row"),
        ("prompt,completion,label\n", "no usable row"),
        ("prompt,prompt,label\n", "f.csv:1: column 'prompt' occurs twice"),
        ('prompt,completion,label\n"a,b,true\nc,d,true\n', "f.csv:2: not CSV"),
    ):
        path.write_text(text)
        with pytest.raises(FeedbackError, match=message):
            read_rows(path)


def test_numbers_and_truth_in_csv(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text(
        "\ufeffprompt,completion,label,score\na,b,True,1e-1\na,b,0,.5\na,b,FALSE,1\na,b,1,0\n", encoding="utf-8"
    )
    assert [r.label for r in read_rows(path)] == [True, False, False, True]
    assert [r.score for r in read_rows(path, needs="scores")] == [0.1, 0.5, 1.0, 0.0]
    path.write_text("prompt,chosen,rejected,completion,label\na,b,c,,\na,,,d,false\n")
    assert [r.completions for r in read_rows(path)] == [("b", "c"), ("d",)]


def test_parquet_names_the_row_and_all_columns(tmp_path):
    path = _parquet(tmp_path / "f.parquet", [GOOD] * 300 + [{**GOOD, "label": None}])
    with pytest.raises(FeedbackError, match=r"f\.parquet: row 300: label must be true or false, not None"):
        read_rows(path)
    other = _parquet(tmp_path / "g.parquet", [{"instruction": "a", "output": "b", "good": True}])
    with pytest.raises(FeedbackError, match=r"row 0: column 'prompt' is missing \(found: instruction, output, good\)"):
        read_rows(other)
    (row,) = read_rows(other, columns="prompt=instruction,completion=output,label=good")
    assert (row.prompt, row.completion, row.label) == ("a", "b", True)
    broken = tmp_path / "broken.parquet"
    for content in (b"", b"PAR1", path.read_bytes()[:-20], b"PAR1" + bytes(100) + b"PAR1"):
        broken.write_bytes(content)
        with pytest.raises(FeedbackError, match=r"broken\.parquet: ") as error:
            read_rows(broken)
        assert "\n" not in str(error.value)


# ---- columns and scales


def test_columns_are_renamed():
    record = {"question": "pack", "response": "pear", "kto_tag": False, "prompt": "not this", "chosen": "nor this"}
    for columns in (
        "prompt=question, completion = response,label=kto_tag",
        {"prompt": "question", "completion": "response", "label": "kto_tag"},
    ):
        (row,) = read_rows([{k: v for k, v in record.items() if k != "chosen"}], columns=columns)
        assert (row.prompt, row.completion, row.label) == ("pack", "pear", False)
    (row,) = read_rows([record], columns="prompt=question,completion=chosen")
    assert (row.completions, row.label) == (("nor this",), False)
    (row,) = read_rows([GOOD | {"good": False}], columns="label=good")
    assert row.label is False
    (swapped,) = read_rows([GOOD], columns="prompt=completion,completion=prompt")
    assert (swapped.prompt, swapped.completion) == (GOOD["completion"], GOOD["prompt"])
    with pytest.raises(FeedbackError, match=r"row 0: column 'wieght', given as weight, is missing \(found: prompt"):
        read_rows([GOOD], columns="weight=wieght")
    for columns, message in (
        ("completion", "must read ours=theirs"),
        ("completion=a=b", "must read ours=theirs"),
        ("complete=a", "did you mean 'completion'?"),
        ("label=a,label=b", "names a column twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows([GOOD], columns=columns)


def test_kto_tag_counts_where_there_is_no_label():
    untagged = {"prompt": "a", "completion": "b"}
    assert read_rows([untagged | {"kto_tag": False}])[0].label is False
    assert read_rows([untagged | {"label": True, "kto_tag": True}])[0].label is True
    assert read_rows([untagged | {"label": True, "kto_tag": None}])[0].label is True
    with pytest.raises(FeedbackError, match="label is True and kto_tag is False"):
        read_rows([untagged | {"label": True, "kto_tag": False}])
    with pytest.raises(FeedbackError, match="kto_tag must be true or false, not 1"):
        read_rows([untagged | {"kto_tag": 1}])


def test_likert_scores():
    records = [{"prompt": "a", "completion": "b", "score": score} for score in (1, 2, 3.5, 5)]
    for scale in ("1,5", (1, 5)):
        rows = read_rows(records, needs="scores", score_scale=scale)
        assert [r.score for r in rows] == [0, 0.25, 0.625, 1]
        assert [r.label for r in rows] == [False, False, True, True]
    with pytest.raises(FeedbackError, match=r"row 0: score must be a number in \[2, 5\], not 1"):
        read_rows(records, needs="scores", score_scale="2,5")
    assert read_rows(records, needs="rewards")[3].score == 5
    for scale, needs, message in (
        ("5", "scores", "two numbers"),
        ("5,1", "scores", "must rise"),
        ("0,inf", "scores", "must rise"),
        ("a,b", "scores", "two numbers"),
        ("1,5", "rewards", "not for rewards"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(records, needs=needs, score_scale=scale)


# ---- the Hub


def test_what_is_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("")
    for name in ("trl-lib/kto-mix-14k", "a/b:train", "openbmb/UltraFeedback", "a/b.v2"):
        assert is_hub_name(name), name
    for name in ("data/mine", "a/b.jsonl", "a/b.JSON", "a/b.csv", "a/b.parquet:train", "a/b.jsonl.gz", "/a/b", "./a", "../a/b",
                 "a/b/c", "imdb", "nowhere", "~/a", "a/", "a/b:", Path("a/b"), "a b/c", "https://a/b"):  # fmt: skip
        assert not is_hub_name(name), name


def test_a_hub_dataset_is_loaded_by_name_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if split == "none":
            raise ValueError("Unknown split\n'none'")
        return datasets.Dataset.from_list([GOOD, {**GOOD, "label": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows("owner/data", on_bad_row="skip")) == 1
    with pytest.raises(FeedbackError, match="owner/data:test: row 1: label must be true or false"):
        read_rows("owner/data:test")
    assert asked == [("owner/data", "train"), ("owner/data", "test")]
    with pytest.raises(
        FeedbackError,
        match=r"owner/data:none: no such file, and not loaded from the Hub .ValueError: Unknown split 'none'",
    ):
        read_rows("owner/data:none")


def test_only_a_hub_name_reaches_for_the_network(tmp_path, monkeypatch):
    pytest.importorskip("datasets")

    def refuse(*args, **kwargs):
        raise AssertionError("network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for source in (tmp_path / "owner" / "name", "nowhere", "owner/name.jsonl", str(tmp_path)):
        with pytest.raises(FeedbackError):
            read_rows(source)
    with pytest.raises(FeedbackError, match="owner/name: no such file, and not loaded from the Hub") as error:
        read_rows("owner/name")  # offline, see conftest
    assert "network" not in str(error.value)


def test_the_command_line_reads_from_the_hub_and_says_so_in_one_line(tmp_path, capfd):
    pytest.importorskip("datasets")
    arguments = ["train", "--model", "m", "--output_dir", str(tmp_path / "out"), "--data"]
    for data, message in (
        ("owner/name:test", "owner/name:test: no such file, and not loaded from the Hub"),
        ("owner/name.jsonl", "--data owner/name.jsonl: no such file"),
        (str(tmp_path), "a folder; pass one file of it"),
    ):
        assert cli.main([*arguments, data]) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]
    good = str(tiny.write(tmp_path / "f.jsonl", tiny.rows(9)))
    for option, message in (
        (["--columns", "complete=a"], "did you mean 'completion'?"),
        (["--score_scale", "1,5"], "score_scale is for objectives that read a score in [0, 1], not for labels"),
    ):
        assert cli.main([*arguments, good, *option]) == 2
        assert message in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("library", "source"), [("pyarrow", "f.parquet"), ("datasets", "owner/name")])
def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch, library, source):
    monkeypatch.chdir(tmp_path)
    _parquet(tmp_path / "f.parquet", [GOOD])
    for name in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FeedbackError, match=rf"{source}: reading it needs {library}: pip install 'bco_fast\[data\]'"):
        read_rows(source)


def test_files_need_neither_datasets_nor_pyarrow(tmp_path):
    path = _csv(tmp_path / "f.csv", [GOOD])
    code = f"import sys; from bco_fast.data.rows import read_rows; read_rows({str(path)!r}); print({{'datasets', 'pyarrow', 'torch', 'transformers'}} & set(sys.modules))"  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout.strip() == "set()", run.stderr


# ---- hostile files


@pytest.mark.parametrize("name", ["f.jsonl.gz", "f.jsonl", "f.json", "f.csv"])
def test_compressed_files_are_not_unpacked(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(50_000_000), 9))
    tracemalloc.start()
    try:
        with pytest.raises(FeedbackError, match=r"compressed files \(gzip\) are not opened"):
            read_rows(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["f.jsonl", "f.json", "f.csv"])
def test_an_endless_line_is_named_without_being_read(tmp_path, monkeypatch, name):
    """64 MiB without a line break, where a row may have 1 MiB."""
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / name
    with path.open("wb") as file:
        if name == "f.json":
            file.write(b'[{"a": "')
            file.seek(64 << 20)
            file.write(b'"}, ' + json.dumps(GOOD).encode() + b"]")
        else:
            file.write(b"prompt,completion,label\n" if name == "f.csv" else json.dumps(GOOD).encode() + b"\n")
            file.seek(64 << 20)
            file.write(b"\n" + json.dumps(GOOD).encode())
    place = "f.json: row 0" if name == "f.json" else f"{name}:2"
    tracemalloc.start()
    try:
        for read in (read_rows, read_prompts):  # `generate` and `online` read no more than `train`
            with pytest.raises(FeedbackError, match=rf"{place}: longer than 1 MiB(; on_bad_row|$)"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    if name == "f.jsonl":  # in the others a quote may open or close in it, so nothing behind it can be trusted
        assert [row.where for row in read_rows(path, on_bad_row="skip")] == [f"{path}:1", f"{path}:3"]


def test_strings_of_backslashes_and_quotes_take_linear_time(tmp_path):
    record = {**GOOD, "prompt": '\\"' * 200_000 + "\\\\" * 200_000}
    path = tmp_path / "f.json"
    path.write_text(json.dumps([record, GOOD]))
    assert [len(r.prompt) for r in read_rows(path)] == [800_000, len(GOOD["prompt"])]


def test_a_parquet_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_BOMB_BYTES", 1 << 20)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"prompt": ["a"], "completion": ["b" * (8 << 20)], "label": [True]})
    parquet.write_table(table, tmp_path / "f.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(FeedbackError, match="row group 0 unpacks"):
        read_rows(tmp_path / "f.parquet")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FeedbackError, match="Is a directory; pass one file of it"):
        read_rows(tmp_path)


def test_a_key_given_twice_is_refused(tmp_path):
    row = '{"prompt": "a", "completion": "b", "label": true, "label": false}'
    for name, text in {"a.jsonl": row, "a.json": f"[{row}]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(FeedbackError, match=r"the key 'label' is given twice"):
            read_rows(tmp_path / name)
    (tmp_path / "deep.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a", "content": "b"}], "label": true}'
    )
    with pytest.raises(FeedbackError, match=r"deep.jsonl:1: the key 'content' is given twice"):
        read_rows(tmp_path / "deep.jsonl")


def test_tables_with_other_separators(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\tlabel\nsay, a\tb\ttrue\n")
    (row,) = read_rows(tmp_path / "a.tsv")
    assert (row.prompt, row.completion, row.label) == ("say, a", "b", True)
    for name, text, kind in (("a.csv", "prompt;completion;label\na;b;1\n", "semicolons"), ("b.csv", "prompt\tlabel\na\t1\n", "tabs"), ("b.tsv", "prompt,label\na,1\n", "commas")):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(FeedbackError, match=f"{name}:1: the columns are separated by {kind}"):
            read_rows(tmp_path / name)
    (tmp_path / "c.csv").write_text('prompt,completion,label,weight\na,b,1,"0,5"\n')
    with pytest.raises(FeedbackError, match="weight must be a number >= 0, not '0,5'; write a decimal point"):
        read_rows(tmp_path / "c.csv")


def test_a_weight_that_is_infinite_in_float32_is_refused():
    row = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(FeedbackError, match=r"weight 1e\+39 is infinite in float32"):
        read_rows([row | {"weight": 1e39}])
    assert read_rows([row | {"weight": 3e38}])[0].weight == 3e38


def test_repeated_rows_and_texts_with_both_thumbs_are_counted(caplog):
    row = {"prompt": "a", "completion": "b", "label": True}
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "label": True}
    read_rows([row, row, row | {"label": False}, row | {"completion": "c"}, chat, chat])
    assert "2 rows repeat an earlier one, and 1 texts have both thumbs up and thumbs down" in caplog.text
    caplog.clear()
    read_rows([row, row | {"completion": "c", "label": False}])
    read_rows([row | {"score": score} for score in (0.1, 0.2)], needs="scores")
    assert not caplog.text


def test_a_label_that_disagrees_with_kto_tag_is_refused():
    with pytest.raises(FeedbackError, match="label is True and kto_tag is False"):
        read_rows([{"prompt": "a", "completion": "b", "label": True, "kto_tag": False}])


def test_chats_in_csv(tmp_path):
    chat = [{"role": "user", "content": "hi, you"}, {"role": "assistant", "content": 'a "b"'}]
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages", "label"], [json.dumps(chat), "true"]])
    (row,) = read_rows(path)
    assert (row.prompt, row.label) == ((chat[0],), True)
    assert row.completions[0]["content"] == 'a "b"'


@pytest.mark.parametrize(
    ("head", "cell", "reason"),
    [
        ("messages", "[{'role': 'user'}]", "messages is not JSON"),
        ("prompt", "[{'role': 'user', 'content': 'hi'}]", "prompt holds chat messages as text"),
        ("prompt", '[{"content": "hi", "role": "user"}]', "prompt holds chat messages as text"),
    ],
)
def test_what_csv_cannot_hold_names_what_can(tmp_path, head, cell, reason):
    path = tmp_path / "chats.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[head, "completion", "label"], [cell, "a", "true"]])
    with pytest.raises(
        FeedbackError, match=f"{reason}.*a column messages with a JSON list; JSON Lines and Parquet hold"
    ):
        read_rows(path)
