"""The one batch form: what training, evaluation and the reference read, whatever the layout of the tokens.

    input_ids              [B, T] padded on the right; [1, total] packed or shared
    attention_mask         [B, T], padded batches
    position_ids           [1, total], packed and shared batches: 0 where a sequence begins; a completion's first token
                           follows its prompt's last one
    segments               packed and shared batches: runs of tokens and what they continue (`Segment`)
    cu_seq_lens_q, _k      [B + 1] int32, packed batches, with max_length_q, _k (numbers): for FlashAttention, which
                           otherwise reads them back from the device in every layer
    rows                   [K] int64, the positions of the flattened hidden states that predict a completion token; the
                           last token of a shared prompt occurs once for each of its completions
    targets                [K] int64, the token that each of them predicts
    cu_completions         [B + 1] int32, completion b is rows[cu_completions[b] : cu_completions[b + 1]]
    label                  [B] bool
    weight, score          [B] float32
    ref_logps              [B] float32, summed over the completion
    index                  [B] int64, number of the row or pair in the dataset
    ref_token_logps        [K] float32, where the items have them
    counts                 [3] int64: thumbs up, thumbs down, completion tokens of thumbs up; of pairs: pairs, 0, tokens of
                           the chosen completions
    kl_...                 the same form for KTO's mismatched completions; `collate(continued=True)` leaves out their prompts
                           where the batch has them
    placeholder            True in a batch that counts for nothing; otherwise absent

Shared batches hold every prompt once, however many of its completions are in the batch: prompt, y1, y2, next prompt, ...
In every layout, a judged turn of a chat is computed within a later turn of the same chat that begins with its tokens.

A batch of pairs has all chosen completions first, then all rejected ones. Everything is counted here, on the CPU, so that
nothing on the device has to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dataset import Example, Item

Layout = Literal["padded", "packed", "shared"]

Batch = dict[str, Tensor]


class Segment(NamedTuple):
    """A run of tokens [start, stop), and the tokens [start, stop) that it continues, if any: of its own row, or of the row
    that `Segments.continues`."""

    start: int
    stop: int
    prompt: tuple[int, int] | None = None


@dataclass
class Segments:
    """The runs that make up a row of tokens, in order. They stay on the host, whatever moves the batch."""

    parts: tuple[Segment, ...]
    continues: Segments | None = None
    """Of the row, computed before this one, whose tokens these runs continue; None: of this row."""
    continued: bool = False
    """Another row continues this one."""
    visits: list[int | None] = field(default_factory=list, compare=False)
    """The layers whose attention has read them; see `training.sharing`."""
    kept: dict[object, tuple[Tensor, Tensor]] | None = field(default=None, compare=False, repr=False)
    """Of a row that is continued, its keys and values in each attention layer, until that other row is computed."""


def collate(
    items: Sequence[Item | tuple[Item, Item]],
    pad_token_id: int = 0,
    *,
    layout: Layout = "padded",
    continued: bool = False,
) -> Batch:
    """Items of a `FeedbackDataset` as one batch, in the form described above.

    Args:
        items: examples with what the reference said about them; or pairs of these, chosen first.
        pad_token_id: fills the end of shorter sequences; no completion token can see it.
        layout: pad sequences to one length; or lay them end to end ("packed"), every prompt once ("shared").
        continued: of a shared batch, KTO's mismatched completions continue the prompts of the batch, with the keys and
            values that its forward pass leaves behind. They can only be computed after it and before its backward.
    """
    paired = not isinstance(items[0][0], Example)
    if paired:
        items = [side for sides in zip(*items, strict=True) for side in sides]
    items = [Item(*item) for item in items]
    examples = [item.example for item in items]
    labels = torch.tensor([example.label for example in examples])
    batch = collate_tokens(examples, pad_token_id, layout=layout) | {
        "label": labels,
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
        "score": torch.tensor([example.score for example in examples], dtype=torch.float32),
        "ref_logps": torch.tensor([item.ref_logps for item in items], dtype=torch.float32),
        "index": torch.tensor([item.index for item in items]),
    }
    up = int(labels.sum())
    lengths = batch["cu_completions"].diff()
    batch["counts"] = torch.tensor([up, 0 if paired else len(items) - up, int(lengths[labels].sum())])
    if items[0].ref_token_logps is not None:
        token_logps = np.concatenate([item.ref_token_logps for item in items])
        batch["ref_token_logps"] = torch.from_numpy(token_logps.astype(np.float32))
    if items[0].mismatched is not None:
        others = [item.mismatched.example for item in items]
        if continued and layout == "shared":
            kl = _continuing(batch, examples, others)
        else:
            kl = collate_tokens(others, pad_token_id, layout=layout)
        kl["ref_logps"] = torch.tensor([item.mismatched.ref_logps for item in items], dtype=torch.float32)
        batch |= {f"kl_{name}": value for name, value in kl.items()}
    return batch


def placeholder(batch: Batch) -> Batch:
    """A batch that counts for nothing, for a rank without rows: it runs forward and backward, and adds zeros."""
    nothing = {name: torch.zeros_like(batch[name]) for name in ("weight", "counts") if name in batch}
    return batch | nothing | {"placeholder": True}


def collate_tokens(examples: Sequence[Example], pad_token_id: int = 0, *, layout: Layout = "padded") -> Batch:
    """The part of a batch that a model needs to give log-probabilities: tokens, rows, targets, cu_completions."""
    host = hosts(examples)
    kept = sorted(set(host))
    batch, positions = _LAYOUTS[layout]([examples[i] for i in kept], pad_token_id)
    at = dict(zip(kept, positions, strict=True))
    places = [at[h][e.completion_start - 1 : len(e) - 1] for h, e in zip(host, examples, strict=True)]
    return batch | _predictions(examples, places)


def _predictions(examples: Sequence[Example], places: Sequence[np.ndarray]) -> Batch:
    """Which positions predict which tokens of the completions."""
    targets = np.concatenate([example.input_ids[example.completion_start :] for example in examples])
    return {
        "rows": torch.from_numpy(np.concatenate(places)),
        "targets": torch.from_numpy(targets.astype(np.int64)),
        "cu_completions": torch.from_numpy(_cumulative([len(place) for place in places]).astype(np.int32)),
    }


def hosts(examples: Sequence[Example]) -> list[int]:
    """For each example the index of the one whose tokens hold its own: itself, or the longest turn of its chat that begins
    with it. Attention is causal, so one pass over that turn gives the log-probabilities of both."""
    host, chats = list(range(len(examples))), {}
    for i, example in enumerate(examples):
        if example.group:
            chats.setdefault(example.group, []).append(i)
    for members in chats.values():
        members.sort(key=lambda i: -len(examples[i]))
        for place, i in enumerate(members):
            ids = examples[i].input_ids
            longer = (
                h for h in members[:place] if host[h] == h and np.array_equal(examples[h].input_ids[: len(ids)], ids)
            )
            host[i] = next(longer, i)
    return host


def _cumulative(lengths: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


# Each layout returns the batch's tokens and, for each example, the positions of its tokens in the flattened row.


def _padded(examples: Sequence[Example], pad_token_id: int) -> tuple[Batch, list[np.ndarray]]:
    shape = len(examples), max(map(len, examples))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention = np.zeros(shape, dtype=np.int64)
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = example.input_ids
        attention[i, : len(example)] = 1
    positions = [i * shape[1] + np.arange(len(example)) for i, example in enumerate(examples)]
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention)}, positions


def _packed(examples: Sequence[Example], pad_token_id: int) -> tuple[Batch, list[np.ndarray]]:
    cu = torch.from_numpy(_cumulative([len(example) for example in examples]).astype(np.int32))
    longest = max(map(len, examples))
    row = _Row()
    positions = [row.add(example.input_ids) for example in examples]
    lengths = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
    return row.batch() | lengths, positions


def _shared(examples: Sequence[Example], pad_token_id: int) -> tuple[Batch, list[np.ndarray]]:
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.prompt_key, []).append(i)
    row = _Row()
    positions: list[np.ndarray] = [np.empty(0)] * len(examples)
    for members in groups.values():
        first, length = examples[members[0]].input_ids, examples[members[0]].completion_start
        if len(members) == 1:  # nothing is shared, so prompt and completion are one run
            positions[members[0]] = row.add(first)
            continue
        prompt = row.add(first[:length])
        for i in members:
            completion = row.add(examples[i].input_ids[length:], length, (int(prompt[0]), int(prompt[-1]) + 1))
            positions[i] = np.concatenate([prompt, completion])
    return row.batch(), positions


def _continuing(batch: Batch, examples: Sequence[Example], others: Sequence[Example]) -> Batch:
    """Other completions of the same prompts, without the prompts: of each, the last token alone is computed again, because
    it predicts the first token of the completion. A prompt that was cut differently, or that a judged turn of a chat does
    not have in one run, is computed whole."""
    row, places = _Row(), []
    batch["segments"].continued = True
    position_ids = batch["position_ids"][0].numpy()
    ends = batch["rows"][batch["cu_completions"][:-1].long()].numpy() + 1
    for example, other, end in zip(examples, others, ends.tolist(), strict=True):
        length = example.completion_start
        in_one_run = np.array_equal(position_ids[end - length : end], np.arange(length))
        if in_one_run and other.prompt_key == example.prompt_key:
            place = row.add(other.input_ids[length - 1 :], length - 1, (end - length, end - 1))
        else:
            place = row.add(other.input_ids)[other.completion_start - 1 :]
        places.append(place[:-1])
    return row.batch(continues=batch["segments"]) | _predictions(others, places)


_LAYOUTS = {"padded": _padded, "packed": _packed, "shared": _shared}


class _Row:
    """A row of tokens in the making."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.offsets: list[np.ndarray] = []
        self.parts: list[Segment] = []

    def add(self, tokens: np.ndarray, offset: int = 0, prompt: tuple[int, int] | None = None) -> np.ndarray:
        """One run, whose first token has this position in its sequence; -> places in the row."""
        start = self.parts[-1].stop if self.parts else 0
        self.ids.append(tokens)
        self.offsets.append(np.arange(offset, offset + len(tokens)))
        self.parts.append(Segment(start, start + len(tokens), prompt))
        return np.arange(start, start + len(tokens))

    def batch(self, continues: Segments | None = None) -> Batch:
        return {
            "input_ids": torch.from_numpy(np.concatenate(self.ids).astype(np.int64))[None],
            "position_ids": torch.from_numpy(np.concatenate(self.offsets).astype(np.int64))[None],
            "segments": Segments(tuple(self.parts), continues),
        }


def layout_tokens(examples: Iterable[Example], layout: Layout) -> int:
    """Tokens that the model runs over when these examples are one batch of that layout."""
    examples = list(examples)
    kept = [examples[i] for i in sorted(set(hosts(examples)))]
    if layout == "padded":
        return len(kept) * max(map(len, kept))
    if layout == "packed":
        return sum(map(len, kept))
    prompts = {example.prompt_key: example.completion_start for example in kept}
    return sum(prompts.values()) + sum(len(example) - example.completion_start for example in kept)


def continued(batch: Mapping[str, Tensor]) -> bool:
    """Whether mismatched completions need what the forward pass on this batch leaves behind."""
    return "segments" in batch and batch["segments"].continued


def mismatched_batch(batch: Mapping[str, Tensor]) -> Batch:
    """KTO's mismatched completions of a batch, under the names that any batch has."""
    return {name.removeprefix("kl_"): value for name, value in batch.items() if name.startswith("kl_")}


def to_device(batch: Mapping[str, Tensor], device: torch.device | str, names: Iterable[str] | None = None) -> Batch:
    """The batch, or the named part of it, on a device; numbers stay numbers."""
    chosen = batch if names is None else {name: batch[name] for name in names if name in batch}
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in chosen.items()
    }
