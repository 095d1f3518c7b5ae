"""One training step of `FeedbackTrainer` against a bare loop round the same operator: how thin is the loop?

    python benchmarks/train_step.py --data feedback.jsonl      about three minutes on two cores; results/train_step.json

A Llama of 20M parameters with V = 32000, batch 4, max_length 512, real feedback, AdamW, float32. Both run the same batches of
the same rows in the same order; rounds alternate in one process, peak memory is of a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import in_own_process, peak_rss, reset_peak_rss, save, summary, table
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from bco_fast import FeedbackConfig, FeedbackTrainer, RewardShift, bco_loss, sequence_logps
from bco_fast.data.batch import collate
from bco_fast.data.tokenize import load_feedback
from bco_fast.models.patch import completion_logps, patch_model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import byte_pair_tokenizer

VOCABULARY, BATCH, MAX_LENGTH, LEARNING_RATE = 32_000, 4, 512, 1e-5
ROWS = 240


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


class Setup:
    """Tokens and cached reference, once; a model of equal weights for every round."""

    def __init__(self, data: Path, folder: Path):
        self.folder = folder
        self.tokenizer = byte_pair_tokenizer(data, VOCABULARY)
        records = [json.loads(line) for line in data.read_text().splitlines()[:ROWS]]
        self.dataset = load_feedback(records, self.tokenizer, max_length=MAX_LENGTH)
        self.trainer(1)  # fills the cache

    def trainer(self, steps: int, callback: TrainerCallback | None = None) -> FeedbackTrainer:
        config = FeedbackConfig(
            output_dir=str(self.folder / "out"),
            cache_dir=str(self.folder / "cache"),
            max_length=MAX_LENGTH,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        callbacks = [callback] if callback else None
        with contextlib.redirect_stdout(io.StringIO()):
            return FeedbackTrainer(
                build_model(), config, self.dataset, processing_class=self.tokenizer, callbacks=callbacks
            )

    def batches(self, steps: int) -> list:
        """The batches that the trainer will see."""
        loader = self.trainer(steps).get_train_dataloader()
        order = []
        for indices in loader.batch_sampler:
            order.append(indices)
            if len(order) == steps:
                return order
        raise ValueError(f"{ROWS} rows make fewer than {steps} batches of {BATCH}")


class _Clock(TrainerCallback):
    def __init__(self):
        self.steps: list[float] = []
        self.last = 0.0

    def on_train_begin(self, *_, **__):
        self.last = time.perf_counter()

    def on_step_end(self, *_, **__):  # data, forward, backward, clipping, optimizer: everything since the last one
        now = time.perf_counter()
        self.steps.append(now - self.last)
        self.last = now


def run_trainer(setup: Setup, steps: int) -> list[float]:
    clock = _Clock()
    trainer = setup.trainer(steps, clock)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return clock.steps


def run_bare(setup: Setup, order: list) -> list[float]:
    model = patch_model(build_model()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    shift, seconds = RewardShift(), []
    for indices in order:
        start = time.perf_counter()
        batch = collate([setup.dataset[i] for i in indices], 0)
        logps = sequence_logps(completion_logps(model, batch), cu_seqlens=batch["cu_completions"])
        shift.observe(0.1 * (logps.detach() - batch["ref_logps"]), batch["label"])
        bco_loss(logps, batch["ref_logps"], batch["label"], beta=0.1, delta=shift).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shift.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval_feedback.jsonl"
    parser.add_argument("--data", type=Path, default=default, help="feedback, JSONL")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--case", help="measure the memory of one case and print it")
    options = parser.parse_args()
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options.data, Path(folder))
        order = setup.batches(options.steps)
        cases = {
            "bare loop": lambda: run_bare(setup, order),
            "FeedbackTrainer": lambda: run_trainer(setup, options.steps),
        }
        if options.case:
            before = reset_peak_rss()
            cases[options.case]()
            print(json.dumps({"peak_mb": round(peak_rss() / 1e6, 1), "before_mb": round(before / 1e6, 1)}))
            return
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(options.rounds):
            for name, case in cases.items():
                times[name] += case()[2:]  # the first two steps allocate
    medians = {name: summary(seconds)["median_s"] for name, seconds in times.items()}
    rows = [
        {
            "benchmark": "train_step",
            "case": name,
            "parameters": sum(p.numel() for p in build_model().parameters()),
            **{"V": VOCABULARY, "batch": BATCH, "max_length": MAX_LENGTH},
            **summary(seconds),
            "ratio_to_bare": round(medians[name] / medians["bare loop"], 3),
            **in_own_process(__file__, "--data", str(options.data), "--steps", "6", "--case", name),
        }
        for name, seconds in times.items()
    ]
    print(f"\n{save('train_step', rows)}")
    print(table(rows, ["case", "median_s", "min_s", "max_s", "ratio_to_bare", "peak_mb"]))


if __name__ == "__main__":
    main()
