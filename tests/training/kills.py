"""The runs that `test_endurance` kills, and how their ends are compared."""

import json
import shutil
from pathlib import Path

import small_runs
import tiny
import torch
from safetensors.torch import load_file

from bco_fast.online.config import OnlineConfig
from bco_fast.online.trainer import OnlineFeedbackTrainer
from bco_fast.training.checkpoints import candidates, examine

PROMPTS = [row["prompt"] for row in tiny.rows(20)]
OPTIONS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "logging_steps": 3}
KINDS = {
    "lora": {"use_peft": True, "lora_r": 2, "lora_dropout": 0.2},
    "kto": {"loss_type": "kto", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}


def _length(prompts, completions, **columns):
    return [min(len(completion.split()), 4) / 4 for completion in completions]


def train(folder: Path, kind: str, resume: bool) -> None:
    """One run up to its end; what an earlier one left is continued or, without a whole checkpoint, removed."""
    if not resume:
        shutil.rmtree(folder / "out", ignore_errors=True)
    trainer = _online(folder) if kind == "online" else small_runs.trainer(folder, **OPTIONS | KINDS[kind])
    trainer.train(resume_from_checkpoint=True if resume else None)
    trainer.save_model()
    trainer.save_state()


def _online(folder: Path) -> OnlineFeedbackTrainer:
    options = vars(small_runs.config(folder, **OPTIONS))
    names = ("output_dir", "learning_rate", "use_cpu", "disable_tqdm", *OPTIONS)
    config = OnlineConfig(
        **{name: options[name] for name in names}, report_to="none", max_length=32, max_new_tokens=5,
        steps_per_round=3, samples_per_prompt=2, per_device_train_batch_size=4, temperature=1.0,
    )  # fmt: skip
    return OnlineFeedbackTrainer(
        tiny.model(attention_dropout=0.2), config, PROMPTS, _length, processing_class=small_runs.TOKENIZER
    )


def resumable(folder: Path) -> bool:
    return any(examine(path).problem is None for path in candidates(True, folder / "out"))


def end(folder: Path) -> dict:
    """The weights, the log without its times, and the rounds of an online run."""
    weights = next((folder / "out").glob("*model.safetensors"))
    log = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "train_loss")
    rounds = sorted((folder / "out/rounds").glob("round-*.jsonl"))
    return {
        "weights": load_file(weights),
        "log": [{name: value for name, value in line.items() if not name.endswith(timed)} for line in log],
        "rounds": [path.read_text() for path in rounds],
    }


def differences(a: dict, b: dict) -> list[str]:
    found = [name for name in ("log", "rounds") if a[name] != b[name]]
    same = a["weights"].keys() == b["weights"].keys() and all(
        torch.equal(tensor, b["weights"][name]) for name, tensor in a["weights"].items()
    )
    return found if same else ["weights", *found]
