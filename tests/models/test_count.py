"""What a step holds, as counted from a config, is what it allocates."""

import pytest
import torch
from peaks import allocated_peak
from small_runs import config
from transformers import AutoModelForCausalLM, LlamaConfig

from bco_fast.data.batch import collate_tokens
from bco_fast.data.dataset import Example
from bco_fast.head.types import HeadStats
from bco_fast.models.attention import use_segments
from bco_fast.models.count import count_step
from bco_fast.models.memory import free_embeddings, offload_activations
from bco_fast.models.patch import completion_logps
from bco_fast.training.policy import prepare_policy

SHAPE = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",
}
CHECKPOINTED = {"gradient_checkpointing": True}
TILED = CHECKPOINTED | {"use_peft": True, "layer_chunk_tokens": 128}
CASES = {
    "full": ({}, 512),
    "LoRA": ({"use_peft": True}, 512),
    "full, checkpointed": (CHECKPOINTED, 1024),
    "LoRA, checkpointed": (CHECKPOINTED | {"use_peft": True}, 1024),
    "LoRA, packed": (CHECKPOINTED | {"use_peft": True, "padding_free": True}, 1024),
    "full, tiled MLP": (CHECKPOINTED | {"mlp_chunk_tokens": 128}, 1024),
    "LoRA, tiled layers": (TILED, 1024),
    "LoRA, offloaded": (
        CHECKPOINTED | {"use_peft": True, "layer_chunk_tokens": 128, "activation_offloading": True},
        1024,
    ),
    "full, fewer checkpoints": (CHECKPOINTED | {"layer_checkpoints": 2, "layer_chunk_tokens": 128}, 1024),
    "LoRA, fewest checkpoints": (TILED | {"layer_checkpoints": 2}, 1024),
    "LoRA, bfloat16": (CHECKPOINTED | {"use_peft": True, "model_dtype": "bfloat16"}, 1024),
    "full, autocast": (CHECKPOINTED | {"bf16": True}, 1024),
}
LAYERS = {"LoRA, fewest checkpoints": 4}  # a group within a group
FAST = {"full, checkpointed", "LoRA"}


def _measured(args, tokens: int, shape: dict) -> int:
    """Two steps on one row, or on four packed ones, of a model that is built here as well; offloaded tensors included."""
    ids = [1 + i % 7 for i in range(tokens)]
    parts = 4 if args.padding_free else 1
    rows = [Example(torch.tensor(ids[i::parts]).int().numpy(), 1, True, 1.0) for i in range(parts)]
    batch = collate_tokens(rows, layout="packed" if args.padding_free else "padded")

    def steps() -> None:
        dtype = torch.float32 if args.model_dtype == "auto" else getattr(torch, args.model_dtype)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)
        model = prepare_policy(model, args, stats=HeadStats())
        if args.padding_free:
            use_segments(model)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            free_embeddings(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        model.train()
        for _ in range(2):
            hooks = torch.enable_grad()
            if args.activation_offloading:
                hooks = offload_activations(batch["input_ids"].shape, "cpu")
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = completion_logps(model, batch).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return allocated_peak(steps)


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in FAST else [pytest.mark.slow]) for c in CASES])
def test_the_count_is_within_a_fifth_of_what_is_allocated(tmp_path, case):
    options, tokens = CASES[case]
    if case in FAST:
        tokens //= 2
    args = config(tmp_path, max_length=tokens, workspace_bytes=1 << 18, lora_r=8, **options)
    shape = SHAPE | {"num_hidden_layers": LAYERS.get(case, SHAPE["num_hidden_layers"])}
    counted = count_step(LlamaConfig(**shape), args, tokens, device="cpu")
    measured = _measured(args, tokens, shape)
    assert 1 / 1.2 < (counted.total + counted.host) / measured < 1.2, (counted, measured)


def test_a_million_tokens_of_an_8b_model_are_counted_on_any_machine(tmp_path):
    shape = SHAPE | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    options = {"use_peft": True, "layer_chunk_tokens": 2048, "activation_offloading": True, **CHECKPOINTED}
    args = config(tmp_path, **options)
    memory = count_step(LlamaConfig(**shape), args, 1 << 20)
    assert memory.parts["weights"] == pytest.approx(8.03e9 * 2 + 84e6 * 4, rel=0.01)
    assert memory.parts[memory.moment] + memory.parts["checkpoints"] <= 112 * 1024 * (1 << 20)
    assert memory.total < 141e9
