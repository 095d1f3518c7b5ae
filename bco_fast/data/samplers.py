"""Which rows share a batch: class balance, stratified order, token budgets, and KTO's mismatched completions."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from .batch import Layout, layout_tokens
from .dataset import Example, FeedbackDataset
from .sources import FeedbackError
from .tokenize import fit, prompt_limit


def oversample(dataset: FeedbackDataset, seed: int = 0) -> FeedbackDataset:
    """The rarer class repeated until both are equally frequent (arXiv 2404.04656, App. C).

    Every row of that class is repeated equally often, except for a remainder drawn with `seed`. The order is kept and
    copies come last. A dataset of one class is returned unchanged.
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

    The mismatch of a row depends on the dataset, not on the batch, so its reference log-probability can be cached like
    any other. Truncation is that of `tokenize_rows`.

    Raises:
        FeedbackError: all rows have the same prompt.
    """
    examples = dataset.examples
    order = sorted(range(len(examples)), key=lambda i: examples[i].key)
    prompts = [example.input_ids[: example.completion_start].tobytes() for example in examples]
    if len(set(prompts)) < 2:
        raise FeedbackError("KTO compares with another prompt's completion, and all rows have the same prompt")
    keep_prompt = prompt_limit(max_length, max_prompt_length)
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

    Each class is shuffled, then the two are merged by error diffusion. The order depends on (seed, epoch) alone, and the
    Trainer calls `set_epoch`, so a resumed run sees the rows of an uninterrupted one.
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


class GroupedSampler(torch.utils.data.Sampler):
    """A random order of prompts in which the items of one prompt follow one another, so that a batch can share it.

    The order depends on (seed, epoch) alone, and the Trainer calls `set_epoch`.

    Args:
        groups: of each item, what it shares with others of its group.
    """

    def __init__(self, groups: Sequence[Hashable], seed: int = 0):
        self.members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups):
            self.members.setdefault(group, []).append(index)
        self.size, self.seed, self.epoch = len(groups), seed, 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")  # noqa: S311 - an order of rows, not a secret
        groups = list(self.members.values())
        rng.shuffle(groups)
        for group in groups:
            yield from rng.sample(group, len(group))


def token_batches(
    items: Sequence[Sequence[Example]], order: Iterable[int], tokens_per_batch: int, *, layout: Layout = "padded"
) -> Iterator[list[int]]:
    """Cut `order` into batches of at most so many tokens; a longer item is a batch by itself.

    Args:
        items: the examples of each item: one, or the two sides of a pair.
        order: indices of the items, in the order in which they may share a batch.
        layout: of the batches, which decides what a batch takes (`data.batch`).
    """
    batch: list[int] = []
    members: list[Example] = []
    longest = total = 0
    prompts: set[bytes] = set()
    for index in order:
        sides = items[index]
        if sides[0].group:  # a turn may cost nothing beside a later one of its chat
            size = layout_tokens([*members, *sides], layout)
        elif layout == "shared":
            fresh = {side.prompt_key: side.completion_start for side in sides if side.prompt_key not in prompts}
            size = total + sum(fresh.values()) + sum(len(side) - side.completion_start for side in sides)
        elif layout == "packed":
            size = total + sum(map(len, sides))
        else:
            size = max(longest, *map(len, sides)) * (len(members) + len(sides))
        if batch and size > tokens_per_batch:
            yield batch
            batch, members, longest, prompts = [], [], 0, set()
            size = layout_tokens(sides, layout)
        batch.append(index)
        members += sides
        longest, total = max(longest, *map(len, sides)), size
        prompts.update(side.prompt_key for side in sides)
    if batch:
        yield batch


class TokenBudgetSampler(torch.utils.data.Sampler):
    """Batches of dataset indices whose tokens stay within a budget (`token_batches`).

    `order` is cut into batches once, so every epoch has the same number of them and a run can be resumed. Later epochs
    shuffle the batches by (seed, epoch).

    Args:
        items, order, tokens_per_batch, layout: see `token_batches`.
    """

    def __init__(
        self,
        items: Sequence[Sequence[Example]],
        order: Iterable[int],
        tokens_per_batch: int,
        *,
        layout: Layout = "padded",
        seed: int = 0,
    ):
        self.seed, self.epoch = seed, 0
        self.batches = list(token_batches(items, order, tokens_per_batch, layout=layout))

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        if self.epoch:  # the first epoch keeps the order it was given
            random.Random(f"{self.seed}/{self.epoch}").shuffle(batches)  # noqa: S311 - an order of rows, not a secret
        yield from batches


class RankBatches(torch.utils.data.Sampler):
    """One rank's share of a sequence of batches: batch i belongs to rank i % ranks.

    All ranks yield equally many. A rank for which no batch is left at the end yields an empty one, of which the trainer
    makes a batch that counts for nothing (`data.batch.placeholder`). So no row is repeated, and rows are the same on any
    number of ranks. accelerate's own sharding repeats rows instead, and does not pass `set_epoch` on.

    Args:
        batches: a batch sampler; it yields the same on every rank.
        drop_last: leave out the last batches if they are too few for all ranks.
    """

    def __init__(self, batches, rank: int, ranks: int, *, drop_last: bool = False):
        self.batches, self.rank, self.ranks, self.drop_last = batches, rank, ranks, drop_last

    def __len__(self) -> int:
        return (len(self.batches) if self.drop_last else len(self.batches) + self.ranks - 1) // self.ranks

    def set_epoch(self, epoch: int) -> None:
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        turn: list[list[int]] = []
        for batch in self.batches:
            turn.append(batch)
            if len(turn) == self.ranks:
                yield turn[self.rank]
                turn = []
        if turn and not self.drop_last:
            yield turn[self.rank] if self.rank < len(turn) else []
