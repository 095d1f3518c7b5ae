"""Two files of completions compared by a reward or a chat model: win rate with its interval, and the lengths behind it.

The completion of a prompt in A wins against the one in B if its reward is higher; equal rewards are half a win (BCO, arXiv
2404.04656, Table 2; BNF, arXiv 2410.04834, Table 5, with a reward in place of GPT-4). Files are AlpacaEval's, Arena-Hard's
or JSONL, in any combination. Completions are matched by question_id if all have one, else by the prompt; the k-th
completion of a prompt meets the k-th. A prompt is a text, or chat messages, as `generate` writes them.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ..data.prompts import Prompt, id_of, is_chat, prompt_of
from ..data.sources import RowError, as_record, open_source, shortened
from ..online.rewards import Reward, RewardError, score
from .endpoint import PairwiseJudge
from .length_control import length_controlled_win_rate

logger = logging.getLogger("bco_fast")

RESAMPLES = 10_000
OWN = ("prompt", "instruction", "turns", "completion", "output", "choices", "messages")
"""Columns that are read here; the others go to the reward."""


class JudgeError(ValueError):
    """Files that cannot be compared; names the file, the record and the reason."""


@dataclass(frozen=True)
class Answer:
    completion: str
    prompt: Prompt | None
    id: str | int | None
    where: str
    columns: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Lengths:
    """Means over the compared completions; tokens is None without a tokenizer."""

    characters: float
    words: float
    tokens: float | None


@dataclass(frozen=True)
class Verdict:
    """A against B.

    Attributes:
        compared: pairs of completions, of `prompts` prompts.
        wins, ties, losses: a chat model judges both orders; disagreement is a tie, a win and a tie are a win.
        only_in_a, only_in_b: completions without a counterpart; they are not counted.
        win_rate: (wins + ties / 2) / compared; `low` and `high` are its 95 % percentile bootstrap over prompts.
        lc_win_rate: the length-controlled win rate, by characters; see `length_control`. With the prompts' difficulty if all
            records of A have a column `difficulty`.
        reward_a, reward_b: means; None where a chat model judges.
        unclear: answers of a chat model without a verdict, which count as ties.
        length_unit: of the correlation: tokens, or words without a tokenizer.
        length_correlation: Pearson's r between the win (1, 1/2, 0) and length of A minus length of B; None if either is
            constant.
        win_rate_when_longer, win_rate_when_shorter: over the pairs in which A's completion is longer or shorter; None
            without such a pair.
    """

    compared: int
    prompts: int
    only_in_a: int
    only_in_b: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float
    lc_win_rate: float
    reward_a: float | None
    reward_b: float | None
    unclear: int
    lengths_a: Lengths
    lengths_b: Lengths
    length_unit: str
    length_correlation: float | None
    win_rate_when_longer: float | None
    win_rate_when_shorter: float | None
    seed: int
    resamples: int


def read_answers(path: str | os.PathLike) -> list[Answer]:
    """Completions of an AlpacaEval, Arena-Hard or JSONL file; its columns tell which.

    Raises:
        FeedbackError: the file cannot be read. JudgeError: a record without a completion, or no record.
    """
    answers = []
    for where, record in open_source(path).records:
        try:
            record = as_record(record)
            columns = {name: value for name, value in record.items() if name not in OWN}
            answers.append(Answer(_completion_of(record), prompt_of(record)[1], id_of(record), where, columns))
        except RowError as error:
            raise JudgeError(f"{where}: {error}") from None
    if not answers:
        raise JudgeError(f"{path}: no record")
    return answers


def _completion_of(record: Mapping) -> str:
    if "choices" in record:
        try:
            turns = record["choices"][0]["turns"]
            completion = turns[0]["content"] if isinstance(turns[0], dict) else turns[0]
        except (LookupError, TypeError):
            raise RowError("choices must be [{index, turns: [{content}]}]") from None
        if len(record["choices"]) != 1 or len(turns) != 1:
            raise RowError(
                f"{len(record['choices'])} choices of {len(turns)} turns; one choice of one turn is compared"
            )
    else:
        name = next((name for name in ("completion", "output") if name in record), None)
        if name is None:
            raise RowError(f"none of completion, output, choices (found: {shortened(record)})")
        completion = record[name]
        if isinstance(completion, list) and len(completion) == 1:  # WildBench's
            (completion,) = completion
    if not isinstance(completion, str):
        raise RowError(f"the completion must be a string, not {type(completion).__name__}")
    return completion


def match(a: Sequence[Answer], b: Sequence[Answer], prompts: dict | None = None) -> list[tuple[Prompt, Answer, Answer]]:
    """(prompt, answer of A, answer of B), in the order of A. Prompts are all texts or all chats.

    A chat of one user's message is the same prompt as that message's text: where the files differ in this, a warning says
    so, and the text counts.

    Args:
        prompts: question_id -> prompt, for files that do not hold them (Arena-Hard's).

    Raises:
        JudgeError: the files share neither ids nor prompts, a prompt is unknown, or one file has chats of several messages
            and the other texts.
    """
    prompts = prompts or {}

    def prompt(*answers: Answer) -> Prompt:
        known = (prompts.get(answer.id) if answer.prompt is None else answer.prompt for answer in answers)
        found = next((prompt for prompt in known if prompt is not None), None)
        if found is None:
            raise JudgeError(f"{answers[0].where} has no prompt; --prompts FILE gives the prompts of question_ids")
        return found

    by_id = all(answer.id is not None for answer in (*a, *b))
    key = (lambda answer: answer.id) if by_id else (lambda answer: _identity(prompt(answer)))
    waiting = defaultdict(list)
    for answer in reversed(b):
        waiting[key(answer)].append(answer)
    pairs = [(answer, waiting[key(answer)].pop()) for answer in a if waiting.get(key(answer))]
    if not pairs:
        raise JudgeError("the two files have no prompt in common")
    asked = [prompt(*pair) for pair in pairs]
    if _forms_differ(pairs) or not all(map(is_chat, asked)):
        asked = [_text_of(found, ours) for found, (ours, _) in zip(asked, pairs, strict=True)]
    return [(found, *pair) for found, pair in zip(asked, pairs, strict=True)]


def _identity(prompt: Prompt) -> str:
    """Equal for prompts that ask the same."""
    if not is_chat(prompt):
        return prompt
    alone = len(prompt) == 1 and prompt[0]["role"] == "user"
    return prompt[0]["content"] if alone else json.dumps(prompt, sort_keys=True)


def _text_of(prompt: Prompt, answer: Answer) -> str:
    if is_chat(prompt) and (len(prompt) > 1 or prompt[0]["role"] != "user"):
        raise JudgeError(f"{answer.where}: the prompt is a chat of several messages, and other prompts are texts")
    return prompt[0]["content"] if is_chat(prompt) else prompt


def _forms_differ(pairs: Sequence[tuple[Answer, Answer]]) -> bool:
    """Whether one side holds chats and the other texts; warns of it."""
    forms = [
        {is_chat(answer.prompt) for answer in side if answer.prompt is not None} for side in zip(*pairs, strict=True)
    ]
    differ = bool(forms[0] and forms[1] and forms[0] != forms[1])
    if differ:
        chats, texts = ("A", "B") if True in forms[0] else ("B", "A")
        logger.warning(
            "the model of %s was asked by chat messages and that of %s by text: the difference may be that of the chat template",
            chats, texts,
        )  # fmt: skip
    return differ


def win_rate_interval(
    wins: np.ndarray,  # [pairs] 1, 1/2 or 0
    groups: Sequence,  # [pairs] the prompt of each
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean win. Prompts are drawn with replacement, each with all its pairs."""
    numbers: dict = {}
    index = [numbers.setdefault(group, len(numbers)) for group in groups]
    total, count = np.bincount(index, weights=wins), np.bincount(index)
    rng = np.random.default_rng(seed)
    rates = []
    step = max(1, 2_000_000 // len(total))  # draws held at a time
    for start in range(0, resamples, step):
        drawn = rng.integers(len(total), size=(min(step, resamples - start), len(total)))
        rates.append(total[drawn].sum(1) / count[drawn].sum(1))
    low, high = np.percentile(np.concatenate(rates), [2.5, 97.5])
    return float(low), float(high)


def judge(
    a: Sequence[Answer],
    b: Sequence[Answer],
    reward: Reward | PairwiseJudge,
    *,
    prompts: dict | None = None,
    count_tokens: Callable[[str], int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Verdict:
    """Compare A with B.

    Args:
        reward: called once for A's completions and once for B's, with the columns that every compared record of the
            file has; or a judge of pairs.
        prompts: as in `match`.
        count_tokens: for the lengths in tokens.
        resamples, seed: of the bootstrap.

    Raises:
        JudgeError: of `match`. RewardError: of `score`; says whose completions. EndpointError: of the judge of pairs.
    """
    if resamples < 1:
        raise JudgeError(f"resamples must be at least 1, not {resamples}")
    if seed < 0:
        raise JudgeError(f"seed must be >= 0, not {seed}")
    matched = match(a, b, prompts)
    asked = [prompt for prompt, _, _ in matched]
    texts = [_identity(prompt) for prompt in asked]
    sides = [ours for _, ours, _ in matched], [theirs for _, _, theirs in matched]
    rewards = [None, None]
    if isinstance(reward, PairwiseJudge):
        wins = reward.wins(
            [_transcript(prompt) for prompt in asked], *([answer.completion for answer in answers] for answers in sides)
        )
    else:
        scores = [
            np.array(_score(reward, asked, answers, side)) for answers, side in zip(sides, ("A", "B"), strict=True)
        ]
        wins, rewards = (np.sign(scores[0] - scores[1]) + 1) / 2, [float(score.mean()) for score in scores]
    low, high = win_rate_interval(wins, texts, resamples=resamples, seed=seed)
    sizes = [_sizes([answer.completion for answer in answers], count_tokens) for answers in sides]
    unit = "tokens" if count_tokens is not None else "words"
    difference = sizes[0][unit] - sizes[1][unit]
    return Verdict(
        compared=len(matched),
        prompts=len(set(texts)),
        only_in_a=len(a) - len(matched),
        only_in_b=len(b) - len(matched),
        wins=int((wins > 0.5).sum()),
        ties=int((wins == 0.5).sum()),
        losses=int((wins < 0.5).sum()),
        win_rate=float(wins.mean()),
        low=low,
        high=high,
        lc_win_rate=length_controlled_win_rate(
            wins, sizes[0]["characters"], sizes[1]["characters"], _difficulty(sides[0])
        ),
        reward_a=rewards[0],
        reward_b=rewards[1],
        unclear=getattr(reward, "unclear", 0),
        lengths_a=_means(sizes[0]),
        lengths_b=_means(sizes[1]),
        length_unit=unit,
        length_correlation=_correlation(wins, difference),
        win_rate_when_longer=_mean(wins[difference > 0]),
        win_rate_when_shorter=_mean(wins[difference < 0]),
        seed=seed,
        resamples=resamples,
    )


def _difficulty(answers: list[Answer]) -> np.ndarray | None:
    found = [answer.columns.get("difficulty") for answer in answers]
    return np.array(found, dtype=float) if all(isinstance(value, (int, float)) for value in found) else None


def _transcript(prompt: Prompt) -> str:
    """A prompt as a judge of pairs reads it; of a chat with more than a question, each message under its role."""
    asked = _identity(prompt)
    if not is_chat(prompt) or asked == prompt[0]["content"]:
        return asked
    return "\n\n".join(f"[{message['role']}]\n{message.get('content', '')}" for message in prompt)


def _score(reward: Reward, prompts: list[Prompt], answers: list[Answer], side: str) -> list[float]:
    shared = Counter(name for answer in answers for name in answer.columns)
    names = [name for name, times in shared.items() if times == len(answers) and name not in ("prompts", "completions")]
    columns = {name: [answer.columns[name] for answer in answers] for name in names}
    completions = [answer.completion for answer in answers]
    if is_chat(prompts[0]):  # TRL's format of conversations
        completions = [[{"role": "assistant", "content": completion}] for completion in completions]
    try:
        return score(reward, prompts, completions, **columns)
    except RewardError as error:
        raise RewardError(f"completions of {side}: {error}") from error


def _sizes(completions: list[str], count_tokens: Callable[[str], int] | None) -> dict[str, np.ndarray]:
    measures = {"characters": len, "words": lambda text: len(text.split())}
    measures |= {} if count_tokens is None else {"tokens": count_tokens}
    return {name: np.array([measure(text) for text in completions], dtype=float) for name, measure in measures.items()}


def _means(sizes: dict[str, np.ndarray]) -> Lengths:
    return Lengths(**{name: _mean(sizes.get(name, [])) for name in ("characters", "words", "tokens")})


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _correlation(wins: np.ndarray, difference: np.ndarray) -> float | None:
    if np.ptp(wins) == 0 or np.ptp(difference) == 0:
        return None
    return float(np.clip(np.corrcoef(wins, difference)[0, 1], -1, 1))


def as_summary(verdict: Verdict) -> dict:
    def rounded(value):
        if isinstance(value, dict):
            return {name: rounded(x) for name, x in value.items()}
        return round(value, 6) if isinstance(value, float) and math.isfinite(value) else value

    return rounded(asdict(verdict))


def describe(verdict: Verdict, names: tuple[str, str] = ("A", "B")) -> str:
    """The verdict as a table, and one line about length."""
    v = verdict
    a, b = v.lengths_a, v.lengths_b
    means = {"tokens": (a.tokens, b.tokens), "words": (a.words, b.words), "characters": (a.characters, b.characters)}
    rows = [
        ("", *names),
        ("wins", f"{v.wins}", f"{v.losses}"),
        ("win rate, ties half", f"{v.win_rate:.1%}", f"{1 - v.win_rate:.1%}"),
        ("  95 % interval", f"{v.low:.1%} - {v.high:.1%}", f"{1 - v.high:.1%} - {1 - v.low:.1%}"),
        ("length-controlled", f"{v.lc_win_rate:.1%}", f"{1 - v.lc_win_rate:.1%}"),
        *([] if v.reward_a is None else [("mean reward", f"{v.reward_a:.4g}", f"{v.reward_b:.4g}")]),
        *((f"mean {unit}", f"{x:.1f}", f"{y:.1f}") for unit, (x, y) in means.items() if x is not None),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in rows]
    lines.append(
        f"{v.compared} pairs of {v.prompts} prompts, {v.ties} ties; interval: {v.resamples} resamples of prompts"
    )
    return "\n".join([*lines, _length_note(v)])


def _length_note(v: Verdict) -> str:
    if v.length_correlation is None:
        return "length: wins or lengths do not vary, so there is no correlation"
    rates = (v.win_rate_when_longer, v.win_rate_when_shorter)
    longer, shorter = ("no such pair" if rate is None else f"{rate:.1%}" for rate in rates)
    return (
        f"length: win and difference in {v.length_unit} correlate with r = {v.length_correlation:+.2f}; win rate where A is "
        f"longer {longer}, where it is shorter {shorter}"
    )
