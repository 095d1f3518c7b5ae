"""The trainer: TRL's metric names, a step that is the paper's, accumulation and resume that change nothing."""

import json
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from small_runs import TOKENIZER, reward_error
from small_runs import config as _config
from small_runs import parameters as _parameters
from small_runs import trainer as _trainer

from bco_fast import FeedbackTrainer, bco_loss
from bco_fast.data.batch import collate
from bco_fast.reference.cache import ReferenceCache
from bco_fast.reference.identity import reference_id
from bco_fast.training.step import completion_sums


def test_one_step_is_the_papers_loss_on_the_batch(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.feedback.shift._state[:] = torch.tensor([[0.3, 0.1], [1.0, 1.0]])
    items = [trainer.train_dataset[i] for i in range(8)]
    batch = collate(items, 1)
    loss = trainer.compute_loss(trainer.model, batch)
    logps = completion_sums(trainer.model, batch)
    expected = bco_loss(logps, batch["ref_logps"], batch["label"], beta=0.1, delta=0.2).loss
    assert torch.allclose(loss, expected, rtol=1e-6, atol=0.0)


def test_rewards_are_zero_at_step_0(tmp_path):
    """The policy is its own reference: whatever the batch, padded or not, r = 0 to rounding."""
    metrics = _trainer(tmp_path).evaluate()
    assert abs(metrics["eval_rewards/chosen"]) < 1e-4
    assert abs(metrics["eval_rewards/rejected"]) < 1e-4
    assert math.isclose(metrics["eval_loss"], math.log(2), rel_tol=1e-4)


def test_metrics_carry_trls_names(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.train()
    line = next(entry for entry in trainer.state.log_history if "loss" in entry)
    names = {
        "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "delta", "error_term",
    }  # fmt: skip
    assert names <= line.keys()
    evaluated = trainer.evaluate()
    assert {f"eval_{name}" for name in names | {"rewards/auc"}} <= evaluated.keys()
    assert math.isclose(evaluated["eval_rewards/margins"], evaluated["eval_rewards/chosen"] - evaluated["eval_rewards/rejected"], rel_tol=1e-6)  # fmt: skip


def test_training_raises_the_margin_and_the_shift_follows(tmp_path):
    trainer = _trainer(tmp_path, max_steps=30, num_train_epochs=10)
    trainer.train()
    lines = [e for e in trainer.state.log_history if "loss" in e]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"] + 0.5
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["delta"] != 0.0


def test_delta_of_a_step_comes_from_earlier_steps(tmp_path):
    trainer = _trainer(tmp_path, max_steps=2, shift_mode="batch")
    trainer.train()
    first, second = [e for e in trainer.state.log_history if "loss" in e]
    for line in (first, second):
        middle = (line["rewards/chosen"] + line["rewards/rejected"]) / 2
        size = max(abs(line["rewards/chosen"]), abs(line["rewards/rejected"]))
        assert abs(line["delta"] - middle) <= 1e-6 * size
    assert abs(second["rewards/chosen"]) > 1e-3
    assert math.isclose(first["loss"], math.log(2), rel_tol=1e-4)  # delta was still 0


@pytest.mark.parametrize(
    ("size", "steps"), [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4), pytest.param(1, 8, marks=pytest.mark.slow)]
)
def test_accumulation_changes_nothing(tmp_path, size, steps):
    """1x8 = 2x4 = 8x1: parameters, δ and the logged loss."""
    results = []
    for per_device, accumulation in ((8, 1), (size, steps)):
        trainer = _trainer(
            tmp_path, rows=32, per_device_train_batch_size=per_device, gradient_accumulation_steps=accumulation,
            optim="sgd", max_grad_norm=0.0, ref_model=tiny.model(seed=1),
        )  # fmt: skip
        trainer.train()
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        results.append((_parameters(trainer), losses, trainer.delta))
    (whole, losses, delta), (parts, part_losses, part_delta) = results
    assert np.allclose(losses, part_losses, rtol=1e-5)
    assert abs(delta) > 0.01  # far from the reference, δ is no difference of nearly equal numbers
    assert abs(delta - part_delta) <= reward_error(logps=50)
    for name, tensor in whole.items():
        assert torch.allclose(parts[name], tensor, rtol=1e-4, atol=1e-6), name


def test_a_trainer_that_asks_otherwise_whether_the_loss_is_scaled_accumulates_alike(tmp_path, monkeypatch):
    """transformers before 5.18 know no `loss_is_scaled_for_ga` and would divide by the number of micro-batches."""
    forgets = property(lambda self: None, lambda self, value: None)
    monkeypatch.setattr(FeedbackTrainer, "loss_is_scaled_for_ga", forgets, raising=False)
    norms = []
    for per_device, accumulation in ((8, 1), (4, 2)):
        options = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        trainer = _trainer(tmp_path, rows=32, optim="sgd", max_steps=1, **options)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path, step):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "learning_rate": 1e-3}
    whole = _trainer(tmp_path / "a", **options)
    whole.train()
    state = json.loads((tmp_path / "a/out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FeedbackState"]["attributes"]["shift"]["state"] != [[0, 0], [0, 0]]
    shutil.copytree(tmp_path / "a/out" / f"checkpoint-{step}", tmp_path / "b/out" / f"checkpoint-{step}")
    resumed = _trainer(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/out" / f"checkpoint-{step}"))
    assert resumed.feedback.shift.state_dict() == whole.feedback.shift.state_dict()
    expected = _parameters(whole)
    for name, tensor in _parameters(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    timing = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}

    def history(trainer):
        return [{k: v for k, v in e.items() if k not in timing} for e in trainer.state.log_history]

    assert history(resumed) == history(whole)


def test_the_reference_is_computed_once(tmp_path):
    first = _trainer(tmp_path)
    assert (first.reference_report.hits, first.reference_report.computed) == (0, 60)
    second = _trainer(tmp_path, learning_rate=1e-5, beta=0.3, seed=0, per_device_train_batch_size=4, loss_type="bce")
    assert (second.reference_report.hits, second.reference_report.computed) == (16 + 1 + 20, 0)  # of its steps only
    assert np.array_equal(second.train_dataset.ref_logps, first.train_dataset.ref_logps)
    other = _trainer(tmp_path, seed=1)
    assert other.reference_report.computed == 60


def test_a_separate_reference_model(tmp_path):
    policy, reference = tiny.model(seed=0), tiny.model(seed=1)
    trainer = FeedbackTrainer(policy, _config(tmp_path), tiny.rows(10), processing_class=TOKENIZER, ref_model=reference)
    cache = ReferenceCache(tmp_path / "cache", reference_id(reference))
    keys = [e.key for e in trainer.train_dataset.examples]
    assert np.array_equal(trainer.train_dataset.ref_logps, cache.sums(keys))
    batch = collate([trainer.train_dataset[i] for i in range(10)], 1)
    with torch.no_grad():
        own = completion_sums(policy, batch)
    assert (own - batch["ref_logps"]).abs().max() > 1


def test_evaluation_does_not_move_the_shift(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.train()
    before = trainer.feedback.shift.state_dict()
    trainer.evaluate()
    assert trainer.feedback.shift.state_dict() == before


def test_weights_of_rows_enter_the_loss(tmp_path):
    rows = [{**row, "weight": 0.0} for row in tiny.rows(16)]
    trainer = FeedbackTrainer(tiny.model(), _config(tmp_path, max_steps=1), rows, processing_class=TOKENIZER)
    before = _parameters(trainer)
    trainer.train()
    for name, tensor in _parameters(trainer).items():
        assert torch.equal(tensor, before[name]), name


def test_the_head_never_sees_the_prompt(tmp_path, monkeypatch):
    """Prompt tokens are dropped before the head: N counts completion tokens only."""
    from bco_fast.head.backends import torch as chunked

    trainer = _trainer(tmp_path)
    batch = collate([trainer.train_dataset[i] for i in range(8)], 1)
    seen, real = [], chunked.forward

    def counting(inputs, *args, **kwargs):
        seen.append(len(inputs.hidden))
        return real(inputs, *args, **kwargs)

    monkeypatch.setattr(chunked, "forward", counting)
    trainer.compute_loss(trainer.model, batch)
    assert seen == [len(batch["targets"])] == [sum(e.completion_mask.sum() for e in trainer.train_dataset.examples[:8])]
    assert seen[0] < batch["input_ids"].numel() / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "bcoo"}, "loss_type"),
        ({"beta": 0.0}, "beta"),
        ({"shift_mode": "mean"}, "mode"),
        ({"shift_decay": 1.5}, "decay"),
    ],
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)


def test_trainer_refuses(tmp_path):
    with pytest.raises(ValueError, match="64 positions"):
        FeedbackTrainer(tiny.model(), _config(tmp_path, max_length=65), tiny.rows(3), processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="pass the tokenizer"):
        FeedbackTrainer(tiny.model(), _config(tmp_path), tiny.rows(3))
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="FeedbackConfig"):
        FeedbackTrainer(tiny.model(), TrainingArguments(str(tmp_path)), tiny.rows(3), processing_class=TOKENIZER)


def test_the_best_checkpoint_by_auc_is_kept_and_training_stops_early(tmp_path):
    from transformers import EarlyStoppingCallback

    trainer = FeedbackTrainer(
        tiny.model(),
        _config(
            tmp_path, max_steps=60, num_train_epochs=60, eval_strategy="steps", eval_steps=4, save_strategy="best",
            metric_for_best_model="rewards/auc", load_best_model_at_end=True, save_total_limit=1, learning_rate=2e-2,
        ),
        tiny.rows(24),
        tiny.rows(60, seed=5),
        processing_class=TOKENIZER,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
    )  # fmt: skip
    trainer.train()
    scores = [e["eval_rewards/auc"] for e in trainer.state.log_history if "eval_rewards/auc" in e]
    assert trainer.state.global_step < 60
    assert trainer.state.best_metric == max(scores)
    assert scores[-3:] != sorted(scores[-3:], reverse=False) or max(scores) > max(scores[-3:])
    assert trainer.evaluate()["eval_rewards/auc"] == max(scores)  # the best model is back


def test_nothing_of_the_trainer_is_overridden_by_accident():
    from transformers import Trainer

    meant = {
        "_get_train_sampler", "compute_loss", "create_model_card", "get_batch_samples", "get_train_dataloader", "log",
        "prediction_step", "save_model", "train", "_save_checkpoint", "create_scheduler",
    }  # fmt: skip
    ours = {name for name in vars(FeedbackTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert ours == meant
