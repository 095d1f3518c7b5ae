"""Runs in axolotl's environment: its YAML through its own loading and training, with our plugin. Prints one line of JSON."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

import tiny
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import train

COMMON = {
    "plugins": ["bco_fast.integrations.axolotl.Plugin"],
    "sequence_len": 64,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 3,
    "learning_rate": 0.01,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "val_set_size": 0,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "special_tokens": {"pad_token": "<pad>"},
    "dataset_num_proc": 1,
}
LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "v_proj"],
}


def run(folder: Path, name: str, **options) -> dict:
    config = COMMON | {"base_model": str(folder / "model"), "output_dir": str(folder / name)} | options
    config["dataset_prepared_path"] = str(folder / f"{name}-prepared")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    cfg = load_cfg(str(file))
    _, _, trainer = train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    args = {
        name: getattr(trainer.args, name)
        for name in ("loss_type", "max_length", "beta", "desirable_weight", "learning_rate")
    }
    ids = [int(i) for i in trainer.train_dataset.examples[0].input_ids]
    return {
        "trainer": type(trainer).__mro__[1].__name__,
        "losses": losses,
        "args": args,
        "text": trainer.processing_class.decode(ids),
    }


def kto_losses(folder: Path, **options) -> dict[str, float]:
    """Of the first step, on all rows together, by our trainer and by axolotl's own."""
    losses = {}
    for name, ours in (("ours", {"bco_fast": {"loss_type": "kto"}}), ("theirs", {})):
        config = COMMON | {"base_model": str(folder / "model"), "output_dir": str(folder / name), "rl": "kto"}
        config |= {"max_steps": 1, "micro_batch_size": 12, "remove_unused_columns": False} | ours | options
        config["dataset_prepared_path"] = str(folder / f"{name}-prepared")
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        cfg = load_cfg(str(file))
        _, _, trainer = train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg))
        assert hasattr(trainer, "recorder") is (name == "ours")
        (losses[name],) = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny.model().save_pretrained(folder / "model")
    tiny.build_tokenizer().save_pretrained(folder / "model")
    thumbs = {"ds_type": "json", "split": "train", "type": {"field_prompt": "prompt", "field_completion": "completion"}}
    thumbs |= {"path": str(tiny.write(folder / "thumbs.jsonl", tiny.rows(12)))}
    pairs = {
        "ds_type": "json",
        "split": "train",
        "type": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"},
    }
    pairs |= {"path": str(tiny.write(folder / "pairs.jsonl", tiny.pairs(12)))}
    results = {
        "bco": run(folder, "bco", rl="bco", datasets=[thumbs], rl_beta=0.2, kto_desirable_weight=2.0),
        "bco lora": run(folder, "bco-lora", rl="bco", datasets=[thumbs], **LORA),
        "kto": kto_losses(folder, datasets=[thumbs], rl_beta=0.2, kto_desirable_weight=2.0),
        "rdpo": run(folder, "rdpo", rl="rdpo", datasets=[pairs], bco_fast={"alpha": 0.02}),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
