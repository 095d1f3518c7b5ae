"""A script written for TRL's BCOTrainer runs with its import changed."""

import logging
import os
import subprocess
from pathlib import Path

import chats
import numpy as np
import pytest
import tiny
import torch
import trl_script
from peft import LoraConfig
from small_runs import TOKENIZER
from transformers import AutoModelForCausalLM

from bco_fast import BCOConfig, BCOTrainer
from bco_fast.data.density_ratio import DensityRatio

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def published(tmp_path):
    """What the example script names on its command line: a model, a data set of two splits, an output folder."""
    tiny.model(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    tiny.write(tmp_path / "data" / "train.jsonl", tiny.rows(32))
    tiny.write(tmp_path / "data" / "test.jsonl", tiny.rows(8, seed=5))
    paths = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "cache_dir": "cache"}
    options = {name: str(tmp_path / folder) for name, folder in paths.items()}
    return [f"--{name}={value}" for name, value in (options | {"report_to": "none", "use_cpu": "true"}).items()]


@pytest.mark.parametrize(
    "flags",
    [pytest.param(trl_script.FULL, id="full", marks=pytest.mark.slow), pytest.param(trl_script.ADAPTER, id="adapter")],
)
def test_the_example_script_of_trl_runs_with_its_documented_flags(tmp_path, published, flags):
    trainer, embedder, before = trl_script.run([*flags, *published])
    args = trainer.args
    assert (args.per_device_eval_batch_size, args.max_prompt_length, args.warmup_steps) == (32, 1536, 0.1)
    assert (args.bf16, args.remove_unused_columns, args.max_completion_length) == (True, False, None)
    assert trainer.state.global_step == 2
    assert (tmp_path / "out" / ("adapter_config.json" if flags is trl_script.ADAPTER else "config.json")).exists()
    # Each prompt of the training and held-out rows once, and none while training.
    assert before == embedder.prompts <= 32 + 8


@pytest.mark.slow
def test_the_example_script_runs_with_trls_own_argument_classes(published):
    python = ROOT / ".venv-peers-trl-1.12" / "bin" / "python"
    if not python.exists():
        pytest.skip("make venv-peers builds the environment of TRL 1.12")
    script = ROOT / "tests" / "training" / "trl_script.py"
    done = subprocess.run([python, script, *trl_script.ADAPTER, *published], capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.stdout.endswith("trained 2\n"), done.stderr[-3000:]


def test_the_weights_of_embedding_func_are_the_density_ratios(tmp_path):
    """Against the ratio fitted on the same vectors, one prompt at a time; a weight in the data is multiplied."""
    train, held_out = tiny.rows(48), tiny.rows(16, seed=5)
    train[0]["weight"] = 3.0
    embedder = trl_script.Embedder(len(TOKENIZER))
    config = _config(tmp_path, min_density_ratio=0.7, max_density_ratio=1.4)
    trainer = BCOTrainer(tiny.model(), None, config, train, held_out, TOKENIZER, embedding_func=embedder, embedding_tokenizer=TOKENIZER)  # fmt: skip

    class Vectors:
        def embed(self, texts):
            ids = [torch.tensor(TOKENIZER(text, add_special_tokens=False)["input_ids"]) for text in texts]
            return np.stack([embedder.table.weight[i].mean(0).detach().double().numpy() for i in ids])

        fit = embed

    ratio = DensityRatio(Vectors(), seed=config.seed)
    up_first = sorted(train, key=lambda row: not row["label"])
    ratio.fit([row["prompt"] for row in up_first], [row["label"] for row in up_first])
    for rows, dataset in ((train, trainer.train_dataset), (held_out, trainer.eval_dataset)):
        expected = np.where(
            [r["label"] for r in rows], 1.0, np.clip(ratio.ratio([r["prompt"] for r in rows]), 0.7, 1.4)
        )
        expected *= [row.get("weight", 1.0) for row in rows]
        np.testing.assert_allclose([example.weight for example in dataset.examples], expected, rtol=1e-4)
        assert np.ptp(expected) > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_tokenizer": None}, "embedding_tokenizer"),
        ({"embedding_func": lambda input_ids, attention_mask: input_ids[0]}, r"\[4, D\] for 4 prompts"),
        ({"embedding_func": lambda input_ids, attention_mask: input_ids * float("nan")}, "not finite"),
    ],
)
def test_an_embedding_func_that_cannot_be_used(tmp_path, options, message):
    given = {"embedding_func": trl_script.Embedder(len(TOKENIZER)), "embedding_tokenizer": TOKENIZER} | options
    with pytest.raises(ValueError, match=message):
        BCOTrainer(tiny.model(), None, _config(tmp_path), tiny.rows(16), None, TOKENIZER, **given)


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
        config = _config(tmp_path, prompt_sample_size=512, dataset_num_proc=4)
        BCOTrainer(tiny.model(), None, config, tiny.rows(4), None, TOKENIZER)
    assert "prompt_sample_size=512 has no effect without embedding_func" in caplog.text
    assert "dataset_num_proc=4 has no effect" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"generate_during_eval": True}, "generate_during_eval"), ({"is_encoder_decoder": True}, "causal"), ({"truncation_mode": "keep_start"}, "keep_start"), ({"min_density_ratio": 2.0, "max_density_ratio": 1.0}, "0 < min <= max"), ({"prompt_sample_size": 0}, "prompt_sample_size"), ({"warmup_ratio": 0.1, "warmup_steps": 3}, "leave one out")],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)


def test_trainer_refuses(tmp_path):
    good = (tiny.model(), None, _config(tmp_path), tiny.rows(4), None, TOKENIZER)
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        BCOTrainer(good[0], *good[:1], *good[2:])
    with pytest.raises(ValueError, match="model_adapter_name"):
        BCOTrainer(*good, model_adapter_name="train")
    with pytest.raises(ValueError, match="BCOConfig"):
        BCOTrainer(tiny.model())


IMPLICIT = {
    "standard": {"chosen": "The sky is blue.", "rejected": "The sky is black."},
    "conversational": {
        "chosen": [{"role": "user", "content": "The sky?"}, {"role": "assistant", "content": "blue"}],
        "rejected": [{"role": "user", "content": "The sky?"}, {"role": "assistant", "content": "green"}],
    },
}


@pytest.mark.parametrize("kind", IMPLICIT)
def test_pairs_without_a_prompt_train(tmp_path, kind):
    rows = [IMPLICIT[kind]] * 2
    tokenizer = TOKENIZER if kind == "standard" else chats.TOKENIZER
    model = tiny.model(vocab_size=len(tokenizer))
    trainer = BCOTrainer(model, None, _config(tmp_path, max_steps=1), rows, None, tokenizer)
    assert [example.label for example in trainer.train_dataset.examples] == [True, False, True, False]
    trainer.train()


def test_the_tokenizer_is_that_of_the_models_checkpoint(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"pass the tokenizer, because .*model has none"):
        BCOTrainer(str(tmp_path / "model"), None, _config(tmp_path), tiny.rows(4))
    TOKENIZER.save_pretrained(tmp_path / "model")
    for model in (str(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        trainer = BCOTrainer(model, None, _config(tmp_path), tiny.rows(4))
        assert trainer.processing_class.get_vocab() == TOKENIZER.get_vocab()
