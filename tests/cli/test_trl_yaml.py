"""A KTO file of TRL runs unchanged under `bco-fast train`."""

import json
import logging

import pytest
import tiny
import yaml

from bco_fast import cli
from bco_fast.cli.trl_yaml import from_trl

# The shape of TRL's own example: ScriptArguments, ModelConfig and KTOConfig in one file.
KTO = {
    "model_name_or_path": "MODEL", "dtype": "float32", "attn_implementation": "eager", "trust_remote_code": False,
    "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"], "lora_task_type": "CAUSAL_LM",
    "dataset_name": "DATA", "dataset_train_split": "train", "dataset_num_proc": 2,
    "output_dir": "OUT", "max_length": 64, "precompute_ref_log_probs": True, "beta": 0.2, "desirable_weight": 1.2,
    "learning_rate": 5e-5, "per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "bf16": False, "use_cpu": True, "warmup_steps": 1, "lr_scheduler_type": "cosine", "sync_ref_model": False,
}  # fmt: skip


def _file(tmp_path, **changes):
    tiny.model().save_pretrained(tmp_path / "m")
    tiny.build_tokenizer().save_pretrained(tmp_path / "m")
    data = tiny.write(tmp_path / "kto.jsonl", tiny.rows(20))
    options = KTO | {
        "model_name_or_path": str(tmp_path / "m"),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "kto.yaml"
    path.write_text(yaml.safe_dump(options | changes))
    return path


def test_a_kto_file_of_trl_trains(tmp_path, capfd):
    path = _file(tmp_path)
    assert cli.main(["train", "--config", str(path), "--cache_dir", str(tmp_path / "cache")]) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["steps"], summary["rows"], summary["held_out_rows"]) == (2, 20, 0)
    assert summary["cache_rows"] == 2 * 9  # kto: the rows of two steps and the first four, each with its mismatch
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_flags_win_over_the_file(tmp_path, capfd):
    path = _file(tmp_path, use_peft=False)
    arguments = ["train", "--config", str(path), "--cache_dir", str(tmp_path / "cache"), "--loss_type", "bco", "--desirable_weight", "1", "--max_steps", "1"]  # fmt: skip
    assert cli.main(arguments) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["steps"], summary["cache_rows"]) == (1, 7)  # rows of one step, and the first four


def test_trls_defaults_hold_and_what_has_no_effect_is_said(caplog):
    with caplog.at_level(logging.INFO, "bco_fast"):
        ours = from_trl({"model_name_or_path": "m", "dataset_name": "trl-lib/kto-mix-14k", "dataset_test_split": "test", "eval_strategy": "steps", "dataset_num_proc": 8})  # fmt: skip
    assert ours == {
        "model": "m", "data": "trl-lib/kto-mix-14k", "eval_data": "trl-lib/kto-mix-14k:test", "eval_strategy": "steps",
        "loss_type": "kto", "learning_rate": 1e-6, "gradient_checkpointing": True, "disable_dropout": True,
    }  # fmt: skip
    assert "dataset_num_proc has no effect" in caplog.text


def test_a_file_of_ours_is_left_alone():
    assert from_trl({"model": "m", "learning_rate": 1.0}) == {"model": "m", "learning_rate": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sync_ref_model": True}, "sync_ref_model: the reference is constant"),
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"model_revision": "v2"}, "model_revision"),
        ({"loss_type": "no_such_loss"}, "loss_type"),
        ({"betta": 0.1}, "did you mean 'beta'"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_in_one_line(tmp_path, capfd, change, message):
    assert cli.main(["train", "--config", str(_file(tmp_path, **change))]) == 2
    assert message in capfd.readouterr().err.strip().splitlines()[-1]
