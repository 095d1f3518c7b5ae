"""What to switch on so that a step fits, in which order, and how long a context then fits."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from .count import Memory, checkpointed, count_step, count_steps
from .groups import fewest_checkpoints

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


OFFLOAD, GROUPS = "activation_offloading", "layer_checkpoints"
SWITCHES = (
    Switch("gradient_checkpointing", True, "one more forward of the layers: at most 4/3 of the time"),
    Switch("layer_chunk_tokens", 2048, "one more forward of the projections around attention: at most 9/8 of the time"),
    Switch(OFFLOAD, True, "copies to host memory, beside the computation"),
)
"""In the order in which they are turned on: the cheapest of those that save much first."""
MORE_FORWARDS = (
    "nothing: the first layer's input is looked up again",
    "up to one more forward of the layers: at most 5/4 of the time",
    "up to two more forwards of the layers: at most 3/2 of the time",
)
"""The cost of the last switch, for where host memory does not hold what would be offloaded, by how often a layer runs
forward. Its value is the largest that fits."""


def _fewer_checkpoints(layers: int, most: int) -> Switch:
    return Switch(GROUPS, most, MORE_FORWARDS[sum(most < fewest_checkpoints(layers, runs) for runs in (1, 2))])


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


def with_all(options: FeedbackConfig | Namespace, *, offload: bool = True):
    """A copy of the options with every switch of `SWITCHES` on."""
    for switch in SWITCHES:
        if not switch.is_on(options) and (offload or switch.option != OFFLOAD):
            options = with_switch(options, switch)
    return options


def with_fewest_checkpoints(config: PretrainedConfig, options: FeedbackConfig | Namespace):
    """A copy of the options with every switch on but offloading, and the fewest checkpoints in its place."""
    layers = config.get_text_config().num_hidden_layers
    return with_switch(with_all(options, offload=False), _fewer_checkpoints(layers, fewest_checkpoints(layers)))


def stages(
    config: PretrainedConfig,
    options: FeedbackConfig | Namespace,
    tokens: int,
    budget: float,
    host: float = math.inf,
    **where,
) -> Iterator[tuple[Stage, object]]:
    """Turn on switches, one after another, until a step fits into `budget` bytes or none is left.

    Args:
        host: bytes of host memory for what is offloaded; where they are too few, checkpoints are made fewer instead.
        where: of `count_steps`.

    Yields:
        (stage, options with its switches), the options as given first.
    """
    memory = count_step(config, options, tokens, **where)
    yield Stage(None, memory), options
    for switch in SWITCHES:
        if memory.total <= budget and memory.host <= host:
            return
        if not switch.is_on(options):
            turned = with_switch(options, switch)
            found = count_step(config, turned, tokens, **where)
            if found.host > host or (switch.option == OFFLOAD and where.get("device") == "cpu"):
                continue
            options, memory = turned, found
            yield Stage(switch, memory), options
    if (
        (memory.total <= budget and memory.host <= host)
        or getattr(options, GROUPS, None)
        or options.activation_offloading
    ):
        return
    layers = config.get_text_config().num_hidden_layers
    fewer = range(layers, fewest_checkpoints(layers) - 1, -1)
    for most, memory in zip(fewer, count_steps(config, options, tokens, fewer, **where), strict=True):
        if memory.total <= budget or most == fewer[-1]:
            switch = _fewer_checkpoints(layers, most)
            yield Stage(switch, memory), with_switch(options, switch)
            return


def longest(
    config: PretrainedConfig, options: FeedbackConfig | Namespace, budget: float, host: float = math.inf, **where
) -> int:
    """The longest context, in tokens, of which a step fits into `budget` bytes, and into `host` bytes of host memory; 0
    where none does.

    Memory grows with the tokens, almost along a line, so the line through two counts leads to the next guess.
    """

    def count(tokens: int) -> float:
        memory = count_step(config, options, tokens, **where)
        return max(memory.total, memory.host * budget / host)

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
