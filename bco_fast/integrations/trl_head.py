"""The fused lm-head of bco_fast in TRL's own trainers (TRL 1.16): DPO, KTO, SFT, GRPO, RLOO.

    from bco_fast.integrations.trl import use_fused_head
    trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=dataset)
    use_fused_head(trainer)
    trainer.train()

TRL's trainers score tokens with a chunked head of their own. It rounds logits to the model's dtype before the softmax
and recomputes them in the backward also where the head is frozen. Ours keeps logits in float32 and takes 4NDV FLOP with a
frozen head. Losses, data, arguments and metrics stay TRL's.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..head.linear_logps import HeadOptions, HeadSpec, head_logps
from ..head.types import Backend

OPERATOR, COMPACT = "_ChunkedLogProbFunction", "_use_triton"
"""The names by which TRL's forward finds its operator, and whether to leave out positions without a label."""
CHUNK = 8192
_numbers = itertools.count()


def use_fused_head(trainer, *, backend: Backend = "auto", workspace_bytes: int = 256 << 20) -> None:
    """Let the models of one TRL trainer compute log-probabilities with bco_fast's head. Call it before `train`.

    Other trainers and models in the process keep TRL's head. On devices without Triton, where TRL scores every position,
    only those with a label are scored.

    Args:
        trainer: made by TRL 1.16: DPOTrainer, KTOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer, or a subclass.
        backend, workspace_bytes: see `fused_linear_logps`.

    Raises:
        ValueError: a model of the trainer has no head of TRL's kind; it asks for log(sum p^2) (DPO with `use_weighting`),
            which this head does not compute; or ZeRO-3 is on, which takes the weight away before the backward.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("use_fused_head does not work with DeepSpeed ZeRO-3: use ZeRO-2 or FSDP")
    functions = [
        _trl_forward(trainer, model) for model in (trainer.model, getattr(trainer, "ref_model", None)) if model
    ]
    operator = Operator(HeadOptions(backend, workspace_bytes))
    for function in functions:
        # The function is changed in place, because accelerate may have wrapped it already: it finds our operator under a
        # name of its own, so that other trainers keep theirs.
        names = {OPERATOR: f"_bco_fast_head_{next(_numbers)}", COMPACT: "_bco_fast_compact"}
        function.__globals__.update({names[OPERATOR]: operator, names[COMPACT]: lambda device: True})
        code = function.__code__
        function.__code__ = code.replace(co_names=tuple(names.get(name, name) for name in code.co_names))


def _trl_forward(trainer, model: nn.Module) -> types.FunctionType:
    """The forward that TRL gave to a model, below what accelerate wrapped around it."""
    model = trainer.accelerator.unwrap_model(model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    for function in _wrapped(model.forward):
        code = getattr(function, "__code__", None)
        if code is None or not {OPERATOR, COMPACT} <= set(code.co_names):
            continue
        cells = dict(zip(code.co_freevars, function.__closure__, strict=True))
        if "log_sum_sq_probs" in cells["outputs"].cell_contents:
            raise ValueError("use_fused_head does not compute log(sum p^2): leave use_weighting out")
        return function
    raise ValueError(
        f"{type(trainer).__name__} has no fused head of TRL 1.16 in its {type(model).__name__}, or bco_fast's already"
    )


def _wrapped(forward) -> Iterator:
    """A function and those that it was wrapped around, by `functools.wraps` or accelerate."""
    seen: list = []
    todo = [forward]
    while todo:
        function = todo.pop()
        function = getattr(function, "__func__", function)
        if any(function is other for other in seen):
            continue
        seen.append(function)
        yield function
        todo += [f for f in (getattr(function, "__wrapped__", None), getattr(function, "model_forward", None)) if f]
        todo += filter(callable, map(_contents, getattr(function, "__closure__", None) or ()))


def _contents(cell):
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


@dataclass(frozen=True)
class Operator:
    """Stands in for TRL's autograd function: `apply` takes what that takes, and returns what that returns."""

    options: HeadOptions

    def apply(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor | None, None, Tensor | None, Tensor | None]:
        """-> logps, entropy, nothing, mean logit, whether the target is the most likely token; [N] each."""
        spec = HeadSpec(logit_scale, softcap, temperature)
        wants = {"return_entropy": "entropy" in outputs, "return_top1": "is_top1" in outputs}
        if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = (None if t is None else t.to(hidden.dtype) for t in (weight, bias))
        found = head_logps(hidden, weight, targets, bias, spec, self.options, **wants)
        logps, *rest = found if isinstance(found, tuple) else (found,)
        entropy = rest.pop(0) if wants["return_entropy"] else None
        top1 = rest.pop(0) if wants["return_top1"] else None
        mean = mean_logits(hidden, weight, bias, spec) if "mean_logits" in outputs else None
        return logps, entropy, None, mean, top1


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec) -> Tensor:  # [N] float32
    """Mean over the vocabulary of each row's logits, which TRL logs. It costs one dot product a row: without a softcap the
    mean of the logits is the logit of the mean of the weight's rows."""
    rows = hidden.float()
    if spec.softcap is None:
        mean = rows @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) * spec.logit_multiplier
    total = rows.new_zeros(len(rows))
    for first in range(0, len(weight), CHUNK):
        logits = rows @ weight[first : first + CHUNK].float().T
        logits = logits if bias is None else logits + bias[first : first + CHUNK].float()
        total += (spec.softcap * torch.tanh(logits * spec.logit_scale / spec.softcap)).sum(1)
    return total / (len(weight) * spec.temperature)
