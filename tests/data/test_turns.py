"""A thumb on each turn: the same rows as a chat that was split by hand, in one pass."""

import logging
import math

import numpy as np
import pytest
import tiny
import torch
from chats import CHATML, TOKENIZER
from chats import tokenizer as chat_tokenizer
from small_runs import config

from bco_fast import FeedbackError, FeedbackTrainer, load_feedback, patch_model
from bco_fast.data.batch import collate, hosts, layout_tokens
from bco_fast.data.rows import read_rows, split_by_prompt
from bco_fast.models.attention import use_segments
from bco_fast.models.patch import completion_logps


def _chat(seed=0, turns=4, **judgements):
    """A conversation; judgements: name of a key -> its value in each assistant turn, None for none."""
    messages = []
    for i in range(turns):
        messages.append({"role": "user", "content": f"question {seed} {i}"})
        answer = {"role": "assistant", "content": f"answer {i} " * (1 + (seed + i) % 3)}
        messages.append(answer | {key: values[i] for key, values in judgements.items() if values[i] is not None})
    return messages


def _by_hand(messages, keys=("label", "score", "weight")):
    """One row for each judged turn, as a user would write them."""
    rows = []
    for i, turn in enumerate(messages):
        if "label" in turn or "score" in turn:
            context = [{k: v for k, v in m.items() if k in ("role", "content")} for m in messages[: i + 1]]
            rows.append({"messages": context, **{k: turn[k] for k in keys if k in turn}})
    return rows


CHATS = [_chat(s, label=[True, None, False, True], weight=[1.0, None, 0.5, None]) for s in range(6)]


def test_the_rows_are_those_of_a_chat_split_by_hand():
    turns = load_feedback([{"messages": chat} for chat in CHATS], TOKENIZER)
    rows = load_feedback([row for chat in CHATS for row in _by_hand(chat)], TOKENIZER)
    assert len(turns) == len(rows) == 18
    for a, b in zip(turns.examples, rows.examples, strict=True):
        assert (a.key, a.label, a.weight, a.completion_start) == (b.key, b.label, b.weight, b.completion_start)
    assert [e.group for e in rows.examples] == [""] * 18
    assert len({e.group for e in turns.examples}) == 6


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_one_pass_gives_the_log_probabilities_of_every_turn(layout):
    examples = load_feedback([{"messages": chat} for chat in CHATS], TOKENIZER).examples
    model = patch_model(tiny.model(vocab_size=len(TOKENIZER), max_position_embeddings=512)).eval()
    alone = torch.cat([completion_logps(model, collate([(e, 0.0)], 1)) for e in examples])
    use_segments(model)
    batch = collate([(e, 0.0) for e in examples], 1, layout=layout)
    longest = [max(len(e) for e in examples[i : i + 3]) for i in range(0, 18, 3)]
    assert batch["input_ids"].numel() == (6 * max(longest) if layout == "padded" else sum(longest))
    assert batch["input_ids"].numel() == layout_tokens(examples, layout)
    found = completion_logps(model, batch)
    assert (found - alone).abs().max() <= 1e-5


def test_training_on_turns_is_training_on_split_rows(tmp_path):
    """Loss and gradient of a step of all rows, and what is logged."""
    found = []
    for data in ([{"messages": c} for c in CHATS], [row for c in CHATS for row in _by_hand(c)]):
        trainer = FeedbackTrainer(
            tiny.model(vocab_size=len(TOKENIZER), max_position_embeddings=512),
            config(tmp_path, max_length=512, max_steps=2, per_device_train_batch_size=18, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, share_prompts="false"),
            data, processing_class=TOKENIZER,
        )  # fmt: skip
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        found.append((lines, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    (lines, weights), (others, expected) = found
    for line, other in zip(lines, others, strict=True):
        assert math.isclose(line["loss"], other["loss"], rel_tol=1e-5)
        assert math.isclose(line["grad_norm"], other["grad_norm"], rel_tol=1e-4)
    assert (weights - expected).norm() <= 1e-6 * expected.norm()


def test_scores_and_other_formats():
    scored = _chat(score=[0.2, None, 0.9, None])
    rated = [{**m, "rating": m["score"]} if "score" in m else m for m in scored]
    for turn in rated:
        turn.pop("score", None)
    said = {"user": "human", "assistant": "gpt"}
    sharegpt = [
        {"from": said[m["role"]], "value": m["content"], **{k: v for k, v in m.items() if k == "score"}} for m in scored
    ]
    expected = read_rows(_by_hand(scored), needs="scores")
    for record in ({"messages": scored}, {"messages": rated}, {"conversations": sharegpt}):
        rows = read_rows([record], needs="scores")
        assert [(r.prompt, r.completions, r.score, r.label) for r in rows] == [
            (r.prompt, r.completions, r.score, r.label) for r in expected
        ]
    words = read_rows([{"messages": _chat(feedback=["up", "thumbs_down", None, True])}])
    assert [row.label for row in words] == [True, False, True]
    assert words[1].where.endswith(", turn 3")


def test_the_turns_of_a_chat_are_held_out_together():
    rows = read_rows([{"messages": _chat(s, label=[True, False, True, True])} for s in range(40)])
    train, held_out = split_by_prompt(rows, 0.25)
    assert not {row.group for row in train} & {row.group for row in held_out}
    assert len(train) % 4 == len(held_out) % 4 == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": _chat(label=["yes", None, None, None])}, "label must be true or false, not 'yes'"),
        (
            {"messages": _chat(feedback=["maybe", None, None, None])},
            "the feedback of messages.1. must be true, false or one of",
        ),
        ({"messages": _chat(label=[True] * 4), "label": True}, "label is on the row and on its turns"),
        ({"messages": [{"role": "user", "content": "a", "label": True}]}, "messages.0. is judged, but from 'user'"),
        ({"messages": _chat(label=[True] * 4, feedback=[True] * 4)}, "has two of label, feedback"),
        ({"messages": _chat(label=[True] * 4, weight=[-1] * 4)}, "weight must be a number >= 0"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "the speaker of conversations.0. must be one of"),
    ],
    ids=str,
)
def test_bad_turns_are_named(record, message):
    with pytest.raises(FeedbackError, match=message):
        read_rows([record])


def test_a_template_that_changes_earlier_turns_costs_a_row_each_and_says_so(caplog):
    caplog.set_level(logging.INFO, logger="bco_fast")
    load_feedback([{"messages": CHATS[0]}], TOKENIZER)
    assert "3 judged turns of 1 chats, 0 of them computed by themselves" in caplog.text
    last_only = chat_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '...' }}"))  # fmt: skip
    examples = load_feedback([{"messages": CHATS[0]}], last_only).examples
    assert "3 judged turns of 1 chats, 2 of them computed by themselves" in caplog.text
    assert hosts(examples) == [0, 1, 2]
    cut = load_feedback([{"messages": CHATS[0]}], TOKENIZER, max_length=60, max_prompt_length=20).examples
    assert len(set(hosts(cut))) > 1
    assert all(np.array_equal(cut[h].input_ids[: len(e)], e.input_ids) for e, h in zip(cut, hosts(cut), strict=True))
