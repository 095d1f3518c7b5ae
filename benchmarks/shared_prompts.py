"""A training step of `FeedbackTrainer` with every prompt computed once, against the same step with prompts repeated.

    python benchmarks/shared_prompts.py [--shape NAME ...] [--turns 3]

A Llama of 20M parameters on two cores, float32, `padding_free`, random tokens; one micro-batch holds all completions of
its prompts. The two take turns in one process each, and the ratios are of processor time; peak memory is beyond the model
before the first step. Writes benchmarks/results/shared_prompts.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from statistics import median

import numpy as np
import torch
from common import in_own_process, peak_rss, reset_peak_rss, save, summary, table
from transformers import LlamaConfig, LlamaForCausalLM

from bco_fast import FeedbackConfig, FeedbackTrainer
from bco_fast.data.dataset import Example, FeedbackDataset
from bco_fast.training.references import Reference

# (prompt tokens, completions of a prompt, completion tokens, prompts of a micro-batch)
SHAPES = {
    "1024 + 4 x 128": (1024, 4, 128, 1),
    "512 + 2 x 128": (512, 2, 128, 2),
    "200 + 2 x 300": (200, 2, 300, 2),
    "256 + 1 x 256": (256, 1, 256, 4),
    "8 turns of 128": (0, 8, 128, 1),
}
"""Of the last, every turn of a chat is judged; repeated, each turn is a row with the turns before it as its prompt."""
VOCABULARY = 8192


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def dataset(shape: str, prompts: int, *, together: bool) -> FeedbackDataset:
    rng = np.random.default_rng(0)
    prompt_tokens, completions, tokens, _ = SHAPES[shape]
    examples = []
    for chat in range(prompts):
        if not prompt_tokens:  # half of a turn is the user's
            ids = rng.integers(2, VOCABULARY, completions * tokens).astype(np.int32)
            for i in range(completions):
                stop, group = (i + 1) * tokens, f"chat {chat}" if together else ""
                examples.append(Example(ids[:stop], stop - tokens // 2, i % 2 == 0, 1.0, group=group))
            continue
        prompt = rng.integers(2, VOCABULARY, prompt_tokens)
        for i in range(completions):
            ids = np.concatenate([prompt, rng.integers(2, VOCABULARY, tokens)]).astype(np.int32)
            examples.append(Example(ids, prompt_tokens, i % 2 == 0, 1.0))
    return FeedbackDataset(examples)


def worker(shape: str, share: str, steps: int) -> dict:
    """One process: processor seconds of each step after the first, and peak memory beyond the model."""
    _, completions, _, prompts = SHAPES[shape]
    data = dataset(shape, prompts * (steps + 1), together=share == "true")
    with tempfile.TemporaryDirectory() as folder:
        config = FeedbackConfig(
            output_dir=folder, cache_dir=folder, share_prompts=share if SHAPES[shape][0] else "false", padding_free=True, max_length=4096,
            per_device_train_batch_size=completions * prompts, max_steps=steps + 1, logging_steps=1, save_strategy="no",
            report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=1e-6,
        )  # fmt: skip
        filling: list[float] = []
        fill = Reference.fill

        def timed_fill(*args):
            start = time.process_time()
            report = fill(*args)
            filling.append(time.process_time() - start)
            return report

        Reference.fill = timed_fill
        trainer = FeedbackTrainer(build_model(), config, data, processing_class=_Tokenizer())
        seconds, before = [], peak_rss()
        real = trainer.training_step

        def timed(*args, **kwargs):
            began = time.process_time()
            loss = real(*args, **kwargs)
            seconds.append(time.process_time() - began)
            return loss

        trainer.training_step = timed
        reset_peak_rss()
        trainer.train()
        tokens = sum(len(e) for e in data.examples)
        return {"seconds": seconds[1:], "peak_mb": (peak_rss() - before) / 1e6, "fill_tokens_per_s": tokens / filling[0], "layout": trainer.layout}  # fmt: skip


class _Tokenizer:
    pad_token_id = eos_token_id = 0
    chat_template = None

    def save_pretrained(self, folder):
        return ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*json.loads(options.worker))))
        return
    rows = []
    for shape in options.shape:
        runs: dict[str, list[dict]] = {"true": [], "false": []}
        for _ in range(options.turns):
            for share, found in runs.items():
                found.append(in_own_process(__file__, "--worker", json.dumps([shape, share, options.steps])))
        seconds = {share: [s for run in found for s in run["seconds"]] for share, found in runs.items()}
        peaks = {share: median(run["peak_mb"] for run in found) for share, found in runs.items()}
        fills = {share: median(run["fill_tokens_per_s"] for run in found) for share, found in runs.items()}
        for share, name in (("true", "shared"), ("false", "repeated")):
            rows.append(
                {
                    "benchmark": "shared_prompts",
                    "case": f"{shape}, {name}",
                    **summary(seconds[share]),
                    "peak_mb": round(peaks[share]),
                    "fill_tokens_per_s": round(fills[share]),
                    "time_ratio": round(median(seconds[share]) / median(seconds["false"]), 3),
                    "memory_ratio": round(peaks[share] / peaks["false"], 3),
                    "fill_ratio": round(fills[share] / fills["false"], 2),
                }
            )
    print(save("shared_prompts", rows, keys=("case",)))
    print(table(rows, ["case", "median_s", "time_ratio", "peak_mb", "memory_ratio", "fill_ratio"]))


if __name__ == "__main__":
    main()
