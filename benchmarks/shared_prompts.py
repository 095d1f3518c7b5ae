"""A training step of `FeedbackTrainer` with every prompt computed once, against the same step with prompts repeated and
against TRL 1.16's KTOTrainer and DPOTrainer.

    make venv-peers && python benchmarks/shared_prompts.py [--shape NAME ...] [--objective BCO KTO DPO] [--turns 3]

A Llama of 20M parameters, float32, `padding_free`, random tokens, AdamW; one micro-batch holds all completions of its
prompts. All take turns in one process each, and the ratios are of processor time; peak memory is beyond what the process
holds before the first step. References are computed before, by all of them. Writes benchmarks/results/shared_prompts.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from common import in_own_process, peak_rss, peers_python, reset_peak_rss, save, summary, table
from peers_step import IN_ORDER, Setting, in_order, training_options, trl_kto

# (prompt tokens, completions of a prompt, completion tokens, prompts of a micro-batch)
SHAPES = {
    "1024 + 4 x 128": (1024, 4, 128, 1),
    "512 + 2 x 128": (512, 2, 128, 2),
    "200 + 2 x 300": (200, 2, 300, 2),
    "256 + 1 x 256": (256, 1, 256, 4),
    "8 turns of 128": (0, 8, 128, 1),
}
"""Of the last, every turn of a chat is judged; repeated, each turn is a row with the turns before it as its prompt."""
KINDS = {
    "BCO": ("shared", "repeated"),
    "KTO": ("shared", "shared, mismatched apart", "repeated", "TRL 1.16"),
    "DPO": ("shared", "repeated", "TRL 1.16"),
}
COMPARED = ("1024 + 4 x 128", "512 + 2 x 128")
"""The shapes that KTO and DPO run, by default."""
VOCABULARY, SPECIAL = 8192, 2


def build_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows_of_tokens(shape: str, prompts: int) -> list[dict]:
    """prompt_ids, completion_ids, label, and the chat where the row is a turn of one."""
    rng = np.random.default_rng(0)
    prompt_tokens, completions, tokens, _ = SHAPES[shape]
    rows = []
    for chat in range(prompts):
        if not prompt_tokens:  # half of a turn is the user's
            ids = rng.integers(SPECIAL, VOCABULARY, completions * tokens).tolist()
            for i in range(completions):
                stop = (i + 1) * tokens
                cut = stop - tokens // 2
                rows.append(
                    {"prompt_ids": ids[:cut], "completion_ids": ids[cut:stop], "label": i % 2 == 0, "chat": chat}
                )
            continue
        prompt = rng.integers(SPECIAL, VOCABULARY, prompt_tokens).tolist()
        for i in range(completions):
            completion = rng.integers(SPECIAL, VOCABULARY, tokens).tolist()
            rows.append({"prompt_ids": prompt, "completion_ids": completion, "label": i % 2 == 0})
    return rows


def tokenizer():
    """Knows the tokens of no text; the trainers ask it for the names of a few."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"</s>": 0, "?": 1}, unk_token="?"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>", unk_token="?")  # noqa: S106


def ours(objective: str, kind: str, rows: list[dict], setting: Setting, chats: bool):
    from bco_fast import FeedbackConfig, FeedbackTrainer
    from bco_fast.data.batch import collate
    from bco_fast.data.dataset import Example, FeedbackDataset

    shared, paired = kind.startswith("shared"), objective == "DPO"
    examples = [
        Example(
            np.array(row["prompt_ids"] + row["completion_ids"], dtype=np.int32), len(row["prompt_ids"]), row["label"],
            1.0, group=f"chat {row['chat']}" if chats and shared else "",
        )
        for row in rows
    ]  # fmt: skip
    config = FeedbackConfig(
        **training_options(setting) | {"per_device_train_batch_size": setting.batch // (1 + paired), "max_length": 4096},
        cache_dir=str(setting.folder), loss_type=objective.lower(), padding_free=True,
        share_prompts="true" if shared and not chats else "false",
    )  # fmt: skip
    dataset = FeedbackDataset(examples, paired=paired)
    trainer = in_order(FeedbackTrainer(build_model(), config, dataset, processing_class=tokenizer()))
    if kind == "shared, mismatched apart":
        trainer.data_collator = functools.partial(collate, pad_token_id=0, layout="shared")
    return trainer


def trl(objective: str, rows: list[dict], setting: Setting):
    build_model().save_pretrained(setting.folder / "model")
    tokenizer().save_pretrained(setting.folder / "model")
    (setting.folder / "tokens.json").write_text(json.dumps(rows))
    return trl_kto(setting, True) if objective == "KTO" else trl_dpo(rows, setting)


def trl_dpo(rows: list[dict], setting: Setting):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class OurTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    pairs = [
        {"prompt_ids": up["prompt_ids"], "chosen_ids": up["completion_ids"], "rejected_ids": down["completion_ids"]}
        for up, down in zip(rows[::2], rows[1::2], strict=True)
    ]
    options = training_options(setting) | IN_ORDER | {"per_device_train_batch_size": setting.batch // 2}
    return OurTokens(
        AutoModelForCausalLM.from_pretrained(setting.folder / "model"),
        args=DPOConfig(**options, precompute_ref_log_probs=True, gradient_checkpointing=False, bf16=False),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(setting.folder / "model"),
    )


@contextlib.contextmanager
def timed_fills(seconds: list[float]):
    """Processor seconds of each reference that is computed here."""
    from bco_fast.training.references import Reference

    fill = Reference.fill

    def timed(*args):
        began = time.process_time()
        report = fill(*args)
        seconds.append(time.process_time() - began)
        return report

    Reference.fill = timed
    try:
        yield
    finally:
        Reference.fill = fill


def worker(shape: str, objective: str, kind: str, steps: int) -> dict:
    """One process: processor seconds of each step after the first, and peak memory beyond what it held before."""
    prompt_tokens, completions, tokens, prompts = SHAPES[shape]
    rows = rows_of_tokens(shape, prompts * (steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        longest = completions * tokens if not prompt_tokens else prompt_tokens + tokens
        setting = Setting(Path(folder), steps + 1, completions * prompts, longest)
        filling: list[float] = []
        if kind.startswith("TRL"):
            trainer, extra = trl(objective, rows, setting), {}
        else:
            with timed_fills(filling):
                trainer = ours(objective, kind, rows, setting, not prompt_tokens)
            total = sum(len(e) for part in trainer._reference.parts for e in part.examples)
            extra = {"fill_tokens_per_s": total / filling[0], "layout": trainer.layout}
        seconds, real = [], trainer.training_step

        def timed(*args, **kwargs):
            began = time.process_time()
            loss = real(*args, **kwargs)
            seconds.append(time.process_time() - began)
            return loss

        trainer.training_step = timed
        before = reset_peak_rss()
        trainer.train()
        return {"seconds": seconds[1:], "peak_mb": (peak_rss() - before) / 1e6, **extra}


def measure(shape: str, objective: str, turns: int, steps: int) -> list[dict]:
    runs: dict[str, list[dict]] = {kind: [] for kind in KINDS[objective]}
    for _ in range(turns):
        for kind, found in runs.items():
            python = {"python": peers_python("trl-1.16")} if kind.startswith("TRL") else {}
            found.append(in_own_process(__file__, "--worker", json.dumps([shape, objective, kind, steps]), **python))
    seconds = {kind: [s for run in found for s in run["seconds"]] for kind, found in runs.items()}
    peaks = {kind: median(run["peak_mb"] for run in found) for kind, found in runs.items()}
    fills = {k: median(run["fill_tokens_per_s"] for run in found) for k, found in runs.items() if not k.startswith("TRL")}  # fmt: skip
    rows = []
    prefix = "" if objective == "BCO" else f"{objective}, "
    for kind in runs:
        row = {"benchmark": "shared_prompts", "case": f"{prefix}{shape}, {kind}", **summary(seconds[kind]), "peak_mb": round(peaks[kind])}  # fmt: skip
        for name, base in (("", "repeated"), ("trl_", "TRL 1.16")):
            if base in runs:
                row[f"{name}time_ratio"] = round(median(seconds[kind]) / median(seconds[base]), 3)
                row[f"{name}memory_ratio"] = round(peaks[kind] / peaks[base], 3)
        if kind in fills:
            row |= {"fill_tokens_per_s": round(fills[kind]), "fill_ratio": round(fills[kind] / fills["repeated"], 2)}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=SHAPES)
    parser.add_argument("--objective", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(*json.loads(options.worker))))
        return
    for objective in options.objective:
        for shape in options.shape or (SHAPES if objective == "BCO" else COMPARED):
            rows = measure(shape, objective, options.turns, options.steps)
            print(save("shared_prompts", rows, keys=("case",)))
            columns = ["case", "median_s", "time_ratio", "trl_time_ratio", "peak_mb", "memory_ratio", "trl_memory_ratio", "fill_ratio"]  # fmt: skip
            print(table(rows, columns), flush=True)


if __name__ == "__main__":
    main()
