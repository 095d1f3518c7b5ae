"""`bco-fast check`: counts, cuts, contradictions and advice, from config and tokenizer alone."""

import json

import chats
import pytest
import tiny
from transformers import LlamaConfig

from bco_fast import cli
from bco_fast.cli import check as command
from bco_fast.data.check import advise, examine, needs_of
from bco_fast.data.rows import read_rows
from bco_fast.models.count import Memory


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder without weights."""
    folder = tmp_path / "m"
    LlamaConfig(**{"vocab_size": len(chats.TOKENIZER)} | tiny.TINY).save_pretrained(folder)
    chats.TOKENIZER.save_pretrained(folder)
    monkeypatch.setattr("bco_fast.models.count.count_step", lambda *_, **__: Memory("layer", {"layer": 2e9}, 0.0))
    return folder


def _rows():
    made = [{"prompt": f"Q{i}?", "completion": f"answer {i}", "label": i > 1} for i in range(8)]
    made.append(made[3])
    made.append({**made[4], "label": False})
    made.append({"prompt": "<s>twice", "completion": "a </s> b", "label": True})
    made.append({"prompt": "p" * 50, "completion": "long " * 12, "label": True})
    return made


def test_check_counts_cuts_and_shows(model, tmp_path, capsys):
    data = tiny.write(tmp_path / "f.jsonl", _rows())
    assert cli.main(["check", str(data), "--model", str(model), "--max_length", "40"]) == 0
    *text, last = capsys.readouterr().out.strip().splitlines()
    found, text = json.loads(last), "\n".join(text)
    assert (found["rows"], found["up"], found["down"], found["format"]) == (12, 9, 3, "text")
    assert (found["repeated_rows"], found["both_thumbs"]) == (1, 1)
    assert found["both_thumbs_at"][0].endswith("f.jsonl:10")
    assert found["special_tokens_as_text"]["become_tokens"] == 1
    assert found["cut"] == {"max_length": 40, "prompts": 1, "completions": 1, "empty": 0}
    assert found["tokens"]["together"]["max"] == 50 + 60 + 1
    assert found["step_gb"] == 2.0
    assert found["epoch_pflop"] == pytest.approx(3 * found["reference_pflop"])
    assert found["reference_pflop"] > 0
    assert "trained, 9 tokens: answer 2«<|im_end|>»" in text
    why = next(advice["why"] for advice in found["advice"] if advice["option"] == "--max_length 64")
    assert why == "40 cuts 1 prompts and 1 completions; the model has no more positions"
    options = [advice["option"] for advice in found["advice"]]
    assert {"--loss_type bco", "--beta 0.5", "--desirable_weight auto", "--max_length 64"} <= set(options)


def test_the_cuts_are_those_of_training(tmp_path):
    from bco_fast.data.tokenize import tokenize_rows

    rows = read_rows(_rows())
    for limits in ({"max_length": 40}, {"max_length": 40, "max_prompt_length": 8, "max_completion_length": 6}):
        facts = examine(rows, chats.TOKENIZER, **limits)
        trained = tokenize_rows(rows, chats.TOKENIZER, **limits)
        assert facts["cut"]["prompts"] == trained.report["prompts_cut"]
        assert facts["cut"]["completions"] == trained.report["completions_cut"]
        assert facts["shown"][0]["trained_tokens"] == int(trained.examples[2].completion_mask.sum())


def test_a_chat_is_shown_as_its_template_renders_it():
    rows = [{"messages": [chats.USER, {"role": "assistant", "content": "4 </s>"}], "label": up} for up in (True, False)]
    facts = examine(read_rows(rows), chats.TOKENIZER, max_length=200)
    shown = facts["shown"][0]
    assert shown["prompt"] == "«<|im_start|>»user\nWhat is 2 + 2?«<|im_end|>»\n«<|im_start|>»assistant\n"
    assert shown["trained"] == "4 </s>«<|im_end|>»\n"
    assert (facts["special_tokens_as_text"]["stay_text"], facts["both_thumbs"]) == (2, 1)


@pytest.mark.parametrize(
    ("rows", "needs", "option"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "labels", "--loss_type dpo"),
        ([{"prompt": "a", "completion": "b", "score": 0.3}], "scores", "--loss_type una_score"),
        ([{"prompt": "a", "completion": "b", "label": True}], "labels", "--loss_type sft"),
        ([{"prompt": "a", "completion": "b", "label": False}], "labels", "collect thumbs up"),
    ],
)
def test_the_objective_follows_the_rows(tmp_path, rows, needs, option):
    assert needs_of(str(tiny.write(tmp_path / "f.jsonl", rows))) == needs
    facts = examine(read_rows(rows, needs=needs), chats.TOKENIZER)
    assert advise(facts, needs)[0].option == option


def test_lengths_that_tell_the_classes_apart_are_named():
    rows = [{"prompt": f"{i}", "completion": "x" * (30 + i if i % 2 else 5), "label": bool(i % 2)} for i in range(60)]
    facts = examine(read_rows(rows), chats.TOKENIZER)
    assert facts["length_auc"][0] == 1.0
    why = {advice.option: advice.why for advice in advise(facts, "labels")}
    assert "thumbs up are the longer ones in 100%" in why["watch the lengths in the report"]
    assert "0 of 60 prompts" in why["look at the AUC of `bco-fast udm`"]
    assert "--desirable_weight auto" not in why


@pytest.mark.parametrize(
    ("wrong", "word"),
    [(["--max_length", "65"], "--max_length"), (["--labels", "up=1"], "labels"), (["--beta", "1"], "--beta")],
)
def test_wrong_flags_are_one_line(model, tmp_path, capsys, wrong, word):
    data = tiny.write(tmp_path / "f.jsonl", _rows())
    assert cli.main(["check", str(data), "--model", str(model), "--max_length", "40", *wrong]) == 2
    assert word in capsys.readouterr().err.splitlines()[-1]
    assert cli.main(["check", str(tmp_path / "none"), "--model", str(model)]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_long_text_keeps_both_ends():
    assert command._ends("a" * 300 + "\n" + "b" * 300) == "a" * 240 + " [...] " + "b" * 240
