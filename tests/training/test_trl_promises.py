"""Each of TRL's tests of its KTOTrainer, with the test here that promises the same, or the line of docs/from_trl.md that says
what differs."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from small_runs import TOKENIZER, config

from bco_fast import FeedbackTrainer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "from_trl.md").read_text()
IMAGES = "docs: images, alone or several a row, with either loss"
PROMISES = {
    # its collators
    "padding_and_masks": "data/test_data.py::test_tokens_are_prompt_completion_eos",
    "optional_reference_logps": "training/test_trainer.py::test_a_separate_reference_model",
    "with_pad_to_multiple_of": "cli/test_trl_yaml.py::test_trls_defaults_hold_and_what_has_no_effect_is_said",
    "mm_token_type_ids_shape": IMAGES,
    "output_keys": IMAGES,
    "kl_cycling": IMAGES,
    # what it trains from and on
    "train": "training/test_objectives_train.py::test_every_objective_raises_held_out_auc",
    "train_gpt_oss": "models/test_models.py::test_log_probabilities_are_those_of_the_logits",
    "tokenize_and_process_tokens": "data/test_data.py::test_tokens_are_prompt_completion_eos",
    "train_with_iterable_dataset": "data/test_sources.py::test_a_dataset_and_a_generator_are_iterables_of_dicts",
    "train_with_chat_template_kwargs": "data/test_chat.py::test_a_row_gives_its_template_variables",
    "train_toolcall_data": "data/test_chat.py::test_a_pair_that_parts_at_a_call_of_a_tool",
    "train_model_dtype": "models/test_parameters.py::test_choices_of_loading_are_said",
    "train_with_gradient_checkpointing": "models/test_parameters.py::test_saving_memory_changes_no_gradient",
    "trust_remote_code": "docs: `model_init_kwargs`, `trust_remote_code`, a tokenizer loaded by itself",
    # the reference
    "train_without_providing_ref_model": "training/test_trainer.py::test_the_reference_is_computed_once",
    "train_with_explicit_ref_model": "training/test_trainer.py::test_a_separate_reference_model",
    "train_with_ref_model_is_model_raises": "training/test_trl_compat.py::test_trainer_refuses",
    "train_with_sync_ref_model": "docs: `sync_ref_model` is refused, because a cached reference is fixed",
    "precompute_ref_log_probs_raises_for_iterable_dataset": "docs: streams are refused with a precomputed reference",
    # adapters
    "train_without_providing_ref_model_with_lora": "models/test_parameters.py::test_lora_trains_the_adapter_against_its_own_base",
    "train_peft_model": "training/test_trl_promises.py::test_an_adapter_trains_with_checkpointing_and_its_base_stays",
    "train_with_peft_config_and_gradient_checkpointing": "training/test_trl_promises.py::test_an_adapter_trains_with_checkpointing_and_its_base_stays",
    "peft_with_quantization": "models/test_parameters.py::test_a_quantised_base_keeps_the_stored_dtype_of_its_head",
    # evaluation
    "evaluate_with_raw_dataset": "training/test_evaluation_sets.py::test_rows_seen_late_give_the_metrics_of_rows_seen_early",
    "compute_metrics": "training/test_trl_promises.py::test_metrics_of_ones_own_join_the_others",
    "train_with_eval": "training/test_trainer_objectives.py::test_evaluation_is_the_loss_of_the_whole_set",
    "train_with_multiple_eval_dataset": "training/test_evaluation_sets.py::test_several_datasets_by_name",
    "init_with_eval_dataset_dict": "training/test_evaluation_sets.py::test_datasets_of_the_datasets_library",
    "tag_added": "docs: the model gets the tags `trl` and `kto` or `bco`",
    "tag_added_peft": "docs: the model gets the tags `trl` and `kto` or `bco`",
    # Liger
    "train_with_liger": "models/test_liger.py::test_a_run_records_what_it_used",
    "train_with_liger_kernel_and_peft": "models/test_liger.py::test_layers_are_replaced_and_compute_the_same",
    "liger_kernel_with_peft_lm_head_raises": "models/test_parameters.py::test_an_adapter_on_the_head_is_refused_never_ignored",
    "liger_kernel_with_peft_prompt_learning_raises": "models/test_parameters.py::test_prompt_tuning_is_refused_by_name",
    "init_fails_with_compute_metrics_and_liger": "docs: Liger's loss is refused with `compute_metrics` or a mixture of experts",
    "init_fails_with_moe_aux_loss_and_liger": "docs: Liger's loss is refused with `compute_metrics` or a mixture of experts",
    # checkpoints that read images
    "train_vlm_text_only_data": "models/test_multimodal.py::test_a_checkpoint_with_a_vision_tower_trains_and_is_saved_whole",
    "vision_dataset_with_text_model_raises": "models/test_multimodal.py::test_rows_with_images_are_refused_by_row",
    "train_vlm": IMAGES,
    "train_vlm_multi_image": IMAGES,
    "train_vlm_apo_zero_unpaired": IMAGES,
    "train_vlm_with_max_length": IMAGES,
    "precompute_ref_log_probs_raises_for_vision": IMAGES,
    "train_vlm_liger": IMAGES,
    "train_vlm_gemma_3n": IMAGES,
}


def test_every_promise_has_its_test_or_its_line():
    assert len(PROMISES) == 46
    for name, where in PROMISES.items():
        if where.startswith("docs: "):
            assert where.removeprefix("docs: ") in PAGE, name
        else:
            file, _, test = where.partition("::")
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), name


def test_metrics_of_ones_own_join_the_others(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"test": 0.25}

    held_out = tiny.rows(7, seed=1)
    own = FeedbackTrainer(tiny.model(), config(tmp_path), tiny.rows(8), held_out, processing_class=TOKENIZER, compute_metrics=metrics)  # fmt: skip
    plain = FeedbackTrainer(tiny.model(), config(tmp_path), tiny.rows(8), held_out, processing_class=TOKENIZER)
    found, expected = own.evaluate(), plain.evaluate()
    assert found.pop("eval_test") == 0.25
    assert found.keys() == expected.keys() >= {"eval_loss", "eval_rewards/auc"}
    assert found["eval_loss"] == expected["eval_loss"]
    assert seen == [(7, 1, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PEFT model"])
def test_an_adapter_trains_with_checkpointing_and_its_base_stays(tmp_path, wrapped):
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, given = (peft.get_peft_model(tiny.model(), adapter), {}) if wrapped else (tiny.model(), {"peft_config": adapter})  # fmt: skip
    args = config(tmp_path, max_steps=2, learning_rate=1e-2, gradient_checkpointing=True)
    trainer = FeedbackTrainer(model, args, tiny.rows(8), processing_class=TOKENIZER, **given)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora_" not in name), name
    assert any("lora_" in name for name in before)
