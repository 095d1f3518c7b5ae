"""Evaluation of what the constructor has not seen, of several datasets by name, and of streams."""

import json
import math

import pytest
import tiny
import torch
from small_runs import TOKENIZER, config, slow_but, trainer

from bco_fast import FeedbackTrainer

TIMES = ("runtime", "per_second", "preparation_time")


def _figures(metrics, prefix="eval_"):
    """Metrics without the prefix and without what a clock says."""
    return {k.removeprefix(prefix): v for k, v in metrics.items() if not any(part in k for part in TIMES)}


def _close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(found[name], value, rel_tol=1e-5, abs_tol=1e-6), name


def _make(tmp_path, name, held_out=None, model=None, loss_type="bco", **options):
    ref_model = options.pop("ref_model", None)
    options = {"max_steps": 2, "cache_dir": str(tmp_path / f"cache-{name}"), "loss_type": loss_type} | options
    return FeedbackTrainer(
        tiny.model() if model is None else model, config(tmp_path / name, **options), tiny.feedback_for(loss_type, 16),
        held_out, processing_class=TOKENIZER, ref_model=ref_model,
    )  # fmt: skip


def _saved(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("loss_type", ["bco", "kto", "bnf", "dpo"])
def test_rows_seen_late_give_the_metrics_of_rows_seen_early(tmp_path, loss_type):
    held_out, reference = tiny.feedback_for(loss_type, 9, seed=5), tiny.model(seed=1)
    early = _make(tmp_path, "early", held_out, loss_type=loss_type, ref_model=reference).evaluate()
    late = _make(tmp_path, "late", loss_type=loss_type, ref_model=reference).evaluate(held_out)
    _close(_figures(late), _figures(early))


@pytest.mark.parametrize("kept", slow_but(("adapter", "checkpoint", "ref_model"), fast=("adapter",)))
def test_the_reference_is_found_again_after_training(tmp_path, kept):
    held_out = tiny.rows(9, seed=5)

    def made(name, rows=None):
        torch.manual_seed(0)
        if kept == "adapter":
            return _make(tmp_path, name, rows, use_peft=True, lora_r=2, model_dtype="float32")
        if kept == "checkpoint":
            return _make(tmp_path, name, rows, model=_saved(tmp_path), model_dtype="float32")
        return _make(tmp_path, name, rows, ref_model=reference)

    reference = tiny.model(seed=1)
    early, late = made("early", held_out), made("late")
    for run in (early, late):
        run.train()
    expected = _figures(early.evaluate())
    assert expected["rewards/margins"] != 0
    _close(_figures(late.evaluate(held_out)), expected)
    _close(_figures(late.evaluate(held_out, metric_key_prefix="test"), "test_"), expected)


def test_a_reference_that_is_gone_is_refused_unless_the_cache_has_the_rows(tmp_path):
    held_out = tiny.rows(9, seed=5)
    late = _make(tmp_path, "late")
    late.train()
    with pytest.raises(ValueError, match=r"not loaded from a checkpoint.*as eval_dataset"):
        late.evaluate(held_out)
    other = _make(tmp_path, "other", held_out, cache_dir=late.args.cache_dir)
    other.train()
    _close(_figures(late.evaluate(held_out)), _figures(other.evaluate()))


def test_a_reference_model_that_nobody_keeps_is_refused(tmp_path):
    late = _make(tmp_path, "late", ref_model=tiny.model(seed=1))
    with pytest.raises(ValueError, match="reference model of the constructor is gone"):
        late.evaluate(tiny.rows(3, seed=9))


def test_a_checkpoint_that_changed_is_no_reference(tmp_path):
    path = _saved(tmp_path)
    late = _make(tmp_path, "late", model=path, model_dtype="float32")
    late.train()
    tiny.model(seed=3).save_pretrained(path)
    with pytest.raises(ValueError, match="other weights"):
        late.evaluate(tiny.rows(3, seed=9))


def test_several_datasets_by_name(tmp_path):
    sets = {"near": tiny.rows(9, seed=5), "far": tiny.rows(5, seed=6)}
    run = _make(tmp_path, "run", sets, eval_strategy="steps", eval_steps=1)
    run.train()
    for name, rows in sets.items():
        alone = _figures(run.evaluate(rows))
        logged = [line for line in run.state.log_history if f"eval_{name}_loss" in line]
        assert len(logged) == 2
        assert logged[-1][f"eval_{name}_loss"] == pytest.approx(alone["loss"], abs=1e-6)
        _close(_figures(run.evaluate(name)), alone)
    both = run.evaluate()
    assert {"eval_near_rewards/auc", "eval_far_rewards/auc"} <= both.keys()
    assert {"eval_a_loss", "eval_b_loss"} <= run.evaluate({"a": sets["far"], "b": sets["near"]}).keys()


def test_what_is_written_of_several_datasets(tmp_path):
    sets = {"near": tiny.rows(9, seed=5), "far": tiny.rows(5, seed=6)}
    run = _make(tmp_path, "run", sets)
    run.train()
    run.evaluate()
    record = json.loads((tmp_path / "run" / "out" / "run.json").read_text())
    counts = record["data"]["held_out"]
    assert counts["rows"] == 14
    assert {name: part["rows"] for name, part in counts["sets"].items()} == {"near": 9, "far": 5}
    assert {"eval_near_loss", "eval_far_loss"} <= record["held_out"].keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "out" / "held_out.jsonl").read_text().splitlines()]
    assert [line["set"] for line in lines] == ["near"] * 9 + ["far"] * 5
    run.create_model_card()
    card = (tmp_path / "run" / "out" / "README.md").read_text()
    assert "near: AUC" in card
    assert "far: AUC" in card


def test_the_best_checkpoint_may_be_that_of_one_of_them(tmp_path):
    sets = {"near": tiny.rows(9, seed=5), "far": tiny.rows(5, seed=6)}
    run = _make(
        tmp_path, "run", sets, eval_strategy="steps", eval_steps=1, save_strategy="best",
        metric_for_best_model="eval_far_rewards/auc",
    )  # fmt: skip
    run.train()
    assert run.state.best_metric == max(line.get("eval_far_rewards/auc", 0) for line in run.state.log_history)


@pytest.mark.parametrize("kind", ["stream", "dict of streams", "IterableDatasetDict", "DatasetDict"])
def test_datasets_of_the_datasets_library(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    rows = tiny.rows(6, seed=5)
    table = datasets.Dataset.from_list(rows)
    stream = table.to_iterable_dataset()
    given = {
        "stream": stream,
        "dict of streams": {"a": stream, "b": stream},
        "IterableDatasetDict": datasets.IterableDatasetDict({"a": stream, "b": stream}),
        "DatasetDict": datasets.DatasetDict({"a": table, "b": table}),
    }[kind]
    run = _make(tmp_path, "run", given)
    first, again = run.evaluate(), run.evaluate(given)
    prefix = "eval_" if kind == "stream" else "eval_b_"
    expected = _figures(run.evaluate(rows))
    for metrics in (first, again):
        _close({k: v for k, v in _figures(metrics, prefix).items() if k in expected}, expected)


def test_predict_takes_rows(tmp_path):
    run = _make(tmp_path, "run", use_peft=True, lora_r=2)
    run.train()
    rows = tiny.rows(5, seed=9)
    expected = _figures(run.evaluate(rows))
    found = run.predict(rows)
    assert len(found.predictions) == 5
    assert found.metrics["test_loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_what_is_no_set_of_datasets_is_named(tmp_path):
    run = trainer(tmp_path, rows=8)
    with pytest.raises(TypeError, match="'a' to NoneType"):
        FeedbackTrainer(tiny.model(), config(tmp_path), tiny.rows(8), {"a": None}, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="requires an eval_dataset"):
        _make(tmp_path, "run").evaluate()
    with pytest.raises(ValueError, match=r"no such file|No such file"):
        run.evaluate("nowhere.jsonl")


def test_a_trainer_without_datasets_evaluates(tmp_path):
    run = FeedbackTrainer(tiny.model(), config(tmp_path), processing_class=TOKENIZER)
    assert run.evaluate(tiny.rows(5, seed=5))["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    given = FeedbackTrainer(tiny.model(), config(tmp_path), processing_class=TOKENIZER, ref_model=tiny.model(seed=1))
    with pytest.raises(ValueError, match="was not kept"):
        given.evaluate(tiny.rows(5, seed=5))
