"""What to know of feedback before it is trained on: classes, lengths and cuts, repeats, special tokens, which options fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..losses.metrics import auc, auc_interval
from .dataset import Example, FeedbackDataset
from .labels import FEW
from .repeats import find_repeats
from .rows import FeedbackRow, Needs, parse_columns, with_our_names
from .sources import RowError, as_record, open_source
from .tokenize import fit, prompt_limit, tokenize_rows
from .tokenizer import special_tokens
from .turns import split_turns

_UNCUT = 2**31
_SKEW = 1 / 3
"""A rarer class below this share of the rows is worth weighting."""
_BRIEF = 16
"""Tokens of a completion below which log-ratios are small, so that beta is larger than the papers'."""
_LOOSE, _BIASED = 0.1, 0.1
"""Share of rows whose prompt has both thumbs; distance of the lengths' AUC from chance."""


class Advice(NamedTuple):
    option: str
    """What to pass or to do."""
    why: str


def needs_of(source: str, columns: str | None = None) -> Needs:
    """What the first good row has: "scores" for a score without thumb or pair, else "labels", which reads pairs too.

    Raises:
        FeedbackError: the source cannot be opened. ValueError: columns cannot be understood.
    """
    renamed = parse_columns(columns)
    stream = open_source(source, renamed=renamed)
    for _, record in stream.records:
        try:
            _, part = next(iter(split_turns(with_our_names(as_record(record), renamed, stream.columns))))
        except RowError:
            continue
        other = any(part.get(name) is not None for name in ("label", "kto_tag", "chosen", "rejected"))
        return "scores" if part.get("score") is not None and not other else "labels"
    return "labels"


def examine(
    rows: Sequence[FeedbackRow],
    tokenizer,
    *,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    on_bad_row: str = "error",
    progress: bool = False,
) -> dict:
    """Facts about rows of one kind, all pairs or all single completions; the limits are those of `tokenize_rows`.

    Returns:
        A dict of JSON values. Lengths are tokens before truncation, and "cut" says what truncation does.

    Raises:
        FeedbackError: a row cannot be tokenized, or none is left.
    """
    dataset = tokenize_rows(rows, tokenizer, max_length=_UNCUT, on_bad_row=on_bad_row, progress=progress)
    keep_prompt = prompt_limit(max_length, max_prompt_length)
    limits = max_length, keep_prompt, max_completion_length
    chats = sum(not isinstance(row.prompt, str) for row in rows)
    repeats = find_repeats(rows)
    prompts = [sides[0].prompt_key for sides in dataset.sides]
    bos = getattr(tokenizer, "bos_token_id", None)
    return {
        "rows": len(dataset),
        "format": "chat" if chats == len(rows) else "text" if not chats else "text and chat",
        "pairs": dataset.paired,
        "skipped": dataset.report["skipped"],
        "prompts": len(set(prompts)),
        **_classes(dataset, prompts),
        "tokens": _lengths(dataset),
        "cut": _cuts(dataset, *limits),
        "repeated_rows": len(repeats.again),
        "repeated_at": repeats.again[:3],
        "both_thumbs": len(repeats.both),
        "both_thumbs_at": repeats.both[:3],
        "special_tokens_as_text": _special_texts(rows, tokenizer),
        "two_bos": sum(bos is not None and list(e.input_ids[:2]) == [bos, bos] for e in dataset.examples),
        "shown": [_shown(example, tokenizer, *limits) for example in _three(dataset)],
    }


def _classes(dataset: FeedbackDataset, prompts: Sequence[bytes]) -> dict:
    """Of single completions their thumbs, and how far prompts and lengths alone tell them apart."""
    if dataset.paired:
        return {"up": None, "down": None, "prompts_with_both": None, "length_auc": None}
    labels = [example.label for example in dataset.examples]
    thumbs: dict[bytes, set[bool]] = {}
    for prompt, label in zip(prompts, labels, strict=True):
        thumbs.setdefault(prompt, set()).add(label)
    up = sum(labels)
    found = {"up": up, "down": len(labels) - up, "prompts_with_both": sum(len(seen) == 2 for seen in thumbs.values())}
    if not 0 < up < len(labels):
        return found | {"length_auc": None}
    lengths = torch.tensor([len(e) - e.completion_start for e in dataset.examples], dtype=torch.float64)
    longer = auc(lengths, torch.tensor(labels))
    return found | {"length_auc": [round(v, 4) for v in (longer, *auc_interval(longer, up, len(labels) - up))]}


def _lengths(dataset: FeedbackDataset) -> dict[str, dict[str, int]]:
    examples = dataset.examples
    prompts = [sides[0].completion_start for sides in dataset.sides]
    completions = [len(example) - example.completion_start for example in examples]
    parts = {"prompt": prompts, "completion": completions, "together": [len(example) for example in examples]}
    return {
        name: {"median": int(np.median(n)), "p95": int(np.quantile(n, 0.95)), "max": max(n), "sum": sum(n)}
        for name, n in parts.items()
    }


def _fitted(sides: Sequence[Example], most: int, keep_prompt: int, most_completion: int | None):
    start = sides[0].completion_start
    completions = [side.input_ids[start:][:most_completion] for side in sides]
    return fit(sides[0].input_ids[:start], completions, most, keep_prompt)


def _cuts(dataset: FeedbackDataset, max_length: int, keep_prompt: int, most_completion: int | None) -> dict:
    cut: Counter[str] = Counter()
    for sides in dataset.sides:
        prompt, completions = _fitted(sides, max_length, keep_prompt, most_completion)
        lost = sum(len(side) - side.completion_start for side in sides) - sum(map(len, completions))
        cut["prompts"] += len(prompt) < sides[0].completion_start
        cut["completions"] += lost > 0
        cut["empty"] += not all(map(len, completions))
    return {"max_length": max_length, **{name: cut[name] for name in ("prompts", "completions", "empty")}}


def _special_texts(rows: Iterable[FeedbackRow], tokenizer) -> dict:
    """Rows in whose text a special token is spelt out. In strings it becomes that token, in chats it stays text."""
    pattern = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or "(?!)")
    found: Counter[str] = Counter()
    examples: list[str] = []
    for row in rows:
        parts = [[part] if isinstance(part, (str, Mapping)) else part for part in (row.prompt, *row.completions)]
        texts = [turn if isinstance(turn, str) else turn.get("content", "") for part in parts for turn in part]
        match = next((match for text in texts if (match := pattern.search(text or ""))), None)
        if match:
            found["text" if isinstance(row.prompt, str) else "chat"] += 1
            examples += [f"{row.where}: {match[0]}"][: 3 - len(examples)]
    return {"become_tokens": found["text"], "stay_text": found["chat"], "at": examples}


def _three(dataset: FeedbackDataset) -> list[Example]:
    """The first thumbs up, the first thumbs down, and the longest of the others."""
    first = {example.label: example for example in reversed(dataset.examples)}
    chosen = [first[label] for label in (True, False) if label in first]
    others = [example for example in dataset.examples if not any(example is other for other in chosen)]
    return [*chosen, *sorted(others, key=len, reverse=True)[: 3 - len(chosen)]]


def _shown(example: Example, tokenizer, *limits) -> dict:
    prompt, (completion,) = _fitted([example], *limits)
    control = {index: text for text, index in special_tokens(tokenizer).items()}

    def decoded(ids: Sequence[int]) -> str:
        text, run = "", []
        for token in [*map(int, ids), None]:
            if token is not None and token not in control:
                run.append(token)
                continue
            text += tokenizer.decode(run) if run else ""
            text, run = text + ("" if token is None else f"«{control[token]}»"), []
        return text

    return {
        "label": example.label,
        "prompt_tokens": len(prompt),
        "trained_tokens": len(completion),
        "prompt": decoded(prompt),
        "trained": decoded(completion),
    }


def advise(facts: Mapping, needs: Needs, *, adapter: bool = False, positions: int | None = None) -> list[Advice]:
    """Options that fit the facts of `examine`, each with its reason, and what to mend first.

    Args:
        needs: what was read.
        adapter: whether an adapter is trained instead of all weights.
        positions: of the model; None for no limit.
    """
    found, tokens, cut = [_objective(facts, needs)], facts["tokens"], facts["cut"]
    brief = tokens["completion"]["median"] < _BRIEF
    why = f"completions have a median of {tokens['completion']['median']} tokens, "
    why += "so log-ratios are small" if brief else "as in the papers, most of which take 0.1"
    found.append(Advice(f"--beta {0.5 if brief else 0.1}", why))
    rate = ("1e-5", "a first value for LoRA") if adapter else ("5e-7", "the papers' value for all weights of 7B models")
    found.append(Advice(f"--learning_rate {rate[0]}", f"{rate[1]}; smaller models take more"))
    found += _balance(facts)
    if cut["prompts"] or cut["completions"]:
        parts = f"{cut['prompts']:,} prompts and {cut['completions']:,} completions"
        gone = f", and leaves nothing of {cut['empty']:,}, which are refused" if cut["empty"] else ""
        longest = -(-tokens["together"]["max"] // 64) * 64
        most = min(longest, positions or longest)
        then = "this cuts none" if tokens["together"]["max"] <= most else "the model has no more positions"
        if most > cut["max_length"]:
            found.append(Advice(f"--max_length {most}", f"{cut['max_length']} cuts {parts}{gone}; {then}"))
        else:
            found.append(Advice("shorten or leave out long rows", f"{cut['max_length']} cuts {parts}{gone}; {then}"))
    if facts["both_thumbs"]:
        found.append(
            Advice(
                "drop or settle the contradictions",
                f"{facts['both_thumbs']:,} texts have thumbs up and thumbs down, first {facts['both_thumbs_at'][0]}",
            )
        )
    if facts["two_bos"]:
        found.append(
            Advice(
                "take the BOS out of the prompts' text, or pass messages",
                f"{facts['two_bos']:,} rows begin with two BOS tokens: one of the text, one of the tokenizer",
            )
        )
    return found


def _objective(facts: Mapping, needs: Needs) -> Advice:
    if facts["pairs"]:
        return Advice("--loss_type dpo", "rows are pairs; bco and the others for thumbs read them too")
    if needs in ("scores", "rewards"):
        loss = "una_score" if needs == "scores" else "una_reward"
        return Advice(f"--loss_type {loss}", "rows have scores, which say more than a thumb")
    if not facts["down"]:
        return Advice("--loss_type sft", "all rows are thumbs up; the other objectives compare them with thumbs down")
    if not facts["up"]:
        return Advice("collect thumbs up", "all rows are thumbs down; every objective needs thumbs up")
    return Advice(
        "--loss_type bco", "rows are thumbs; its shift separates classes whose rewards are both on one side of 0"
    )


def _balance(facts: Mapping) -> list[Advice]:
    if facts["pairs"] or not facts["up"] or not facts["down"]:
        return []
    found, (rarer, name) = [], min((facts["up"], "up"), (facts["down"], "down"))
    if rarer < FEW:
        found.append(
            Advice(f"collect thumbs {name}", f"there are {rarer}; with fewer than {FEW}, accuracy says little")
        )
    if rarer < _SKEW * facts["rows"]:
        why = f"thumbs {name} are {rarer / facts['rows']:.0%} of the rows; this weights them up"
        found.append(Advice("--desirable_weight auto", why))
    if facts["prompts_with_both"] < _LOOSE * facts["prompts"]:
        why = f"{facts['prompts_with_both']:,} of {facts['prompts']:,} prompts have both thumbs, so prompts may tell them apart"
        found.append(Advice("look at the AUC of `bco-fast udm`", why))
    if (lengths := facts["length_auc"]) is not None:
        longer, low, high = lengths
        if abs(longer - 0.5) > _BIASED and not low <= 0.5 <= high:
            side, share = ("up", longer) if longer > 0.5 else ("down", 1 - longer)
            found.append(
                Advice(
                    "watch the lengths in the report",
                    f"thumbs {side} are the longer ones in {share:.0%} of comparisons",
                )
            )
    return found
