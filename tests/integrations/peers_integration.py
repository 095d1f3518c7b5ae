"""Run by the environment of TRL 1.16: our objectives inside its KTOTrainer. Prints one line of JSON.

.venv-peers-trl-1.16/bin/python tests/integrations/peers_integration.py          bco_fast's objectives in KTOTrainer
.venv-peers-trl-1.16/bin/python tests/integrations/peers_integration.py heads    its head in TRL's trainers
"""

import copy
import json
import sys
import tempfile

import tiny
import torch
from datasets import Dataset
from families import FAMILIES
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from bco_fast.integrations.trl import SUPPORTED, FeedbackKTOTrainer, use_fused_head


def _config(folder, **options):
    return KTOConfig(
        folder, per_device_train_batch_size=8, max_steps=3, learning_rate=1e-2, max_length=64, use_cpu=True, bf16=False,
        logging_steps=1, report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, **options,
    )  # fmt: skip


def _train(trainer_class, folder, **options):
    own = {name: options.pop(name) for name in ("objective",) if name in options}
    rows = tiny.rows(24)
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in ("prompt", "completion", "label")})
    model = tiny.model()
    tokenizer = tiny.build_tokenizer()
    trainer = trainer_class(model, copy.deepcopy(model), _config(folder, **options), train_dataset=dataset, processing_class=tokenizer, **own)  # fmt: skip
    trainer.train()
    lines = [e for e in trainer.state.log_history if "loss" in e]
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return lines, weights


HEADS = {
    "kto": (KTOTrainer, KTOConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "dpo adapter": (DPOTrainer, DPOConfig, {"peft": True}),
    "dpo precomputed": (DPOTrainer, DPOConfig, {"precompute_ref_log_probs": True}),
    "kto softcap": (KTOTrainer, KTOConfig, {"family": "gemma2"}),
    "dpo bf16": (DPOTrainer, DPOConfig, {"bf16": True}),
}


def _head(name, folder, *, fused):
    """Three steps of a trainer of TRL's, with its own head or with ours: log lines and weights."""
    trainer_class, config, options = HEADS[name]
    options = dict(options)
    config_class, more = FAMILIES[options.pop("family", "llama")]
    adapter = {}
    if options.pop("peft", False):
        adapter["peft_config"] = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="gaussian")
    args = config(
        folder, per_device_train_batch_size=8, max_steps=3, learning_rate=1e-2, max_length=64, use_cpu=True, logging_steps=1,
        report_to="none", save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, seed=0, **{"bf16": False} | options,
    )  # fmt: skip
    rows = tiny.pairs(24) if trainer_class is DPOTrainer else tiny.rows(24)
    torch.manual_seed(0)
    model = tiny.model(config_class, **more)
    if not adapter and not options.get("precompute_ref_log_probs"):
        adapter["ref_model"] = copy.deepcopy(model)
    trainer = trainer_class(
        model, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=tiny.build_tokenizer(), **adapter,
    )  # fmt: skip
    refused = ""
    if fused:
        use_fused_head(trainer)
        try:
            use_fused_head(trainer)
        except ValueError as error:
            refused = str(error)
    weights = [torch.cat([p.detach().flatten() for p in trainer.model.parameters()])]
    trainer.train()
    weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    lines = [
        {k: v for k, v in e.items() if not k.endswith(("runtime", "per_second"))}
        for e in trainer.state.log_history
        if "loss" in e
    ]
    return lines, weights, refused


def _heads(folder):
    out = {}
    for name in HEADS:
        (lines, weights, _), (our_lines, our_weights, refused) = (_head(name, folder, fused=f) for f in (False, True))
        out[name] = {
            "lines": lines,
            "our_lines": our_lines,
            "start_apart": float((weights[0] - our_weights[0]).norm()),
            "moved": float((weights[1] - weights[0]).norm()),
            "apart": float((weights[1] - our_weights[1]).norm()),
            "refused": refused,
        }
    return out


def main():
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        if "heads" in sys.argv:
            print(json.dumps(_heads(folder)))
            return
        lines, theirs = _train(KTOTrainer, folder)
        ours_lines, ours = _train(FeedbackKTOTrainer, folder, objective="kto")
        start = torch.cat([p.detach().flatten() for p in tiny.model().parameters()])
        out["against trl"] = {
            "losses": [line["loss"] for line in lines],
            "our_losses": [line["loss"] for line in ours_lines],
            "moved": float((theirs - start).norm()),
            "apart": float((theirs - ours).norm()),
            "margins": [[line.get("rewards/margins") for line in each] for each in (lines, ours_lines)],
        }
        for objective in SUPPORTED:
            for precomputed in (False, True):
                if objective == "bnf" and precomputed:
                    continue
                lines, weights = _train(FeedbackKTOTrainer, folder, objective=objective, precompute_ref_log_probs=precomputed)  # fmt: skip
                out[f"{objective}{' precomputed' if precomputed else ''}"] = {
                    "losses": [line["loss"] for line in lines],
                    "names": sorted(lines[-1]),
                    "moved": float((weights - start).norm()),
                }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
