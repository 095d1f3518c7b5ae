"""Run by the environment of TRL 1.16: our objectives inside its KTOTrainer. Prints one line of JSON.

.venv-peers-trl-1.16/bin/python tests/integrations/peers_integration.py
"""

import copy
import json
import tempfile

import tiny
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from bco_fast.integrations.trl import SUPPORTED, FeedbackKTOTrainer


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


def main():
    out = {}
    with tempfile.TemporaryDirectory() as folder:
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
