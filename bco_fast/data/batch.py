"""The one batch form: what training, evaluation and the reference read, whatever the layout of the tokens.

    input_ids              [B, T] padded on the right, or [1, total] packed
    attention_mask         [B, T], padded batches
    position_ids           [1, total], packed batches: 0 where a sequence begins
    cu_seq_lens_q, _k      [B + 1] int32, packed batches, with max_length_q, _k (numbers): for FlashAttention, which
                           otherwise reads them back from the device in every layer
    rows                   [K] int64, the positions of the flattened hidden states that predict a completion token
    targets                [K] int64, the token that each of them predicts
    cu_completions         [B + 1] int32, completion b is rows[cu_completions[b] : cu_completions[b + 1]]
    label                  [B] bool
    weight, score          [B] float32
    ref_logps              [B] float32, summed over the completion
    ref_token_logps        [K] float32, where the items have them
    counts                 [3] int64: thumbs up, thumbs down, completion tokens of thumbs up; of pairs: pairs, 0, tokens of
                           the chosen completions
    kl_...                 the same form for KTO's mismatched completions

A batch of pairs has all chosen completions first, then all rejected ones. Everything is counted here, on the CPU, so that
nothing on the device has to be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .dataset import Example, Item

MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
"""What the model's own forward reads of a batch."""

Batch = dict[str, Tensor]


def collate(items: Sequence[Item | tuple[Item, Item]], pad_token_id: int = 0, *, packed: bool = False) -> Batch:
    """Items of a `FeedbackDataset` as one batch, in the form described above.

    Args:
        items: examples with what the reference said about them; or pairs of these, chosen first.
        pad_token_id: fills the end of shorter sequences; no completion token can see it.
        packed: lay the sequences end to end instead of padding them.
    """
    paired = not isinstance(items[0][0], Example)
    if paired:
        items = [side for sides in zip(*items, strict=True) for side in sides]
    items = [Item(*item) for item in items]
    examples = [item.example for item in items]
    labels = torch.tensor([example.label for example in examples])
    batch = collate_tokens(examples, pad_token_id, packed=packed) | {
        "label": labels,
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
        "score": torch.tensor([example.score for example in examples], dtype=torch.float32),
        "ref_logps": torch.tensor([item.ref_logps for item in items], dtype=torch.float32),
    }
    up = int(labels.sum())
    lengths = batch["cu_completions"].diff()
    batch["counts"] = torch.tensor([up, 0 if paired else len(items) - up, int(lengths[labels].sum())])
    if items[0].ref_token_logps is not None:
        token_logps = np.concatenate([item.ref_token_logps for item in items])
        batch["ref_token_logps"] = torch.from_numpy(token_logps.astype(np.float32))
    if items[0].mismatched is not None:
        others = [item.mismatched for item in items]
        kl = collate_tokens([other.example for other in others], pad_token_id, packed=packed)
        kl["ref_logps"] = torch.tensor([other.ref_logps for other in others], dtype=torch.float32)
        batch |= {f"kl_{name}": value for name, value in kl.items()}
    return batch


def collate_tokens(examples: Sequence[Example], pad_token_id: int = 0, *, packed: bool = False) -> Batch:
    """The part of a batch that a model needs to give log-probabilities: tokens, rows, targets, cu_completions."""
    lengths = np.array([len(example) for example in examples])
    starts = np.array([example.completion_start for example in examples])
    cu_lengths = _cumulative(lengths)
    if packed:
        batch = _packed(examples, cu_lengths, int(lengths.max()))
        offsets = cu_lengths[:-1]
    else:
        batch = _padded(examples, pad_token_id)
        offsets = np.arange(len(examples)) * int(lengths.max())
    places = [np.arange(o + s - 1, o + n - 1) for o, s, n in zip(offsets, starts, lengths, strict=True)]
    batch["rows"] = torch.from_numpy(np.concatenate(places))
    targets = np.concatenate([example.input_ids[example.completion_start :] for example in examples])
    batch["targets"] = torch.from_numpy(targets.astype(np.int64))
    batch["cu_completions"] = torch.from_numpy(_cumulative(lengths - starts).astype(np.int32))
    return batch


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _padded(examples: Sequence[Example], pad_token_id: int) -> Batch:
    shape = len(examples), max(map(len, examples))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention = np.zeros(shape, dtype=np.int64)
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = example.input_ids
        attention[i, : len(example)] = 1
    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(attention)}


def _packed(examples: Sequence[Example], cu_lengths: np.ndarray, longest: int) -> Batch:
    ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    cu = torch.from_numpy(cu_lengths.astype(np.int32))
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(len(example)) for example in examples]))[None],
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
        "max_length_q": longest,
        "max_length_k": longest,
    }


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
