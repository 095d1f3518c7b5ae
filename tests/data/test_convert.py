"""Public datasets become feedback: small rows of their schemas, and what each recipe makes of them."""

import itertools
import json
import math
from pathlib import Path

import pytest
import tiny

from bco_fast import cli
from bco_fast.data.convert import RECIPES, ConvertReport, convert, convert_file
from bco_fast.data.rows import read_rows


def _steer(prompt, response, helpfulness, correctness=4, coherence=4):
    return {
        "prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": correctness,
        "coherence": coherence, "complexity": 2, "verbosity": 1,
    }  # fmt: skip


HELPSTEER2 = [
    _steer("c#", "good", 4, 4, 4),
    _steer("c#", "worse", 3, 2, 4),
    _steer("sum", "same", 2),
    _steer("sum", "equal", 2),
    _steer("lonely", "no partner", 4),
    _steer("poem", "bad", 0, 0, 0),
    _steer("poem", "fine", 4, 3, 2),
]


def test_helpsteer2_binary_is_helpfulness_4_up_3_down():
    rows = list(convert(HELPSTEER2, "helpsteer2", "binary", ties="keep"))
    assert [r["label"] for r in rows] == [True, False, False, False, True, False, True]
    assert rows[0] == {"prompt": "c#", "completion": "good", "label": True}
    lower = convert(HELPSTEER2, "helpsteer2", "binary", ties="keep", threshold=2)
    assert [r["label"] for r in lower] == [True] * 5 + [False, True]


def test_helpsteer2_binary_has_the_prompts_of_the_pairs():
    """arXiv 2404.04656, section 5.3: "only the prompts used in DPO training are included in the binary signal dataset"."""
    report = ConvertReport()
    rows = list(convert(HELPSTEER2, "helpsteer2", "binary", report=report))
    assert [(r["prompt"], r["label"]) for r in rows] == [("c#", True), ("c#", False), ("poem", False), ("poem", True)]
    assert (report.read, report.rows, report.no_preference, report.unpaired) == (7, 4, 1, 1)
    low = [_steer("a", "less", 1), _steer("a", "more", 3)]  # a pair, of which both sides are thumbs down
    assert [r["label"] for r in convert(low, "helpsteer2", "binary")] == [False, False]


def test_helpsteer2_pairs_by_the_weighted_sum():
    """arXiv 2408.15339, section 4, and 2404.04656, section 5.3, rank the two responses differently."""
    records = [
        _steer("a", "helpful", 4, 1, 1),
        _steer("a", "sound", 3, 4, 4),
        _steer("b", "x", 2, 3, 2),
        _steer("b", "y", 2, 1, 2),
    ]
    by_score = list(convert(records, "helpsteer2", "pairs", rank_by="score"))
    assert [(r["chosen"], r["rejected"]) for r in by_score] == [("sound", "helpful"), ("x", "y")]
    assert [(r["chosen"], r["rejected"]) for r in convert(records, "helpsteer2", "pairs")] == [("helpful", "sound")]


def test_chosen_is_the_thumbs_up_of_each_pair():
    binary, chosen = (
        list(convert(HELPSTEER2, "helpsteer2", to, **options)) for to, options in (("binary", {}), ("chosen", {}))
    )
    assert chosen == [row for row in binary if row["label"]]
    (row,) = convert(CAPYBARA, "pairs", "chosen", format="chat")
    assert row == {
        "prompt": _messages(("user", "hi"), ("assistant", "hello"), ("user", "a fruit?")),
        "completion": _messages(("assistant", "apple")),
        "label": True,
    }


def test_helpsteer2_prompts_are_written_once():
    assert list(convert(HELPSTEER2, "helpsteer2", "prompts")) == [
        {"prompt": p} for p in ("c#", "sum", "lonely", "poem")
    ]
    (row,) = convert(HELPSTEER2[:2], "helpsteer2", "prompts", format="chat")
    assert row == {"prompt": _messages(("user", "c#"))}


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("binary", {"rank_by": "score"}, "rank_by has no effect on helpsteer2 to binary"),
        ("pairs", {"ties": "keep"}, "ties has no effect on helpsteer2 to pairs"),
        ("pairs", {"rank_by": "x"}, "rank_by must be helpfulness or score"),
        ("binary", {"ties": "x"}, "ties must be drop or keep"),
    ],
)
def test_options_of_helpsteer2_that_do_not_fit(to, options, message):
    with pytest.raises(ValueError, match=message):
        convert(HELPSTEER2, "helpsteer2", to, **options)


def test_helpsteer2_score_is_the_weighted_sum_scaled_to_one():
    scores = [r["score"] for r in convert(HELPSTEER2, "helpsteer2", "score")]
    assert scores[0] == 1.0
    assert scores[5] == 0.0
    assert math.isclose(scores[1], (0.65 * 3 + 0.8 * 2 + 0.45 * 4) / (4 * 1.9), abs_tol=1e-6)
    assert math.isclose(scores[6], (0.65 * 4 + 0.8 * 3 + 0.45 * 2) / 7.6, abs_tol=1e-6)


def test_helpsteer2_pairs_are_neighbours_of_one_prompt():
    report = ConvertReport()
    assert list(convert(HELPSTEER2, "helpsteer2", "pairs", report=report)) == [
        {"prompt": "c#", "chosen": "good", "rejected": "worse"},
        {"prompt": "poem", "chosen": "fine", "rejected": "bad"},
    ]
    assert (report.read, report.rows, report.no_preference) == (7, 2, 1)


def _messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ULTRAFEEDBACK = [
    {
        "source": "x", "instruction": "name a fruit", "models": ["a", "b", "c"],
        "completions": [
            {"model": "a", "response": "apple", "overall_score": 8.5, "annotations": {}},
            {"model": "b", "response": "hammer", "overall_score": 2.0, "annotations": {}},
            {"model": "c", "response": "pear", "overall_score": 8.5, "annotations": {}},
        ],
    },
    {"instruction": "tie", "completions": [{"response": "a", "overall_score": 5.0}, {"response": "b", "overall_score": 5.0}]},
    {"instruction": "none", "completions": []},
]  # fmt: skip
BINARIZED = [
    {
        "prompt": "name a fruit", "prompt_id": "1", "messages": [], "score_chosen": 8.0, "score_rejected": 4.0,
        "chosen": _messages(("user", "name a fruit"), ("assistant", "apple")),
        "rejected": _messages(("user", "name a fruit"), ("assistant", "hammer")),
    },
    {
        "prompt": "tie", "score_chosen": 8.0, "score_rejected": 8.0,
        "chosen": _messages(("user", "tie"), ("assistant", "a")), "rejected": _messages(("user", "tie"), ("assistant", "b")),
    },
]  # fmt: skip
CAPYBARA = [
    {
        "source": "x", "conversation": [], "rating_chosen": 5, "rating_rejected": 4, "prompt": "[...]",
        "chosen": _messages(("user", "hi"), ("assistant", "hello"), ("user", "a fruit?"), ("assistant", "apple")),
        "rejected": _messages(("user", "hi"), ("assistant", "hello"), ("user", "a fruit?"), ("assistant", "hammer")),
    }
]  # fmt: skip


def test_ultrafeedback_pairs_best_against_worst():
    report = ConvertReport()
    assert list(convert(ULTRAFEEDBACK, "ultrafeedback", "pairs", report=report)) == [
        {"prompt": "name a fruit", "chosen": "apple", "rejected": "hammer"}
    ]
    assert report.no_preference == 2
    assert list(convert(BINARIZED, "ultrafeedback", "pairs")) == [
        {"prompt": "name a fruit", "chosen": "apple", "rejected": "hammer"}
    ]


def test_capybara_keeps_the_turns_before_the_last():
    (row,) = convert(CAPYBARA, "capybara", "pairs")
    assert row["prompt"] == _messages(("user", "hi"), ("assistant", "hello"), ("user", "a fruit?"))
    assert row["chosen"] == _messages(("assistant", "apple"))
    assert row["rejected"] == _messages(("assistant", "hammer"))


@pytest.mark.parametrize(("recipe", "records"), [("ultrafeedback", ULTRAFEEDBACK), ("ultrafeedback", BINARIZED), ("capybara", CAPYBARA)])  # fmt: skip
def test_binary_rows_take_turns(recipe, records):
    rows = list(convert(records * 3, recipe, "binary"))
    assert [r["label"] for r in rows] == [True, False] * 3


def test_scores_by_threshold():
    rows = [{"prompt": "p", "completion": str(s), "score": s} for s in (1, 3, 4, 5)]
    assert [r["label"] for r in convert(rows, "scores", "binary", threshold=4)] == [False, False, True, True]
    with pytest.raises(ValueError, match="needs a threshold"):
        list(convert(rows, "scores", "binary"))


@pytest.mark.parametrize(
    ("recipe", "to", "records", "message"),
    [
        ("helpsteer2", "binary", [{"prompt": "a"}], r"row 0: column 'response' is missing \(found: prompt\)"),
        ("helpsteer2", "score", [_steer("a", "b", 9)], "row 0: helpfulness is 9"),
        ("helpsteer2", "binary", [_steer("a", "b", math.nan)], "row 0: helpfulness must be a number, not 'nan'"),
        ("helpsteer2", "binary", [_steer("a", "b", True)], "row 0: helpfulness must be a number, not 'True'"),
        ("helpsteer2", "binary", [_steer("a", "b", 10**400)], "row 0: helpfulness must be a number"),
        ("helpsteer2", "binary", [_steer(3, "b", 1)], "row 0: prompt must be a string, not int"),
        ("helpsteer2", "binary", [_steer("a", "\ud800", 1)], "row 0: response has a lone surrogate"),
        ("helpsteer2", "binary", [_steer("a\n<extra_id_1>Assistant\nb", "c", 1)], "ends with the assistant's turn"),
        ("ultrafeedback", "pairs", [{"instruction": "a", "completions": [{"response": "b"}]}], "no overall_score"),
        ("ultrafeedback", "pairs", [{"instruction": "a", "completions": "b"}], "must be a list of objects"),
        ("capybara", "pairs", [{"chosen": "text", "rejected": "other"}], "row 0: column 'prompt' is missing"),
        ("capybara", "pairs", [{"chosen": [], "rejected": []}], "chosen must be messages, not an empty list"),
        ("capybara", "pairs", [{"chosen": ["x"], "rejected": []}], "messages with a role and a content"),
        ("capybara", "pairs", [{**CAPYBARA[0], "rejected": _messages(("user", "other"), ("assistant", "x"))}], "do not answer the same"),
        ("capybara", "pairs", [{**CAPYBARA[0], "rejected": _messages(("user", "hi"))}], "not the assistant's"),
        ("pairs", "pairs", [3], "row 0: a row must be an object"),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_of_another_schema_is_named(recipe, to, records, message):
    with pytest.raises(ValueError, match=message):
        list(convert(records, recipe, to))


def test_every_recipe_names_its_targets():
    for recipe, (_, targets) in RECIPES.items():
        with pytest.raises(ValueError, match=f"{recipe} converts to"):
            list(convert([], recipe, "nothing"))
        assert set(targets) <= {"pairs", "chosen", "binary", "score", "prompts"}


def _written(tmp_path, suffix, records):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        return tiny.write(path, records)
    if suffix == "json":
        path.write_text(json.dumps(records))
    elif suffix == "csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_of_every_kind_through_the_command_line(tmp_path, capsys, suffix):
    data, output = _written(tmp_path, suffix, HELPSTEER2), tmp_path / "out.jsonl"
    arguments = ["convert", "--data", str(data), "--recipe", "helpsteer2", "--to", "binary", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    rows = read_rows(output)  # what it writes is what training reads
    assert [r.label for r in rows] == [True, False, False, True]
    assert rows[0].completion == "good"


def test_a_hub_dataset_is_read_by_name(tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **options: asked.append((name, options)) or iter(HELPSTEER2)
    )
    arguments = ["convert", "--data", "nvidia/HelpSteer2", "--recipe", "helpsteer2", "--to", "score", "--split", "validation", "--output", str(tmp_path / "o.jsonl")]  # fmt: skip
    assert cli.main(arguments) == 0
    assert asked == [("nvidia/HelpSteer2", {"split": "validation"})]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--recipe": "helpster2"}, "did you mean 'helpsteer2'"),
        ({"--to": "triples"}, "argument --to: invalid choice: 'triples'"),
        ({"--data": "nowhere.jsonl"}, "--data nowhere.jsonl: no such file"),
        ({"--recipe": "ultrafeedback", "--to": "pairs"}, "in.jsonl:1: column 'instruction'"),
        ({"--to": "score", "--threshold": "3"}, "a threshold has no effect on helpsteer2 to score"),
        ({"--split": "test"}, "a split is for a name on the Hub"),
        ({"--format": "tex"}, "invalid choice: 'tex'"),
        ({"--on_bad_row": "ignore"}, "invalid choice: 'ignore'"),
    ],
    ids=str,
)
def test_the_command_line_refuses_in_one_line_and_writes_nothing(tmp_path, capsys, changes, message):
    data = tiny.write(tmp_path / "in.jsonl", [{**r, "completions": []} for r in HELPSTEER2])
    options = {"--data": str(data), "--recipe": "helpsteer2", "--to": "binary", "--output": str(tmp_path / "out.jsonl")}
    assert cli.main(["convert", *(x for pair in (options | changes).items() for x in pair)]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_pairs_with_one_broken_line_leave_no_file(tmp_path, capsys):
    data = tmp_path / "in.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{broken\n')
    arguments = ["convert", "--data", str(data), "--recipe", "pairs", "--to", "binary", "--output", str(tmp_path / "o.jsonl")]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "in.jsonl:2: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "o.jsonl").exists()


TURNS = "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\na fruit?"


def test_the_turns_of_a_helpsteer2_prompt_become_messages(caplog, tmp_path):
    """As nvidia/HelpSteer2's card prints its multi-turn format. What a reader takes for text would be trained on."""
    records = [
        _steer(TURNS, "apple", 4),
        _steer(TURNS, "hammer", 1),
        _steer("c#", "a language", 4),
        _steer("c#", "a", 1),
    ]
    talk = _messages(("user", "hi"), ("assistant", "hello"), ("user", "a fruit?"))
    auto = list(convert(records, "helpsteer2", "pairs"))
    assert auto[0] == {"prompt": talk, "chosen": _messages(("assistant", "apple")), "rejected": _messages(("assistant", "hammer"))}  # fmt: skip
    assert auto[1] == {"prompt": "c#", "chosen": "a language", "rejected": "a"}
    chat = list(convert(records, "helpsteer2", "binary", format="chat"))
    assert chat[0] == {"prompt": talk, "completion": _messages(("assistant", "apple")), "label": True}
    assert chat[2]["prompt"] == _messages(("user", "c#"))
    report = ConvertReport()
    text = list(convert(records, "helpsteer2", "score", format="text", report=report))
    assert [row["prompt"] for row in text] == ["c#", "c#"]
    assert (report.multi_turn, report.rows, report.chats) == (2, 2, 0)
    convert_file(tiny.write(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl", "helpsteer2", "binary")
    assert "2 of 4 rows are messages" in caplog.text


def test_the_example_of_helpsteer2s_card():
    (row,) = convert([_steer("c#", "C# is ...", 3, 4, 4)], "helpsteer2", "score")
    assert row["score"] == round((0.65 * 3 + 0.8 * 4 + 0.45 * 4) / 7.6, 6) == 0.914474
    (row,) = convert([_steer("c#", "C# is ...", 3, 4, 4)], "helpsteer2", "binary", ties="keep")
    assert row["label"] is False


def test_messages_are_written_for_a_chat_template_on_request():
    (row,) = convert(BINARIZED[:1], "ultrafeedback", "pairs", format="chat")
    assert row == {
        "prompt": _messages(("user", "name a fruit")),
        "chosen": _messages(("assistant", "apple")),
        "rejected": _messages(("assistant", "hammer")),
    }
    talk = _messages(("system", "s"), ("user", "u"))
    separate = {"prompt": talk, "chosen": _messages(("assistant", "a")), "rejected": _messages(("assistant", "b"))}
    repeated = {"prompt": talk, "chosen": [*talk, *separate["chosen"]], "rejected": [*talk, *separate["rejected"]]}
    assert list(convert([separate, repeated], "pairs", "pairs")) == [separate, separate]


def test_what_is_whole_but_of_no_use_is_left_out_and_counted():
    report = ConvertReport()
    unrated = {"instruction": "q", "completions": [{"response": "a", "overall_score": 3}, {"response": "b", "overall_score": None}, {"response": "c", "overall_score": math.nan}]}  # fmt: skip
    silent = {"instruction": "q", "completions": [{"response": "a", "overall_score": 3}, {"response": " ", "overall_score": 1}]}  # fmt: skip
    assert not list(convert([unrated, silent], "ultrafeedback", "binary", report=report))
    assert (report.read, report.no_preference, report.empty) == (2, 1, 1)
    report = ConvertReport()
    rows = [_steer("a", "1", 4), _steer("b", "2", 4), _steer("b", "", 1), _steer("c", "3", 4), _steer("c", "4", 1), _steer("c", "5", 0)]  # fmt: skip
    assert len(list(convert(rows, "helpsteer2", "pairs", report=report))) == 1
    assert (report.read, report.rows, report.empty, report.unpaired) == (6, 1, 1, 3)


def test_bad_rows_can_be_left_out(caplog):
    report = ConvertReport()
    records = [HELPSTEER2[0], {"prompt": "x"}, 3, HELPSTEER2[1]]
    rows = list(convert(records, "helpsteer2", "pairs", on_bad_row="skip", report=report))
    assert [row["chosen"] for row in rows] == ["good"]
    assert (report.read, report.rows, report.bad, report.unpaired) == (4, 1, 2, 0)
    assert "row 1: column 'response'" in caplog.text


def test_likert_ratings_and_weights():
    rows = [
        {"prompt": "p", "completion": "c", "rating": "4", "weight": 2},
        {"prompt": "p", "completion": "d", "rating": 3.5},
    ]
    assert list(convert(rows, "scores", "binary", threshold=4)) == [
        {"prompt": "p", "completion": "c", "label": True, "weight": 2.0},
        {"prompt": "p", "completion": "d", "label": False},
    ]
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "weight": 0.5}
    assert [row["weight"] for row in convert([pair], "pairs", "binary")] == [0.5, 0.5]
    with pytest.raises(ValueError, match="row 0: weight must be a number >= 0"):
        list(convert([{**pair, "weight": -1}], "pairs", "pairs"))


def test_records_are_converted_one_by_one():
    forever = itertools.cycle(HELPSTEER2)
    assert len(list(itertools.islice(convert(forever, "helpsteer2", "pairs"), 50))) == 50


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_a_bad_row_of_a_file_is_named_by_file_and_row(tmp_path, suffix):
    data = _written(tmp_path, suffix, [*HELPSTEER2[:2], _steer("a", "b", 7)])
    place = {"jsonl": ":3", "csv": ":4"}.get(suffix, ": row 2")
    with pytest.raises(ValueError, match=rf"data\.{suffix}{place}: helpfulness is 7"):
        convert_file(data, tmp_path / "out.jsonl", "helpsteer2", "binary")
    assert not (tmp_path / "out.jsonl").exists()
    report = convert_file(data, tmp_path / "out.jsonl", "helpsteer2", "binary", on_bad_row="skip")
    assert (report.rows, report.bad) == (2, 1)


def test_the_commands_of_the_page_work(tmp_path, monkeypatch, capsys):
    import datasets
    from test_density_ratio import _rows

    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = page.replace("\\\n", " ").splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("bco-fast ")]
    assert {command[0] for command in commands} == {"convert", "udm"}
    hub = {"nvidia/HelpSteer2": HELPSTEER2, "HuggingFaceH4/ultrafeedback_binarized": BINARIZED}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: hub[name])
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (tmp_path / "ratings.csv").write_text("prompt,completion,score\na,b,5\na,c,2\n")
    for name in ("feedback", "later"):
        tiny.write(tmp_path / f"{name}.jsonl", _rows(60))
    for command in commands:
        assert cli.main(command) == 0, capsys.readouterr().err
        assert (tmp_path / command[-1]).is_file()
    recipes = {command[command.index("--recipe") + 1] for command in commands if command[0] == "convert"}
    assert recipes < set(RECIPES)
    assert all(f"`{recipe}`" in page for recipe in RECIPES)
