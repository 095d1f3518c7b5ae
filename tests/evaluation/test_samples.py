"""Samples of a run: written before, during and after training, in the form of the rows, and without a trace in the run."""

import json
import logging
from types import SimpleNamespace

import chats
import pytest
import tiny
from small_runs import TOKENIZER, config
from transformers.trainer_callback import TrainerCallback

from bco_fast import FeedbackTrainer
from bco_fast.cli import demo
from bco_fast.evaluation.generate import GenerationError, Sampling, generate
from bco_fast.evaluation.report import write_report
from bco_fast.evaluation.samples import PromptSamples

PROMPTS = [row["prompt"] for row in tiny.rows(3, seed=9)]


def _trainer(folder, rows=None, tokenizer=TOKENIZER, **options):
    return FeedbackTrainer(
        tiny.model(), config(folder, **options), rows or tiny.rows(16), None, processing_class=tokenizer
    )


def _samples(folder):
    return [json.loads(line) for line in (folder / "out/samples.jsonl").read_text().splitlines()]


def _log(trainer):
    return [{k: v for k, v in line.items() if "runtime" not in k and "second" not in k} for line in trainer.state.log_history]  # fmt: skip


class _Board(TrainerCallback):
    """Opened and closed as TensorBoard's callback is."""

    tb_writer = None

    def __init__(self):
        self.texts = []

    def on_train_begin(self, *_, **__):
        self.tb_writer = SimpleNamespace(add_text=lambda *text: self.texts.append(text))

    def on_train_end(self, *_, **__):
        self.tb_writer = None


def test_samples_before_during_and_after_change_nothing(tmp_path, caplog):
    plain = _trainer(tmp_path / "a", lora_dropout=0.5, use_peft=True, max_steps=3)
    plain.train()
    sampled = _trainer(tmp_path / "b", lora_dropout=0.5, use_peft=True, max_steps=3)
    board = _Board()
    sampled.add_callback(board)
    PromptSamples(PROMPTS, every=1, max_new_tokens=4).attach(sampled)
    with caplog.at_level(logging.INFO, logger="bco_fast"):
        sampled.train()
    assert _log(sampled) == _log(plain)
    assert sampled.model.training is plain.model.training
    rows = _samples(tmp_path / "b")
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in range(4) for p in PROMPTS]
    assert [text[0] for text in board.texts] == [f"samples/{i}" for _ in range(4) for i in range(3)]
    assert [text[2] for text in board.texts] == [row["step"] for row in rows]
    assert rows[-1]["completion"] in board.texts[-1][1]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("sample at step")]
    assert len(lines) == 12
    greedy = Sampling(temperature=0, max_new_tokens=4)
    after = generate(sampled.model, TOKENIZER, PROMPTS, greedy)
    assert [row["completion"] for row in rows[-3:]] == [c.text for c in after]
    before = generate(tiny.model(), TOKENIZER, PROMPTS, greedy)
    assert [row["completion"] for row in rows[:3]] == [c.text for c in before]


@pytest.mark.slow
def test_a_resumed_run_continues_the_file(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = _trainer(tmp_path / "whole", **options)
    PromptSamples(PROMPTS, every=1, max_new_tokens=4).attach(whole)
    whole.train()
    stopped = _trainer(tmp_path / "stopped", **options)
    PromptSamples(PROMPTS, every=1, max_new_tokens=4).attach(stopped)
    real = stopped.training_step

    def training_step(*arguments, **named):
        if stopped.state.global_step == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    stopped.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    assert _samples(tmp_path / "stopped")[-1]["step"] == 3
    resumed = _trainer(tmp_path / "stopped", **options)
    samples = PromptSamples(PROMPTS, every=1, max_new_tokens=4)
    samples.attach(resumed)
    resumed.train(resume_from_checkpoint=True)
    assert _samples(tmp_path / "stopped") == _samples(tmp_path / "whole") == samples.rows


@pytest.mark.parametrize("form", ["text", "chat"])
def test_prompts_are_read_as_the_rows_were(tmp_path, form):
    tokenizer = chats.tokenizer()
    samples = PromptSamples(PROMPTS[:1])
    samples.encode(tokenizer, {"form": form, "template": None})
    question = [{"role": "user", "content": PROMPTS[0]}]
    as_chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    text = as_chat if form == "chat" else PROMPTS[0]
    assert samples._encoded == [tokenizer(text, add_special_tokens=form == "text")["input_ids"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [f"p {i}" for i in range(65)]}, "sample_prompts has 65 different prompts; 64 are the most"),
        ({"every": 0}, "sample_every must be at least 1"),
        ({"max_new_tokens": 0}, "sample_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_sampled(options, message):
    with pytest.raises(GenerationError, match=message):
        PromptSamples(**{"prompts": PROMPTS} | options)


def test_a_prompt_is_sampled_once():
    prompts = [{"prompt": text} for text in ("a", "b", "a")]
    assert [prompt["prompt"] for prompt in PromptSamples(prompts).prompts] == ["a", "b"]


def test_a_sharded_model_is_refused():
    with pytest.raises(ValueError, match="leave it out, and run `bco-fast generate`"):
        PromptSamples(PROMPTS).attach(SimpleNamespace(sharded=True))


def test_the_report_shows_them(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "trainer_state.json").write_text(json.dumps({"log_history": [], "global_step": 9}))
    chat = [{"role": "user", "content": "say <b>hi</b>"}]
    rows = [{"step": step, "prompt": chat, "completion": f"answer {step} & <i>"} for step in range(9)]
    tiny.write(out / "samples.jsonl", rows)
    write_report([out])
    page = (out / "report.html").read_text()
    assert "say &lt;b&gt;hi&lt;/b&gt;" in page
    shown = [f"answer {step} &amp; &lt;i&gt;" in page for step in range(9)]
    assert shown == [step in (0, 2, 4, 6, 8) for step in range(9)]
    (out / "samples.jsonl").write_text('{"step": 1}\n')
    assert "samples.jsonl cannot be read" in json.dumps(write_report([out])["left_out"])


def test_the_demo_prints_three():
    rows = [{"step": step, "prompt": prompt, "completion": f"{step}"} for step in (0, 9) for prompt in "abc"]
    lines = demo._three(rows).splitlines()
    assert [line.split() for line in lines[1:]] == [[prompt, "0", "9"] for prompt in "abc"]
