"""Batches without padding: sequences end to end, and as many of them as a token budget holds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .data import Item, collate
from .models import completion_logps, logp_budget
from .sequences import sequence_logps

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


@torch.no_grad()
def check_packing(model: nn.Module, items: Sequence[Item], pad_token_id: int) -> None:
    """Refuse a model whose attention looks across the sequences of a packed batch.

    Args:
        model: patched by `patch_model`.
        items: two sequences or more.

    Raises:
        ValueError: packed and padded log-probabilities differ by more than rounding.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        sums = []
        for make in (collate, collate_packed):
            batch = {name: tensor.to(device) for name, tensor in make(items, pad_token_id).items()}
            sums.append(sequence_sums(completion_logps(model, batch), batch) / completion_lengths(batch))
    finally:
        model.train(training)
    budget = logp_budget(model)
    if not (sums[0] - sums[1]).abs().max() <= budget:
        raise ValueError(
            f"{type(model).__name__} does not keep packed sequences apart: the log-probability per token differs by "
            f"{float((sums[0] - sums[1]).abs().max()):.2g} nats from the padded batch's. Leave padding_free off."
        )
