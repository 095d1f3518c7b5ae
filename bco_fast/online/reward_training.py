"""A reward model from pairs: Bradley-Terry on a Hugging Face sequence-classification model with one logit.

    -log sigmoid(r(x, y_w) - r(x, y_l)) + center (r(x, y_w) + r(x, y_l))²

Eq. 2 of Wang et al., arXiv 2408.15339; the second term keeps rewards near 0 (Eisenstein et al., arXiv 2312.09244). Texts are
encoded by `SequenceReward`, so the model reads in use what it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from ..data.rows import FeedbackRow
from ..training.config import _option
from .rewards import SequenceReward


@dataclass
class RewardConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the options of a Bradley-Terry reward model.

    Raises:
        ValueError: an option is out of its range.
    """

    output_dir: str | None = _option(None, "Folder for checkpoints and the reward model; required")
    overwrite_output_dir: bool = _option(
        False, "Delete the run that is in output_dir; without it, training there is refused."
    )
    learning_rate: float = _option(1e-5, "Peak learning rate of AdamW, per optimizer step.")
    remove_unused_columns: bool = _option(False, "Always false: the dataset holds tokens, not columns.")
    center: float = _option(0.0, "Weight of (r_chosen + r_rejected)², >= 0.")
    max_length: int = _option(1024, "Longest text: prompt and completion together, tokens.")
    model_dtype: str = _option("float32", "Dtype of the weights.", choices=["float32", "bfloat16", "float16"])
    chat_template: str | None = _option(None, "Chat template: the path of a Jinja file. Default: the tokenizer's.")
    trust_remote_code: bool = _option(False, "Run the Python code in the folder of the model.")
    columns: str | None = _option(None, "Names of columns in the data, ours=theirs: chosen=better. Default: ours.")
    on_bad_row: str = _option("error", "What to do with a bad row: error, or skip.", choices=["error", "skip"])

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.center < float("inf"):
            raise ValueError(f"center must be >= 0, not {self.center}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, not {self.max_length}")
        self.label_names = ["pairs"]


def encode_pairs(rows: Sequence[FeedbackRow], reward: SequenceReward) -> list[tuple[dict, dict]]:
    """Token ids of (chosen, rejected) of each pair, as `reward` reads them."""
    encoded = []
    for row in rows:
        prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
        sides = ([side] if isinstance(side, Mapping) else side for side in row.completions)
        encoded.append(tuple(reward.encode(prompt, side)[0] for side in sides))
    return encoded


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center: float = 0.0) -> Tensor:
    """The mean over [B] pairs of the loss above; rewards in logits."""
    return (-F.logsigmoid(chosen - rejected) + center * (chosen + rejected).square()).mean()


class RewardTrainer(Trainer):
    """The Hugging Face Trainer with a Bradley-Terry loss.

    Args:
        reward: the model with its tokenizer.
        args: a `RewardConfig`.
        train_dataset, eval_dataset: of `encode_pairs`.
    """

    def __init__(self, reward: SequenceReward, args: RewardConfig, train_dataset, eval_dataset=None, **kwargs):
        self.reward = reward
        super().__init__(
            model=reward.model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=self._collate, compute_metrics=_metrics, processing_class=reward.tokenizer, **kwargs,
        )  # fmt: skip
        self.model_accepts_loss_kwargs = False

    def _collate(self, pairs: Sequence[tuple[dict, dict]]) -> dict[str, Tensor]:
        """All chosen texts, then all rejected ones."""
        sides = [side for sides in zip(*pairs, strict=True) for side in sides]
        return self.reward.batch(sides) | {"pairs": torch.arange(len(pairs))}

    def _rewards(self, model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor]:
        texts = {name: value for name, value in inputs.items() if name != "pairs"}
        return model(**texts).logits[:, 0].float().chunk(2)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        chosen, rejected = self._rewards(model, inputs)
        loss = bradley_terry_loss(chosen, rejected, self.args.center)
        return (loss, {"rewards": torch.stack([chosen, rejected], 1)}) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss, out = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else out["rewards"], inputs["pairs"]


def _metrics(prediction: EvalPrediction) -> dict[str, float]:
    margins = prediction.predictions[:, 0] - prediction.predictions[:, 1]
    return {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}
