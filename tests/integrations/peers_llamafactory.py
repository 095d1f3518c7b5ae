"""Runs in LLaMA-Factory's environment: its training with the classes of examples/llamafactory_bco.py. Prints one line of JSON."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import llamafactory_bco as ours
import tiny
import torch
from hosts import apart
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file

THEIRS = ours.workflow.CustomKTOTrainer
LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_target": "all"}


def train(folder: Path, name: str, trainer: type, **options) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps on twelve rows each, and the weights after them."""
    ours.workflow.CustomKTOTrainer = trainer
    arguments = {
        "stage": "kto",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "dataset": "thumbs",
        "template": "default",
        "cutoff_len": 64,
        "output_dir": str(folder / name),
        "max_steps": 3,
        "per_device_train_batch_size": 12,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "pref_beta": 0.2,
        "kto_chosen_weight": 2.0,
        "disable_gradient_checkpointing": True,
        "report_to": "none",
        "use_cpu": True,
    }
    run_exp(arguments | options)
    state = json.loads((folder / name / "trainer_state.json").read_text())
    (file,) = (folder / name).glob("*model.safetensors")
    return [line["loss"] for line in state["log_history"] if "loss" in line], load_file(file)


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny.model().save_pretrained(folder / "model")
    tiny.build_tokenizer().save_pretrained(folder / "model")
    start = load_file(folder / "model" / "model.safetensors")
    tiny.write(folder / "thumbs.jsonl", tiny.rows(12))
    columns = {"prompt": "prompt", "response": "completion", "kto_tag": "label"}
    (folder / "dataset_info.json").write_text(json.dumps({"thumbs": {"file_name": "thumbs.jsonl", "columns": columns}}))
    losses, weights = train(folder, "theirs", THEIRS)
    fused_losses, fused = train(folder, "fused", ours.FusedKTOTrainer)
    bco_losses, _ = train(folder, "bco", ours.BCOTrainer)
    lora_losses, lora = train(folder, "lora", ours.BCOTrainer, **LORA)
    results = {
        "kto": {"theirs": losses, "fused": fused_losses, "apart": apart(fused, weights) / apart(weights, start)},
        "bco": bco_losses,
        "bco lora": lora_losses,
        "adapters": sum(".lora_" in name for name in lora),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
