"""BCO's Fig. 3 and 4 on real feedback: rows of docs/claims.md that `make claims` keeps when the file is not at hand.

    python benchmarks/claims_real.py --data alpaca_eval_feedback.jsonl     about ten minutes of one core a seed; results/claims_real.json
    make claims FEEDBACK=alpaca_eval_feedback.jsonl                        the same, two seeds at a time

A Llama of 20M parameters with a BPE vocabulary of 32000 (that of train_step.py, from random weights) is fine-tuned on all
completions of the file, up and down alike, so that the reference knows the text. Then all pairs, each once, train BCO, BCE, KTO and DPO
with BCO's β of 0.1, one learning rate and as many steps; embeddings and lm-head stay. A seed is an order of the rows, of the fine-tuning too. Nothing is tuned: the
rates are those written here. The file has two completions of each prompt, `id` N-1 and N-2, one of them with a thumbs up.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from claims import BINARY, _rounded, _tail, mean_of_both
from claims_world import Method, Scale, train
from common import save
from train_step import VOCABULARY, build_model, byte_pair_tokenizer

from bco_fast.data.dataset import FeedbackDataset
from bco_fast.data.samplers import mismatched
from bco_fast.data.tokenize import load_feedback
from bco_fast.losses import OBJECTIVES
from bco_fast.models.patch import patch_model
from bco_fast.reference.fill import token_logps

BETA, RATE, FINE_TUNE_RATE = 0.1, 3e-4, 1e-3
POINTS = 15
"""Of a stored curve; each is the mean of as many steps."""


@dataclasses.dataclass(frozen=True)
class Size:
    batch: int = 8
    """Completions of a step."""
    max_length: int = 72
    """Tokens of a prompt and the completion, whose end is cut."""
    fine_tune_steps: int = 80


def read_pairs(path: Path) -> list[dict]:
    """Of each prompt with one thumbs up and one thumbs down."""
    by_prompt = defaultdict(dict)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        by_prompt[row["id"].rsplit("-", 1)[0]][row["label"]] = row
    return [
        {"prompt": found[True]["prompt"], "chosen": found[True]["completion"], "rejected": found[False]["completion"]}
        for found in by_prompt.values()
        if len(found) == 2
    ]


class Reference:
    """Log-probabilities under the fine-tuned model, each row once."""

    def __init__(self, model):
        self.model, self.rows = model, {}

    @torch.no_grad()
    def __call__(self, data: FeedbackDataset) -> FeedbackDataset:
        keys = [(example.completion_start, example.input_ids.tobytes()) for example in data.examples]
        new = list(dict(zip(keys, data.examples, strict=True)).items())
        new = [(key, example) for key, example in new if key not in self.rows]
        for begin in range(0, len(new), 32):
            chunk = new[begin : begin + 32]
            found = token_logps(self.model, [example for _, example in chunk], 0)
            self.rows |= {key: values for (key, _), values in zip(chunk, found, strict=True)}
        data.ref_token_logps = [self.rows[key] for key in keys]
        data.ref_logps = np.array([values.sum(dtype=np.float64) for values in data.ref_token_logps])
        return data


def dataset(reference: Reference, tokenizer, pairs: list[dict], loss_type: str, size: Size) -> FeedbackDataset:
    options = {"max_length": size.max_length, "progress": False}
    data = load_feedback(pairs, tokenizer, needs=OBJECTIVES[loss_type].data, **options)
    if loss_type == "kto":
        data.mismatched = reference(mismatched(data, max_length=size.max_length))
    return reference(data)


def curve(log: list[dict], name: str) -> list[float]:
    """Means of `POINTS` equal stretches of the steps."""
    values = torch.tensor([entry[name] for entry in log], dtype=torch.float64)
    return [mean_of_both(part.tolist()) for part in values.tensor_split(min(POINTS, len(values)))]


def measure(model, tokenizer, pairs: list[dict], size: Size, seed: int) -> Iterator[dict]:
    """Rows of one seed, one by one; `model` is fine-tuned in place and then the reference."""
    both = [{"prompt": p["prompt"], "completion": p[side], "label": True} for p in pairs for side in ("chosen", "rejected")]  # fmt: skip
    data = load_feedback(both, tokenizer, max_length=size.max_length, progress=False)
    scale = Scale(steps=size.fine_tune_steps, batch=size.batch)
    train(model, data, Method("sft", FINE_TUNE_RATE), scale, seed)
    model.eval()
    reference, used = Reference(model), random.Random(seed).sample(pairs, len(pairs))  # noqa: S311
    steps = math.ceil(2 * len(pairs) / size.batch)  # the last one is filled with rows of a second pass
    logps = np.concatenate(dataset(reference, tokenizer, used, "dpo", size).ref_token_logps)
    yield {"method": "fine-tuned", "steps": steps, "nats_per_token": -float(logps.mean())}
    for name, loss_type in BINARY.items():
        made = dataset(reference, tokenizer, used, loss_type, size)
        scale = Scale(steps=steps, batch=size.batch)
        policy = copy.deepcopy(model)
        for part in (policy.get_input_embeddings(), policy.get_output_embeddings()):
            part.requires_grad_(False)
        log = train(policy, made, Method(loss_type, RATE, {"beta": BETA}), scale, seed)
        fields = ["kl", *{"BCO": ["error_term", "delta"], "BCE": ["error_term"], "KTO": ["z_ref"]}.get(name, [])]
        row = {"method": name, "steps": steps} | {field: _tail(log, field) for field in fields}
        if name == "KTO":
            row["z_ref_zero"] = _tail([{"zero": float(entry["z_ref"] == 0)} for entry in log], "zero")
        yield row | {f"{field}_curve": curve(log, field) for field in fields}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSONL with id, prompt, completion and label")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    size, pairs = Size(), read_pairs(options.data)
    tokenizer = byte_pair_tokenizer(options.data, VOCABULARY)
    settings = {"pairs": len(pairs), "beta": BETA, "rate": RATE, "fine_tune_rate": FINE_TUNE_RATE}
    for seed in options.seeds:
        begin = time.process_time()
        for row in measure(patch_model(build_model()), tokenizer, pairs, size, seed):
            row = {"case": f"a, real, {row['method']}, seed {seed}", "claim": "a, real", "seed": seed, **row}
            row |= settings | dataclasses.asdict(size) | {"processor_s": round(time.process_time() - begin)}
            save("claims_real", [_rounded(row)], keys=("case",))
            print(row, flush=True)


if __name__ == "__main__":
    main()
