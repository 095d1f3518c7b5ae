"""The longest context that fits, ours and theirs, found by bisection; and what counted bytes predict for large models.

    make venv-peers && python benchmarks/long_context.py          the CPU's small model; results/long_context.json
    python benchmarks/long_context.py --shape Llama-3-8B          on a GPU: all of its memory, bfloat16, LoRA and full
    python benchmarks/long_context.py --predict                   only the table of predictions

A trial is a process of its own: two optimizer steps on one sequence of T tokens, a quarter of them prompt, gradient
checkpointing on, batches of one, the reference precomputed. On the CPU it must stay within a budget of resident memory
beyond what the imported libraries take, and is stopped when it does not; on a GPU it must not run out of memory. "PyTorch
that stores the logits" is the same model and loss with `log_softmax` of the logits of the completion. Lengths are found
to within a tenth. Predictions add up tensors (`counted`) and are marked as predicted; tests/benchmarks/test_benchmarks.py
holds the one for the small model against its measured rows.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import RESULTS, Worker, peak_rss, peers_python, reset_peak_rss, save, say, table
from contenders import described
from counts import MODELS, Model

if TYPE_CHECKING:
    from bco_fast.models.count import Memory

CPU_SHAPE, CPU_BUDGET_MB = "small", 192
SHAPES = {CPU_SHAPE: Model(128, 32000, 4, 2, 2, 64, 344)} | MODELS
OURS = {"cpu": {"layer_chunk_tokens": 256, "layer_checkpoints": 2}, "cuda": {"layer_chunk_tokens": 1024}}
LORA_RANK = 32
CPU_WORKSPACE, GPU_WORKSPACE = 16 << 20, 256 << 20
CASES = {  # case: what runs, LoRA, environment
    "bco_fast, LoRA": ("ours", True, None),
    "bco_fast, full": ("ours", False, None),
    "PyTorch that stores the logits, LoRA": ("plain", True, None),
    "PyTorch that stores the logits, full": ("plain", False, None),
    "TRL 1.12 BCO, full": ("trl_bco", False, "trl-1.12"),
    "TRL 1.16 KTOTrainer, full": ("trl_kto", False, "trl-1.16"),
    "TRL 1.12 BCO, LoRA": ("trl_bco", True, "trl-1.12"),
    "TRL 1.16 KTOTrainer, LoRA": ("trl_kto", True, "trl-1.16"),
}
PROMPT_SHARE, STEPS, STEP = 4, 2, 32
START = {"cpu": 128, "cuda": 2048}


# ---- counted bytes


def llama_config(shape: Model, tokens: int, **options):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.V,
        hidden_size=shape.D,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=max(tokens, 2048),
        bos_token_id=1,
        eos_token_id=0,
        pad_token_id=0,
        **options,
    )


def counted(shape: Model, tokens: int, *, lora: bool, device: str, **switches) -> Memory:
    """What a step of ours holds at its fullest moment: `bco-fast plan`'s count.

    In float32 on a CPU, else in bfloat16; checkpointed. switches: layer_chunk_tokens, layer_checkpoints, activation_offloading.
    """
    from bco_fast.models.count import count_step

    completion = tokens - tokens // PROMPT_SHARE
    options = counted_options(lora, device, **switches)
    return count_step(llama_config(shape, tokens), options, tokens, completion=completion, device=device)


def counted_options(lora: bool, device: str, **switches) -> argparse.Namespace:
    options = {
        "use_peft": lora, "load_in_4bit": False, "load_in_8bit": False, "lora_r": LORA_RANK, "lora_alpha": 64, "lora_dropout": 0.0,
        "lora_target_modules": "all-linear", "lora_modules_to_save": "", "bf16": False, "fp16": False, "optim": "adamw_torch_fused",
        "model_dtype": "float32" if device == "cpu" else "bfloat16", "attn_implementation": None, "gradient_accumulation_steps": 1,
        "workspace_bytes": CPU_WORKSPACE if device == "cpu" else GPU_WORKSPACE, "gradient_checkpointing": True,
        "mlp_chunk_tokens": None, "layer_chunk_tokens": None, "activation_offloading": False, "layer_checkpoints": None,
    }  # fmt: skip
    return argparse.Namespace(**options | switches)


def predictions(budget: float = 141e9) -> Iterator[dict]:
    """Memory of each shape on a GPU with this many bytes, and the longest context, a twentieth left to the allocator."""
    for name in ("Llama-3.2-1B", "Llama-3.2-3B", "Llama-3-8B", "Qwen3-14B"):
        for lora in (True, False):
            for offload in (False, True):
                switches = {
                    "lora": lora,
                    "device": "cuda",
                    "layer_chunk_tokens": 2048,
                    "activation_offloading": offload,
                }
                at = {"64k": 1 << 16, "256k": 1 << 18, "1m": 1 << 20}
                memory = {key: counted(SHAPES[name], tokens, **switches) for key, tokens in at.items()}
                # along a line, but where a larger part of a step takes over: between the two counts that are nearest
                left, right = ("256k", "1m") if memory["256k"].total <= 0.95 * budget else ("64k", "256k")
                slope = (memory[right].total - memory[left].total) / (at[right] - at[left])
                longest = at[left] + int((0.95 * budget - memory[left].total) / slope)
                kind = f"{'LoRA' if lora else 'full, bfloat16'}{', offloaded' if offload else ''}"
                yield {
                    "benchmark": "long_context", "predicted": True, "shape": name, "lora": lora, "offload": offload,
                    "case": f"predicted: {name}, {kind}", "budget_gb": budget / 1e9,
                    "longest": max(0, longest) // 1024 * 1024,
                    **{f"{key}_gb": round(found.total / 1e9, 1) for key, found in memory.items()},
                    "1m_host_gb": round(memory["1m"].host / 1e9, 1),
                    "kb_a_token": round(slope / 1024, 1),
                    "parts_at_1m_gb": {part: round(size / 1e9, 1) for part, size in memory["1m"].parts.items()},
                }  # fmt: skip


# ---- what each switch saves and costs

SWITCHES = {
    "nothing": {},
    "checkpoints": {"gradient_checkpointing": True},
    "checkpoints, MLPs in tiles": {"gradient_checkpointing": True, "mlp_chunk_tokens": 512},
    "checkpoints, layers in tiles": {"gradient_checkpointing": True, "layer_chunk_tokens": 512},
    "checkpoints in host memory, layers in tiles": {
        "gradient_checkpointing": True,
        "layer_chunk_tokens": 512,
        "activation_offloading": True,
    },
    "3 checkpoints, layers in tiles": {
        "gradient_checkpointing": True,
        "layer_chunk_tokens": 512,
        "layer_checkpoints": 3,
    },
    "2 checkpoints, layers in tiles": {
        "gradient_checkpointing": True,
        "layer_chunk_tokens": 512,
        "layer_checkpoints": 2,
    },
}


def switch_rows(tokens: int = 4096, repeats: int = 3) -> list[dict]:
    """Processor time of a LoRA micro-batch with each switch, the fastest of turns that the switches take, and its counted memory.

    The copies to host memory are copies within it here, and nothing runs beside them.
    """
    import contextlib

    import torch

    from bco_fast.models.groups import group_layers
    from bco_fast.models.load import add_adapter
    from bco_fast.models.memory import free_embeddings, offload_activations
    from bco_fast.models.patch import patch_model
    from bco_fast.models.tiles import tile_layers, tile_mlps

    shape = replace(SHAPES[CPU_SHAPE], V=4000)
    ids = torch.randint(2, shape.V, (1, tokens))
    rows = torch.arange(tokens // PROMPT_SHARE, tokens - 1)
    models = {}
    for name, switches in SWITCHES.items():
        adapter = lora_config()
        model = patch_model(add_adapter(build(shape, tokens, "cpu"), counted_options(True, "cpu"), adapter, quiet=True))
        if "mlp_chunk_tokens" in switches:
            tile_mlps(model, switches["mlp_chunk_tokens"])
        if "layer_chunk_tokens" in switches:
            tile_layers(model, switches["layer_chunk_tokens"])
        if "layer_checkpoints" in switches:
            group_layers(model, switches["layer_checkpoints"])
        if switches:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            free_embeddings(model)
        models[name] = model.train()
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            offloaded = "activation_offloading" in SWITCHES[name]
            start = time.process_time()
            with offload_activations(ids.shape, "cpu") if offloaded else contextlib.nullcontext():
                loss = model(input_ids=ids, logp_targets=ids[0, rows + 1], logp_rows=rows, use_cache=False).logits.sum()
            loss.backward()
            if turn:
                times[name].append(time.process_time() - start)
    seconds = {name: min(found) for name, found in times.items()}
    made = []
    for name, switches in SWITCHES.items():
        memory = counted(shape, tokens, lora=True, device="cpu", **{"gradient_checkpointing": False} | switches)
        own = memory.parts["checkpoints"] + memory.parts[memory.moment]
        made.append(
            {
                "benchmark": "long_context", "predicted": False, "switch": name, "case": f"switch: {name}", "tokens": tokens,
                "cpu_s": round(seconds[name], 3), "time_ratio": round(seconds[name] / seconds["nothing"], 2),
                "kb_a_token": round(own / tokens / 1024, 1),
            }
        )  # fmt: skip
    return made


# ---- in the process of a trial


def build(shape: Model, tokens: int, device: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = llama_config(shape, tokens)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def options_of(folder: Path, tokens: int, device: str) -> dict:
    return {
        "output_dir": str(folder / "out"),
        "max_length": tokens,
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-5,
        "gradient_checkpointing": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
    }


def sequences(tokens: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """A prompt and a completion for each step."""
    import random

    rng = random.Random(0)  # noqa: S311 - token ids
    ids = [[rng.randrange(2, vocabulary) for _ in range(tokens)] for _ in range(STEPS)]
    return [(row[: tokens // PROMPT_SHARE], row[tokens // PROMPT_SHARE :]) for row in ids]


def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=LORA_RANK, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(model, rows: list, folder: Path, device: str, lora: bool, tokenizer):
    import numpy as np

    from bco_fast import FeedbackConfig, FeedbackTrainer
    from bco_fast.data.dataset import Example, FeedbackDataset

    tokens = sum(map(len, rows[0]))
    config = FeedbackConfig(
        **options_of(folder, tokens, device),
        cache_dir=str(folder / "cache"),
        use_peft=lora,
        **OURS[device],
        workspace_bytes=CPU_WORKSPACE if device == "cpu" else GPU_WORKSPACE,
    )
    examples = [Example(np.array(p + c, np.int32), len(p), i % 2 == 0, 1.0) for i, (p, c) in enumerate(rows)]
    return FeedbackTrainer(model, config, FeedbackDataset(examples), processing_class=tokenizer).train


def plain(model, rows: list, folder: Path, device: str, lora: bool, tokenizer):
    """A bare loop that keeps the logits of the completion, as trainers did."""
    import torch

    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def train() -> None:
        for prompt, completion in rows:
            ids = torch.tensor([prompt + completion], device=device)
            logits = model(ids[:, :-1], logits_to_keep=len(completion), use_cache=False).logits
            targets = ids[:, -len(completion) :, None]
            reward = 0.1 * torch.log_softmax(logits.float(), -1).gather(-1, targets).sum()
            torch.nn.functional.softplus(-reward).backward()
            optimizer.step()
            optimizer.zero_grad()

    return train


def trl_bco(model, rows: list, folder: Path, device: str, lora: bool, tokenizer):
    from datasets import Dataset
    from trl.experimental.bco import BCOConfig, BCOTrainer

    options = options_of(folder, sum(map(len, rows[0])), device)
    args = BCOConfig(**options, precompute_ref_log_probs=True, bf16=device != "cpu")
    text = Dataset.from_list([{"prompt": "Well?", "completion": " Yes.", "label": label} for label in (True, False)])
    peft = {"peft_config": lora_config()} if lora else {}
    trainer = BCOTrainer(model, None, args, text, processing_class=tokenizer, **peft)
    trainer.train_dataset = Dataset.from_list(
        [
            {
                "prompt_input_ids": p,
                "prompt_attention_mask": [1] * len(p),
                "completion_input_ids": p + c,
                "completion_attention_mask": [1] * len(p + c),
                "completion_labels": [-100] * len(p) + c,
                "label": i % 2 == 0,
            }
            for i, (p, c) in enumerate(rows)
        ]
    )
    return trainer.train


def trl_kto(model, rows: list, folder: Path, device: str, lora: bool, tokenizer):
    """`apo_zero_unpaired`: without KTO's second completion, which doubles what a step holds."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class OurTokens(KTOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    options = options_of(folder, sum(map(len, rows[0])), device)
    args = KTOConfig(**options, precompute_ref_log_probs=True, loss_type="apo_zero_unpaired", bf16=device != "cpu")
    dataset = [{"prompt_ids": p, "completion_ids": c, "label": i % 2 == 0} for i, (p, c) in enumerate(rows)]
    peft = {"peft_config": lora_config()} if lora else {}
    dataset = Dataset.from_list(dataset)
    return OurTokens(model, None, args=args, train_dataset=dataset, processing_class=tokenizer, **peft).train


RUNNERS = {"ours": ours, "plain": plain, "trl_bco": trl_bco, "trl_kto": trl_kto}


def trial(job: dict, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    kind, lora, _ = CASES[job["case"]]
    shape, device = SHAPES[job["shape"]], job["device"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = sequences(job["tokens"], shape.V)
    small = replace(shape, D=64, V=1024, layers=1, heads=1, kv_heads=1, head_dim=64, intermediate=64)
    with tempfile.TemporaryDirectory() as elsewhere:  # every library is loaded before the memory is counted
        model = build(small, 64, device)
        RUNNERS[kind](model, sequences(64, small.V), Path(elsewhere), device, lora, tokenizer)()
    if kind == "ours":
        counted(small, 64, lora=lora, device=device)  # as a run of more tokens does when it starts
    del model
    gc.collect()
    before = reset_peak_rss()
    say({"before": before})
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(job["budget"] / torch.cuda.mem_get_info()[1], 1.0))
    try:
        model = build(shape, job["tokens"], device)
        start = time.perf_counter()
        RUNNERS[kind](model, rows, folder, device, lora, tokenizer)()
    except torch.OutOfMemoryError:
        say({"fits": False})
        return
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_rss() - before
    say({"fits": peak <= job["budget"], "peak": peak, "seconds": round(time.perf_counter() - start, 1)})


# ---- in the parent


def run_trial(job: dict, folder: Path, limit_s: float) -> dict:
    """-> fits, and peak bytes and seconds where it ran to its end. Raises RuntimeError where it failed otherwise."""
    package = CASES[job["case"]][2]
    python, environment = (peers_python(package), {"PYTHONPATH": None}) if package else (sys.executable, {})
    # glibc else raises its threshold and keeps what is freed, more with every length
    environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    environment |= {"BCO_FAST_CPU_MATMUL": "mkl"}  # oneDNN holds half a megabyte for each shape that it has compiled
    command = [python, __file__, "--trial", json.dumps(job), "--folder", folder]
    worker = Worker(job["case"], command, folder / "trial.log", **environment)
    started = time.perf_counter()
    try:
        before = worker.answer()["before"]
        while worker.process.poll() is None:
            if time.perf_counter() - started > limit_s:
                return {"fits": False, "why": f"over {limit_s:.0f} s"}
            status = Path(f"/proc/{worker.process.pid}/status").read_text()
            high = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
            if job["device"] == "cpu" and high and int(high.split()[1]) * 1024 - before > job["budget"]:
                return {"fits": False, "why": "over the budget"}
            time.sleep(0.05)
        return worker.answer()
    finally:
        worker.stop()


def longest(job: dict, folder: Path, limit_s: float, start: int, most: int) -> dict:
    """Double or halve until one length fits and one does not, then bisect to within a tenth."""
    trials: dict[int, dict] = {}
    low, high, tokens = 0, None, start
    while True:
        trials[tokens] = run_trial({**job, "tokens": tokens}, folder, limit_s)
        print(job["case"], tokens, trials[tokens], flush=True)
        if trials[tokens]["fits"]:
            low = tokens
        else:
            high = tokens
        if low >= most or (high is not None and (high - low <= max(STEP, low // 10))):
            break
        tokens = min(low * 2, most) if high is None else max(low + high, 2 * STEP) // 2 // STEP * STEP
        if tokens in trials or tokens < STEP:
            break
    return {
        "longest": low,
        "peak_mb": round(trials[low]["peak"] / 1e6, 1) if low else None,
        "seconds": trials[low].get("seconds") if low else None,
        "too_long": high,
        "too_long_because": trials[high].get("why", "out of memory") if high else None,
        "peak_mb_by_tokens": {t: round(trials[t]["peak"] / 1e6, 1) for t in sorted(trials) if "peak" in trials[t]},
    }


def measure(options: argparse.Namespace, device: str, folder: Path) -> Iterator[dict]:
    shape = SHAPES[options.shape]
    budget = options.budget_mb * 1e6
    for case in options.case or CASES:
        kind, lora, _ = CASES[case]
        job = {"case": case, "shape": options.shape, "device": device, "budget": budget}
        row = {"benchmark": "long_context", "predicted": False, "shape": options.shape, "device": device}
        row |= {"case": f"{options.shape}, {case}", "lora": lora, "parameters": shape.parameters()}
        row |= {"budget_mb": options.budget_mb, "V": shape.V}
        try:
            row |= longest(job, folder, options.limit_s, START[device] * (4 if kind == "ours" else 1), options.most)
        except (OSError, RuntimeError) as error:
            row["error"] = str(error).strip().splitlines()[-1][:240]
        if kind == "ours" and row.get("longest"):
            row["switches"] = OURS[device]
            memory = counted(shape, row["longest"], lora=lora, device=device, **row["switches"])
            row["predicted_mb"] = round(memory.total / 1e6, 1)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=CPU_SHAPE, choices=list(SHAPES), help="model; large ones want a GPU")
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one; may be repeated")
    parser.add_argument("--budget-mb", type=float, help="memory, MB (default: 192 on the CPU, all of a GPU)")
    parser.add_argument("--limit-s", type=float, default=120.0, help="a trial that takes longer counts as too long")
    parser.add_argument("--most", type=int, default=1 << 20, help="tokens; look no further")
    parser.add_argument("--predict", action="store_true", help="only the table of predictions")
    parser.add_argument("--switches", action="store_true", help="only the time and memory of each switch, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--trial", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial:
        try:
            trial(json.loads(options.trial), options.folder)
        except Exception as error:  # whatever a peer raises is its row
            sys.exit(described(error))
        return
    rows = switch_rows() if options.switches else list(predictions())
    if not options.predict and not options.switches:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu" and options.shape != CPU_SHAPE:
            parser.error(f"--shape {options.shape} wants a GPU; --predict says what to expect")
        if options.budget_mb is None:
            options.budget_mb = CPU_BUDGET_MB if device == "cpu" else torch.cuda.mem_get_info()[0] / 1e6
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        from tiny import build_tokenizer

        with tempfile.TemporaryDirectory() as folder:
            tokenizer = build_tokenizer()
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            tokenizer.save_pretrained(Path(folder) / "tokenizer")
            for row in measure(options, device, Path(folder)):
                save("long_context", [row], folder=options.out, keys=("case",))
                rows.append(row)
    print(save("long_context", rows, folder=options.out, keys=("case",)))
    print(
        table(
            rows,
            ["case", "longest", "peak_mb", "predicted_mb", "256k_gb", "1m_gb", "kb_a_token", "time_ratio", "error"],
        )
    )


if __name__ == "__main__":
    main()
