"""A checkpoint is resumed by the run that it belongs to; any other is told what differs, and nothing is written."""

import dataclasses
import json

import pytest
import tiny
from small_runs import TOKENIZER, config

from bco_fast import FeedbackTrainer
from bco_fast.online.config import OnlineConfig
from bco_fast.training.checkpoints import CheckpointError
from bco_fast.training.fingerprint import FILE, MAY_DIFFER, differences

pytest.importorskip("peft")


def _trainer(folder, model=None, rows=None, **options):
    defaults = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "learning_rate": 1e-3, "beta": 0.2}
    return FeedbackTrainer(
        tiny.model() if model is None else model,
        config(folder, **defaults | options),
        tiny.feedback_for(options.get("loss_type", "bco"), 24) if rows is None else rows,
        processing_class=TOKENIZER,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    _trainer(folder).train()
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    _trainer(folder, use_peft=True, lora_r=4).train()
    return folder


def _flipped(rows):
    return [{**row, "label": not row["label"]} for row in rows]


OTHERS = {
    "other rows": ({"rows": tiny.rows(24, seed=9)}, "the tokens of the training rows differ"),
    "fewer rows": ({"rows": tiny.rows(24)[:20]}, "rows was 24 and is 20"),
    "other order": ({"rows": tiny.rows(24)[::-1]}, "the tokens of the training rows differ"),
    "flipped labels": ({"rows": _flipped(tiny.rows(24))}, "the labels, weights or scores of the training rows differ"),
    "weights": ({"rows": [{**row, "weight": 2.0} for row in tiny.rows(24)]}, "the labels, weights or scores"),
    "another model": ({"model": tiny.model(seed=1)}, "the weights that training starts from differ"),
    "another config": ({"model": tiny.model(rms_norm_eps=1e-3)}, "the config of the model differs"),
    "beta": ({"beta": 0.3}, "beta was 0.2 and is 0.3"),
    "learning rate": ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
    "seed": ({"seed": 1}, "seed was 42 and is 1"),
    "dtype": ({"model": tiny.model().bfloat16()}, 'dtype was "torch.float32, autocast no" and is "torch.bfloat16, autocast no"'),
    "max_length": ({"max_length": 60}, "max_length was 64 and is 60"),
    "oversample": ({"oversample": True}, "oversample was false and is true"),
    "batch size": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size was 8 and is 4"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1 and is 2"),
    "kto": ({"loss_type": "kto"}, 'loss_type was "bco" and is "kto"'),
    "bce": ({"loss_type": "bce"}, 'loss_type was "bco" and is "bce"'),
    "LoRA": ({"use_peft": True}, "an adapter was false and is true"),
    "optimizer": ({"optim": "sgd"}, 'optim was "adamw_torch_fused" and is "sgd"'),
    "schedule": ({"lr_scheduler_type": "linear"}, 'lr_scheduler_type was "constant" and is "linear"'),
    "fewer steps": ({"max_steps": 1}, "max_steps was 2 and is 1"),
    "epochs": ({"max_steps": -1, "num_train_epochs": 3}, "max_steps was 2 and is not given"),
}  # fmt: skip


def _contents(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*")}


@pytest.mark.parametrize("change", OTHERS)
def test_another_run_is_refused_and_what_differs_is_named(folder, change):
    options, message = OTHERS[change]
    before = _contents(folder)
    trainer = _trainer(folder, **options)
    with pytest.raises(CheckpointError, match="checkpoint-2 belongs to another run: ") as error:
        trainer.train(resume_from_checkpoint=True)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert _contents(folder) == before


ADAPTERS = {
    "rank": ({"use_peft": True, "lora_r": 8}, "default.r was 4 and is 8"),
    "full training": ({}, "an adapter was true and is false"),
    "another base": (
        {"use_peft": True, "lora_r": 4, "model": tiny.model(seed=1)},
        "the weights that training starts from",
    ),
}


@pytest.mark.parametrize("change", ADAPTERS)
def test_another_adapter_is_refused(lora, change):
    options, message = ADAPTERS[change]
    with pytest.raises(CheckpointError) as error:
        _trainer(lora, **options).train(resume_from_checkpoint=True)
    assert message in str(error.value)
    same = _trainer(lora, use_peft=True, lora_r=4, model=tiny.model())
    assert differences(json.loads((lora / "out/checkpoint-2" / FILE).read_text()), _fingerprint(same)) == []


def _fingerprint(trainer):
    from bco_fast.training.fingerprint import fingerprint

    return fingerprint(trainer)


def test_one_refusal_names_everything(folder):
    with pytest.raises(CheckpointError) as error:
        _trainer(folder, beta=0.5, seed=3, rows=_flipped(tiny.rows(24))).train(resume_from_checkpoint=True)
    assert [word in str(error.value) for word in ("beta", "seed", "labels")] == [True] * 3


def test_logging_saving_evaluation_and_more_steps_may_differ(folder, tmp_path, recwarn):
    options = {
        "output_dir": str(tmp_path / "elsewhere"), "max_steps": 3, "logging_steps": 2, "save_steps": 3, "save_total_limit": 1,
        "run_name": "again", "per_device_eval_batch_size": 3, "workspace_bytes": 1 << 20, "dataloader_num_workers": 0,
    }  # fmt: skip
    trainer = _trainer(folder, **options)
    trainer.train(resume_from_checkpoint=str(folder / "out/checkpoint-2"))
    assert trainer.state.global_step == 3
    assert not [w for w in recwarn if w.category is RuntimeWarning]


def test_epochs_may_grow_but_not_shrink(tmp_path):
    trainer = _trainer(tmp_path, max_steps=-1, num_train_epochs=1)
    trainer.train()
    with pytest.raises(CheckpointError, match=r"num_train_epochs was 1 and is 0\.5"):
        _trainer(tmp_path, max_steps=-1, num_train_epochs=0.5).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="max_steps was 3 and is 2"):
        _trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    more = _trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    more.train(resume_from_checkpoint=True)
    assert more.state.global_step == 6


def test_a_checkpoint_that_does_not_say_is_resumed_with_a_warning(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "out", tmp_path / "out")
    for name in (FILE, "manifest.json"):
        (tmp_path / "out/checkpoint-2" / name).unlink()
    with pytest.warns(RuntimeWarning, match="does not say what it was trained on"):
        _trainer(tmp_path, beta=0.7).train(resume_from_checkpoint=True)


def test_a_fingerprint_that_is_none_is_damage(folder, tmp_path):
    import shutil

    from bco_fast.training.checkpoints import examine

    shutil.copytree(folder / "out", tmp_path / "out")
    checkpoint = tmp_path / "out/checkpoint-2"
    (checkpoint / "manifest.json").unlink()
    for text in ("[]", "{", '{"model": 1, "data": {}, "options": {}}', "[" * 100000, " " * (2 << 20)):
        (checkpoint / FILE).write_text(text)
        assert FILE in examine(checkpoint).problem


def test_ignore_data_skip_is_told(folder, tmp_path):
    options = {"output_dir": str(tmp_path / "elsewhere"), "ignore_data_skip": True}
    with pytest.warns(RuntimeWarning, match="rows are seen twice"):
        _trainer(folder, **options).train(resume_from_checkpoint=str(folder / "out/checkpoint-1"))


def test_what_may_differ_are_options():
    assert {field.name for field in dataclasses.fields(OnlineConfig)} >= MAY_DIFFER
    assert not MAY_DIFFER & {
        "loss_type",
        "beta",
        "seed",
        "data_seed",
        "learning_rate",
        "max_length",
        "optim",
        "oversample",
    }
