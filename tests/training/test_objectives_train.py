"""Every objective trains: on the demo's feedback each raises the held-out AUC above the reference's."""

import copy
import itertools
import random

import pytest
import tiny
import torch
from small_runs import slow_but

from bco_fast import FeedbackConfig, FeedbackTrainer
from bco_fast.cli import demo
from bco_fast.losses import OBJECTIVES

# One step size for all of them, but where the loss's scale is another: beta 0.5 on completions of four tokens, as in the
# demo; una_score and una_reward fit numbers between 0 and 1; slic, simpo, orpo and ipo have no beta or their own.
LEARNING_RATE, STEPS = 1e-3, 40
OPTIONS = {
    "sft": {},
    "bnf": {},
    "slic": {"slic_delta": 5.0},
    "orpo": {"lam": 1.0},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "ipo": {"beta": 0.1},
    "apo_down": {"beta": 2.0},  # it first lowers both sides; a large β ends that within a few nats
}


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The demo's model after its noisy demonstrations, its own completions judged, and the reference's AUC."""
    folder = tmp_path_factory.mktemp("demo")
    rng = random.Random(0)  # noqa: S311
    prompts = demo.all_prompts()
    rng.shuffle(prompts)
    tokenizer = demo.build_tokenizer()
    model = tiny.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4, std=0.02)
    demo.fine_tune(model, tokenizer, prompts[120:], rng, steps=150)
    rows = [
        {**row, "score": 0.9 if row["label"] else 0.1}
        for row in demo.judge(model, tokenizer, prompts[120:], seed=1, samples=4).rows
    ]
    held_out = demo.judge(model, tokenizer, prompts[:120], seed=2, samples=3).rows
    return folder, tokenizer, model, rows, held_out


def _pairs(rows):
    sides = {}
    for row in rows:
        sides.setdefault(row["prompt"], ([], []))[row["label"]].append(row["completion"])
    return [
        {"prompt": prompt, "chosen": up, "rejected": down}
        for prompt, (bad, good) in sides.items()
        for up, down in itertools.islice(zip(good, bad, strict=False), 2)
    ]


def _config(folder, loss_type, **options):
    return FeedbackConfig(
        output_dir=str(folder / loss_type), cache_dir=str(folder / "cache"), loss_type=loss_type, max_length=64,
        max_steps=STEPS, per_device_train_batch_size=32, per_device_eval_batch_size=256, learning_rate=LEARNING_RATE,
        warmup_steps=5, logging_steps=STEPS, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip


def _held_out_auc(folder, model, reference, held_out, tokenizer):
    """Of the log-ratio to the reference, whatever the policy was trained by."""
    judge = FeedbackTrainer(model, _config(folder, "bce"), None, held_out, processing_class=tokenizer, ref_model=copy.deepcopy(reference))  # fmt: skip
    return judge.evaluate()["eval_rewards/auc"]


@pytest.mark.parametrize("name", slow_but(OBJECTIVES, ("bco",)))
def test_every_objective_raises_held_out_auc(name, world, record_property):
    """Against the reference itself every reward is 0, and the AUC of that is 1/2."""
    folder, tokenizer, reference, rows, held_out = world
    torch.manual_seed(0)
    model = copy.deepcopy(reference)
    data = _pairs(rows) if OBJECTIVES[name].data == "pairs" else rows
    FeedbackTrainer(model, _config(folder, name, **OPTIONS.get(name, {"beta": 0.5})), data, processing_class=tokenizer).train()  # fmt: skip
    auc = _held_out_auc(folder, model, reference, held_out, tokenizer)
    record_property("figure", f"{auc:.3f} after {STEPS} steps of 32 rows")
    assert auc > 0.6
