"""A run resumed at any step is bitwise the uninterrupted one."""

import random
import shutil

import numpy as np
import pytest
import tiny
import torch
from small_runs import slow_but
from transformers import EarlyStoppingCallback

from bco_fast import FeedbackConfig, FeedbackTrainer

TOKENIZER = tiny.build_tokenizer()
STEPS = 14

# 40 rows: epochs end within the 14 steps, at and beside logged ones
RUNS = {
    "bco": {"loss_type": "bco"},
    "bco, δ pooled and at once": {"loss_type": "bco", "shift_mode": "cumulative", "shift_balanced": False, "shift_update": "micro"},
    "bco, accumulated, uneven": {"loss_type": "bco", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    "bco, stratified": {"loss_type": "bco", "batch_composition": "stratified", "reduction": "class_mean"},
    "bco, packed by tokens": {"loss_type": "bco", "tokens_per_batch": 150, "padding_free": True},
    "bco, evaluated each epoch": {"loss_type": "bco", "eval_strategy": "epoch", "logging_strategy": "epoch"},
    "kto, accumulated": {"loss_type": "kto", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "bnf, evaluated": {"loss_type": "bnf", "eval_strategy": "steps", "eval_steps": 3},
    "una_reward": {"loss_type": "una_reward"},
    "dpo": {"loss_type": "dpo"},
}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def _trainer(folder, name, callbacks=None, model=None, **options):
    config = FeedbackConfig(
        **{
            "output_dir": str(folder / name),
            "cache_dir": str(folder / "cache"),
            "max_length": 64,
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 4,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | options
    )
    return FeedbackTrainer(
        tiny.model(attention_dropout=0.2) if model is None else model,
        config,
        tiny.feedback_for(config.loss_type, 40),
        tiny.feedback_for(config.loss_type, 8, seed=5) if config.eval_strategy != "no" else None,
        processing_class=TOKENIZER,
        callbacks=callbacks,
    )


# of the Trainer's last line and of evaluations: they say how long this process took, and what it trained itself
TIMING = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}  # fmt: skip


def _state(trainer):
    """All that a run is: parameters, moments, schedule, δ, log, and the random numbers to come."""
    return {
        "parameters": dict(trainer.model.named_parameters()),
        "optimizer": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "shift": trainer.feedback.shift.state_dict(),
        "window": trainer.feedback.state()["attributes"]["sums"],
        "log": [{k: v for k, v in line.items() if k not in TIMING} for line in trainer.state.log_history],
        "step": trainer.state.global_step,
        "random": [torch.random.get_rng_state(), random.getstate(), np.random.get_state()],  # noqa: NPY002 - what the Trainer restores
    }


def _differences(a, b, place=""):
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in _differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)} entries"]
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in _differences(*pair, f"{place}/{i}")]
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return [] if np.array_equal(np.asarray(a.detach() if isinstance(a, torch.Tensor) else a), np.asarray(b.detach() if isinstance(b, torch.Tensor) else b)) else [place]  # fmt: skip
    return [] if a == b or a is b else [f"{place}: {a} and {b}"]


def _resumed_at_every(steps, folder, run, last=STEPS):
    options = RUNS[run] | {"max_steps": last}
    whole = _trainer(folder, f"whole {run}", **options)
    whole.train()
    expected = _state(whole)
    assert expected["step"] == last
    for step in steps:
        source = folder / f"whole {run}" / f"checkpoint-{step}"
        resumed = _trainer(folder, "resumed", **options | {"save_strategy": "no"})
        torch.manual_seed(step)  # what this process drew before must not matter
        random.seed(step)
        resumed.train(resume_from_checkpoint=str(source))
        found = _state(resumed)
        if step == last:  # nothing is drawn any more
            found["random"] = expected["random"]
        assert _differences(expected, found) == [], f"resumed at {step}"
    return expected


@pytest.mark.parametrize("run", slow_but(RUNS, ("bco, packed by tokens",)))
def test_resumed_is_bitwise_the_uninterrupted_run(folder, run):
    """In the window of a log line, and at an epoch's end; 7 steps."""
    expected = _resumed_at_every((3, 5), folder, run, last=7)
    assert (expected["shift"]["state"] != [[0, 0], [0, 0]]) == (RUNS[run]["loss_type"] in ("bco", "una_reward"))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_resumed_at_every_step(folder, run):
    _resumed_at_every(range(1, STEPS + 1), folder, run)


def test_the_comparison_sees_what_a_resume_can_lose(folder):
    """Without the moments, the random state or δ the run is another one: the tests above can fail."""
    whole = _trainer(folder, "whole to lose", max_steps=5)
    whole.train()
    expected = _state(whole)
    for lost in ("optimizer", "dropout", "shift"):
        resumed = _trainer(folder, "resumed", max_steps=5, save_strategy="no")
        if lost == "optimizer":
            resumed._load_optimizer_and_scheduler = lambda checkpoint: None
        elif lost == "dropout":
            resumed._load_rng_state = lambda checkpoint: None
        else:
            resumed.feedback.on_train_begin = lambda *args, **kwargs: None
        torch.manual_seed(99)
        resumed.train(resume_from_checkpoint=str(folder / "whole to lose/checkpoint-2"))
        places = " ".join(_differences(expected, _state(resumed)))
        assert "/parameters/" in places, lost
        assert "/log/" in places, lost


def test_resuming_the_last_step_trains_nothing(folder):
    """The Trainer would do a 15th step."""
    whole = _trainer(folder, "whole to end", max_steps=3)
    whole.train()
    resumed = _trainer(folder, "whole to end", max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert _differences(_state(whole)["parameters"], _state(resumed)["parameters"]) == []


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_finished_one(folder):
    """With a schedule that does not depend on the length, 3 + 3 steps are 6."""
    options = {"lr_scheduler_type": "constant", "save_strategy": "steps", "logging_steps": 1}
    whole = _trainer(folder, "six", max_steps=6, **options)
    whole.train()
    _trainer(folder, "three", max_steps=3, **options).train()
    longer = _trainer(folder, "three", max_steps=6, **options)
    longer.train(resume_from_checkpoint=True)
    assert _differences(_state(whole)["parameters"], _state(longer)["parameters"]) == []
    assert _differences(_state(whole)["optimizer"], _state(longer)["optimizer"]) == []


@pytest.mark.slow
def test_early_stopping_counts_on(folder):
    """Resumed anywhere, the run stops where the uninterrupted one does."""
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "logging_steps": 1,
        "metric_for_best_model": "eval_delta", "greater_is_better": True, "learning_rate": 1e-2,
    }  # fmt: skip
    whole = _trainer(folder, "stopped", [EarlyStoppingCallback(3)], **options)
    whole.train()
    stopped = whole.state.global_step
    assert 3 < stopped < STEPS
    for step in (stopped - 2, stopped - 1):
        shutil.rmtree(folder / "resumed", ignore_errors=True)
        resumed = _trainer(folder, "resumed", [EarlyStoppingCallback(3)], **options)
        resumed.train(resume_from_checkpoint=str(folder / f"stopped/checkpoint-{step}"))
        assert resumed.state.global_step == stopped
        assert resumed.state.best_global_step == whole.state.best_global_step
        assert _differences(_state(whole)["parameters"], _state(resumed)["parameters"]) == []


@pytest.mark.slow
def test_an_adapter_goes_on_too(tmp_path):
    """Its checkpoint has adapter_model.safetensors in place of the model."""
    peft = pytest.importorskip("peft")

    def trainer(name, **options):
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.2)
        model = peft.get_peft_model(tiny.model(attention_dropout=0.2), adapter)
        return _trainer(tmp_path, name, model=model, max_steps=6, **options)

    whole = trainer("adapter")
    whole.train()
    files = {path.name for path in (tmp_path / "adapter/checkpoint-3").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    resumed = trainer("resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "adapter/checkpoint-3"))
    assert _differences(_state(whole), _state(resumed)) == []
    (tmp_path / "adapter/checkpoint-6/adapter_model.safetensors").unlink()
    with pytest.warns(RuntimeWarning, match=r"adapter_model\.safetensors is missing"):
        trainer("adapter").train(resume_from_checkpoint=True)
