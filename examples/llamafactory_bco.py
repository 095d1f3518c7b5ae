"""BCO in LLaMA-Factory 0.9.5: python llamafactory_bco.py train.yaml, with stage: kto in the YAML."""

import llamafactory.train.kto.workflow as workflow
import torch
from llamafactory.train.tuner import run_exp
from transformers import TrainerCallback

from bco_fast import RewardShift, bco_loss, patch_model, sequence_logps
from bco_fast.models.patch import completion_logps


class FusedKTOTrainer(workflow.CustomKTOTrainer):
    """LLaMA-Factory's KTO on bco_fast's lm-head: no logits in memory."""

    def __init__(self, model, ref_model, finetuning_args, processor, **named):
        super().__init__(model, ref_model, finetuning_args, processor, **named)
        for each in filter(None, (model, ref_model)):
            patch_model(each)

    def forward(self, model, batch, prefix=""):
        if "pixel_values" in batch:
            raise ValueError("bco_fast trains on text: leave out rows with images")
        labels = batch[f"{prefix}labels"]
        targets = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), 1)
        inputs = {name: batch[prefix + name] for name in ("input_ids", "attention_mask")}
        logps = sequence_logps(completion_logps(model, inputs | {"targets": targets}))
        return logps.new_zeros(len(logps), 0), logps, logps / (targets != -100).sum(1)


class BCOTrainer(FusedKTOTrainer):
    """And with the loss of BCO. δ is not part of LLaMA-Factory's checkpoints."""

    def __init__(self, *positional, **named):
        super().__init__(*positional, **named)
        self.shift = RewardShift("ema")
        self.add_callback(_EndOfStep(self.shift))

    def forward(self, model, batch, prefix=""):
        if prefix == "kl_":  # BCO reads no mismatched completions
            return (torch.zeros(len(batch["kto_tags"]), device=batch["input_ids"].device),) * 3
        return super().forward(model, batch, prefix)

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


if __name__ == "__main__":
    workflow.CustomKTOTrainer = BCOTrainer
    run_exp()
