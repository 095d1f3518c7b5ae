"""Win rates against numbers counted by hand; files of different formats meet by id or by prompt."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from bco_fast import cli
from bco_fast.evaluation.generate import Completion, write_completions
from bco_fast.evaluation.judge import (
    Answer,
    JudgeError,
    _transcript,
    as_summary,
    describe,
    judge,
    match,
    read_answers,
    win_rate_interval,
)
from bco_fast.online.rewards import RewardError


def words(prompts, completions, **columns):
    """A reward: the number of words."""
    return [len(c.split()) for c in completions]


def answers(*completions, prompt="p{}"):
    return [Answer(c, prompt.format(i), None, f"row {i}") for i, c in enumerate(completions)]


def test_counts_and_lengths_by_hand():
    a = answers("x", "x x x", "xx xx", "y")
    b = answers("x x", "x", "x x", "z")
    verdict = judge(a, b, words, seed=1)
    assert (verdict.wins, verdict.ties, verdict.losses, verdict.win_rate) == (1, 2, 1, 0.5)
    assert (verdict.compared, verdict.prompts, verdict.only_in_a, verdict.only_in_b) == (4, 4, 0, 0)
    assert (verdict.reward_a, verdict.reward_b) == (7 / 4, 6 / 4)
    assert (verdict.lengths_a.words, verdict.lengths_b.words, verdict.lengths_a.tokens) == (7 / 4, 6 / 4, None)
    assert (verdict.lengths_a.characters, verdict.lengths_b.characters) == (3, 2)
    assert verdict.length_correlation == pytest.approx(np.corrcoef([0, 1, 0.5, 0.5], [-1, 2, 0, 0])[0, 1])
    assert (verdict.win_rate_when_longer, verdict.win_rate_when_shorter) == (1.0, 0.0)
    by_tokens = judge(a, b, words, count_tokens=len)
    assert by_tokens.length_unit == "tokens"
    assert by_tokens.lengths_a.tokens == 3
    assert by_tokens.length_correlation == pytest.approx(np.corrcoef([0, 1, 0.5, 0.5], [-2, 4, 2, 0])[0, 1])
    swapped = judge(b, a, words, seed=1)
    assert swapped.win_rate == 0.5
    assert (swapped.wins, swapped.losses) == (1, 1)


def test_the_same_file_is_a_tie():
    verdict = judge(answers("x", "y y"), answers("x", "y y"), words)
    assert (verdict.win_rate, verdict.low, verdict.high, verdict.ties) == (0.5, 0.5, 0.5, 2)
    assert verdict.length_correlation is None
    assert "do not vary" in describe(verdict)
    assert json.loads(json.dumps(as_summary(verdict)))["win_rate"] == 0.5


def test_the_interval_is_the_binomials():
    """805 independent wins: percentile bootstrap within Monte Carlo error of the normal approximation."""
    wins = (np.random.default_rng(0).random(805) < 0.6).astype(float)
    low, high = win_rate_interval(wins, range(805))
    half = 1.96 * math.sqrt(wins.mean() * (1 - wins.mean()) / 805)
    assert low == pytest.approx(wins.mean() - half, abs=0.004)
    assert high == pytest.approx(wins.mean() + half, abs=0.004)
    assert win_rate_interval(wins, range(805)) == (low, high)
    assert win_rate_interval(wins, range(805), seed=1) != (low, high)


def test_the_interval_is_over_prompts_not_over_samples():
    """16 samples of each prompt that all go one way carry no more than one does."""
    once = (np.arange(50) % 2).astype(float)
    groups = list(range(50))
    assert win_rate_interval(np.repeat(once, 16), np.repeat(groups, 16).tolist()) == win_rate_interval(once, groups)


@pytest.mark.slow
def test_the_interval_covers():
    """300 experiments of 200 prompts, two samples each: 95 % intervals hold the truth in 95 % (standard error 1.3)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        chance = rng.beta(2, 1, size=200)  # of mean 2/3, shared by a prompt's samples
        wins = (rng.random((2, 200)) < chance).astype(float).ravel()
        low, high = win_rate_interval(wins, [*range(200)] * 2, resamples=1000)
        held += low <= 2 / 3 <= high
    assert 0.91 <= held / 300 <= 0.985


FORMATS = ("alpaca_eval", "arena_hard", "jsonl")


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_files_of_all_formats_meet(tmp_path, first, second):
    prompts = [{"prompt": f"Why {i}?", "question_id": f"q{i}"} for i in range(4)]
    write_completions(tmp_path / "a", prompts, [Completion("x " * i, i, True) for i in range(4)], first, generator="a")
    write_completions(
        tmp_path / "b", prompts[::-1], [Completion("x x", 2, True)] * 4, second, generator="b"
    )  # fmt: skip
    a, b = read_answers(tmp_path / "a"), read_answers(tmp_path / "b")
    seen = []

    def reward(prompts, completions, **columns):
        seen.append(prompts)
        return words(prompts, completions)

    verdict = judge(a, b, reward, prompts={row["question_id"]: row["prompt"] for row in prompts})
    assert (verdict.wins, verdict.ties, verdict.losses) == (1, 1, 2)
    assert seen == [[f"Why {i}?" for i in range(4)]] * 2
    if {first, second} in ({"arena_hard"}, {"arena_hard", "alpaca_eval"}):
        with pytest.raises(JudgeError, match="--prompts FILE"):
            judge(a, b, reward)


def test_samples_of_a_prompt_meet_in_order_and_the_rest_is_counted():
    a = [Answer(c, p, None, "") for p, c in (("p", "1"), ("q", "2"), ("p", "3"), ("r", "4"), ("p", "5"))]
    b = [Answer(c, p, None, "") for p, c in (("p", "6"), ("s", "7"), ("p", "8"), ("q", "9"))]
    assert [(p, x.completion, y.completion) for p, x, y in match(a, b)] == [
        ("p", "1", "6"),
        ("q", "2", "9"),
        ("p", "3", "8"),
    ]
    verdict = judge(a, b, lambda prompts, completions, **_: [float(c) for c in completions])
    assert (verdict.compared, verdict.prompts, verdict.only_in_a, verdict.only_in_b) == (3, 2, 2, 1)
    with pytest.raises(JudgeError, match="no prompt in common"):
        judge(a, answers("x"), words)


def test_columns_reach_the_reward():
    a = [Answer("x", "p", None, "", {"answer": 1, "odd": 1}), Answer("x", "q", None, "", {"answer": 2})]
    seen = []
    b = [Answer("y", "p", None, ""), Answer("y", "q", None, "")]
    judge(a, b, lambda prompts, **columns: seen.append(columns) or [0, 0])
    assert seen[0] == {"completions": ["x", "x"], "answer": [1, 2]}


def test_a_bad_reward_says_whose_and_for_which_prompt():
    def reward(prompts, completions, **columns):
        return [math.nan if c == "bad" else 1.0 for c in completions]

    with pytest.raises(RewardError, match=r"completions of B: the reward of prompt 1 \('p1'\) is nan"):
        judge(answers("x", "x"), answers("x", "bad"), reward)


def _chat(*contents):
    roles = ("user", "assistant", "user")
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_completions_of_chats_are_compared_as_generate_writes_them(tmp_path, caplog):
    asked = [{"prompt": [{"role": "system", "content": "Be brief."}, *_chat("hi")]}, {"prompt": _chat("a", "b", "c")}]
    sides = []
    for name, texts in (("a", ("x", "x x x")), ("b", ("x x", "x"))):
        path = tmp_path / f"{name}.jsonl"
        write_completions(path, asked, [Completion(text, 1, True) for text in texts], "jsonl", generator=name)
        sides.append(read_answers(path))
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions))
        return words(prompts, [message["content"] for (message,) in completions])

    verdict = judge(*sides, reward)
    assert (verdict.wins, verdict.losses, verdict.prompts) == (1, 1, 2)
    assert seen[0] == ([row["prompt"] for row in asked], [[{"role": "assistant", "content": text}] for text in ("x", "x x x")])  # fmt: skip
    assert not caplog.records


def test_files_whose_models_were_asked_in_other_forms_are_compared_with_a_warning(caplog):
    a = [Answer("x x", _chat("one"), None, "a:1"), Answer("x", _chat("two"), None, "a:2")]
    b = [Answer("x", "two", None, "b:1"), Answer("x", "one", None, "b:2")]
    assert [prompt for prompt, _, _ in match(a, b)] == ["one", "two"]
    assert "the model of A was asked by chat messages and that of B by text" in caplog.text
    verdict = judge(b, a, words)
    assert (verdict.wins, verdict.ties, verdict.losses) == (0, 1, 1)
    assert "the model of B was asked by chat messages and that of A by text" in caplog.text
    mixed = [Answer("x", _chat("a", "b", "c"), 1, "a:1"), Answer("x", "two", 2, "a:2")]
    with pytest.raises(JudgeError, match="a:1: the prompt is a chat of several messages"):
        match(mixed, mixed)


def test_a_judge_of_pairs_reads_a_transcript():
    assert _transcript("hi") == _transcript(_chat("hi")) == "hi"
    assert _transcript(_chat("a", "b", "c")) == "[user]\na\n\n[assistant]\nb\n\n[user]\nc"


def _files(tmp_path):
    rows = tiny.rows(20)
    a = tiny.write(tmp_path / "ours.jsonl", rows)
    b = tiny.write(tmp_path / "theirs.jsonl", [{**r, "completion": "apple"} for r in rows[:19]])
    return a, b


def test_judge_from_the_command_line_with_a_function(tmp_path, capfd, caplog, monkeypatch):
    a, b = _files(tmp_path)
    (tmp_path / "rules_for_the_judge.py").write_text(
        "def words(prompts, completions, label, **columns):\n    return [len(c.split()) for c in completions]\n"
        "def nan(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["judge", str(a), str(b), "--reward", "rules_for_the_judge:words"]) == 0
    *table, last = capfd.readouterr().out.strip().splitlines()
    summary = json.loads(last)
    assert "ours.jsonl: 1 completions have no counterpart" in caplog.text
    assert table[0].split() == ["A", "ours", "B", "theirs"]
    assert any(line.startswith("win rate, ties half") for line in table)
    count = sum(len(r["completion"].split()) > 1 for r in tiny.rows(20)[:19])
    assert (summary["compared"], summary["wins"], summary["ties"]) == (19, count, 19 - count)
    assert summary["low"] <= summary["win_rate"] <= summary["high"]
    assert cli.main(["judge", str(a), str(b), "--reward", "rules_for_the_judge:nan"]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("bco-fast: error: completions of A: the reward of prompt 0 ('")


def test_judge_from_the_command_line_with_a_model(tmp_path, capfd):
    a, b = _files(tmp_path)
    tokenizer = tiny.build_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**{"vocab_size": len(tokenizer), **tiny.TINY, "num_labels": 1})
    )
    model.save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    assert cli.main(["judge", str(a), str(b), "--reward", str(tmp_path / "reward")]) == 0
    out = capfd.readouterr().out
    summary = json.loads(out.strip().splitlines()[-1])
    assert summary["length_unit"] == "tokens"
    assert summary["lengths_b"] == {"characters": 5.0, "words": 1.0, "tokens": 1.0}
    assert "mean tokens" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "text": "b"}', ":1: none of completion, output, choices (found: prompt, text)"),
        ('{"prompt": "a", "completion": 3}', "the completion must be a string, not int"),
        ('{"question_id": 1, "choices": []}', "choices must be"),
        ('{"question_id": 1, "choices": [{"turns": ["a", "b"]}]}', "1 choices of 2 turns"),
        ('{"prompt": "elsewhere", "completion": "a"}', "no prompt in common"),
        ('{"completion": "a"}', "b.jsonl:1 has no prompt"),
        ("", "no record"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capfd, text, message):
    a, _ = _files(tmp_path)
    (tmp_path / "b.jsonl").write_text(text)
    assert cli.main(["judge", str(a), str(tmp_path / "b.jsonl"), "--reward", "json:loads"]) == 2
    streams = capfd.readouterr()
    assert message in streams.err.strip().splitlines()[-1]
    assert streams.out == ""
