"""BCO, BNF and UNA inside TRL's own KTOTrainer (TRL 1.16).

    from bco_fast.integrations.trl import FeedbackKTOTrainer
    trainer = FeedbackKTOTrainer(model, args=KTOConfig(...), train_dataset=dataset, objective="bco")

Data, collator, reference handling, arguments and callbacks are TRL's; the loss is ours, on the fused lm-head of bco_fast.
`use_fused_head(trainer)` leaves TRL's losses as they are and exchanges the head alone, in any of its trainers (`trl_head`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import KTOConfig, KTOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..losses import OBJECTIVES
from ..losses.reward_shift import RewardShift
from ..losses.sequence import sequence_logps
from ..models.patch import HeadOutput, completion_logps, forward_logps, patch_model
from .trl_head import use_fused_head

__all__ = ["SUPPORTED", "FeedbackKTOTrainer", "use_fused_head"]

SUPPORTED = ("bco", "bce", "kto", "una_binary_mse", "una_binary_bce", "bnf")


class _Steps(TrainerCallback):
    def __init__(self, shift: RewardShift):
        self.shift = shift

    def on_step_end(self, args, state, control, **kwargs):
        self.shift.step()


class FeedbackKTOTrainer(KTOTrainer):
    """TRL's KTOTrainer with an objective of bco_fast.

    Args:
        objective: one of bco, bce, kto, una_binary_mse, una_binary_bce, bnf.
        shift: the `RewardShift` of bco and una; by default the objective's own. TRL's checkpoints do not hold it.
        workspace_bytes: of the fused head.
        args and the rest: of KTOTrainer. `beta`, `desirable_weight`, `undesirable_weight` are read from args.

    Raises:
        ValueError: an objective that does not read thumbs; bnf with precompute_ref_log_probs, which keeps sums only.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args: KTOConfig | None = None,
        *positional,
        objective: str = "bco",
        shift: RewardShift | None = None,
        workspace_bytes: int = 256 << 20,
        **kwargs,
    ):
        if objective not in SUPPORTED:
            raise ValueError(f"objective must be one of {', '.join(SUPPORTED)}, not {objective!r}")
        args = KTOConfig("kto_output") if args is None else args
        if OBJECTIVES[objective].per_token and args.precompute_ref_log_probs:
            raise ValueError(
                f"{objective} needs the reference's log-probability of every token; TRL precomputes their sums only"
            )
        # The one loss type of TRL's that runs no forward pass on mismatched completions.
        args.loss_type = "kto" if OBJECTIVES[objective].mismatched else "apo_zero_unpaired"
        self.objective = OBJECTIVES[objective]
        self.shift = RewardShift(self.objective.shift or "fixed") if shift is None else shift
        super().__init__(model, ref_model, args, *positional, **kwargs)
        patch_model(self.accelerator.unwrap_model(self.model), workspace_bytes=workspace_bytes)
        if self.ref_model is not None:
            patch_model(self.accelerator.unwrap_model(self.ref_model), workspace_bytes=workspace_bytes)
        self.add_callback(_Steps(self.shift))

    def _compute_loss(self, model, inputs, return_outputs):
        if return_outputs:
            raise ValueError("the fused head has no logits to return: evaluate with prediction_loss_only=True")
        batch = {k: v.to(self.accelerator.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        labels, mode = batch["label"].bool(), "train" if self.model.training else "eval"
        tokens = _with_targets(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        head = forward_logps(model, tokens, return_entropy=self.objective.per_token)
        out = self._objective_loss(head, self._reference(tokens, batch), batch, tokens, labels, model)
        for name, value in out.metrics.items():
            value = float(self.accelerator.gather_for_metrics(torch.as_tensor(value, device=labels.device)).nanmean())
            if value == value:  # a class may be absent
                self._metrics[mode][name].append(value)
        aux = 0.0 if head.aux_loss is None or not self.aux_loss_enabled else self.router_aux_loss_coef * head.aux_loss
        return out.loss + aux

    def _objective_loss(self, head: HeadOutput, reference: Tensor, batch, tokens, labels: Tensor, model):
        if self.objective.per_token:
            mask = tokens["targets"] >= 0
            return self.objective.loss(head.logps, reference, labels, mask=mask, entropy=head.entropy)
        logps = sequence_logps(head.logps)
        options: dict = {"beta": self.beta}
        if self.objective.mismatched:
            options["kl"] = self._z_ref(model, batch)
        if self.objective.shift:
            if torch.is_grad_enabled():
                self.shift.observe(self.beta * (logps.detach() - reference), labels)
            options["delta"] = self.shift
        weight = torch.where(labels, self.desirable_weight, self.undesirable_weight).to(logps.dtype)
        return self.objective.loss(logps, reference, labels, sample_weight=weight, **options)

    @torch.no_grad()
    def _reference(self, tokens: dict[str, Tensor], batch) -> Tensor:
        """Sums [B], or for bnf per token [B, T], from TRL's precomputed column, its reference model or the base model."""
        if self.precompute_ref_logps:
            return batch["ref_logps"]
        logps = self._reference_logps(tokens)
        return logps if self.objective.per_token else sequence_logps(logps)

    def _reference_logps(self, tokens: dict[str, Tensor]) -> Tensor:
        if self.ref_model is not None:
            return completion_logps(self.ref_model, tokens)
        base: nn.Module = self.accelerator.unwrap_model(self.model)
        with (
            base.disable_adapter(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
        ):
            return completion_logps(self.model, tokens)

    @torch.no_grad()
    def _z_ref(self, model, batch) -> Tensor:
        tokens = _with_targets(batch["KL_input_ids"], batch["KL_attention_mask"], batch["KL_completion_mask"])
        policy = sequence_logps(completion_logps(model, tokens))
        reference = (
            batch["ref_KL_logps"] if self.precompute_ref_logps else sequence_logps(self._reference_logps(tokens))
        )  # fmt: skip
        return self.accelerator.gather_for_metrics((policy - reference).mean()).mean()


def _with_targets(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> dict[str, Tensor]:
    """TRL masks the tokens of a completion; our targets say, one place earlier, which token is to be predicted."""
    targets = torch.full_like(input_ids, -100)
    targets[:, :-1] = torch.where(completion_mask[:, 1:].bool(), input_ids[:, 1:], -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "targets": targets}
