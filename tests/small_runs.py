"""Small training runs that several tests share."""

import pytest
import tiny
import torch

from bco_fast import FeedbackConfig, FeedbackTrainer

TOKENIZER = tiny.build_tokenizer()
# Two that keep a state, δ and z_ref, and one of pairs.
FIRST = ("bco", "kto", "dpo")


def slow_but(values, fast=FIRST):
    """The parameters of a test: `fast` ones always, the rest with the long proofs."""
    values = list(values)
    assert set(fast) <= set(values), set(fast) - set(values)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def command_folder(tmp_path, monkeypatch, rows):
    """Makes tmp_path the current folder, with a model and its tokenizer, m, and so many rows of feedback, f.jsonl."""
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("m")
    TOKENIZER.save_pretrained("m")
    tiny.write(tmp_path / "f.jsonl", tiny.rows(rows))
    return tmp_path


def config(tmp_path, **options):
    return FeedbackConfig(
        **{
            "output_dir": str(tmp_path / "out"),
            "cache_dir": str(tmp_path / "cache"),
            "max_length": 64,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "lr_scheduler_type": "constant",
        }
        | options
    )


def reward_error(logps, beta=0.1):
    """How far apart two float32 computations of a reward may be: it is a difference of log-probabilities of this size,
    so a small reward keeps their rounding. The bound of a mean of rewards, of δ and of the loss in them too."""
    return 8 * torch.finfo(torch.float32).eps * beta * abs(logps)


def trainer(tmp_path, rows=40, seed=0, ref_model=None, **options):
    return FeedbackTrainer(
        tiny.model(seed=seed),
        config(tmp_path, **options),
        tiny.rows(rows),
        tiny.rows(20, seed=5),
        processing_class=TOKENIZER,
        ref_model=ref_model,
    )


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
