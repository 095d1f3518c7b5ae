"""A script written for TRL's BCOTrainer runs with its import changed."""

import logging

import pytest
import tiny
from peft import LoraConfig
from small_runs import TOKENIZER

from bco_fast import BCOConfig, BCOTrainer


def _config(tmp_path, **options):
    return BCOConfig(
        **{
            "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "max_length": 64, "max_steps": 2,
            "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "save_strategy": "no", "logging_steps": 1,
        }
        | options
    )  # fmt: skip


def test_a_script_of_trl_runs(tmp_path):
    """The example of TRL's own documentation, but for the model and the data."""
    from datasets import Dataset

    rows = tiny.rows(24)
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in ("prompt", "completion", "label")})
    training_args = _config(tmp_path, precompute_ref_log_probs=True, max_prompt_length=32, max_completion_length=1)
    assert training_args.max_completion_length is None
    trainer = BCOTrainer(
        model=tiny.model(), ref_model=tiny.model(), args=training_args, train_dataset=dataset, eval_dataset=dataset.select(range(8)),
        processing_class=TOKENIZER, peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    line = next(e for e in trainer.state.log_history if "loss" in e)
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "delta",
    } <= line.keys()
    assert hasattr(trainer.model, "peft_config")


def test_defaults_are_trls(tmp_path):
    config = BCOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (config.learning_rate, config.beta, config.max_length) == (5e-7, 0.1, 1024)
    assert config.gradient_checkpointing is True
    assert config.bf16 is True
    assert config.disable_dropout is True
    assert config.logging_steps == 10


def test_models_may_be_paths_and_the_tokenizer_may_be_called_so(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    config = _config(tmp_path, model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"}, max_length=None)
    trainer = BCOTrainer(str(tmp_path / "model"), str(tmp_path / "model"), config, tiny.rows(8), tokenizer=TOKENIZER)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.args.max_length == 64
    trainer.train()


def test_dropout_is_switched_off(tmp_path):
    from transformers import GPT2Config

    model = tiny.model(GPT2Config, n_embd=32, n_layer=1, n_head=4, n_positions=64, resid_pdrop=0.1)
    trainer = BCOTrainer(model, None, _config(tmp_path), tiny.rows(8), None, TOKENIZER)
    assert all(m.p == 0.0 for m in trainer.model.modules() if type(m).__name__ == "Dropout")


def test_what_has_no_effect_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "bco_fast"):
        _config(tmp_path, prompt_sample_size=512, dataset_num_proc=4)
    assert "prompt_sample_size=512 has no effect" in caplog.text
    assert "dataset_num_proc=4 has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"generate_during_eval": True}, "generate_during_eval"), ({"is_encoder_decoder": True}, "causal"), ({"truncation_mode": "keep_start"}, "keep_start")],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)


def test_trainer_refuses(tmp_path):
    good = (tiny.model(), None, _config(tmp_path), tiny.rows(4), None, TOKENIZER)
    with pytest.raises(ValueError, match="bco-fast udm"):
        BCOTrainer(*good, embedding_func=lambda **k: None)
    with pytest.raises(ValueError, match="model_adapter_name"):
        BCOTrainer(*good, model_adapter_name="train")
    with pytest.raises(ValueError, match="BCOConfig"):
        BCOTrainer(tiny.model())
