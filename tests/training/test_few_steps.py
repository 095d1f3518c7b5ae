"""A run of few steps computes the reference of the rows that it reads, and trains as if all were known."""

import math

import numpy as np
import pytest
import tiny
from small_runs import TOKENIZER, config, parameters

from bco_fast import FeedbackTrainer
from bco_fast.training.loader import items_of_all_steps

OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}


def _trainer(folder, loss_type="bco", **options):
    rows = tiny.feedback_for(loss_type, 40), tiny.feedback_for(loss_type, 6)
    options = OPTIONS | {"loss_type": loss_type} | options
    return FeedbackTrainer(tiny.model(), config(folder, **options), *rows, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"loss_type": "bnf"}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "kto"}, marks=pytest.mark.slow),
        {"loss_type": "dpo"},
        pytest.param({"batch_composition": "stratified"}, marks=pytest.mark.slow),
        {"tokens_per_batch": 40, "per_device_train_batch_size": 8},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_only_the_rows_of_its_steps(tmp_path, monkeypatch, options):
    few = _trainer(tmp_path / "few", **options)
    seen, step = set(), few.training_step

    def training_step(model, inputs, *rest):
        seen.update(inputs["index"].tolist())
        return step(model, inputs, *rest)

    few.training_step = training_step
    few.train()
    known = np.flatnonzero(~np.isnan(few.train_dataset.ref_logps[:: 1 + few.train_dataset.paired]))
    assert set(known) == seen | {0, 1, 2, 3}
    assert len(known) < 20
    assert math.isfinite(few.evaluate()["eval_loss"])
    monkeypatch.setattr("bco_fast.training.references.items_of_all_steps", lambda _: None)
    whole = _trainer(tmp_path / "whole", **options)
    whole.train()
    assert not np.isnan(whole.train_dataset.ref_logps).any()
    ends = parameters(few), parameters(whole)
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])


def test_more_steps_than_were_planned_add_the_other_rows(tmp_path):
    made = _trainer(tmp_path, eval_strategy="no")
    assert not made.train_dataset.has_reference
    made.args.max_steps = 8
    made.train()
    assert made.train_dataset.has_reference


def test_all_rows_can_be_evaluated(tmp_path):
    made = _trainer(tmp_path)
    assert math.isfinite(made.evaluate(made.train_dataset)["eval_loss"])
    assert made.train_dataset.has_reference


@pytest.mark.parametrize("options", [{"max_steps": -1}, {"max_steps": 4}, {"auto_find_batch_size": True}])
def test_all_rows_where_they_may_be_read(tmp_path, options):
    made = _trainer(tmp_path, loss_type="simpo", **options)
    assert items_of_all_steps(made) is None
