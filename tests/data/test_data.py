"""Feedback files: what becomes of a row, and a named complaint about each bad one."""

import hashlib
import json
import math
import pickle
import re
import tracemalloc

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bco_fast import FeedbackError, load_feedback
from bco_fast.data import sources
from bco_fast.data.batch import collate
from bco_fast.data.rows import read_rows, split_by_prompt
from bco_fast.data.samplers import mismatched
from bco_fast.data.tokenize import tokenize_rows

TOKENIZER = tiny.build_tokenizer()
GOOD = {"prompt": "pack two fruit for anna :", "completion": "apple pear", "label": True}


def test_tokens_are_prompt_completion_eos():
    (example,) = load_feedback([GOOD], TOKENIZER).examples
    assert TOKENIZER.decode(example.input_ids) == "pack two fruit for anna : apple pear </s>"
    assert example.completion_start == 6
    assert example.completion_mask.tolist() == [False] * 6 + [True] * 3
    assert (example.label, example.weight) == (True, 1.0)


def test_targets_are_the_completion_shifted():
    dataset = load_feedback([GOOD, {**GOOD, "completion": "pear", "label": False, "weight": 0.5}], TOKENIZER)
    dataset.ref_logps = np.array([-3.0, -4.0])
    batch = collate([dataset[0], dataset[1]], pad_token_id=1)
    assert batch["input_ids"].shape == (2, 9)
    cu = batch["cu_completions"].tolist()
    for row, example in enumerate(dataset.examples):
        asked = slice(*cu[row : row + 2])
        assert batch["targets"][asked].tolist() == example.input_ids[6:].tolist()
        assert batch["rows"][asked].tolist() == [9 * row + t for t in range(5, len(example) - 1)]
        assert batch["attention_mask"][row].sum() == len(example)
    assert cu == [0, 3, 5]
    assert batch["counts"].tolist() == [1, 1, 3]
    assert batch["input_ids"][1, 8] == 1
    assert batch["label"].tolist() == [True, False]
    assert batch["weight"].tolist() == [1.0, 0.5]
    assert batch["ref_logps"].tolist() == [-3.0, -4.0]


def test_truncation_keeps_the_end_of_the_prompt_then_cuts_the_completion(caplog):
    row = {"prompt": "pack two fruit for anna :", "completion": "apple pear plum lemon", "label": True}
    whole = load_feedback([row], TOKENIZER, max_length=11)
    assert whole.report == {"rows": 1, "skipped": 0, "prompts_cut": 0, "completions_cut": 0}
    shorter = load_feedback([row], TOKENIZER, max_length=9)
    assert TOKENIZER.decode(shorter.examples[0].input_ids) == "fruit for anna : apple pear plum lemon </s>"
    assert shorter.report == {"rows": 1, "skipped": 0, "prompts_cut": 1, "completions_cut": 0}
    shortest = load_feedback([row], TOKENIZER, max_length=6)
    assert TOKENIZER.decode(shortest.examples[0].input_ids) == "for anna : apple pear plum"
    assert shortest.report["completions_cut"] == 1
    assert "cut 1 prompts and 1 completions" in caplog.text
    wider = load_feedback([row], TOKENIZER, max_length=6, max_prompt_length=5)
    assert TOKENIZER.decode(wider.examples[0].input_ids) == "two fruit for anna : apple"
    shorter = load_feedback([row], TOKENIZER, max_length=11, max_completion_length=2)
    assert TOKENIZER.decode(shorter.examples[0].input_ids) == "pack two fruit for anna : apple pear"
    assert shorter.report == {"rows": 1, "skipped": 0, "prompts_cut": 0, "completions_cut": 1}
    assert "max_length=11 and max_completion_length=2 cut 0 prompts and 1 completions" in caplog.text


def test_keys_follow_the_tokens_after_truncation():
    a, b = load_feedback([GOOD, {**GOOD, "label": False}], TOKENIZER).examples
    assert a.key == b.key
    (cut,) = load_feedback([GOOD], TOKENIZER, max_length=7).examples
    assert cut.key != a.key


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SCORED = {"prompt": "a", "completion": "b", "score": 0.5}

# kind -> (the line of the file, the complaint, what the objective reads)
BAD = {
    "not json": ('{"prompt": ', "not JSON (Expecting value", "labels"),
    "not utf-8": (b"\xff\xfe{}", "not JSON ('utf-16-le' codec", "labels"),
    "nested too deep": ("[" * 100_000, "not JSON (maximum recursion depth", "labels"),
    "longer than a row may be": ('{"prompt": "' + "a" * 2000 + '"}', "longer than 0 MiB", "labels"),
    "not an object": ("[1]", "a row must be an object, not list", "labels"),
    "no prompt": ({"completion": "a", "label": True}, "column 'prompt' is missing (found: completion, label); columns prompt=NAME says which one it is", "labels"),
    "no completion": ({"prompt": "a", "label": True}, "column 'completion' is missing", "labels"),
    "no label": ({"prompt": "a", "completion": "b", "rating": 5}, "column 'label' is missing (found: prompt, completion, rating)", "labels"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing", "labels"),
    "no pair": (GOOD, "column 'chosen' is missing", "pairs"),
    "no score": (GOOD, "column 'score' is missing", "scores"),
    "prompt is a number": ({**GOOD, "prompt": 3}, "prompt must be a string or a list of messages, not int", "labels"),
    "completion is null": ({**GOOD, "completion": None}, "completion must be a string or a list of messages, not NoneType", "labels"),
    "completion is empty": ({**GOOD, "completion": ""}, "completion is empty", "labels"),
    "chosen is blank": ({**PAIR, "chosen": " \n"}, "chosen is empty", "pairs"),
    "half a character": ({**GOOD, "completion": "\ud83d"}, "completion has a lone surrogate, which is not text", "labels"),
    "label is 1": ({**GOOD, "label": 1}, "label must be true or false, not 1", "labels"),
    "label is a word": ({**GOOD, "label": "true"}, "label must be true or false, not 'true'", "labels"),
    "label is long": ({**GOOD, "label": "x" * 999}, "label must be true or false, not 'xxx", "labels"),
    "two labels": ({**GOOD, "kto_tag": False}, "label is True and kto_tag is False", "labels"),
    "weight is negative": ({**GOOD, "weight": -1}, "weight must be a number >= 0, not -1", "labels"),
    "weight is NaN": ('{"prompt": "a", "completion": "b", "label": true, "weight": NaN}', "weight must be a number >= 0, not nan", "labels"),
    "weight is a word": ({**GOOD, "weight": "1"}, "weight must be a number >= 0, not '1'", "labels"),
    "weight is true": ({**GOOD, "weight": True}, "weight must be a number >= 0, not True", "labels"),
    "weight that no float holds": ({**GOOD, "weight": 10**400}, "weight must be a number >= 0, not an integer of 1329 bits", "labels"),
    "score above 1": ({**SCORED, "score": 4}, "score must be a number in [0, 1], not 4", "scores"),
    "score is infinite": ({**SCORED, "score": float("inf")}, "score must be a number, not inf", "rewards"),
    "the same twice": ({**PAIR, "rejected": "b"}, "chosen and rejected are the same", "labels"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, kind, caplog, monkeypatch):
    monkeypatch.setattr(sources, "MAX_ROW_BYTES", 1500 if kind.startswith("longer") else 16 << 20)
    line, reason, needs = BAD[kind]
    line = json.dumps(line) if isinstance(line, dict) else line
    line = line if isinstance(line, bytes) else line.encode()
    good = json.dumps({"pairs": PAIR, "labels": GOOD}.get(needs, SCORED)).encode()
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(good + b"\n\n" + line + b"\n" + good)
    with pytest.raises(FeedbackError, match=re.escape(f"feedback.jsonl:3: {reason}")) as error:
        read_rows(path, needs=needs)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    assert len(read_rows(path, needs=needs, on_bad_row="skip")) == 2
    assert "feedback.jsonl:3" in caplog.text


def test_each_kind_of_bad_row_has_its_own_reason():
    assert len({reason for _, reason, _ in BAD.values()}) == len(BAD) >= 16


def test_all_bad_rows_are_counted(tmp_path):
    path = tiny.write(tmp_path / "f.jsonl", [GOOD, {**GOOD, "label": 0}, {**GOOD, "completion": ""}, {}])
    with pytest.raises(FeedbackError, match=r"f.jsonl:2.*and 2 more bad rows"):
        read_rows(path)


def test_rows_without_tokens_or_room(tmp_path):
    rows = read_rows([GOOD, {**GOOD, "prompt": " "}])
    with pytest.raises(FeedbackError, match="row 1: prompt has no tokens"):
        tokenize_rows(rows, TOKENIZER)
    dataset = tokenize_rows(rows, TOKENIZER, on_bad_row="skip")
    assert dataset.report["skipped"] == 1
    with pytest.raises(FeedbackError, match="no completion left after truncation to 5 tokens"):
        load_feedback([GOOD], TOKENIZER, max_length=5, max_prompt_length=5)


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(FeedbackError, match=r"nowhere\.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(FeedbackError, match="no usable row"):
        read_rows(tmp_path / "empty.jsonl")


def test_options_out_of_range():
    for options in (
        {"max_length": 1},
        {"max_prompt_length": 0},
        {"max_completion_length": 0},
        {"on_bad_row": "ignore"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            load_feedback([GOOD], TOKENIZER, **options)


def test_the_split_never_parts_a_prompt():
    rows = read_rows(tiny.rows(100) + tiny.rows(100, seed=1) + tiny.rows(100))
    train, held_out = split_by_prompt(rows, 0.2)
    assert len(train) + len(held_out) == 300
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert 0.1 < len(held_out) / 300 < 0.3
    shuffled = split_by_prompt(rows[::-1], 0.2)
    assert {r.prompt for r in shuffled[1]} == {r.prompt for r in held_out}
    assert {r.prompt for r in split_by_prompt(rows, 0.2, seed=1)[1]} != {r.prompt for r in held_out}
    with pytest.raises(FeedbackError, match="one side empty"):
        split_by_prompt(rows[:1], 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_by_prompt(rows, math.nan)


def test_a_list_and_a_file_give_the_same(tmp_path):
    records = tiny.rows(5)
    a = load_feedback(records, TOKENIZER)
    b = load_feedback(tiny.write(tmp_path / "f.jsonl", records), TOKENIZER)
    assert [e.key for e in a.examples] == [e.key for e in b.examples]
    assert torch.equal(collate([a[0]])["input_ids"], collate([b[0]])["input_ids"])


def _digest(dataset):
    return hashlib.blake2b(b"".join(e.key for e in dataset.examples), digest_size=16).hexdigest()


def _byte_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["</s>", "<s>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 0)]
    )  # closes every text, as some tokenizers do
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")  # noqa: S106


def test_token_ids_of_strings_stay_as_they_were():
    """Reference caches rest on these: a changed digest means that every user's cache is computed again."""
    assert _digest(load_feedback(tiny.rows(50), TOKENIZER)) == "fe48b2fb1498aa3021560a7c8e9dd061"
    pairs = load_feedback(tiny.pairs(20), TOKENIZER, needs="pairs", max_length=9)
    assert _digest(pairs) == "8249e489b4a685d2183b134fe9418528"
    rows = [
        {"prompt": "Wie heißt du?\n", "completion": " Ich – äh – heiße 李.</s> Done", "label": True},  # noqa: RUF001
        {"prompt": "<s>[INST] a </s>", "completion": "b\x00c", "label": False},
        {"prompt": "x" * 40, "completion": "y" * 30, "label": False},
    ]
    dataset = load_feedback(rows, _byte_tokenizer(), max_length=60)
    assert _digest(dataset) == "7391689d1b02f0e3a195bd42ac9e646e"
    assert [e.completion_start for e in dataset.examples] == [16, 13, 30]


def test_blocks_change_nothing(monkeypatch):
    chat = {"messages": [{"role": "user", "content": "pack"}, {"role": "assistant", "content": "pear"}], "label": True}
    tokenizer = tiny.build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    records = [*tiny.rows(20), chat, {**GOOD, "prompt": " "}, *tiny.rows(20, seed=1), chat, *tiny.rows(20)]
    whole = load_feedback(records, tokenizer, on_bad_row="skip")
    monkeypatch.setattr("bco_fast.data.tokenize.BLOCK_ROWS", 7)
    parts = load_feedback(records, tokenizer, on_bad_row="skip")
    assert len(whole) == 62
    assert [e.key for e in whole.examples] == [e.key for e in parts.examples]
    assert [e.label for e in whole.examples] == [e.label for e in parts.examples]
    assert whole.report == parts.report


def test_a_bar_for_many_rows_only(monkeypatch, capfd):
    load_feedback(tiny.rows(30), TOKENIZER)
    assert "tokenize" not in capfd.readouterr().err
    monkeypatch.setattr("bco_fast.data.tokenize._PROGRESS_ROWS", 10)
    load_feedback(tiny.rows(30), TOKENIZER, progress=False)
    assert "tokenize" not in capfd.readouterr().err
    load_feedback(tiny.rows(30), TOKENIZER)
    assert "tokenize: 100%" in capfd.readouterr().err


def test_complaints_do_not_pile_up(caplog):
    """A stream of 20,000 bad rows leaves five complaints and a count."""

    def records():
        yield GOOD
        for _ in range(20_000):
            yield {"prompt": "a" * 50, "label": True}

    tracemalloc.start()
    try:
        with pytest.raises(FeedbackError, match="20000 of 20001 thumbs up"):
            read_rows(records(), on_bad_row="skip")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    assert "skipped 20000 bad rows in all" in caplog.text
    assert caplog.text.count("is missing") == 5


def test_ids_take_four_bytes_and_batches_are_int64():
    dataset = load_feedback([GOOD], TOKENIZER)
    assert dataset.examples[0].input_ids.dtype == np.int32
    batch = collate([dataset[0]])
    assert batch["input_ids"].dtype == batch["targets"].dtype == batch["attention_mask"].dtype == torch.int64


def test_workers_give_the_batches_of_one_process():
    dataset = load_feedback(tiny.rows(12), TOKENIZER)
    dataset.mismatched = mismatched(dataset, max_length=64)
    for part in (dataset, dataset.mismatched):
        part.ref_logps = np.arange(12) - 20.0
        part.ref_token_logps = [np.full(len(e) - e.completion_start, -1.0, np.float32) for e in part.examples]
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301 - our own
    pairs = load_feedback(tiny.pairs(8), TOKENIZER, needs="pairs")
    for data, same in ((dataset, copy), (pairs, pickle.loads(pickle.dumps(pairs)))):  # noqa: S301
        alone = list(torch.utils.data.DataLoader(data, 4, collate_fn=collate))
        workers = list(torch.utils.data.DataLoader(same, 4, collate_fn=collate, num_workers=2))
        assert len(alone) == len(workers) == len(data) // 4
        for a, b in zip(alone, workers, strict=True):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[name], b[name]) or a[name].isnan().all() for name in a)
    assert {"kl_input_ids", "ref_token_logps"} <= set(collate([dataset[0]]))
