"""`FeedbackConfig`: the Hugging Face `TrainingArguments` with the options of objectives on feedback."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import transformers
from transformers import TrainingArguments

from ..losses import OBJECTIVES, Objective
from ..losses.divergence import DIVERGENCES
from ..losses.reward_shift import MODES, RewardShift
from ..losses.sums import Sum, find_objective
from . import values


def _option(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


NOT_READ = {
    "label_smoothing_factor": "the objective is the loss",
    "remove_unused_columns": "the dataset holds tokens, not columns",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "label_names": "batches have one form",
    "train_sampling_strategy": "batch_composition and share_prompts decide the order of the rows",
    "length_column_name": "the dataset holds tokens, not columns",
    "average_tokens_across_devices": "the loss of a step is always that of all its rows on all devices",
    "eval_do_concat_batches": "metrics are those of all held-out rows together",
    "batch_eval_metrics": "metrics are those of all held-out rows together",
    "include_for_metrics": "metrics are computed from rewards and labels",
    "do_predict": "bco-fast generate writes completions",
}
"""Options of TrainingArguments without effect here, and why; another value than the default is refused."""

NOT_READ_4 = {"group_by_length": NOT_READ["train_sampling_strategy"]}
"""The same of transformers 4."""

ROWS_ONLY = (
    "per_device_train_batch_size", "auto_find_batch_size", "dataloader_drop_last", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
)  # fmt: skip
"""Options that `tokens_per_batch` replaces."""


@dataclass
class FeedbackConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the options of objectives on feedback.

    Raises:
        ValueError: an option is out of its range, or belongs to another kind of objective than `loss_type`.
    """

    output_dir: str | None = _option(None, "Folder for checkpoints, the model, its card and the log; required")
    overwrite_output_dir: bool = _option(
        False, "Delete the run that is in output_dir; without it, `bco-fast` refuses to train there."
    )
    learning_rate: float = _option(5e-6, "Peak learning rate of AdamW, per optimizer step.")
    logging_steps: float = _option(10, "Optimizer steps between log lines; below 1, a share of all steps.")
    remove_unused_columns: bool = _option(False, "Always false: the dataset holds tokens, not columns.")
    logging_nan_inf_filter: bool = _option(False, "Always false: a loss that is not finite stops the run.")

    loss_type: list[str] | str = _option(  # noqa: RUF009
        "bco", f"Objective, or several for their weighted sum: {', '.join(OBJECTIVES)}.", choices=OBJECTIVES
    )
    loss_weights: list[float] | None = _option(  # noqa: RUF009
        None, "Weights of a sum of objectives, > 0. Default: 1 each."
    )
    beta: float | None = _option(
        None, "Reward per nat of log-ratio, > 0. Default: the paper's, 0.1 for most, see docs/objectives.md."
    )
    reduction: str = _option(
        "mean",
        "Reduction of an unpaired objective: mean over the batch, or class_mean, the sum of the two class means.",
        choices=["mean", "class_mean"],
    )
    shift_mode: str | None = _option(
        None,
        "How δ is estimated from the rewards: ema, cumulative, batch or fixed (0). Default: ema for bco and una_reward, "
        "fixed for the other una objectives.",
        choices=list(MODES),
    )
    shift_decay: float = _option(0.9, "Decay of δ's moving average per optimizer step, [0, 1).")
    shift_balanced: bool = _option(True, "Weigh both classes equally in δ (Eq. 7 of BCO); else rewards are pooled.")
    shift_update: str = _option(
        "step",
        "When δ is updated: step, after an optimizer step, or micro, before the loss of each micro-batch.",
        choices=["step", "micro"],
    )
    slic_delta: float = _option(1.0, "Margin of slic, nats, > 0.")
    sft_weight: float = _option(0.0, "Weight of the chosen completion's likelihood in slic, >= 0.")
    gamma: float = _option(1.0, "Target margin of simpo, in reward units, >= 0.")
    lam: float = _option(0.1, "Weight of the odds ratio in orpo, >= 0.")
    label_smoothing: float = _option(
        0.0, "Share of pairs that dpo, robust and aot expect to be the wrong way round, [0, 0.5)."
    )
    f_divergence_type: str = _option(
        "reverse_kl",
        "Divergence in dpo and six others (docs/objectives.md).",
        choices=list(DIVERGENCES),
    )
    f_alpha_divergence_coef: float = _option(0.5, "Of alpha_divergence, mostly in [0, 1]; 1 is reverse_kl.")
    exo_epsilon: float = _option(
        0.001, "Share of the probability that exo_pair leaves to the rejected completion, (0, 0.5)."
    )
    discopop_tau: float = _option(0.05, "Width of discopop's modulation, in reward units, (0, 1).")
    nll_weight: float = _option(1.0, "Weight of the chosen completion's likelihood in cpo, >= 0.")
    alpha: float = _option(0.01, "Reward per token of length in rdpo, >= 0.")
    length_normalized: bool = _option(False, "Let ipo compare means over tokens, as in TRL, instead of sums.")

    desirable_weight: str = _option(
        "1", "λ that multiplies the cost of thumbs up; auto: n-/n+ or n+/n- on the rarer class, to balance the classes."
    )
    undesirable_weight: float = _option(1.0, "λ that multiplies the cost of thumbs down, >= 0.")
    oversample: bool = _option(False, "Repeat rows of the rarer class until both are equally frequent.")
    batch_composition: str = _option(
        "random",
        "Order of the rows: random, or stratified, every batch with the classes in the dataset's proportion.",
        choices=["random", "stratified"],
    )
    pairing_ratio: float = _option(
        1.0, "Share of pairs that an unpaired objective sees both sides of; of the others, one side at random, [0, 1]."
    )

    model_dtype: str = _option(
        "auto",
        "Dtype of the weights of a model loaded from a path. auto: float32 if all are trained, else as stored.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    trust_remote_code: bool = _option(
        False,
        "Run the Python code in the folder of a model or tokenizer. Only for folders that you would run as a program.",
    )
    attn_implementation: str | None = _option(
        None,
        "Attention backend; flash: FlashAttention. Default: flash-attn, else SDPA.",
    )
    liger: str = _option(
        "auto",
        "Liger's RMSNorm, rotary positions and SwiGLU in the layers: true, false, or auto, on a GPU where liger-kernel is "
        "installed and knows the family.",
        choices=["auto", "true", "false"],
    )
    load_in_4bit: bool = _option(False, "QLoRA: load the base in 4 bits (NF4), its head in the stored dtype.")
    load_in_8bit: bool = _option(False, "Load the base in 8 bits, its head in the stored dtype.")
    use_peft: bool = _option(False, "Train a LoRA adapter; the base with the adapter disabled is the reference.")
    lora_r: int = _option(32, "Rank of the adapter, dimensions.")
    lora_alpha: int = _option(64, "Scale of the adapter: alpha / r multiplies its output.")
    lora_dropout: float = _option(0.0, "Dropout on the adapter's input, [0, 1).")
    lora_target_modules: str = _option("all-linear", "Modules with an adapter, comma-separated, or all-linear.")
    lora_modules_to_save: str = _option(
        "", "Modules trained in full beside the adapter, comma-separated, e.g. lm_head."
    )

    disable_dropout: bool = _option(
        False, "Set every nn.Dropout of the model to 0, so that rewards start at 0 in training."
    )

    padding_free: bool = _option(False, "Pack the sequences of a batch end to end instead of padding them.")
    share_prompts: str = _option(
        "auto",
        "Compute a prompt once for all of its completions in a micro-batch: true, false, or auto, where the model can and it "
        "saves a tenth of the tokens and 64 a completion.",
        choices=["auto", "true", "false"],
    )
    tokens_per_batch: int | None = _option(
        None,
        "Largest micro-batch in tokens (padded ones without padding_free), instead of rows. Default: no limit.",
    )
    activation_offloading: bool = _option(
        False, "Keep saved activations in host memory; with gradient_checkpointing, for long context."
    )
    layer_checkpoints: int | None = _option(
        None,
        "Hidden states that gradient_checkpointing keeps at most; fewer than the layers cost up to two more forwards. "
        "Default: one for each layer.",
    )
    long_context: str = _option(
        "off",
        "auto: before training, count what a step takes and turn on gradient_checkpointing, layer_chunk_tokens, "
        "activation_offloading and layer_checkpoints, in this order, until it fits.",
        choices=["off", "auto"],
    )
    mlp_chunk_tokens: int | None = _option(
        None, "Tokens that an MLP processes at a time, for long context. Default: all."
    )
    layer_chunk_tokens: int | None = _option(
        None,
        "Tokens that norms, projections and MLPs process at a time, recomputed in the backward, for long context. Default: "
        "all.",
    )

    max_length: int = _option(1024, "Longest row: prompt and completion together, tokens.")
    max_prompt_length: int | None = _option(
        None, "Tokens that a prompt keeps, from its end, if the row is too long. Default: half of max_length."
    )
    max_completion_length: int | None = _option(
        None, "Tokens that a completion keeps, from its beginning, even in a short row. Default: no limit of its own."
    )
    chat_template: str | None = _option(
        None, "Chat template: the path of a Jinja file, or the template. Default: the tokenizer's."
    )
    on_bad_row: str = _option(
        "error",
        "What to do with a bad row of feedback: error, or skip (counted and logged).",
        choices=["error", "skip"],
    )
    columns: str | None = _option(None, "Names of columns in the data, ours=theirs: completion=response,label=kto_tag.")
    labels: str | None = _option(
        None, "Values of label that are thumbs: up=1,down=-1 or up=4|5,down=1|2,ignore=3. Default: true and false."
    )
    score_scale: str | None = _option(None, "Lowest and highest score in the data, as in 1,5. Default: 0,1.")
    ref_adapter: str | None = _option(None, "Adapter on the same base that is the reference: a folder. Default: none.")
    cache_dir: str | None = _option(
        None, "Folder of the reference cache. Default: $BCO_FAST_CACHE, or bco_fast in the user's cache folder."
    )
    reference_tokens_per_batch: int = _option(8192, "Padded tokens in one forward pass of the reference model.")
    backend: str = _option(
        "auto",
        "Backend of the fused head: auto, triton, torch or reference.",
        choices=["auto", "triton", "torch", "reference"],
    )
    workspace_bytes: int = _option(256 << 20, "Limit in bytes for the logits tiles of the fused head.")
    sparse_tolerance: float = _option(
        0.0,
        "Share of the L1 norm of the logits' gradient that the backward of a trainable head may leave out, [0, 1). 0: the "
        "exact backward.",
    )

    def __post_init__(self):
        values.check_texts(self)
        super().__post_init__()
        if not isinstance(self.loss_type, str):  # None: HfArgumentParser drops the default of a list
            self.loss_type = "+".join(self.loss_type or [type(self).__dataclass_fields__["loss_type"].default])
        find_objective(self.loss_type, self.loss_weights)  # raises on names and weights that do not fit
        if self.beta is None:
            self.beta = self.objective.beta
        elif self.objective.beta is None:
            raise ValueError(f"{self.loss_type} has no beta")
        self._check_inherited()
        self._check_weights()
        values.check_numbers(self)
        values.check_others(self)
        self._check_fit()
        self._leave_the_head_to_us()
        if self.data_seed is None:
            self.data_seed = self.seed  # else the order of the rows follows torch's seed of the moment, also on resume
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin for; torch would warn at every start
        self.new_shift()  # raises on a bad mode or decay

    def _given(self, name: str) -> bool:
        field = type(self).__dataclass_fields__.get(name)  # None: this transformers has no such option
        return field is not None and getattr(self, name) not in (field.default, [], {}, "")

    def _check_inherited(self) -> None:
        """Options of TrainingArguments that nothing here would read are refused, like those of another objective."""
        for name, reason in (NOT_READ | NOT_READ_4).items():
            if self._given(name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be honoured: {reason}")
        for name in ROWS_ONLY if self.tokens_per_batch is not None else ():
            if self._given(name):
                raise ValueError(f"tokens_per_batch makes batches of its own and does not read {name}: leave one out")
        if self.save_strategy == "best" and transformers.__version__.startswith("4."):
            raise ValueError(
                "save_strategy='best' loses the best checkpoint with transformers 4: use 'steps', or pip install -U transformers"
            )
        for axis in ("tp_size", "cp_size", "sp_size"):
            if getattr(self.parallelism_config, axis, 1) > 1:
                raise ValueError(f"parallelism_config: {axis} is not supported; use fsdp or deepspeed")

    def _check_weights(self) -> None:
        if self.desirable_weight != "auto":
            try:
                self.desirable_weight = float(self.desirable_weight)
            except ValueError:
                raise ValueError(
                    f"desirable_weight must be a number or 'auto', not {self.desirable_weight!r}"
                ) from None
        elif self.undesirable_weight != 1.0:
            raise ValueError("desirable_weight='auto' sets both weights: leave undesirable_weight at 1")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError(
                "quantised weights cannot be trained themselves: load_in_4bit and load_in_8bit need use_peft"
            )
        if self.long_context not in ("off", "auto"):
            raise ValueError(f"long_context must be off or auto, not {self.long_context!r}")
        if self.share_prompts not in ("auto", "true", "false"):
            raise ValueError(f"share_prompts must be auto, true or false, not {self.share_prompts!r}")

    def _check_fit(self) -> None:
        """Options that the objective would ignore are refused: somebody meant something by them."""
        ours = type(self).__dataclass_fields__
        unpaired = ("reduction", "desirable_weight", "undesirable_weight", "oversample", "batch_composition", "pairing_ratio")  # fmt: skip
        objective = find_objective(self.loss_type, self.loss_weights)
        useless = {
            "pairs": unpaired if objective.paired else [],
            "shift": [] if objective.shift else ("shift_mode",),
            "tokens": ("reduction",) if objective.mean_over_tokens else [],
            "lengths": [] if objective.lengths is None else ("length_normalized",),
            "scores": [] if objective.data == "labels" else ("pairing_ratio",),
            "own": [name for other in OBJECTIVES.values() for name in other.options if name not in objective.options],
        }
        for name in (name for names in useless.values() for name in names):
            value, default = getattr(self, name), ours[name].default
            if value != default and not (name == "desirable_weight" and value == 1.0):
                raise ValueError(f"{self.loss_type} does not read {name} (given: {value!r})")
        if self.ref_adapter is not None and not objective.reference:
            raise ValueError(f"{self.loss_type} does not read ref_adapter: it has no reference")
        if self._given("f_alpha_divergence_coef") and self.f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef is for f_divergence_type alpha_divergence, not {self.f_divergence_type}"
            )
        other = [name for name, part in getattr(objective, "parts", {}).items() if part.reference and "f_divergence_type" not in part.options]  # fmt: skip
        if other and self._given("f_divergence_type"):
            raise ValueError(f"f_divergence_type is not defined for {other[0]}, a part of {self.loss_type}")
        if objective.batchwise and (self.tokens_per_batch is not None or self.per_device_train_batch_size < 2):
            raise ValueError(
                f"{self.loss_type} sorts the pairs of a micro-batch: give per_device_train_batch_size, at least 2, and no "
                "tokens_per_batch"
            )

    def _leave_the_head_to_us(self) -> None:
        """Liger's kernels are welcome in the layers; its fused head would replace the forward that ours hooks into."""
        if self.liger not in ("auto", "true", "false"):
            raise ValueError(f"liger must be auto, true or false, not {self.liger!r}")
        for name, asked in (self.liger_kernel_config or {}).items():
            if asked and name in ("fused_linear_cross_entropy", "cross_entropy"):
                raise ValueError(f"liger_kernel_config asks for {name}: the head is bco_fast's own, leave it out")
        if self.use_liger_kernel:  # the Trainer's would come after the reference is computed, so it is ours that acts
            self.liger, self.use_liger_kernel = "true", False

    @property
    def objective(self) -> Objective:
        objective = find_objective(self.loss_type, self.loss_weights)
        if isinstance(objective, Sum):
            return replace(objective, parts={name: self._decided(part) for name, part in objective.parts.items()})
        return self._decided(objective)

    def _decided(self, objective: Objective) -> Objective:
        return replace(objective, lengths=self.length_normalized) if objective.lengths is None else objective

    @property
    def settings(self) -> dict:
        """beta and the objective's own hyper-parameters, by keyword of its loss; of a sum those of each part, by name."""
        objective = self.objective
        if isinstance(objective, Sum):
            return {name: self._settings_of(part) for name, part in objective.parts.items()}
        return self._settings_of(objective)

    def _settings_of(self, objective: Objective) -> dict[str, float | str]:
        beta = {} if objective.beta is None else {"beta": self.beta}
        return beta | {keyword: getattr(self, name) for name, keyword in objective.options.items()}

    def new_shift(self) -> RewardShift:
        mode = self.shift_mode or self.objective.shift or "fixed"
        # una_reward's constant is the mean of r - reward, whatever the class
        balanced = self.shift_balanced and self.objective.data != "rewards"
        return RewardShift(mode, self.shift_decay, balanced, self.shift_update)
