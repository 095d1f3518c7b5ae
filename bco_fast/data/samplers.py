"""Which rows meet in a batch: class balance, stratified order, and KTO's mismatched completions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from .dataset import Example, FeedbackDataset
from .sources import FeedbackError
from .tokenize import fit


def oversample(dataset: FeedbackDataset, seed: int = 0) -> FeedbackDataset:
    """The rarer class repeated until both are equally frequent (arXiv 2404.04656, App. C).

    Every row of it is repeated equally often, but for a remainder that is drawn with `seed`. Order is kept, copies come
    last; a dataset of one class is returned as it is.
    """
    classes = [[i for i, e in enumerate(dataset.examples) if e.label is up] for up in (False, True)]
    few, many = sorted(classes, key=len)
    if dataset.paired or not few:
        return dataset
    missing = len(many) - len(few)
    remainder = random.Random(seed).sample(few, missing % len(few))  # noqa: S311 - a draw of rows, not a secret
    copies = few * (missing // len(few)) + sorted(remainder)
    return replace(dataset, examples=[*dataset.examples, *(dataset.examples[i] for i in copies)])


def balancing_weights(labels: Sequence[bool]) -> tuple[float, float]:
    """(λ of thumbs up, λ of thumbs down): n₋/n₊ or n₊/n₋ on the rarer class, so that both weigh the same."""
    up = sum(labels)
    down = len(labels) - up
    if not up or not down:
        return 1.0, 1.0
    return (down / up, 1.0) if up < down else (1.0, up / down)


def mismatched(dataset: FeedbackDataset, *, max_length: int, max_prompt_length: int | None = None) -> FeedbackDataset:
    """Each prompt with the completion of the next row, in the order of their keys, that has a different prompt.

    So the mismatch of a row hangs on the dataset, not on the batch it falls into, and its reference log-probability can
    be cached like any other. Truncated as `tokenize_rows` does.

    Raises:
        FeedbackError: all rows have the same prompt.
    """
    examples = dataset.examples
    order = sorted(range(len(examples)), key=lambda i: examples[i].key)
    prompts = [example.input_ids[: example.completion_start].tobytes() for example in examples]
    if len(set(prompts)) < 2:
        raise FeedbackError("KTO compares with another prompt's completion, and all rows have the same prompt")
    keep_prompt = max_length // 2 if max_prompt_length is None else max_prompt_length
    made: list[Example | None] = [None] * len(examples)
    ahead = 1  # order[place + ahead] is the next row of another prompt; it only moves forward, so this is one pass
    for place, i in enumerate(order):
        ahead = max(ahead - 1, 1)
        while prompts[order[(place + ahead) % len(order)]] == prompts[i]:
            ahead += 1
        other = examples[order[(place + ahead) % len(order)]]
        prompt, (completion,) = fit(
            examples[i].input_ids[: examples[i].completion_start],
            [other.input_ids[other.completion_start :]],
            max_length,
            keep_prompt,
        )
        ids = torch.cat([torch.from_numpy(part) for part in (prompt, completion)]).numpy()
        made[i] = Example(ids, len(prompt), False, 1.0)
    return FeedbackDataset(made)


class StratifiedSampler(torch.utils.data.Sampler):
    """A random order in which any stretch of rows has the classes in the dataset's proportion, to within one row.

    Each class is shuffled, then the two are merged by an error-diffusion walk. The order hangs on (seed, epoch), and
    `set_epoch` is called by the Trainer, so a resumed run sees what an uninterrupted one does.
    """

    def __init__(self, labels: Sequence[bool], seed: int = 0):
        self.labels, self.seed, self.epoch = list(labels), seed, 0

    def __len__(self) -> int:
        return len(self.labels)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")  # noqa: S311 - an order of rows, not a secret
        classes = [[i for i, up in enumerate(self.labels) if up is side] for side in (False, True)]
        for rows in classes:
            rng.shuffle(rows)
        down, up = map(len, classes)
        share = up / max(down + up, 1)
        given, start = 0, rng.random()  # a random phase: else the first row of every epoch would be of one class
        for place in range(1, len(self.labels) + 1):
            due = min(math.floor(place * share + start), up)
            side = due > given or place - given > down
            given += side
            yield classes[side].pop()


class TokenBudgetSampler(torch.utils.data.Sampler):
    """Batches of dataset indices whose tokens stay within a budget.

    `order` is cut into batches once, so their number is the same in every epoch and a run can be resumed; what changes
    from epoch to epoch is the order of the batches, by (seed, epoch). A sequence longer than the budget is a batch of its
    own. The last ones are repeated until the number is a multiple of `ranks`, as every rank must take as many.

    Args:
        lengths: tokens of each item.
        order: indices, in the order in which they may share a batch.
        tokens_per_batch: the budget, > 0.
        padded: count what padding to the longest sequence makes of a batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        order: Iterable[int],
        tokens_per_batch: int,
        *,
        padded: bool = False,
        seed: int = 0,
        ranks: int = 1,
    ):
        self.seed, self.epoch, self.batches = seed, 0, []
        batch: list[int] = []
        longest = total = 0
        for index in order:
            length = lengths[index]
            size = max(longest, length) * (len(batch) + 1) if padded else total + length
            if batch and size > tokens_per_batch:
                self.batches.append(batch)
                batch, longest, total = [], 0, 0
            batch.append(index)
            longest, total = max(longest, length), total + length
        if batch:
            self.batches.append(batch)
        self.batches += self.batches[: -len(self.batches) % ranks]

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        if self.epoch:  # the first epoch keeps the order it was given
            random.Random(f"{self.seed}/{self.epoch}").shuffle(batches)  # noqa: S311 - an order of rows, not a secret
        yield from batches
