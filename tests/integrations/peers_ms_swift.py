"""Runs in ms-swift's environment: `swift rlhf` with examples/ms_swift_bco.py as its plugin. Prints one line of JSON."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "USE_HF": "1", "SWIFT_UI_LANG": "en"}

import tiny
import torch
from hosts import apart
from swift.arguments import RLHFArguments
from swift.pipelines.train.rlhf import SwiftRLHF
from swift.rlhf_trainers import KTOTrainer
from swift.trainers import TrainerFactory

PLUGIN = Path(__file__).parents[2] / "examples" / "ms_swift_bco.py"


class Recorded:
    """Before a trainer's class: keeps the loss of each step."""

    losses: list[float]

    def compute_loss(self, model, inputs, *positional, **named):
        loss = super().compute_loss(model, inputs, *positional, **named)
        self.losses.append(float(loss))
        return loss


def train(folder: Path, trainer: str, **options) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of ms-swift's own trainer, or of one of the plugin, on twelve rows a step."""
    arguments = RLHFArguments(
        rlhf_type="kto",
        model=str(folder / "model"),
        model_type="llama",
        template="default",
        dataset=[str(folder / "chats.jsonl")],
        output_dir=str(folder / trainer),
        external_plugins=[str(PLUGIN)],
        max_steps=3,
        per_device_train_batch_size=12,
        gradient_accumulation_steps=1,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        warmup_ratio=0,
        weight_decay=0,
        beta=0.2,
        desirable_weight=2.0,
        torch_dtype="float32",
        gradient_checkpointing="lora" in options.values(),
        save_strategy="no",
        eval_strategy="no",
        dataset_num_proc=1,
        report_to=[],
        use_cpu=True,
        **options,
    )
    plugged = TrainerFactory.get_trainer_cls(arguments)  # the plugin has entered it
    owner = sys.modules[plugged.__module__]
    losses: list[float] = []
    base = {"theirs": KTOTrainer, "fused": owner.FusedKTOTrainer, "bco": plugged}[trainer]
    globals()["Used"] = type("Used", (Recorded, base), {"losses": losses})
    TrainerFactory.TRAINER_MAPPING["kto"] = f"{__name__}.Used"
    run = SwiftRLHF(arguments)
    run.main()
    TrainerFactory.TRAINER_MAPPING["kto"] = f"{plugged.__module__}.{plugged.__name__}"
    return losses, {n: w.detach().clone() for n, w in run.model.named_parameters()}


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny.model().save_pretrained(folder / "model")
    tiny.build_tokenizer().save_pretrained(folder / "model")
    start = dict(tiny.model().named_parameters())
    said = (("user", "prompt"), ("assistant", "completion"))
    chats = [
        {"messages": [{"role": role, "content": row[name]} for role, name in said], "label": row["label"]}
        for row in tiny.rows(12)
    ]
    tiny.write(folder / "chats.jsonl", chats)
    losses, weights = train(folder, "theirs", tuner_type="full")
    fused_losses, fused = train(folder, "fused", tuner_type="full")
    bco_losses, _ = train(folder, "bco", tuner_type="full")
    lora_losses, lora = train(
        folder,
        "bco",
        tuner_type="lora",
        loss_type=["apo_zero_unpaired"],
        lora_rank=4,
        lora_alpha=8,
        target_modules="all-linear",
    )
    results = {
        "kto": {"theirs": losses, "fused": fused_losses, "apart": apart(fused, weights) / apart(weights, start)},
        "bco": bco_losses,
        "bco lora": lora_losses,
        "adapters": sum(".lora_" in name for name in lora),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
