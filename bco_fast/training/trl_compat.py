"""`BCOTrainer` and `BCOConfig`: a script written for TRL <= 1.12 runs with its import changed.

TRL removed its BCO trainer in 2026. What each of its arguments became is in docs/from_trl.md; none is ignored in silence.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from ..models.load import read_weights
from .config import FeedbackConfig, _option
from .policy import tokenizer_of
from .prompt_matching import PromptMatching
from .trainer import FeedbackTrainer

logger = logging.getLogger("bco_fast")

# What these asked for happens anyway, or has no counterpart that could change a result.
_NEEDLESS = {
    "precompute_ref_log_probs": "the reference is always computed once and cached",
    "precompute_ref_batch_size": "reference_tokens_per_batch sets the size of the reference's batches",
    "dataset_num_proc": "rows are tokenized in this process",
    "max_completion_length": "it concerned encoder-decoders only",
    "label_pad_token_id": "it was internal",
    "padding_value": "padding is never looked at",
}

_MATCHING = ("prompt_sample_size", "min_density_ratio", "max_density_ratio")


def _of_model_config(default):
    """No argument of BCOConfig, because scripts parse it together with TRL's ModelConfig, which has the same flag."""
    return field(default=default, init=False)


@dataclass
class BCOConfig(FeedbackConfig):
    """`FeedbackConfig` with the names and the defaults of TRL's BCOConfig.

    What TRL's ModelConfig holds (attention backend, LoRA, quantisation) is no argument here: scripts pass a loaded model,
    `model_init_kwargs` and `peft_config`.

    One thing differs: δ is the paper's, the midpoint of the two classes' running means (Eq. 7 of arXiv 2404.04656). TRL's
    was the pooled mean of all rewards, updated in every micro-batch; `shift_mode="cumulative", shift_balanced=False,
    shift_update="micro"` gives that one.

    Raises:
        ValueError: an option that cannot be honoured: encoder-decoders, generation during evaluation.
    """

    learning_rate: float = _option(5e-7, "Peak learning rate of AdamW.")
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward.")
    # True instead of TRL's None, with which HfArgumentParser refuses a bare --bf16; fp16 takes its place.
    bf16: bool | None = _option(True, "Compute in bfloat16; fp16 takes its place.")
    max_length: int | None = _option(1024, "Tokens of prompt and completion together; None for the model's positions.")
    disable_dropout: bool = _option(True, "Set every dropout of the model to 0.")
    truncation_mode: str = _option("keep_end", "Which end of a prompt that is too long stays.", choices=["keep_end"])
    generate_during_eval: bool = _option(False, "Not supported.")
    is_encoder_decoder: bool | None = _option(None, "Not supported.")
    model_init_kwargs: dict | None = field(
        default=None, metadata={"help": "Of from_pretrained, when the model is a path."}
    )
    max_completion_length: int | None = _option(None, "Without effect: it concerned encoder-decoders.")
    precompute_ref_log_probs: bool = _option(False, "Without effect: the reference is always computed once and cached.")
    precompute_ref_batch_size: int | None = _option(None, "Without effect: see reference_tokens_per_batch.")
    dataset_num_proc: int | None = _option(None, "Without effect.")
    prompt_sample_size: int = _option(1024, "Rows of each class that the density ratio of embedding_func is fitted on.")
    min_density_ratio: float = _option(0.5, "Lower bound of the weight of a thumbs down, with embedding_func.")
    max_density_ratio: float = _option(10.0, "Upper bound of the weight of a thumbs down, with embedding_func.")
    label_pad_token_id: int = _option(-100, "Without effect.")
    padding_value: int | None = _option(None, "Without effect.")
    warmup_ratio: float = _option(
        0.0, "Share of the steps in which the learning rate rises; warmup_steps below 1 does the same."
    )
    remove_unused_columns: bool = _option(True, "Without effect: the dataset holds tokens, not columns.")

    attn_implementation: str | None = _of_model_config(None)
    load_in_4bit: bool = _of_model_config(False)
    load_in_8bit: bool = _of_model_config(False)
    use_peft: bool = _of_model_config(False)
    lora_r: int = _of_model_config(32)
    lora_alpha: int = _of_model_config(64)
    lora_dropout: float = _of_model_config(0.0)
    lora_target_modules: str = _of_model_config("all-linear")
    lora_modules_to_save: str = _of_model_config("")

    def __post_init__(self):
        self.remove_unused_columns = False
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps both set the warm-up: leave one out")
        if self.warmup_ratio and "warmup_ratio" not in FeedbackConfig.__dataclass_fields__:  # gone in transformers 5
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, 0.0
        if self.generate_during_eval:
            raise ValueError("generate_during_eval is not supported: generate in a TrainerCallback's on_evaluate")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder: bco_fast trains causal language models")
        if self.truncation_mode != "keep_end":
            raise ValueError(
                "truncation_mode='keep_start' is not supported: a prompt's end is what the completion answers"
            )
        self.bf16 = not self.fp16 if self.bf16 in (None, True) else False
        super().__post_init__()
        defaults = type(self).__dataclass_fields__
        for name, instead in _NEEDLESS.items():
            if getattr(self, name) != defaults[name].default:
                logger.warning("%s=%r has no effect: %s", name, getattr(self, name), instead)
        self.max_completion_length = None  # FeedbackConfig's would cut
        if not 0 < self.min_density_ratio <= self.max_density_ratio < math.inf:
            raise ValueError(
                "min_density_ratio and max_density_ratio must be 0 < min <= max, not "
                f"{self.min_density_ratio} and {self.max_density_ratio}"
            )
        if self.prompt_sample_size < 1:
            raise ValueError(f"prompt_sample_size must be at least 1, not {self.prompt_sample_size}")

    def _given(self, name: str) -> bool:
        return name != "remove_unused_columns" and super()._given(name)


class BCOTrainer(FeedbackTrainer):
    """`FeedbackTrainer` with the arguments of TRL's BCOTrainer.

    Args:
        model, ref_model: models, or paths of them; ref_model is needed only if it is not `model` itself.
        args: a `BCOConfig`.
        train_dataset, eval_dataset: rows of prompt, completion, label (TRL's format), or what `FeedbackTrainer` takes.
        processing_class: the tokenizer (`tokenizer=` in older scripts); by default the model's own.
        peft_config: wraps the model in an adapter; its base is then the reference.
        embedding_func: called with `input_ids` and `attention_mask` [B, T] of prompts, returns their vectors [B, D]. The
            density ratio is fitted on them here, once, and weighs the thumbs down of both datasets (`prompt_matching`).
        embedding_tokenizer: makes these tokens; needed with embedding_func.
        **kwargs: of `FeedbackTrainer`.

    Raises:
        ValueError: several adapters, or embedding_func without its tokenizer or with an objective that reads no thumbs.
        FeedbackError: the prompts of one class, or too few, with embedding_func.
    """

    def __init__(
        self,
        model=None,
        ref_model=None,
        args: BCOConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        tokenizer=None,
        embedding_func=None,
        embedding_tokenizer=None,
        model_adapter_name=None,
        ref_adapter_name=None,
        **kwargs,
    ):
        names = (
            "data_collator",
            "model_init",
            "callbacks",
            "optimizers",
            "preprocess_logits_for_metrics",
            "peft_config",
        )
        kwargs |= dict(zip(names, positional, strict=False))
        if model_adapter_name is not None or ref_adapter_name is not None:
            raise ValueError("model_adapter_name and ref_adapter_name: the reference is the base, or pass ref_model=")
        if args is None:
            raise ValueError("args is missing: pass a BCOConfig")
        options = dict(getattr(args, "model_init_kwargs", None) or {})
        trusted = getattr(args, "trust_remote_code", False)
        if options:
            model, ref_model = (_load(m, trusted, options) for m in (model, ref_model))
        if args.max_length is None:
            args.max_length = _positions(model)
        if args.shift_mode is None:
            logger.info("δ is the midpoint of the classes' running means (the paper's); TRL pooled all rewards")
        processing_class = tokenizer if processing_class is None else processing_class
        if embedding_func is None:
            _say_what_is_needless(args)
        else:
            matching = PromptMatching(embedding_func, embedding_tokenizer, args)
            processing_class = processing_class or tokenizer_of(model, args)
            train_dataset, eval_dataset = matching.weighted(train_dataset, eval_dataset, processing_class)
        super().__init__(
            model, args, train_dataset, eval_dataset, processing_class=processing_class,
            ref_model=_load(ref_model, trusted, {}), **kwargs,
        )  # fmt: skip


def _say_what_is_needless(args) -> None:
    for name in _MATCHING:
        if getattr(args, name, None) != BCOConfig.__dataclass_fields__[name].default:
            logger.warning("%s=%r has no effect without embedding_func", name, getattr(args, name))


def _load(model, trusted: bool, options: dict):
    if not isinstance(model, str):
        return model
    return read_weights(model, trusted, **options)


def _positions(model) -> int:
    config = getattr(model, "config", None)
    positions = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        raise ValueError("max_length=None: the model does not say how many positions it has, give a number")
    return positions
