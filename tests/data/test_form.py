"""A model is sampled from in the form that it was trained on, or one line says why not."""

import json
import logging

import chats
import pytest

from bco_fast import cli
from bco_fast.data.form import follow, form_of, trained_form
from bco_fast.data.rows import read_rows
from bco_fast.data.tokenize import tokenize_rows
from bco_fast.training.record import _describe

TEXT = {"prompt": "a", "completion": "b", "label": True}
CHAT = {"messages": [chats.USER, chats.FOUR], "label": True}
OTHER = chats.tokenizer(chats.CHATML + " ")
BARE = chats.tokenizer(None)


def _recorded(folder, rows):
    folder.mkdir()
    dataset = tokenize_rows(read_rows(rows), chats.TOKENIZER, max_length=200)
    (folder / "run.json").write_text(json.dumps({"data": {"train": _describe(dataset)}}))


@pytest.mark.parametrize(("rows", "form"), [([TEXT], "text"), ([CHAT], "chat")])
def test_the_record_says_the_form_and_checkpoints_find_it(tmp_path, rows, form):
    _recorded(tmp_path / "out", rows)
    (tmp_path / "out" / "checkpoint-3").mkdir()
    expected = form_of(read_rows(rows), chats.TOKENIZER)
    assert expected["form"] == form
    assert (expected["template"] is None) is (form == "text")
    assert trained_form(tmp_path / "out") == trained_form(tmp_path / "out" / "checkpoint-3") == expected
    assert form_of(read_rows([TEXT, CHAT]), chats.TOKENIZER)["form"] == "text and chat"


@pytest.mark.parametrize("content", ["", "[]", '{"data": null}', '{"data": {"train": {"form": 3}}}', "[" * 9000])
def test_a_damaged_record_says_nothing(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    assert trained_form(tmp_path) is None


def _trained(row):
    return form_of(read_rows([row]), chats.TOKENIZER)


STRINGS, TALKS = [{"prompt": "a"}], [{"prompt": [chats.USER]}]


@pytest.mark.parametrize(
    ("trained", "prompts", "tokenizer", "asked", "used", "said"),
    [
        (None, STRINGS, chats.TOKENIZER, "auto", "auto", ""),
        (TEXT, STRINGS, chats.TOKENIZER, "auto", "off", ""),
        (TEXT, STRINGS, chats.TOKENIZER, "on", "on", "trained on text"),
        (TEXT, TALKS, chats.TOKENIZER, "auto", "auto", "trained on text"),
        (TEXT, [{"prompt": "a", "turns": ["a", "b"]}], chats.TOKENIZER, "auto", "auto", "trained on text"),
        (CHAT, STRINGS, chats.TOKENIZER, "auto", "auto", ""),
        (CHAT, STRINGS, chats.TOKENIZER, "off", "off", "trained on chats"),
        (CHAT, STRINGS, BARE, "auto", "auto", "trained on chats"),
        (CHAT, TALKS, OTHER, "auto", "auto", "another chat template"),
        (CHAT, TALKS, chats.TOKENIZER, "off", "off", ""),
    ],
)
def test_prompts_follow_the_form(caplog, trained, prompts, tokenizer, asked, used, said):
    with caplog.at_level(logging.WARNING, "bco_fast"):
        assert follow(trained and _trained(trained), prompts, tokenizer, asked) == used
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])


def test_generate_reads_the_record(tmp_path, monkeypatch, capsys):
    _recorded(tmp_path / "m", [TEXT])
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    seen = []

    def generate_turns(model, tokenizer, prompts, sampling, *, chat, progress):
        seen.append(chat)
        raise ValueError("enough")

    monkeypatch.setattr("bco_fast.evaluation.generate.generate_turns", generate_turns)
    monkeypatch.setattr("bco_fast.cli.generate.load_model_and_tokenizer", lambda *_, **__: (None, chats.TOKENIZER))
    arguments = ["generate", "--model", str(tmp_path / "m"), "--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "c")]  # fmt: skip
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--chat", "on"]) == 2
    assert seen == ["off", "on"]
    assert capsys.readouterr().err.count("enough") == 2
