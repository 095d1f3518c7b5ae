"""How many GPUs a model needs at a context, with LoRA and with all weights trained: counted bytes, not measured.

    python benchmarks/sharding.py          prints the table of docs/scale.md; results/sharding.json

A rank's micro-batch is one row of that many tokens, all of them scored, with gradient checkpointing. `count_step` counts its
activations from the model's own code. LoRA of rank 32 on bfloat16 weights; all weights: float32 weights, gradients and two
moments of AdamW, 16 bytes a weight. FSDP2 and ZeRO-3 share these out over the ranks, and gather in bfloat16 two layers (the next
is fetched while one computes), the embedding and the head; where all weights are trained, a layer's and the head's gradients
are whole too, before they are shared out. A tenth of the GPU is left to the allocator and NCCL.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from common import RESULTS, save
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from bco_fast import FeedbackConfig
from bco_fast.models.count import count_step
from bco_fast.models.load import add_adapter
from bco_fast.models.tiles import decoder_layers


def _config(kind: type, D: int, intermediate: int, layers: int, heads: int, V: int) -> PreTrainedConfig:
    return kind(
        hidden_size=D, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, vocab_size=V, tie_word_embeddings=False, max_position_embeddings=1 << 17,
        dtype="bfloat16",
    )  # fmt: skip


MODELS = {
    "8B": _config(LlamaConfig, 4096, 14336, 32, 32, 128256),
    "14B": _config(Qwen3Config, 5120, 17408, 40, 40, 151936),
    "32B": _config(Qwen3Config, 5120, 25600, 64, 64, 151936),
    "70B": _config(LlamaConfig, 8192, 28672, 80, 64, 128256),
}
"""Llama 3.1 and Qwen3, as published."""
CONTEXTS = {"4k": 4096, "32k": 32768, "128k": 131072}
GPUS = (1, 2, 4, 8, 16, 32, 64)
LONG = {"activation_offloading": True, "layer_chunk_tokens": 4096}
"""Switches that long contexts need; a star in the table."""
GPU_BYTES = 80e9
USABLE = 0.9
LOW, STATE = 2, 16  # bytes of a weight in bfloat16, and of one that AdamW trains


def sizes(config: PreTrainedConfig, options: FeedbackConfig) -> dict[str, int]:
    """Numbers of parameters: all, in one layer, in the embedding or the head, and of an adapter."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        layer = sum(p.numel() for p in decoder_layers(model)[0].parameters())
        found = {"all": sum(p.numel() for p in model.parameters()), "layer": layer, "adapter": 0}
        if options.use_peft:
            model = add_adapter(model, options)
            found["adapter"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found | {"head": config.vocab_size * config.hidden_size}


def rank_bytes(n: dict[str, int], activations: float, gpus: int) -> float:
    """Of one rank at its fullest moment."""
    lora = n["adapter"] > 0
    state = LOW * n["all"] + STATE * n["adapter"] if lora else STATE * n["all"]
    if gpus == 1:
        return state + activations
    gathered = LOW * (2 * n["layer"] + 2 * n["head"])
    gradients = 0 if lora else LOW * (n["layer"] + n["head"])
    return state / gpus + gathered + gradients + activations


def rows() -> Iterator[dict]:
    for model, config in MODELS.items():
        for trained in ("LoRA", "all"):
            lora = {"use_peft": True, "lora_r": 32} if trained == "LoRA" else {}
            common = {
                "output_dir": "unused",
                "gradient_checkpointing": True,
                "model_dtype": "bfloat16",
                "use_cpu": True,
            }
            # with gradients there all the time, the fullest moment is that of the activations
            common["gradient_accumulation_steps"] = 2
            n = sizes(config, FeedbackConfig(**common, **lora))
            for context, tokens in CONTEXTS.items():
                for switches in ({}, LONG):
                    memory = count_step(config, FeedbackConfig(**common, **lora, **switches), tokens)
                    state = sum(memory.parts[part] for part in ("weights", "optimizer", "gradients"))
                    activations = memory.total - state
                    per_rank = {gpus: rank_bytes(n, activations, gpus) for gpus in GPUS}
                    yield {
                        "model": model, "trained": trained, "context": context, "long": bool(switches),
                        "activations_gb": round(activations / 1e9, 2), "host_gb": round(memory.host / 1e9, 2),
                        "rank_gb": {str(gpus): round(size / 1e9, 1) for gpus, size in per_rank.items()},
                        "gpus": next((g for g, size in per_rank.items() if size <= USABLE * GPU_BYTES), None),
                    }  # fmt: skip


def cell(found: list[dict]) -> str:
    """The fewest GPUs, with a star where that takes the switches for long contexts."""
    plain, long = sorted(found, key=lambda row: row["long"])
    fewest = min(row["gpus"] or math.inf for row in found)
    if fewest == math.inf:
        return "-"
    return f"{fewest}" if plain["gpus"] == fewest else f"{long['gpus']}*"


def markdown(found: list[dict]) -> str:
    lines = ["| | " + " | ".join(f"LoRA, {c} | all weights, {c}" for c in CONTEXTS) + " |"]
    lines.append("|---" * (1 + 2 * len(CONTEXTS)) + "|")
    for model in MODELS:
        cells = [
            cell([row for row in found if (row["model"], row["context"], row["trained"]) == (model, context, trained)])
            for context in CONTEXTS
            for trained in ("LoRA", "all")
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    found = list(rows())
    print(save("sharding", found, folder=options.out))
    print(markdown(found))


if __name__ == "__main__":
    main()
