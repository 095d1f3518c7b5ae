"""A tokenizer and models small enough to train in a test, built from a seed."""

import json
import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from bco_fast.cli.demo import all_prompts, build_tokenizer, demonstration, deserves_thumbs_up
from bco_fast.losses import OBJECTIVES

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def model(config_class=LlamaConfig, seed=0, std=0.2, **options):
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config_class(**{"vocab_size": len(build_tokenizer())} | TINY | options))
    for parameter in made.parameters():  # spread logits, unlike a fresh model's flat ones
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    return made


def rows(n, seed=0):
    rng = random.Random(seed)  # noqa: S311
    prompts = rng.sample(all_prompts(), n)
    made = []
    for prompt in prompts:
        completion = demonstration(prompt, rng)
        made.append({"prompt": prompt, "completion": completion, "label": deserves_thumbs_up(prompt, completion)})
    return made


def scored(n, seed=0):
    """Rows with a score beside the label; the label is score > 0.5."""
    return [
        {**row, "score": round((0.6 if row["label"] else 0.0) + 0.4 * (i % 5) / 4, 3)}
        for i, row in enumerate(rows(n, seed))
    ]


def pairs(n, seed=0):
    rng = random.Random(seed)  # noqa: S311
    made = []
    for prompt in rng.sample(all_prompts(), n):
        sides = {True: None, False: None}
        while None in sides.values():
            completion = demonstration(prompt, rng)
            sides[deserves_thumbs_up(prompt, completion)] = completion
        made.append({"prompt": prompt, "chosen": sides[True], "rejected": sides[False]})
    return made


def feedback_for(loss_type, n, seed=0):
    """Rows of the kind an objective reads."""
    kind = {"pairs": pairs, "scores": scored, "rewards": scored, "labels": rows}
    return kind[OBJECTIVES[loss_type].data](n, seed)


def write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def byte_pair_tokenizer(feedback, vocabulary):
    """Trained on the text of a feedback file: real sentences, no download."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    records = map(json.loads, feedback.read_text().splitlines())
    texts = (record[column] for record in records for column in ("prompt", "completion"))
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["</s>", "<s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")  # noqa: S106
