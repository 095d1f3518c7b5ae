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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .files import atomic_text

logger = logging.getLogger("bco_fast")

FORMATS = ("alpaca_eval", "arena_hard", "jsonl")
TEXTS = ("instruction", "prompt", "turns")
"""Where a record keeps its prompt; the first that is there counts."""
IDS = ("question_id", "uid")
ANSWERS = ("completion", "output", "chosen", "rejected", "label", "score", "weight", "generator")
"""Columns that speak of an earlier completion; they are not carried over to a new one."""


class GenerationError(ValueError):
    """Prompts or options that cannot be generated from; names the file, the row and the reason."""


@dataclass(frozen=True)
class Prompt:
    text: str
    id: str | int | None = None
    columns: dict = field(default_factory=dict)
    """What else the record has."""


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


def read_json_records(path: str | os.PathLike) -> list[tuple[str, dict]]:
    """(file:place, object) of a JSON list or of JSONL, whichever the file is.

    Raises:
        GenerationError: the file cannot be read, is not JSON, has no record, or a record is not an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise GenerationError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise GenerationError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    records = []
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}: record {i}", record) for i, record in enumerate(json.loads(text))]
        except (ValueError, RecursionError) as error:
            raise GenerationError(f"{path}: not JSON ({error})") from None
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    records.append((f"{path}:{number}", json.loads(line)))
                except (ValueError, RecursionError) as error:
                    raise GenerationError(f"{path}:{number}: not JSON ({error})") from None
    for where, record in records:
        if not isinstance(record, dict):
            raise GenerationError(f"{where}: a record must be an object, not {type(record).__name__}")
    if not records:
        raise GenerationError(f"{path}: no record")
    return records


def prompt_of(where: str, record: dict) -> str | None:
    """The prompt of a record, or None if it has none. Raises GenerationError if it is not one text."""
    name = next((name for name in TEXTS if name in record), None)
    if name is None:
        return None
    text = record[name]
    if name == "turns":
        if not isinstance(text, list) or len(text) != 1:
            raise GenerationError(f"{where}: turns must be a list with one turn")
        text = text[0]["content"] if isinstance(text[0], dict) and "content" in text[0] else text[0]
    if not isinstance(text, str) or not text.strip():
        raise GenerationError(f"{where}: {name} must be a text that is not empty")
    return text


def id_of(record: dict) -> str | int | None:
    found = next((record[name] for name in IDS if record.get(name) is not None), None)
    return found if isinstance(found, (str, int)) else None


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
    """Prompts of a JSON list or JSONL file: `instruction`, `prompt`, or Arena-Hard's `turns`.

    Raises:
        GenerationError: as `read_json_records`, or a record without a prompt.
    """
    prompts = []
    for where, record in read_json_records(path):
        text = prompt_of(where, record)
        if text is None:
            raise GenerationError(
                f"{where}: none of the columns {', '.join(TEXTS)} (found: {', '.join(record) or 'none'})"
            )
        columns = {name: value for name, value in record.items() if name not in (*TEXTS, *ANSWERS)}
        prompts.append(Prompt(text, id_of(record), columns))
    return prompts


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


@torch.no_grad()
def draw(
    model: nn.Module,
    encoded: Sequence[Sequence[int]],
    order: Sequence[int],
    options: Mapping[str, object],
    *,
    batch_size: int,
    seed: int,
    progress: bool = False,
) -> list[list[int]]:
    """What `model.generate` adds to each prompt, padding included; the global random state is left as it was.

    Args:
        encoded: prompts as token ids.
        order: in which they are cut into batches; samples hang on it.
        options: of `model.generate`, pad_token_id among them.
    """
    device, training = next(model.parameters()).device, model.training
    drawn: list[list[int]] = [[] for _ in encoded]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress):
                chosen = order[start : start + batch_size]
                batch = _left_padded([encoded[i] for i in chosen], options["pad_token_id"])
                tokens = model.generate(**{name: tensor.to(device) for name, tensor in batch.items()}, **options)
                for i, ids in zip(chosen, tokens[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                    drawn[i] = ids
    finally:
        model.train(training)
    return drawn


def _end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """The tokenizer's EOS and those of the model's generation config: chat models end a turn with a token of its own."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id, *ends]
    if not ends:
        raise GenerationError("neither tokenizer nor model has an EOS token, so no completion would end")
    return list(dict.fromkeys(ends))


def _left_padded(encoded: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:  # [B, T] int64
    width = max(map(len, encoded))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in encoded]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]),
    }


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
