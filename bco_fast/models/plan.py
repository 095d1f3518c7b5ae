"""What to switch on so that a step fits, in which order, and how long a context then fits."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from .count import Memory, checkpointed, count_step

if TYPE_CHECKING:
    from ..training.config import FeedbackConfig

USABLE = 0.95
"""Share of a GPU's memory that is planned with; the rest is the CUDA context, libraries and fragments."""
STEP = 1024
"""Tokens; contexts are whole multiples."""
MOST = 1 << 24
"""Tokens; nobody's context is longer."""


@dataclass(frozen=True)
class Switch:
    """An option that saves memory, and what it costs."""

    option: str
    value: object
    cost: str

    def is_on(self, options) -> bool:
        if self.option == "gradient_checkpointing":
            return checkpointed(options)
        return bool(getattr(options, self.option))


SWITCHES = (
    Switch("gradient_checkpointing", True, "one more forward of the layers: at most 4/3 of the time"),
    Switch("layer_chunk_tokens", 2048, "one more forward of the layers without attention: at most 5/4 of the time"),
    Switch("activation_offloading", True, "copies to host memory, beside the computation"),
)
"""In the order in which they are turned on: the cheapest of those that save much first."""


@dataclass
class Stage:
    """The memory of a step once a switch has been turned on; None: as the options were given."""

    switch: Switch | None
    memory: Memory


def with_switch(options: FeedbackConfig | Namespace, switch: Switch):
    """A copy of the options with the switch on."""
    turned = copy.copy(options)
    setattr(turned, switch.option, switch.value)
    if switch.option == "gradient_checkpointing" and hasattr(turned, "activation_checkpointing"):
        turned.activation_checkpointing = switch.value  # the name that newer versions of transformers read
    return turned


def with_all(options: FeedbackConfig | Namespace):
    """A copy of the options with every switch on."""
    for switch in SWITCHES:
        if not switch.is_on(options):
            options = with_switch(options, switch)
    return options


def stages(
    config: PretrainedConfig, options: FeedbackConfig | Namespace, tokens: int, budget: float, **where
) -> Iterator[tuple[Stage, object]]:
    """Turn on switches, one after another, until a step fits into `budget` bytes or none is left.

    Args:
        where: of `count_step`.

    Yields:
        (stage, options with its switches), the options as given first.
    """
    memory = count_step(config, options, tokens, **where)
    yield Stage(None, memory), options
    for switch in SWITCHES:
        if memory.total <= budget:
            return
        if not switch.is_on(options):
            options = with_switch(options, switch)
            memory = count_step(config, options, tokens, **where)
            yield Stage(switch, memory), options


def longest(config: PretrainedConfig, options: FeedbackConfig | Namespace, budget: float, **where) -> int:
    """The longest context, in tokens, of which a step fits into `budget` bytes; 0 where none does.

    Memory grows with the tokens, almost along a line, so the line through two counts leads to the next guess.
    """

    def count(tokens: int) -> float:
        return count_step(config, options, tokens, **where).total

    low, high = STEP, None
    used = {low: count(low)}
    if used[low] > budget:
        return 0
    tokens = 64 * STEP
    for _ in range(12):
        used[tokens] = count(tokens)
        if used[tokens] <= budget:
            low = max(low, tokens)
        else:
            high = tokens if high is None else min(high, tokens)
        if low >= MOST or (high is not None and high - low <= max(STEP, low // 64)):
            break
        known = sorted(used)
        left, right = (low, high) if high is not None else known[-2:]
        slope = (used[right] - used[left]) / (right - left)
        guess = int(low + 0.995 * (budget - used[low]) / max(slope, 1.0)) // STEP * STEP
        tokens = min(max(guess, low + STEP), (high or MOST + STEP) - STEP, MOST)
        if tokens in used:
            break
    return low
