"""`BCOTrainer` and `BCOConfig`: a script written for TRL <= 1.12 runs with its import changed.

TRL removed its BCO trainer in 2026. What each of its arguments became is in docs/from_trl.md; none is ignored in silence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from ..models.load import read_weights
from .config import FeedbackConfig, _option
from .trainer import FeedbackTrainer

logger = logging.getLogger("bco_fast")

# What these asked for happens anyway, or has no counterpart that could change a result.
_NEEDLESS = {
    "precompute_ref_log_probs": "the reference is always computed once and cached",
    "precompute_ref_batch_size": "reference_tokens_per_batch sets the size of the reference's batches",
    "dataset_num_proc": "rows are tokenized in this process",
    "prompt_sample_size": "bco-fast udm fits on all prompts",
    "min_density_ratio": "an option of bco-fast udm",
    "max_density_ratio": "an option of bco-fast udm",
    "max_completion_length": "it concerned encoder-decoders only",
    "label_pad_token_id": "it was internal",
    "padding_value": "padding is never looked at",
}


@dataclass
class BCOConfig(FeedbackConfig):
    """`FeedbackConfig` with the names and the defaults of TRL's BCOConfig.

    One thing differs: δ is the paper's, the midpoint of the two classes' running means (Eq. 7 of arXiv 2404.04656). TRL's
    was the pooled mean of all rewards, updated in every micro-batch; `shift_mode="cumulative", shift_balanced=False,
    shift_update="micro"` gives that one.

    Raises:
        ValueError: an option that cannot be honoured: encoder-decoders, generation during evaluation.
    """

    learning_rate: float = _option(5e-7, "Peak learning rate of AdamW.")
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward.")
    bf16: bool | None = _option(None, "Compute in bfloat16. Default: yes, unless fp16 is set.")
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
    prompt_sample_size: int = _option(1024, "Without effect: an option of bco-fast udm.")
    min_density_ratio: float = _option(0.5, "Without effect: an option of bco-fast udm.")
    max_density_ratio: float = _option(10.0, "Without effect: an option of bco-fast udm.")
    label_pad_token_id: int = _option(-100, "Without effect.")
    padding_value: int | None = _option(None, "Without effect.")

    def __post_init__(self):
        if self.generate_during_eval:
            raise ValueError("generate_during_eval is not supported: generate in a TrainerCallback's on_evaluate")
        if self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder: bco_fast trains causal language models")
        if self.truncation_mode != "keep_end":
            raise ValueError(
                "truncation_mode='keep_start' is not supported: a prompt's end is what the completion answers"
            )
        if self.bf16 is None:
            self.bf16 = not self.fp16
        super().__post_init__()
        defaults = type(self).__dataclass_fields__
        for name, instead in _NEEDLESS.items():
            if getattr(self, name) != defaults[name].default:
                logger.warning("%s=%r has no effect: %s", name, getattr(self, name), instead)
        self.max_completion_length = None  # FeedbackConfig's would cut


class BCOTrainer(FeedbackTrainer):
    """`FeedbackTrainer` with the arguments of TRL's BCOTrainer.

    Args:
        model, ref_model: models, or paths of them; ref_model is needed only if it is not `model` itself.
        args: a `BCOConfig`.
        train_dataset, eval_dataset: rows of prompt, completion, label (TRL's format), or what `FeedbackTrainer` takes.
        processing_class: the tokenizer (`tokenizer=` in older scripts).
        peft_config: wraps the model in an adapter; its base is then the reference.
        **kwargs: of `FeedbackTrainer`.

    Raises:
        ValueError: embedding_func (distribution matching is `bco-fast udm` now), several adapters.
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
        if embedding_func is not None or embedding_tokenizer is not None:
            raise ValueError(
                "embedding_func: distribution matching is a step of its own now, which writes weights into the data: "
                "bco-fast udm --data FILE --embedder PATH --output FILE"
            )
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
        super().__init__(
            model, args, train_dataset, eval_dataset,
            processing_class=tokenizer if processing_class is None else processing_class,
            ref_model=_load(ref_model, trusted, {}), **kwargs,
        )  # fmt: skip


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
