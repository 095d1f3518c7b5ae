"""Online training: rounds sampled from the policy, judged, kept, resumed; and a reward that rises."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from chats import TOKENIZER as CHAT_TOKENIZER
from small_runs import TOKENIZER, reward_error, slow_but
from small_runs import parameters as _parameters

from bco_fast import FeedbackError, load_feedback
from bco_fast.cli import demo
from bco_fast.data.prompts import read_prompts
from bco_fast.data.rows import read_rows
from bco_fast.online.config import OnlineConfig
from bco_fast.online.generators import HuggingFaceGenerator
from bco_fast.online.rewards import RewardError
from bco_fast.online.rounds import Sampled, read_round, write_round
from bco_fast.online.trainer import OnlineFeedbackTrainer
from bco_fast.training.checkpoints import CheckpointError

PROMPTS = demo.all_prompts()[:40]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def _reward(prompts, completions, **columns):
    """Share of the asked words among the completion's: any number in [0, 1]."""
    out = []
    for prompt, completion in zip(prompts, completions, strict=True):
        kind = demo.THINGS[prompt.split()[2]].split()
        words = completion.split()
        out.append(sum(word in kind for word in words) / max(len(words), 1))
    return out


def _config(tmp_path, **options):
    return OnlineConfig(
        **{
            "output_dir": str(tmp_path / "out"), "max_length": 32, "max_new_tokens": 5, "max_steps": 6,
            "steps_per_round": 2, "samples_per_prompt": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "lr_scheduler_type": "constant", "temperature": 1.0,
        }
        | options
    )  # fmt: skip


def _trainer(tmp_path, reward=_reward, prompts=PROMPTS, model=None, ref_model=None, **options):
    return OnlineFeedbackTrainer(
        tiny.model(std=0.05) if model is None else model, _config(tmp_path, **options), prompts, reward,
        processing_class=TOKENIZER, eval_prompts=PROMPTS[:10], ref_model=ref_model,
    )  # fmt: skip


def _log(trainer):
    """Without what differs between processes: the time, and the mean loss since the resume."""
    lines = [{k: v for k, v in line.items() if k != "train_loss"} for line in trainer.state.log_history]
    return [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second"))} for line in lines]


def _rounds(tmp_path):
    return sorted((tmp_path / "out" / "rounds").glob("*.jsonl"))


def test_prompts_over_the_limit_are_left_out_and_counted(tmp_path, caplog):
    """arXiv 2408.15339, section 4: "excluding the prompts longer than 1000 tokens"."""
    short, long = "pack two fruit for anna :", "pack two fruit for anna : anna : anna :"
    length = len(TOKENIZER(short)["input_ids"])
    args = _config(tmp_path, max_prompt_length=length)
    model = tiny.model()
    trainer = OnlineFeedbackTrainer(model, args, [short, long], _reward, processing_class=TOKENIZER)
    assert [(row["prompt"], len(ids)) for row, ids in trainer.prompts] == [(short, length)]
    assert f"left out 1 of 2 prompts, which have more than {length} tokens" in caplog.text
    with pytest.raises(ValueError, match="all 1 prompts have more than"):
        OnlineFeedbackTrainer(model, args, [long], _reward, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="give max_new_tokens instead"):
        _config(tmp_path, max_completion_length=4)
    assert (OnlineConfig(output_dir="x", max_steps=1, use_cpu=True).temperature, args.top_p) == (1.0, 1.0)


def test_rounds_are_sampled_judged_kept_and_trained_on(tmp_path):
    calls = []

    def reward(prompts, completions, **columns):
        calls.append((len(prompts), sorted(columns)))
        return _reward(prompts, completions)

    prompts = [{"prompt": p, "source": f"s{i}"} for i, p in enumerate(PROMPTS)]
    trainer = _trainer(tmp_path, reward, prompts)
    before = _parameters(trainer)
    trainer.train()
    assert calls == [(16, ["source"])] * 3
    files = _rounds(tmp_path)
    assert [f.name for f in files] == [f"round-0000{i}.jsonl" for i in range(3)]
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 16
        assert [r["prompt"] for r in rows[::2]] == [r["prompt"] for r in rows[1::2]]  # two samples of each
        assert all(r["label"] == (r["reward"] > 0.5) for r in rows)
        assert [r["reward"] for r in rows] == _reward([r["prompt"] for r in rows], [r["completion"] for r in rows])
    assert any(not torch.equal(before[n], p) for n, p in _parameters(trainer).items())
    rounds = [e for e in trainer.state.log_history if "round" in e]
    assert [e["round"] for e in rounds] == [0, 1, 2]
    assert abs(rounds[0]["kl"]) <= reward_error(logps=20, beta=1.0)
    assert all({"reward", "reward_std", "completions/mean_length"} <= e.keys() for e in rounds)
    # 40 prompts, 8 a round: a pass of shuffled prompts meets each once
    seen = [r["prompt"] for f in files for r in map(json.loads, f.read_text().splitlines())][::2]
    assert len(set(seen)) == 24


def test_a_round_is_a_feedback_file(tmp_path):
    _trainer(tmp_path, max_steps=2).train()
    text = _rounds(tmp_path)[0]
    rows = read_rows(text, on_bad_row="skip")
    assert 0 < len(rows) <= 16
    assert {row.prompt for row in rows} <= set(PROMPTS)


@pytest.mark.parametrize("loss_type", slow_but(["una_score", "una_reward", "bco", "kto", "bnf", "sft"], ["kto"]))
def test_any_unpaired_objective(tmp_path, loss_type):
    trainer = _trainer(tmp_path, loss_type=loss_type, max_steps=4, reward_threshold=0.3)
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))


def test_the_tokens_trained_on_are_the_tokens_sampled(tmp_path):
    trainer = _trainer(tmp_path, max_steps=2)
    trainer.train()
    rows = [json.loads(line) for line in _rounds(tmp_path)[0].read_text().splitlines()]
    for row, example in zip(rows, trainer._round[1].examples, strict=True):
        assert example.input_ids.tolist() == row["prompt_ids"] + row["completion_ids"]
        assert example.completion_start == len(row["prompt_ids"])
        assert row["prompt_ids"] == TOKENIZER(row["prompt"])["input_ids"]
        assert TOKENIZER.decode(row["completion_ids"], skip_special_tokens=True).strip() == row["completion"]
        assert TOKENIZER.eos_token_id not in row["completion_ids"][:-1]


@pytest.mark.parametrize("step", slow_but([1, 2, 3], [3]))
def test_resume_samples_nothing_again_and_ends_bitwise_alike(tmp_path, step):
    """Step 1 and 3 lie in the middle of a round."""
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = _trainer(tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a/out", tmp_path / "b/out")
    for later in (tmp_path / "b/out/rounds").glob("round-*.jsonl"):
        if int(later.stem.split("-")[1]) > step // 2:
            later.unlink()
    sampled = []

    def counting(model, prompts, seed):
        sampled.append(len(prompts))
        return HuggingFaceGenerator(TOKENIZER, max_new_tokens=5, temperature=1.0)(model, prompts, seed)

    resumed = _trainer(tmp_path / "b", **options)
    resumed.generator = counting
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out" / f"checkpoint-{step}"))
    assert len(sampled) == 3 - 1 - step // 2
    expected = _parameters(whole)
    for name, tensor in _parameters(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    assert _log(resumed) == _log(whole)


def _other_reward(prompts, completions, **columns):
    return _reward(prompts, completions)


def test_another_judge_reference_or_column_is_refused_on_resume(tmp_path):
    rows = [{"prompt": prompt, "source": 0} for prompt in PROMPTS]
    _trainer(tmp_path, prompts=rows, max_steps=1, save_strategy="steps", save_steps=1).train()
    others = {
        "the reward differs": {"reward": _other_reward},
        "the further columns of the prompts differ": {"prompts": [{**row, "source": 1} for row in rows]},
        "the tokens of the training rows differ": {"prompts": rows[1:]},
        "the reference model differs": {"ref_model": tiny.model(seed=3)},
    }
    for said, change in others.items():
        changed = _trainer(tmp_path, **{"prompts": rows, "max_steps": 2} | change)
        with pytest.raises(CheckpointError, match=said):
            changed.train(resume_from_checkpoint=True)


def test_a_round_keeps_every_character(tmp_path):
    """U+2028 ends a line for Python's splitlines, not for JSON."""
    row = Sampled("a\u2028b", {"source": "\x85"}, [3], [4, 0], "c\u2029\nd", 0.5)
    write_round(tmp_path / "r.jsonl", [row, row], 0.5)
    assert read_round(tmp_path / "r.jsonl") == [row, row]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a\u2028b"}, ensure_ascii=False), encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a\u2028b"}]


def test_a_round_may_be_replayed(tmp_path):
    seen = []
    trainer = _trainer(tmp_path, steps_per_round=4, replay_epochs=2, max_steps=4, share_prompts="false")
    real = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *a: seen.append(real(*a)) or seen[-1]
    trainer.train()
    assert trainer.round_rows == 16
    rows = [row.tolist() for batches, _ in seen for batch in batches for row in batch["input_ids"]]
    strip = [tuple(t for t in row if t != TOKENIZER.pad_token_id) for row in rows]
    assert len(_rounds(tmp_path)) == 1
    assert sorted(strip[:16]) == sorted(strip[16:])
    assert strip[:16] != strip[16:]


def test_samples_of_a_prompt_share_it(tmp_path):
    """Each micro-batch holds a prompt once for its samples, and the reference's values are those of single rows."""
    trainer, seen = _trainer(tmp_path, max_steps=2, share_prompts="true"), []
    assert trainer.layout == "shared"
    real = trainer.get_batch_samples
    trainer.get_batch_samples = lambda *a: seen.append(real(*a)) or seen[-1]
    trainer.train()
    for (batch,), _ in seen:
        prompts = [segment.prompt for segment in batch["segments"].parts if segment.prompt]
        assert len(prompts) == 2 * len(set(prompts)) == len(batch["label"])
    _, dataset = trainer._round
    trainer.layout = "padded"
    alone = trainer._reference_token_logps(dataset.examples)
    for value, other in zip(dataset.ref_token_logps, alone, strict=True):
        assert np.allclose(value, other, rtol=1e-5, atol=1e-5)


def _broken(kind):
    def reward(prompts, completions, **columns):
        values = _reward(prompts, completions)
        if kind == "nan":
            values[3] = math.nan
        elif kind == "length":
            values.pop()
        else:
            raise RuntimeError("the reward server is gone")
        return values

    return reward


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "prompt"),
        pytest.param("length", "15", marks=pytest.mark.slow),
        pytest.param("raises", "server is gone", marks=pytest.mark.slow),
    ],
)
def test_a_broken_reward_keeps_the_round_and_the_run(tmp_path, kind, message):
    """It breaks in the second round; mended, the run resumes from the checkpoint and ends as if nothing had happened."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(prompts))
        return (_broken(kind) if len(calls) == 2 else _reward)(prompts, completions, **columns)

    trainer = _trainer(tmp_path, reward)
    with pytest.raises(RewardError, match=message) as caught:
        trainer.train()
    assert "round 1" in str(caught.value)
    assert "checkpoint-2" in str(caught.value)
    kept = tmp_path / "out" / "rounds" / "sampled-00001.jsonl"
    assert len(kept.read_text().splitlines()) == 16
    sampled = []
    resumed = _trainer(tmp_path)
    real = resumed.generator
    resumed.generator = lambda *a: sampled.append(1) or real(*a)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert len(sampled) == 1  # the third round; the second was kept
    assert not kept.exists()
    whole = _trainer(tmp_path / "whole")
    whole.train()
    expected = _parameters(whole)
    for name, tensor in _parameters(resumed).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_reward_that_breaks_at_once_can_be_mended(tmp_path):
    with pytest.raises(RewardError, match="checkpoint-0"):
        _trainer(tmp_path, _broken("nan")).train()
    resumed = _trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-0"))
    assert resumed.state.global_step == 6


@pytest.mark.slow
def test_the_reference_of_an_adapter_is_its_base(tmp_path):
    trainer = _trainer(tmp_path, use_peft=True, lora_r=4, max_steps=2)
    assert trainer._resident is None
    trainer.train()
    rounds = [e for e in trainer.state.log_history if "round" in e]
    assert abs(rounds[0]["kl"]) <= reward_error(logps=20, beta=1.0)
    full = _trainer(tmp_path / "full", max_steps=4)
    assert full._resident is not None
    assert not any(p.requires_grad for p in full._resident.parameters())
    start = [p.clone() for p in full._resident.parameters()]
    full.train()
    assert all(torch.equal(a, b) for a, b in zip(start, full._resident.parameters(), strict=True))


def test_generation_leaves_the_random_state_alone_and_hangs_on_its_seed():
    model, generator = tiny.model(), HuggingFaceGenerator(TOKENIZER, max_new_tokens=6, temperature=1.0, batch_size=3)
    prompts = [TOKENIZER(p)["input_ids"] for p in ["pack two fruit for anna :", "list", "bring four books for ben :", "choose", "fetch two"]]  # fmt: skip
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generator(model, prompts, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert generator(model, prompts, 5) == first
    assert generator(model, prompts, 6) != first
    greedy = HuggingFaceGenerator(TOKENIZER, max_new_tokens=6, temperature=0)
    assert greedy(model, prompts, 1) == greedy(model, prompts, 2)
    alone = [greedy(model, [p], 1)[0] for p in prompts]
    assert greedy(model, prompts, 1) == alone  # padding on the left changes nothing


@pytest.mark.slow
def test_scores_are_scaled(tmp_path):
    wide = lambda prompts, completions, **c: [10.0 * v - 5 for v in _reward(prompts, completions)]  # noqa: E731
    for scale in ("sigmoid", "minmax"):
        trainer = _trainer(tmp_path / scale, wide, reward_scale=scale, max_steps=2)
        trainer.train()
        scores = np.array([e.score for e in trainer._round[1].examples])
        assert ((scores >= 0) & (scores <= 1)).all()
        assert scores.max() > scores.min()
    with pytest.raises(RewardError, match=r"una_score needs \[0, 1\]"):
        _trainer(tmp_path, wide, max_steps=2).train()


def test_evaluation_is_the_mean_reward_of_held_out_prompts(tmp_path):
    trainer = _trainer(tmp_path)
    metrics = trainer.evaluate()
    assert metrics == trainer.evaluate()
    assert 0 <= metrics["eval_reward"] <= 1
    assert metrics["eval_reward_stderr"] > 0


def test_held_out_prompts_are_sampled_during_training(tmp_path):
    trainer = _trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_reward" in e] == [3, 6]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_type": "dpo"}, ValueError, "needs pairs"),
        ({"max_steps": -1}, ValueError, "give max_steps"),
        ({"samples_per_prompt": 0}, ValueError, "samples_per_prompt"),
        ({"samples_per_prompt": 5}, ValueError, "do not divide"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"max_new_tokens": 32}, ValueError, "no room for a prompt"),
        ({"loss_type": "bco", "reward_scale": "sigmoid"}, ValueError, "does not read reward_scale"),
    ],
    ids=str,
)
def test_refuses(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        _trainer(tmp_path, **options)


def test_rounds_of_an_earlier_run_are_not_overwritten(tmp_path):
    _trainer(tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="rounds of an earlier run"):
        _trainer(tmp_path, max_steps=2).train()


@pytest.mark.parametrize(("source", "message"), [([], "no usable row"), (["a", " "], "row 1"), ([{"text": "a"}], "row 0"), ("/nowhere.jsonl", "nowhere")])  # fmt: skip
def test_bad_prompts_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(source)


CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Say {word}, not </s>."}]
    for word in ("one", "two", "three", "four")
]


def _chat_trainer(tmp_path, prompts=CHATS, reward=None, tokenizer=CHAT_TOKENIZER, **options):
    model = tiny.model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=256)
    config = _config(tmp_path, max_length=256, max_steps=2, max_new_tokens=4, per_device_train_batch_size=4, **options)
    reward = reward or (lambda prompts, completions, **columns: [0.25] * len(prompts))
    return OnlineFeedbackTrainer(model, config, prompts, reward, processing_class=tokenizer)


def test_chats_are_rendered_as_offline_training_renders_the_round(tmp_path):
    asked = []

    def reward(prompts, completions, **columns):
        asked.extend(zip(prompts, completions, strict=True))
        return [0.25] * len(prompts)

    trainer = _chat_trainer(tmp_path, [{"prompt": chat, "tools": TOOLS} for chat in CHATS], reward)
    trainer.train()
    (file,) = _rounds(tmp_path)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(row["prompt"] in CHATS for row in rows)
    for row, (prompt, completion) in zip(rows, asked, strict=True):  # TRL's form of chats
        assert prompt == row["prompt"]
        assert completion == [{"role": "assistant", "content": row["completion"]}]
    template = CHAT_TOKENIZER.apply_chat_template(CHATS[0], tools=TOOLS, add_generation_prompt=True, tokenize=False)
    first = next(row for row in rows if row["prompt"] == CHATS[0])
    assert CHAT_TOKENIZER.decode(first["prompt_ids"]) == template
    assert CHAT_TOKENIZER.convert_tokens_to_ids("</s>") not in first["prompt_ids"]  # what a message says is data
    for row in rows:
        row["completion"] = row["completion"] or "nothing"  # offline an empty completion is a bad row
    dataset = load_feedback(rows, CHAT_TOKENIZER, max_length=256)
    for row, example in zip(rows, dataset.examples, strict=True):
        assert example.input_ids[: example.completion_start].tolist() == row["prompt_ids"]


@pytest.mark.slow
def test_a_chat_round_resumes(tmp_path):
    broken = iter([math.nan, 0.25])
    reward = lambda prompts, completions, **columns: [next(broken)] + [0.5] * (len(prompts) - 1)  # noqa: E731
    with pytest.raises(RewardError, match="checkpoint-0"):
        _chat_trainer(tmp_path, reward=reward).train()
    resumed = _chat_trainer(tmp_path, reward=reward)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-0"))
    assert resumed.state.global_step == 2
    assert len(_rounds(tmp_path)) == 1


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", CHATS[0]], "row 1: prompts are all strings or all chat"),
        ([CHATS[0], [*CHATS[0], {"role": "assistant", "content": "x"}]], "row 1: prompt ends with the assistant"),
        ([[{"role": "wizard", "content": "x"}]], r"row 0: the role of prompt\[0\]"),
        ([{"prompt": CHATS[0], "tools": "{"}], "row 0: tools is not JSON"),
        ([[]], "row 0: prompt has no message"),
    ],
    ids=["mixed", "assistant", "role", "tools", "empty"],
)
def test_bad_chats_are_named(prompts, message):
    with pytest.raises(FeedbackError, match=message):
        read_prompts(prompts)


def test_chats_need_a_template(tmp_path):
    with pytest.raises(FeedbackError, match="no chat template"):
        OnlineFeedbackTrainer(tiny.model(), _config(tmp_path), CHATS, _reward, processing_class=TOKENIZER)
