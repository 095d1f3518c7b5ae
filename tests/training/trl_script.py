"""The argument lines and the calls of TRL 1.12's example script for BCO, with the import changed.

As a program, with TRL's own argument classes: .venv-peers-trl-1.12/bin/python tests/training/trl_script.py [FLAGS]
"""

import shlex
import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import load_dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from bco_fast import BCOConfig, BCOTrainer

FULL = shlex.split("""
    --per_device_train_batch_size 16 --per_device_eval_batch_size 32 --num_train_epochs 1 --learning_rate 1e-6
    --gradient_checkpointing --gradient_accumulation_steps 1 --logging_steps 0.01 --eval_steps 0.2 --save_strategy no
    --logging_first_step --max_length 2048 --max_prompt_length 1536 --max_completion_length 1024
    --no_remove_unused_columns --warmup_ratio 0.1 --bf16 --trust_remote_code
""")
ADAPTER = [*FULL, "--use_peft", "--lora_target_modules=all-linear", "--lora_r=16", "--lora_alpha=16"]


@dataclass
class ScriptArguments:
    """The fields of TRL's that the script reads."""

    dataset_name: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"


@dataclass
class ModelConfig:
    """The fields of TRL 1.12's, by name and type."""

    model_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: str | None = "float32"
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_target_modules: list[str] | None = None
    lora_target_parameters: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"choices": ["fp4", "nf4"]})
    use_bnb_nested_quant: bool = False
    bnb_4bit_quant_storage: str | None = None


def get_peft_config(model_args):
    if not model_args.use_peft:
        return None
    return LoraConfig(r=model_args.lora_r, lora_alpha=model_args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")  # fmt: skip


class Embedder(nn.Module):
    """A mean of token vectors, and the number of prompts it was called with."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table, self.prompts = nn.Embedding(vocabulary, 8), 0

    def forward(self, input_ids, attention_mask):
        self.prompts += len(input_ids)
        return (self.table(input_ids) * attention_mask[:, :, None]).sum(1) / attention_mask.sum(1, keepdim=True)


def embed_prompt(input_ids, attention_mask, model):
    return model(input_ids=input_ids, attention_mask=attention_mask)


def run(flags, script_class=ScriptArguments, model_class=ModelConfig, peft_config=get_peft_config):
    """-> (trainer, embedder, prompts embedded before training)"""
    parser = HfArgumentParser((script_class, BCOConfig, model_class))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses(flags)
    training_args.gradient_checkpointing_kwargs = {"use_reentrant": True}
    model, ref_model = (AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, trust_remote_code=training_args.trust_remote_code) for _ in range(2))  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    dataset = load_dataset(script_args.dataset_name)
    torch.manual_seed(0)
    embedder = Embedder(len(tokenizer))
    trainer = BCOTrainer(
        model,
        ref_model,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split],
        processing_class=tokenizer,
        peft_config=peft_config(model_args),
        embedding_func=partial(embed_prompt, model=embedder),
        embedding_tokenizer=tokenizer,
    )
    before = embedder.prompts
    trainer.train()
    trainer.save_model(training_args.output_dir)
    return trainer, embedder, before


if __name__ == "__main__":
    import trl

    trainer, embedder, before = run(sys.argv[1:], trl.ScriptArguments, trl.ModelConfig, trl.get_peft_config)
    assert before == embedder.prompts
    print("trained", trainer.state.global_step)
