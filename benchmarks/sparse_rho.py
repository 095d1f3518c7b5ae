"""How many blocks a certified sparse backward keeps as a model learns real text.

    python benchmarks/sparse_rho.py --data feedback.jsonl --steps 200        about six minutes on two cores; results/sparse_rho.json

A Llama of 20M parameters with a BPE vocabulary of 32000 is trained from scratch on the completions of a file of feedback
(SFT, AdamW 1e-3, 4 rows of at most 512 tokens a step). Before the first step, in the middle and at the end, on 16 held-out
rows: the share rho of the blocks that the bound asks for, with blocks of 64, 128 and 256 tokens of the vocabulary. (Rows of
results with an `order` other than "ids" come from a version that could permute the vocabulary.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import save, table
from train_step import MAX_LENGTH, VOCABULARY, build_model, byte_pair_tokenizer

from bco_fast import patch_model
from bco_fast.data.batch import collate
from bco_fast.data.tokenize import load_feedback
from bco_fast.head.backends import torch as chunked
from bco_fast.head.sparse.choose import choose_blocks
from bco_fast.head.types import HeadInputs, HeadSaved, HeadSpec, HeadWant
from bco_fast.models.patch import completion_logps

BATCH, HELD_OUT = 4, 16
TAUS = {"2^-7": 2.0**-7, "2^-5": 2.0**-5}


def head_inputs(model, dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and targets of the held-out completions, [N, D] and [N]."""
    kept = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    batch = collate([dataset.item(i) for i in range(HELD_OUT)], 0)
    with torch.no_grad():
        completion_logps(model.eval(), batch)
    hook.remove()
    model.train()
    return kept[0].flatten(0, 1)[batch["rows"]], batch["targets"]


def measure(model, dataset, step: int) -> list[dict]:
    hidden, targets = head_inputs(model, dataset)
    weight = model.get_output_embeddings().weight.detach()
    rows = []
    for width in (64, 128, 256):
        chunked.MASS_TILE = width
        inputs = HeadInputs(hidden, weight, targets, None, HeadSpec())
        out = chunked.forward(inputs, HeadWant(mass=True), 64 << 20)
        saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, None, out.row_argmax, out.mass)
        row = {"benchmark": "sparse_rho", "step": step, "cell": width, "order": "ids", "N": len(targets)}
        row["loss"] = round(-float(out.logps.mean()), 4)
        for label, tau in TAUS.items():
            choice = choose_blocks(
                torch.ones(len(targets)),
                saved,
                tau,
                width=width,
                sharded=False,
                break_even=1.1,
                workspace_bytes=64 << 20,
            )
            row[f"rho {label}"] = round(choice.kept_fraction, 4)
        rows.append(row)
    print(table(rows, ["step", "loss", "cell", "order", *(f"rho {label}" for label in TAUS)]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    tokenizer = byte_pair_tokenizer(options.data, VOCABULARY)
    records = [json.loads(line) for line in options.data.read_text().splitlines()]
    held_out = load_feedback(records[:HELD_OUT], tokenizer, max_length=MAX_LENGTH)
    train = load_feedback(records[HELD_OUT:], tokenizer, max_length=MAX_LENGTH)
    for dataset in (held_out, train):
        dataset.ref_logps = None
    model = patch_model(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(0)
    rows = []
    for step in range(options.steps + 1):
        if step in (0, options.steps // 2, options.steps):
            rows += measure(model, held_out, step)
        chosen = torch.randint(0, len(train.examples), (BATCH,), generator=g).tolist()
        batch = collate([train.item(i) for i in chosen], 0)
        logps = completion_logps(model, batch)
        loss = -logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(save("sparse_rho", rows))


if __name__ == "__main__":
    main()
