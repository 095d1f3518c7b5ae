"""Runs in axolotl's environment: its YAML through its own loading and training, with our plugin. Prints one line of JSON."""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "AXOLOTL_DATASET_NUM_PROC": "0",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
}

import tiny
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import train
from hosts import apart

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
    "dataset_num_proc": 0,
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


def kto_step(folder: Path, name: str, **options) -> dict:
    """One step of `rl: kto` on all rows together: its loss, the norm of its gradient, and the tokens and weights."""
    config = COMMON | {
        "base_model": str(folder / "model"),
        "output_dir": str(folder / name),
        "rl": "kto",
        "remove_unused_columns": False,
    }
    config |= {"max_steps": 1, "micro_batch_size": 12, "optimizer": "sgd", "learning_rate": 8.0} | options
    config["dataset_prepared_path"] = str(folder / f"{name}-prepared")
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    cfg = load_cfg(str(file))
    _, _, trainer = train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg))
    step = next(line for line in trainer.state.log_history if "loss" in line)
    if ours := hasattr(trainer, "recorder"):
        rows = [example.input_ids.tolist() for example in trainer.train_dataset.examples]
    else:
        rows = [row["prompt_ids"] + row["completion_ids"] for row in trainer.train_dataset]
    return {
        "ours": ours,
        "loss": step["loss"],
        "grad_norm": float(step["grad_norm"]),
        "tokens": sorted(rows),
        "weights": {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()},
    }


def kto_step_of_both(folder: Path, **options) -> dict:
    """The same by our trainer and by axolotl's; how far the weights lie apart, relative to what the step moved."""
    ours = kto_step(folder, "kto-ours", bco_fast={"loss_type": "kto"}, **options)
    theirs = kto_step(folder, "kto-theirs", **options)
    assert ours.pop("ours")
    assert not theirs.pop("ours")
    weights, their_weights, start = ours.pop("weights"), theirs.pop("weights"), dict(tiny.model().named_parameters())
    assert set(weights) == set(their_weights) == set(start)
    return {"ours": ours, "theirs": theirs, "apart": apart(weights, their_weights) / apart(their_weights, start)}


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    tiny.model().save_pretrained(folder / "model")
    tiny.build_tokenizer().save_pretrained(folder / "model")
    thumbs = {"ds_type": "json", "split": "train", "type": {"field_prompt": "prompt", "field_completion": "completion"}}
    thumbs |= {"path": str(tiny.write(folder / "thumbs.jsonl", tiny.rows(12)))}
    spaced = thumbs | {"type": thumbs["type"] | {"completion_format": " {completion}"}}
    pairs = {
        "ds_type": "json",
        "split": "train",
        "type": {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"},
    }
    pairs |= {"path": str(tiny.write(folder / "pairs.jsonl", tiny.pairs(12)))}
    results = {
        "bco": run(folder, "bco", rl="bco", datasets=[thumbs], rl_beta=0.2, kto_desirable_weight=2.0),
        "bco lora": run(folder, "bco-lora", rl="bco", datasets=[thumbs], **LORA),
        "kto": kto_step_of_both(folder, datasets=[spaced], rl_beta=0.2, kto_desirable_weight=2.0),
        "kto without a space": kto_step(folder, "kto-joined", datasets=[thumbs])["tokens"],
        "rdpo": run(folder, "rdpo", rl="rdpo", datasets=[pairs], bco_fast={"alpha": 0.02}),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
