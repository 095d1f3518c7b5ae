"""Completions of a prompts file, written as AlpacaEval, Arena-Hard and plain JSONL publish them.

alpaca_eval   a JSON list of {"instruction", "output", "generator", "dataset"}
arena_hard    JSONL of {"question_id", "answer_id", "model_id", "choices": [{"index", "turns": [{"content",
              "token_len"}]}], "tstamp"}, for the questions of its question.jsonl
jsonl         {"prompt", "completion"} and the further columns of the prompts file

Batches are padded on the left and hold prompts of like length.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..data.prompts import GenerationError, Prompt
from ..files import atomic_text
from ..models.sampling import draw

logger = logging.getLogger("bco_fast")

FORMATS = ("alpaca_eval", "arena_hard", "jsonl")


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int
    """Without the EOS."""
    ended: bool
    """Whether the model ended it; False where max_new_tokens did."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 0.7
    """0 for greedy decoding."""
    top_p: float = 0.95
    max_new_tokens: int = 512
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature must be >= 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p must be in (0, 1], not {self.top_p}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} must be at least 1, not {getattr(self, name)}")


def encode_prompts(
    tokenizer, prompts: Sequence[str], *, chat: Literal["auto", "on", "off"] = "auto", max_length: int | None = None
) -> list[list[int]]:
    """Token ids of prompts, as a user's turn where a chat template is used, else as the tokenizer begins a text.

    Args:
        chat: "auto" uses the chat template if the tokenizer has one.
        max_length: what is longer loses its beginning; how many did is logged.

    Raises:
        GenerationError: chat="on" without a template, or a prompt without tokens.
    """
    if chat == "on" and not tokenizer.chat_template:
        raise GenerationError("chat=on, but the tokenizer has no chat template")
    if chat != "off" and tokenizer.chat_template:
        encoded = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            for prompt in prompts
        ]
    else:
        encoded = tokenizer(list(prompts))["input_ids"]
        eos = tokenizer.eos_token_id
        for i, (ids, prompt) in enumerate(zip(encoded, prompts, strict=True)):
            if ids and ids[-1] == eos and eos is not None and not prompt.endswith(tokenizer.eos_token):
                encoded[i] = ids[:-1]  # some tokenizers close every text
    for i, ids in enumerate(encoded):
        if not ids:
            raise GenerationError(f"prompt {i} ({prompts[i][:60]!r}) has no tokens")
    cut = 0 if max_length is None else sum(len(ids) > max_length for ids in encoded)
    if cut:
        logger.warning("%d of %d prompts lost their beginning, down to %d tokens", cut, len(encoded), max_length)
        encoded = [ids[-max_length:] for ids in encoded]
    return encoded


def generate(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    chat: Literal["auto", "on", "off"] = "auto",
    progress: bool = False,
) -> list[Completion]:
    """One completion for each prompt. The same prompts, sampling and machine give the same completions; the global
    random state is left as it was.

    Nothing but `sampling` shapes the distribution: top-k and penalties of the checkpoint's generation config are off,
    its EOS tokens count.

    Raises:
        GenerationError: of `encode_prompts`; max_new_tokens leaves no position for a prompt; the model has no EOS.
    """
    sampling = sampling or Sampling()
    ends = _end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and sampling.max_new_tokens >= positions:
        raise GenerationError(f"max_new_tokens is {sampling.max_new_tokens}, but the model has {positions} positions")
    encoded = encode_prompts(
        tokenizer, prompts, chat=chat, max_length=positions - sampling.max_new_tokens if positions else None
    )
    options = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": ends, "pad_token_id": pad}
    options |= {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "use_cache": True}
    if sampling.temperature > 0:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        options |= {"min_p": 0.0, "typical_p": 1.0}
    else:
        options |= {
            "do_sample": False,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 50,
        }  # unused; the defaults warn least
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    drawn = draw(
        model, encoded, order, options, batch_size=sampling.batch_size, seed=sampling.seed, progress=progress
    )  # fmt: skip
    return [_completion(tokenizer, ids, set(ends)) for ids in drawn]


def _end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """The tokenizer's EOS and those of the model's generation config: chat models end a turn with a token of its own."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id, *ends]
    if not ends:
        raise GenerationError("neither tokenizer nor model has an EOS token, so no completion would end")
    return list(dict.fromkeys(ends))


def _completion(tokenizer, ids: list[int], ends: set[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), len(ids), end is not None)


def write_completions(
    path: str | os.PathLike,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    form: str,
    *,
    generator: str,
    dataset: str = "",
    now: float | None = None,
) -> None:
    """Write a file of one of `FORMATS`, whole or not at all.

    Args:
        generator: the model's name: `generator` and `model_id` of the formats.
        dataset: AlpacaEval's `dataset` for prompts that name none.
        now: seconds since 1970, Arena-Hard's `tstamp`; None for the clock.

    Raises:
        GenerationError: an unknown format, or for arena_hard a question without its own question_id.
    """
    check_format(prompts, form)
    pairs = list(zip(prompts, completions, strict=True))
    with atomic_text(path) as file:
        if form == "alpaca_eval":
            rows = [
                {
                    "instruction": prompt.text,
                    "output": completion.text,
                    "generator": generator,
                    "dataset": prompt.columns.get("dataset", dataset),
                }
                for prompt, completion in pairs
            ]
            file.write(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
            return
        now = time.time() if now is None else now
        for prompt, completion in pairs:
            if form == "arena_hard":
                row = _arena_hard(prompt, completion, generator, now)
            else:
                row = {"prompt": prompt.text, "completion": completion.text, **prompt.columns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def check_format(prompts: Sequence[Prompt], form: str) -> None:
    """Whether completions of these prompts can be written so; see `write_completions`."""
    if form not in FORMATS:
        raise GenerationError(f"format must be one of {', '.join(FORMATS)}, not {form!r}")
    if form == "arena_hard":
        seen = set()
        for i, prompt in enumerate(prompts):
            if prompt.id is None or prompt.id in seen:
                flaw = "has no question_id" if prompt.id is None else f"has the question_id {prompt.id!r} of another"
                raise GenerationError(f"prompt {i} ({prompt.text[:60]!r}) {flaw}; arena_hard needs one for each")
            seen.add(prompt.id)


def _arena_hard(prompt: Prompt, completion: Completion, generator: str, now: float) -> dict:
    # the published answer_id is random; this one is the same for the same answer
    identity = json.dumps([prompt.id, generator, completion.text]).encode()
    return {
        "question_id": prompt.id,
        "answer_id": hashlib.blake2b(identity, digest_size=11).hexdigest(),
        "model_id": generator,
        "choices": [{"index": 0, "turns": [{"content": completion.text, "token_len": completion.tokens}]}],
        "tstamp": now,
    }
