"""bco_fast's head inside TRL 1.16's own trainers: processor time, losses and gradients of LoRA steps.

    make venv-peers && OMP_NUM_THREADS=1 python benchmarks/trl_heads.py [--rows 2 --tokens 64] [--parts error]
        results/trl_heads.json

The shape is Qwen2.5-0.5B's (494M parameters, V = 151936, tied), with random weights, float32, LoRA of rank 8 on all
projections, random tokens, half of each row prompt. The part "head" is forward and backward of the operator alone, with a
frozen weight. The part "step" is a whole step of KTOTrainer or DPOTrainer, reference included: as TRL makes it, after
`use_fused_head`, and of `FeedbackKTOTrainer`. Times are processor seconds of one process, medians without the first step.
Losses and gradients of three steps are compared with TRL's: the largest difference of a loss, and the largest norm of a
difference of gradients as a share of the gradient's norm. The part "error" makes the first of these steps in float64 too,
with all logits at once, and says how far each program is from that: whose rounding the difference is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from common import ROOT, Worker, peers_python, save, say, table

QWEN = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
STEPS = 3
THEIRS, FUSED, FEEDBACK, TRUTH = "TRL 1.16", "use_fused_head", "FeedbackKTOTrainer", "float64"
CASES = {"kto": (THEIRS, FUSED, FEEDBACK), "dpo": (THEIRS, FUSED)}
ROWS_OF_HEAD = 256
PARTS = ("head", "step", "error")


# ---- in TRL's environment


def head(dtype: torch.dtype, turns: int) -> dict:
    """Processor seconds of TRL's operator and of ours in its place, by turns; weight frozen."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from bco_fast.head.linear_logps import HeadOptions
    from bco_fast.integrations.trl_head import Operator

    torch.manual_seed(0)
    weight = (torch.randn(QWEN["vocab_size"], QWEN["hidden_size"]) / 30).to(dtype)
    hidden = torch.randn(ROWS_OF_HEAD, QWEN["hidden_size"]).to(dtype).requires_grad_()
    targets = torch.randint(len(weight), (ROWS_OF_HEAD,))
    operators = {THEIRS: ChunkedLogProbFunction, FUSED: Operator(HeadOptions("auto", 256 << 20))}
    seconds: dict[str, list[float]] = {name: [] for name in operators}
    for turn in range(turns + 1):
        for name, operator in operators.items():
            began = time.process_time()
            operator.apply(hidden, weight, None, targets, 1.0, 8192, None, 1.0, ())[0].sum().backward()
            if turn:
                seconds[name].append(time.process_time() - began)
    return {name: median(values) for name, values in seconds.items()}


def rows_of(kind: str, rows: int, tokens: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    half = tokens // 2

    def ids(count: int) -> list[int]:
        return torch.randint(1000, QWEN["vocab_size"], (count,), generator=generator).tolist()

    made = []
    for i in range(rows * STEPS):
        row = {"prompt_ids": ids(half)}
        if kind == "dpo":
            row |= {"chosen_ids": ids(half), "rejected_ids": ids(half)}
        else:
            row |= {"completion_ids": ids(half), "KL_completion_ids": ids(half), "label": i % 2 == 0}
        made.append(row)
    return made


def step(kind: str, case: str, rows: int, tokens: int, folder: Path, steps: int = STEPS) -> dict:
    """Train; -> processor seconds of each step and its loss. Gradients go to a file."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    from bco_fast.cli.demo import build_tokenizer
    from bco_fast.integrations.trl import FeedbackKTOTrainer, use_fused_head

    base, config = (DPOTrainer, DPOConfig) if kind == "dpo" else (KTOTrainer, KTOConfig)
    base = FeedbackKTOTrainer if case == FEEDBACK else base
    losses, gradients, clock = [], [], []

    class Measured(base):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.append(time.process_time())

        def on_pre_optimizer_step(self, *_, model, **__):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone())

        def on_step_end(self, *_, **__):
            clock.append(time.process_time())

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN), dtype=torch.float32)
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
    options = {"objective": "kto"} if case == FEEDBACK else {}
    trainer = Measured(
        model,
        args=config(
            str(folder / "out"), per_device_train_batch_size=rows, max_steps=steps, learning_rate=1e-3, optim="sgd", seed=0,
            max_length=tokens * 2, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_steps=1, max_grad_norm=0.0, train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(rows_of(kind, rows, tokens)), processing_class=build_tokenizer(), peft_config=lora,
        **options,
    )  # fmt: skip
    if case == FUSED:
        use_fused_head(trainer)
    if case == TRUTH:
        trainer.model.double()
        Qwen2RMSNorm.forward = _norm
        use_fused_head(trainer, backend="reference")
    trainer.add_callback(Watch())
    trainer.train()
    torch.save(gradients, folder / f"{kind}-{case}.pt")
    if steps == 1:
        return {"losses": losses}
    seconds = [after - before for before, after in zip(clock[::2], clock[1::2], strict=True)]
    return {"seconds": median(seconds[1:]), "losses": losses}


def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
    """Qwen2's, which rounds to float32 whatever it is given."""
    return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


# ---- in the parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2, help="rows or pairs of a step")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row, half of them prompt")
    parser.add_argument("--turns", type=int, default=5, help="of the operator alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="rows of the others stay as they are")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        part, *names, folder = options.worker
        torch.set_num_threads(1)
        if part == "head":
            say(head(getattr(torch, names[0]), options.turns))
        else:
            say(step(*names, options.rows, options.tokens, Path(folder), 1 if part == "error" else STEPS))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def ask(*names: str) -> dict:
            python = peers_python("trl-1.16")
            sizes = ["--rows", options.rows, "--tokens", options.tokens, "--turns", options.turns]
            command = [python, __file__, *sizes, "--worker", *names, folder]
            worker = Worker(" ".join(names), command, folder / "log", PYTHONPATH=str(ROOT))
            try:
                return worker.answer()
            finally:
                worker.stop()

        for dtype in ("float32", "bfloat16") if "head" in options.parts else ():
            found = ask("head", dtype)
            rows += [_row("head", f"frozen, {dtype}", name, found, N=ROWS_OF_HEAD) for name in found]
        for kind, cases in CASES.items() if "step" in options.parts else ():
            found = {case: ask("step", kind, case) for case in cases}
            seconds = {case: each["seconds"] for case, each in found.items()}
            for case in cases:
                apart = _apart(folder, kind, case, found)
                sizes = {"rows": options.rows, "tokens": options.tokens}
                rows.append(_row("step", f"{kind}, LoRA", case, seconds, **sizes) | apart)
        for kind, cases in CASES.items() if "error" in options.parts else ():
            found = {case: ask("error", kind, case) for case in (*cases, TRUTH)}
            for case in cases:
                loss, gradient = _apart(folder, kind, case, found, TRUTH).values()
                sizes = {"rows": options.rows, "tokens": options.tokens, "loss_error": loss, "gradient_error": gradient}
                rows.append(
                    {"benchmark": "trl_heads", "part": "error", "case": f"error, {kind}, LoRA, {case}", **sizes}
                )
    columns = ["processor_s", "ratio_to_trl", "loss_apart", "gradient_apart", "loss_error", "gradient_error"]
    print(table(rows, ["case", *columns]), file=sys.stderr)
    print(save("trl_heads", rows, keys=() if set(options.parts) == set(PARTS) else ("case",)))


def _row(part: str, what: str, name: str, seconds: dict[str, float], **sizes) -> dict:
    ratio = round(seconds[name] / seconds[THEIRS], 3)
    shape = {"shape": "Qwen2.5-0.5B", "D": QWEN["hidden_size"], "V": QWEN["vocab_size"], **sizes}
    times = {"processor_s": round(seconds[name], 3), "ratio_to_trl": ratio}
    return {"benchmark": "trl_heads", "part": part, "case": f"{part}, {what}, {name}", **shape, **times}


def _apart(folder: Path, kind: str, case: str, found: dict[str, dict], other: str = THEIRS) -> dict:
    """How far losses and gradients are from another's."""
    theirs, ours = ([g.double() for g in torch.load(folder / f"{kind}-{name}.pt")] for name in (other, case))
    losses = zip(found[other]["losses"], found[case]["losses"], strict=True)
    return {
        "loss_apart": max(abs(a - b) for a, b in losses),
        "gradient_apart": max(float((a - b).norm() / a.norm()) for a, b in zip(theirs, ours, strict=True)),
    }


if __name__ == "__main__":
    main()
