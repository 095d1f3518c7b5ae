"""One training step of TRL's BCOTrainer and KTOTrainer and of `FeedbackTrainer`: seconds and peak memory.

    make venv-peers && python benchmarks/peers_step.py --data feedback.jsonl     results/peers_step.json

The Llama and the feedback of train_step.py: 20M parameters, V = 32000, batch 4, 512 tokens, float32, AdamW, no gradient
checkpointing. Every case is a process of its own environment that trains without a break but for waiting: the processes
take turns of a few steps. All see the same tokens in the same batches in the same order; the program checks that the
completion tokens agree. With `--lengths 128 256 512 1024` every sequence has just so many tokens, a quarter of them prompt, cut
from that feedback one after another, in batches of 2: tokens/s and memory by context length, in
results/peers_step_lengths.json. Peak memory is the largest resident memory while training, after the model was built and a
reference, where it is precomputed, was computed. Processor seconds, of all threads, tell whether the machine had other
work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from common import RESULTS, Worker, peak_rss, peers_python, reset_peak_rss, save, say, summary, table

ROOT = Path(__file__).parents[1]
BATCH, MAX_LENGTH, LEARNING_RATE, WARM_UP = 4, 512, 1e-5, 3
BATCH_OF_LENGTHS, PROMPT_SHARE = 2, 4
OURS = {"BCO": "bco_fast BCO", "KTO": "bco_fast KTO"}
PEERS = {  # case: objective, environment, precomputed reference
    "TRL 1.12 BCO": ("BCO", "trl-1.12", False),
    "TRL 1.12 BCO, precomputed": ("BCO", "trl-1.12", True),
    "TRL 1.16 KTO": ("KTO", "trl-1.16", False),
    "TRL 1.16 KTO, precomputed": ("KTO", "trl-1.16", True),
}


# ---- in the process of a case


class Setting(NamedTuple):
    """What all cases share."""

    folder: Path
    steps: int
    batch: int = BATCH
    max_length: int = MAX_LENGTH


def training_options(setting: Setting) -> dict:
    return {
        "output_dir": str(setting.folder / "out"),
        "max_length": setting.max_length,
        "per_device_train_batch_size": setting.batch,
        "max_steps": setting.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "beta": 0.1,
    }


IN_ORDER = {"train_sampling_strategy": "sequential"}
"""Of TRL's trainers; ours decide the order of rows themselves, unless `in_order` says so."""


def in_order(trainer):
    """Let a trainer of ours take the rows as they come."""
    from torch.utils.data import SequentialSampler

    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    return trainer


def counting(trainer_class: type, tokens) -> type:
    """The trainer, with a count of the completion tokens that go into its loss."""

    class Counting(trainer_class):
        completion_tokens = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.completion_tokens += int(tokens(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Counting


def ours(objective: str, setting: Setting):
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bco_fast import FeedbackConfig, FeedbackTrainer
    from bco_fast.data.dataset import Example, FeedbackDataset

    folder = setting.folder
    options = {**training_options(setting), "loss_type": objective.lower(), "cache_dir": str(folder / objective)}
    trainer = counting(FeedbackTrainer, lambda inputs: (inputs["targets"] >= 0).sum())
    rows = json.loads((folder / "tokens.json").read_text())
    examples = [
        Example(
            np.array(row["prompt_ids"] + row["completion_ids"], np.int32), len(row["prompt_ids"]), row["label"], 1.0
        )
        for row in rows
    ]
    return in_order(
        trainer(
            AutoModelForCausalLM.from_pretrained(folder / "model"),
            FeedbackConfig(**options),
            FeedbackDataset(examples),
            processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        )
    )


def trl_bco(setting: Setting, precomputed: bool):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.bco import BCOConfig, BCOTrainer

    folder = setting.folder
    args = BCOConfig(
        **training_options(setting),
        **IN_ORDER,
        precompute_ref_log_probs=precomputed,
        gradient_checkpointing=False,
        bf16=False,
    )
    trainer = counting(BCOTrainer, lambda inputs: (inputs["completion_labels"][:, 1:] != -100).sum())(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        None if precomputed else AutoModelForCausalLM.from_pretrained(folder / "model"),
        args,
        Dataset.from_list([{"prompt": "Well?", "completion": " Yes.", "label": label} for label in (True, False)]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    rows = []
    for row in json.loads((folder / "tokens.json").read_text()):
        prompt, completion = row["prompt_ids"], row["completion_ids"]
        rows.append(
            {
                "prompt_input_ids": prompt,
                "prompt_attention_mask": [1] * len(prompt),
                "completion_input_ids": prompt + completion,
                "completion_attention_mask": [1] * len(prompt + completion),
                "completion_labels": [-100] * len(prompt) + completion,
                "label": row["label"],
            }
        )
    trainer.train_dataset = Dataset.from_list(rows)  # not its own tokens: it would add a BOS and cut elsewhere
    return trainer


def trl_kto(setting: Setting, precomputed: bool):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    class OurTokens(KTOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    folder = setting.folder
    rows = json.loads((folder / "tokens.json").read_text())
    for first in range(0, len(rows), setting.batch):  # completions turned by one within a batch, as it does
        batch = rows[first : first + setting.batch]
        for row, other in zip(batch, [batch[-1], *batch], strict=False):
            row["KL_completion_ids"] = other["completion_ids"]
    args = KTOConfig(
        **training_options(setting),
        **IN_ORDER,
        precompute_ref_log_probs=precomputed,
        gradient_checkpointing=False,
        bf16=False,
    )
    return counting(OurTokens, lambda inputs: inputs["completion_mask"].sum())(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        None if precomputed else AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )


def work(case: str, setting: Setting, per_turn: int) -> None:
    """Train; tell the parent when a turn is over and wait for the next, by lines of JSON that begin with @."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.before, self.steps, self.last = reset_peak_rss(), [], self.now()

        def on_step_end(self, args, state, *_, **__):  # data, forward, backward, clipping, optimizer
            self.steps.append([after - before for before, after in zip(self.last, self.now(), strict=True)])
            if (state.global_step - WARM_UP) % per_turn == 0 and state.global_step >= WARM_UP:
                say(self.steps)
                self.steps = []
                if state.global_step < setting.steps and not sys.stdin.readline():
                    sys.exit("the parent is gone")
            self.last = self.now()

        @staticmethod
        def now() -> tuple[float, float]:
            return time.perf_counter(), time.process_time()

    if case in PEERS:
        objective, package, precomputed = PEERS[case]
        package = package.partition("-")[0]
        trainer = {"BCO": trl_bco, "KTO": trl_kto}[objective](setting, precomputed)
    else:
        package, trainer = "bco_fast", ours(case.split()[-1], setting)
    turns = Turns()
    trainer.add_callback(turns)
    trainer.train()
    memory = {"peak_mb": round(peak_rss() / 1e6, 1), "before_mb": round(turns.before / 1e6, 1)}
    versions = {package: version(package), "transformers": version("transformers")}
    say({**memory, "completion_tokens": trainer.completion_tokens, "versions": versions})


# ---- in the parent


def prepare(data: Path, setting: Setting, cut: bool) -> int:
    """The model, the feedback and its tokens, in files; -> parameters."""
    from train_step import VOCABULARY, build_model, byte_pair_tokenizer

    from bco_fast.data.tokenize import load_feedback

    folder, rows = setting.folder, setting.steps * setting.batch
    model, tokenizer = build_model(), byte_pair_tokenizer(data, VOCABULARY)
    model.config.max_position_embeddings = max(setting.max_length, MAX_LENGTH)
    tokenizer.pad_token = tokenizer.eos_token  # what the model's config says, and both peers want to be told
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = data.read_text().splitlines()
    lines = lines if cut else lines[:rows]
    (folder / "feedback.jsonl").write_text("\n".join(lines) + "\n")
    dataset = load_feedback(folder / "feedback.jsonl", tokenizer, max_length=setting.max_length)
    tokens = [
        {
            "prompt_ids": example.input_ids[: example.completion_start].tolist(),
            "completion_ids": example.input_ids[example.completion_start :].tolist(),
            "label": example.label,
        }
        for example in dataset.examples
    ]
    if cut:
        stream = [token for row in tokens for token in row["prompt_ids"] + row["completion_ids"]]
        length, prompt = setting.max_length, setting.max_length // PROMPT_SHARE
        parts = [stream[i * length : (i + 1) * length] for i in range(rows)]
        tokens = [
            {"prompt_ids": part[:prompt], "completion_ids": part[prompt:], "label": i % 2 == 0}
            for i, part in enumerate(parts)
        ]
        if len(tokens[-1]["completion_ids"]) + prompt != length:
            raise ValueError(f"{data} has too few tokens for {rows} sequences of {length}")
    (folder / "tokens.json").write_text(json.dumps(tokens))
    return sum(p.numel() for p in model.parameters())


def start(python: Path, case: str, setting: Setting, options: argparse.Namespace) -> Worker:
    arguments = ["--worker", case, "--folder", setting.folder, "--turns", options.turns, "--per-turn", options.per_turn]
    arguments += ["--batch", setting.batch, "--max-length", setting.max_length]
    environment = {"TRL_EXPERIMENTAL_SILENCE": "1"} | ({"PYTHONPATH": None} if case in PEERS else {})
    return Worker(case, [python, __file__, *arguments], setting.folder / f"{case}.log", **environment)


def measure(options: argparse.Namespace, setting: Setting) -> dict[str, dict]:
    """case -> what it measured."""
    pythons = dict.fromkeys(OURS.values(), Path(sys.executable))
    pythons |= {case: peers_python(package) for case, (_, package, _) in PEERS.items()}
    workers: list[Worker] = []
    try:
        for case, python in pythons.items():
            workers.append(start(python, case, setting, options))
            workers[-1].answer()  # warm: before the next one starts, so that they do not disturb each other
        steps = {worker.name: [] for worker in workers}
        for _ in range(options.turns):
            for worker in workers:
                steps[worker.name] += worker.turn()
        return {w.name: {"steps": steps[w.name], **w.answer()} for w in workers}
    finally:
        for worker in workers:
            worker.stop()


def rows_of(measured: dict[str, dict], parameters: int, setting: Setting) -> list[dict]:
    rows = []
    for case, values in measured.items():
        row = {"benchmark": "peers_step", "case": case, "parameters": parameters, "V": 32_000}
        seconds, processor = zip(*values.pop("steps"), strict=True)
        row |= {"batch": setting.batch, "max_length": setting.max_length, **summary(seconds)}
        row |= {"processor_median_s": round(statistics.median(processor), 3), **values}
        rows.append(row)
    by_case = {row["case"]: row for row in rows}
    for case, (objective, *_) in PEERS.items():
        peer, mine = by_case[case], by_case[OURS[objective]]
        peer["ours_time_ratio"] = round(mine["median_s"] / peer["median_s"], 3)
        peer["ours_processor_ratio"] = round(mine["processor_median_s"] / peer["processor_median_s"], 3)
        peer["ours_memory_ratio"] = round(mine["peak_mb"] / peer["peak_mb"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT.parent / "shared" / "data" / "alpaca_eval_feedback.jsonl"
    parser.add_argument("--data", type=Path, default=default, help="feedback, JSONL")
    parser.add_argument("--turns", type=int, default=5, help="times each case is measured")
    parser.add_argument("--per-turn", type=int, default=4, help="steps of one turn")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--lengths", type=int, nargs="+", help="sequences of just so many tokens, instead of real ones")
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = WARM_UP + options.turns * options.per_turn
    if options.worker:
        setting = Setting(options.folder, steps, options.batch, options.max_length)
        work(options.worker, setting, options.per_turn)
        return
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file")
    for package in sorted({package for _, package, _ in PEERS.values()}):
        peers_python(package)
    ratios = [f"ours_{what}_ratio" for what in ("time", "processor", "memory")]
    columns = [
        "case",
        *["tokens_per_s", "tokens_per_processor_s"] * bool(options.lengths),
        "median_s",
        "min_s",
        "max_s",
        "processor_median_s",
        "peak_mb",
        *ratios,
    ]
    for length in options.lengths or [None]:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(Path(folder), steps)
            if length is not None:
                setting = setting._replace(batch=BATCH_OF_LENGTHS, max_length=length)
            parameters = prepare(options.data, setting, cut=length is not None)
            rows = rows_of(measure(options, setting), parameters, setting)
        tokens = {row["case"]: row["completion_tokens"] for row in rows}
        if len(set(tokens.values())) > 1:
            raise RuntimeError(f"the cases trained on different completion tokens: {tokens}")
        if length is None:
            print(save("peers_step", rows, folder=options.out))
        else:
            for row in rows:
                row |= {"trainer": row["case"], "case": f"{row['case']}, {length} tokens"}
                row["tokens_per_s"] = round(setting.batch * length / row["median_s"])
                row["tokens_per_processor_s"] = round(setting.batch * length / row["processor_median_s"])
            print(save("peers_step_lengths", rows, folder=options.out, keys=("case",)))
        print(table(rows, columns))


if __name__ == "__main__":
    main()
