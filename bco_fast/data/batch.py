"""Feedback as tokens, and tokens as batches. What may stand in a file: `rows` and docs/feedback.md.

    strings   tok(prompt) + tok(completion, no special tokens) + EOS
    chats     the tokenizer's chat template, see `chat`

Keys of the reference cache rest on these ids. A row longer than `max_length` first loses the beginning of its prompt
down to `max_prompt_length` tokens, then the end of its completion (and with it the EOS); both are counted and reported,
never silent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..losses.sequence import sequence_logps
from .dataset import Example, Item

IGNORE = -100


def collate(items: Sequence[Item | tuple[Item, Item]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """A right-padded batch; of pairs, all chosen completions and then all rejected ones.

    Returns:
        input_ids, attention_mask [B, T]; targets [B, T], the token that each position predicts, -100 for prompt and
        padding; label [B] bool; weight, score, ref_logps [B] float32. Where the items have them, ref_token_logps [B, T]
        float32, 0 where nothing is asked; and kl_input_ids, kl_attention_mask, kl_targets, kl_ref_logps of the
        mismatched completions.
    """
    if not isinstance(items[0][0], Example):
        items = [side for sides in zip(*items, strict=True) for side in sides]
    items = [Item(*item) for item in items]
    examples = [item.example for item in items]
    width = max(map(len, examples))
    input_ids = np.full((len(items), width), pad_token_id, dtype=np.int64)
    attention = np.zeros((len(items), width), dtype=np.int64)
    targets = np.full((len(items), width), IGNORE, dtype=np.int64)
    ref_tokens = np.zeros((len(items), width), dtype=np.float32)
    for i, (example, _, ref_token_logps, _) in enumerate(items):
        length, start = len(example), example.completion_start
        input_ids[i, :length] = example.input_ids
        attention[i, :length] = 1
        targets[i, start - 1 : length - 1] = example.input_ids[start:]
        if ref_token_logps is not None:
            ref_tokens[i, start - 1 : length - 1] = ref_token_logps
    batch = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention),
        "targets": torch.from_numpy(targets),
        "label": torch.tensor([example.label for example in examples]),
        "weight": torch.tensor([example.weight for example in examples], dtype=torch.float32),
        "score": torch.tensor([example.score for example in examples], dtype=torch.float32),
        "ref_logps": torch.tensor([item.ref_logps for item in items], dtype=torch.float32),
    }
    if items[0].ref_token_logps is not None:
        batch["ref_token_logps"] = torch.from_numpy(ref_tokens)
    if items[0].mismatched is not None:
        kl = collate([item.mismatched for item in items], pad_token_id)
        batch |= {f"kl_{name}": kl[name] for name in ("input_ids", "attention_mask", "targets", "ref_logps")}
    return batch


_PER_TOKEN = ("input_ids", "targets", "ref_token_logps")


def collate_packed(items: Sequence[Item | tuple[Item, Item]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """`collate` without its padding: one row of all sequences, told apart by their positions.

    Returns:
        input_ids, targets and ref_token_logps [1, total]; position_ids [1, total], 0 where a sequence begins (attention
        masks and FlashAttention's sequence lengths follow from them); cu_seqlens [B + 1] int32; the rest as `collate`.
        Mismatched completions are packed likewise, under their `kl_` names.
    """
    batch = collate(items, pad_token_id)
    packed = _pack({name: tensor for name, tensor in batch.items() if not name.startswith("kl_")})
    kl = {name[3:]: tensor for name, tensor in batch.items() if name.startswith("kl_")}
    return packed | ({f"kl_{name}": tensor for name, tensor in _pack(kl).items()} if kl else {})


def _pack(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    inside = batch["attention_mask"].bool()
    lengths = inside.sum(1)
    packed = {name: tensor for name, tensor in batch.items() if name not in (*_PER_TOKEN, "attention_mask")}
    packed |= {name: batch[name][inside][None] for name in _PER_TOKEN if name in batch}
    packed["position_ids"] = torch.arange(inside.shape[1]).expand_as(inside)[inside][None]
    packed["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    return packed


def sequence_sums(token_logps: Tensor, batch: Mapping[str, Tensor]) -> Tensor:  # [B]
    """Summed log-probability of each completion of a padded or packed batch."""
    if "cu_seqlens" in batch:
        return sequence_logps(token_logps[0], cu_seqlens=batch["cu_seqlens"])
    return sequence_logps(token_logps)


def completion_lengths(batch: Mapping[str, Tensor]) -> Tensor:  # [B] int64
    """Completion tokens of each sequence of a padded or packed batch."""
    asked = batch["targets"] >= 0
    if "cu_seqlens" not in batch:
        return asked.sum(1)
    ends = torch.nn.functional.pad(asked[0].long().cumsum(0), (1, 0))
    return ends[batch["cu_seqlens"].long()].diff()
