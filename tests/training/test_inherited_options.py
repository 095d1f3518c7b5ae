"""No option of `TrainingArguments` is ignored: each is used or refused, and a new one must be put into a table here."""

import dataclasses

import pytest
import tiny
from small_runs import TOKENIZER, config
from transformers import TrainingArguments

from bco_fast import FeedbackConfig, FeedbackTrainer
from bco_fast.training.config import NOT_READ, ROWS_ONLY

USED = {
    "the Trainer's loop, optimizer and schedule": """
        per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
        optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules gradient_accumulation_steps
        max_grad_norm neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size seed full_determinism""",
    "the Trainer's precision, memory and devices": """
        bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
        gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
        use_liger_kernel liger_kernel_config use_cache use_cpu accelerator_config parallelism_config fsdp fsdp_config deepspeed
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout debug
        skip_memory_metrics local_rank""",
    "the Trainer's logging": """
        logging_strategy logging_steps logging_first_step log_on_each_node include_num_input_tokens_seen log_level
        log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id""",
    "the Trainer's evaluation": """
        eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
        eval_use_gather_object eval_accumulation_steps load_best_model_at_end metric_for_best_model greater_is_better""",
    "the Trainer's saving": """
        output_dir save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub
        hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision""",
    "the Trainer's loader": """
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
        dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order""",
    "resume": "resume_from_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
    "ours": "data_seed",
    "what `bco-fast train` does anyway": "do_train do_eval",
}

INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
OTHER = {
    "label_smoothing_factor": 0.1,
    "remove_unused_columns": True,
    "logging_nan_inf_filter": True,
    "label_names": ["x"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "size",
    "average_tokens_across_devices": False,
    "eval_do_concat_batches": False,
    "batch_eval_metrics": True,
    "include_for_metrics": ["loss"],
    "do_predict": True,
    "per_device_train_batch_size": 4,
    "auto_find_batch_size": True,
    "dataloader_drop_last": True,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
}


def _config(**options):
    workers = {"dataloader_num_workers": 1} if any(name.startswith("dataloader_") for name in options) else {}
    return FeedbackConfig(output_dir="out", use_cpu=True, report_to="none", **workers | options)


def test_every_option_is_used_or_refused():
    used = [name for names in USED.values() for name in names.split()]
    assert len(used) == len(set(used))
    assert set(used) | set(NOT_READ) == INHERITED
    assert not set(used) & set(NOT_READ)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}=.*cannot be honoured: "):
        _config(**{name: OTHER[name]})


@pytest.mark.parametrize("name", ROWS_ONLY)
def test_what_a_token_budget_replaces_is_refused_beside_it(name):
    _config(**{name: OTHER[name]})
    with pytest.raises(ValueError, match=f"tokens_per_batch .* does not read {name}"):
        _config(tokens_per_batch=100, **{name: OTHER[name]})


@pytest.mark.parametrize("loss_type", ["bco", "dpo"])
def test_a_token_budget_that_a_row_exceeds_is_refused(tmp_path, loss_type):
    with pytest.raises(ValueError, match=r"tokens_per_batch is 4, but row \d+ \(counted from 0\) alone has \d+ tokens"):
        FeedbackTrainer(
            tiny.model(),
            config(tmp_path, tokens_per_batch=4, loss_type=loss_type),
            tiny.feedback_for(loss_type, 8),
            processing_class=TOKENIZER,
        )


@pytest.mark.parametrize("axis", ["tp_size", "cp_size"])
def test_splitting_a_row_over_ranks_is_refused(axis):
    from types import SimpleNamespace

    made = _config()
    made.parallelism_config = SimpleNamespace(**{axis: 2})
    with pytest.raises(ValueError, match=f"{axis} is not supported"):
        made._check_inherited()
