"""BCO in ms-swift 4.6: swift rlhf --rlhf_type kto --external_plugins ms_swift_bco.py --model ... --dataset ..."""

import torch
from swift.rlhf_trainers import KTOTrainer
from swift.trainers import TrainerFactory
from transformers import TrainerCallback

from bco_fast import RewardShift, bco_loss, patch_model, sequence_logps
from bco_fast.models.patch import completion_logps


class FusedKTOTrainer(KTOTrainer):
    """ms-swift's KTO on bco_fast's lm-head: no logits in memory."""

    def __init__(self, model=None, ref_model=None, *positional, **named):
        if named["template"].padding_free or named["template"].sequence_parallel_size > 1:
            raise ValueError("leave out padding_free and sequence parallelism: each row must be one sequence")
        super().__init__(model, ref_model, *positional, **named)
        for each in filter(None, (model, ref_model)):
            patch_model(each)

    def _logps(self, model, batch, prefix):  # [B], nats
        if f"{prefix}pixel_values" in batch:
            raise ValueError("bco_fast trains on text: leave out rows with images")
        labels = batch[f"{prefix}labels"]
        targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), 1)
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        return sequence_logps(completion_logps(model, inputs | {"targets": targets}))

    def _compute_kl_logps(self, model, batch):
        with torch.no_grad():
            return self._logps(model, batch, "KL_completion_") if self.calculate_KL else None

    def forward(self, model, batch):
        logps, up = self._logps(model, batch, "completion_"), torch.tensor(batch["label"])
        no_logits = logps.new_zeros(0)
        return logps[up], logps[~up], no_logits, no_logits, self._compute_kl_logps(model, batch)


class BCOTrainer(FusedKTOTrainer):
    """And with the loss of BCO. δ is not part of ms-swift's checkpoints."""

    def __init__(self, model=None, ref_model=None, *positional, **named):
        super().__init__(model, ref_model, *positional, **named)
        self.calculate_KL = False  # BCO reads no mismatched completions
        self.shift = RewardShift("ema")
        self.add_callback(_EndOfStep(self.shift))

    def kto_loss(self, chosen, rejected, kl, ref_chosen, ref_rejected, ref_kl):
        logps, ref_logps = torch.cat((chosen, rejected)), torch.cat((ref_chosen, ref_rejected))
        labels = torch.arange(len(logps), device=logps.device) < len(chosen)
        rewards = self.beta * (logps.detach() - ref_logps)
        if torch.is_grad_enabled():
            self.shift.observe(rewards, labels)
        weight = torch.where(labels, self.desirable_weight, self.undesirable_weight)
        out = bco_loss(logps, ref_logps, labels, beta=self.beta, delta=self.shift)
        return weight * out.per_example, rewards[labels], rewards[~labels], logps.new_zeros(())


class _EndOfStep(TrainerCallback):
    def __init__(self, shift):
        self.shift = shift

    def on_step_end(self, args, state, control, **named):
        self.shift.step()


TrainerFactory.TRAINER_MAPPING["kto"] = f"{__name__}.BCOTrainer"
