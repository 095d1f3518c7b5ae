"""Completions of prompts, written in the formats that AlpacaEval, Arena-Hard, MT-Bench, WildBench and plain JSONL use.

alpaca_eval   a JSON list of {"instruction", "output", "generator", "dataset"}
arena_hard    JSONL of {"question_id", "answer_id", "model_id", "choices": [{"index", "turns": [{"content",
              "token_len"}]}], "tstamp"}, for the questions of its question.jsonl
mt_bench      the same, with choices[0].turns a list of texts, one for each turn of a question
wild_bench    a JSON list of {"session_id", "chat_history", "output": [text], "generator"}, for its conversation_input
jsonl         {"prompt", "completion"} and the further columns of the prompts
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..data.chat import Message
from ..data.prompts import id_of, is_chat, prompt_ids, read_prompts
from ..data.tokenizer import pad_or_eos, positions
from ..files import atomic_text
from ..models.sampling import draw

logger = logging.getLogger("bco_fast")

FORMATS = ("alpaca_eval", "arena_hard", "mt_bench", "wild_bench", "jsonl")
ANSWERS = (
    "completion",
    "output",
    "chosen",
    "rejected",
    "label",
    "score",
    "weight",
    "generator",
    "instruction",
    "turns",
    "conversation_input",
)
"""Columns about an earlier completion, or other names of the prompt; they are not copied to a new completion."""


class GenerationError(ValueError):
    """Options that cannot be generated with, or prompts that a format cannot hold."""


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int
    """Without the EOS."""
    ended: bool
    """Whether the model ended it; False if max_new_tokens did."""


@dataclass(frozen=True)
class Sampling:
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
        if not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed must be in [0, 2^63), not {self.seed}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise GenerationError(f"{name} must be at least 1, not {getattr(self, name)}")


Prompts = Iterable[str | Sequence[Message] | Mapping]
"""As `read_prompts` takes them."""


def encode_prompts(
    tokenizer, prompts: Prompts, *, chat: Literal["auto", "on", "off"] = "auto", max_length: int | None = None
) -> list[list[int]]:
    """Token ids of prompts; with a chat template, a text is a user's turn.

    Args:
        chat: "auto" uses the chat template if the tokenizer has one.
        max_length: longer prompts lose their beginning; their number is logged.

    Raises:
        GenerationError: chat="on" without a template. FeedbackError: a prompt without tokens, or of a wrong form.
    """
    if chat == "on" and not tokenizer.chat_template:
        raise GenerationError("chat=on, but the tokenizer has no chat template")
    rows = read_prompts(prompts)
    if chat != "off" and tokenizer.chat_template and not is_chat(rows[0]["prompt"]):
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    encoded = prompt_ids(rows, tokenizer)
    cut = 0 if max_length is None else sum(len(ids) > max_length for ids in encoded)
    if cut:
        logger.warning("%d of %d prompts lost their beginning, down to %d tokens", cut, len(encoded), max_length)
        encoded = [ids[-max_length:] for ids in encoded]
    return encoded


def generate(
    model: nn.Module,
    tokenizer,
    prompts: Prompts,
    sampling: Sampling | None = None,
    *,
    chat: Literal["auto", "on", "off"] = "auto",
    progress: bool = False,
) -> list[Completion]:
    """One completion for each prompt. The same prompts, sampling and machine give the same completions; the global random
    state does not change.

    Only `sampling` shapes the distribution: top-k and penalties of the checkpoint's generation config are off; its EOS
    tokens count.

    Raises:
        GenerationError: as `encode_prompts`; max_new_tokens leaves no position for a prompt; the model has no EOS.
    """
    sampling = sampling or Sampling()
    limit = positions(model)
    if limit and sampling.max_new_tokens >= limit:
        raise GenerationError(f"max_new_tokens is {sampling.max_new_tokens}, but the model has {limit} positions")
    room = limit - sampling.max_new_tokens if limit else None
    encoded = encode_prompts(tokenizer, prompts, chat=chat, max_length=room)
    return complete(model, tokenizer, encoded, sampling, progress=progress)


def complete(
    model: nn.Module, tokenizer, encoded: Sequence[list[int]], sampling: Sampling, *, progress: bool = False
) -> list[Completion]:
    """One completion for each prompt of `encode_prompts`; `generate` says what shapes it.

    Raises:
        GenerationError: the model has no EOS.
    """
    ends, pad = _end_tokens(model, tokenizer), pad_or_eos(tokenizer)
    options = {
        "max_new_tokens": sampling.max_new_tokens,
        "eos_token_id": ends,
        "pad_token_id": ends[0] if pad is None else pad,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "use_cache": True,
    }
    if sampling.temperature > 0:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        options |= {"min_p": 0.0, "typical_p": 1.0}
    else:  # the last three are unused; these values cause the fewest warnings
        options |= {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    batches = {"batch_size": sampling.batch_size, "seed": sampling.seed, "progress": progress}
    return [_completion(tokenizer, ids, set(ends)) for ids in draw(model, encoded, order, options, **batches)]


def generate_turns(
    model: nn.Module,
    tokenizer,
    rows: Sequence[Mapping],
    sampling: Sampling | None = None,
    *,
    chat: Literal["auto", "on", "off"] = "auto",
    progress: bool = False,
) -> list[list[Completion]]:
    """Completions of every turn of rows of `read_prompts(turns=True)`: each turn continues the conversation so far.

    Raises:
        GenerationError: as `generate`; a row has several turns and the tokenizer no chat template.
    """
    asked = [list(row.get("turns") or [row["prompt"]]) for row in rows]
    if max(map(len, asked)) > 1 and (chat == "off" or not tokenizer.chat_template):
        raise GenerationError("prompts with several turns need the tokenizer's chat template")
    options = {"chat": chat, "progress": progress}
    answers = [[first] for first in generate(model, tokenizer, list(rows), sampling, **options)]
    for turn in range(1, max(map(len, asked))):
        going = [i for i, turns in enumerate(asked) if len(turns) > turn]
        talks = [_conversation(asked[i][: turn + 1], answers[i]) for i in going]
        for i, answer in zip(going, generate(model, tokenizer, talks, sampling, **options), strict=True):
            answers[i].append(answer)
    return answers


def _conversation(questions: Sequence[str], answers: Sequence[Completion]) -> list[dict]:
    said = [{"role": "user", "content": questions[0]}]
    for answer, question in zip(answers, questions[1:], strict=True):
        said += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": question}]
    return said


def _end_tokens(model: nn.Module, tokenizer) -> list[int]:
    """The tokenizer's EOS and those of the model's generation config: chat models often end a turn with another token."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    if not ends:
        raise GenerationError("neither tokenizer nor model has an EOS token, so no completion would end")
    return ends


def _completion(tokenizer, ids: list[int], ends: set[int]) -> Completion:
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    ids = ids[:end]
    return Completion(tokenizer.decode(ids, skip_special_tokens=True), len(ids), end is not None)


def write_completions(
    path: str | os.PathLike,
    prompts: Sequence[Mapping],
    completions: Sequence[Completion] | Sequence[Sequence[Completion]],
    form: str,
    *,
    generator: str,
    dataset: str = "",
    now: float | None = None,
) -> None:
    """Write a file in one of `FORMATS`; it appears only when it is complete.

    Args:
        prompts: rows of `read_prompts`.
        completions: one for each prompt, or those of its turns.
        generator: the model's name: `generator` and `model_id` of the formats.
        dataset: AlpacaEval's `dataset` for prompts that name none.
        now: seconds since 1970, Arena-Hard's `tstamp`; None for the clock.

    Raises:
        GenerationError: of `check_format`.
    """
    check_format(prompts, form)
    answers = [[c] if isinstance(c, Completion) else list(c) for c in completions]
    now = time.time() if now is None else now

    def row(prompt: Mapping, turns: Sequence[Completion]) -> dict:
        completion = turns[0]
        if form in ("arena_hard", "mt_bench"):
            return _arena_hard(id_of(prompt), turns, generator, now, texts=form == "mt_bench")
        if form == "wild_bench":
            said = {"chat_history": prompt["prompt"], "output": [completion.text], "generator": generator}
            return {"session_id": id_of(prompt), **said}
        if form == "alpaca_eval":
            own = {"generator": generator, "dataset": prompt.get("dataset", dataset)}
            return {"instruction": prompt["prompt"], "output": completion.text, **own}
        columns = {name: value for name, value in prompt.items() if name not in ("prompt", *ANSWERS)}
        return {"prompt": prompt["prompt"], "completion": completion.text, **columns}

    rows = [row(*pair) for pair in zip(prompts, answers, strict=True)]
    with atomic_text(path) as file:
        if form in ("alpaca_eval", "wild_bench"):
            file.write(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check_format(prompts: Sequence[Mapping], form: str) -> None:
    """Whether completions of these prompts can be written so; see `write_completions`."""
    if form not in FORMATS:
        raise GenerationError(f"format must be one of {', '.join(FORMATS)}, not {form!r}")
    if form == "alpaca_eval" and prompts and is_chat(prompts[0]["prompt"]):
        raise GenerationError("alpaca_eval holds instructions as text, not chat messages")
    if form != "mt_bench" and any(len(prompt.get("turns") or []) > 1 for prompt in prompts):
        raise GenerationError(
            f"{form} holds one answer to a prompt, and some have several turns; mt_bench holds them all"
        )
    if form == "wild_bench" and prompts and not is_chat(prompts[0]["prompt"]):
        raise GenerationError("wild_bench holds conversations (conversation_input), not text")
    seen = set()
    for i, prompt in enumerate(prompts if form in ("arena_hard", "mt_bench", "wild_bench") else ()):
        if (known := id_of(prompt)) is None or known in seen:
            name = "session_id" if form == "wild_bench" else "question_id"
            problem = f"has no {name}" if known is None else f"has the {name} {known!r} of another"
            raise GenerationError(f"prompt {i} ({str(prompt['prompt'])[:60]!r}) {problem}; {form} needs one for each")
        seen.add(known)


def _arena_hard(question: str | int, turns: Sequence[Completion], generator: str, now: float, *, texts: bool) -> dict:
    # the published answer_id is random; this one is the same for the same answer
    identity = json.dumps([question, generator, *(turn.text for turn in turns)]).encode()
    said = [turn.text if texts else {"content": turn.text, "token_len": turn.tokens} for turn in turns]
    return {
        "question_id": question,
        "answer_id": hashlib.blake2b(identity, digest_size=11).hexdigest(),
        "model_id": generator,
        "choices": [{"index": 0, "turns": said}],
        "tstamp": now,
    }
