"""Online alignment: prompts in, completions sampled from the policy, a reward, and an unpaired objective on the result.

UNA's fourth application (Wang et al., arXiv 2408.15339, section 2.3.4): the difference between the implicit reward
β (logp − logp_ref) and an explicit one is minimised on the policy's own completions. Training runs in rounds: a round is
sampled by the current policy, judged, kept as a feedback file, and trained on for `steps_per_round` steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..training.config import FeedbackConfig, _option


@dataclass
class OnlineConfig(FeedbackConfig):
    """`FeedbackConfig` with the options of sampling.

    A round has steps_per_round · batch · accumulation · ranks / replay_epochs completions, on every rank a multiple of
    samples_per_prompt.

    Raises:
        ValueError: as `FeedbackConfig`; a paired objective; no max_steps; an option that the generator does not read.
    """

    loss_type: list[str] | str = _option(  # noqa: RUF009
        "una_score",
        "Unpaired objective, or several for their weighted sum.",
        choices=FeedbackConfig.__dataclass_fields__["loss_type"].metadata["choices"],
    )
    steps_per_round: int = _option(8, "Optimizer steps on the completions of one round.")
    samples_per_prompt: int = _option(4, "Completions of each prompt in a round.")
    replay_epochs: int = _option(1, "Times a round's completions are trained on within its steps.")
    max_prompt_length: int | None = _option(
        None, "Longest prompt, tokens; longer ones are left out and counted. Default: max_length - max_new_tokens."
    )
    max_new_tokens: int = _option(256, "Longest completion, tokens.")
    temperature: float = _option(1.0, "Of sampling, > 0; 1 is the policy's own distribution.")
    top_p: float = _option(1.0, "Nucleus of sampling, (0, 1].")
    generation_batch_size: int = _option(64, "Prompts in one call of generate; vLLM makes its own batches.")
    generator: str = _option(
        "hf",
        "Sampler: hf, the policy's own generate, or vllm, an engine on the same GPU that gets its weights each round.",
        choices=["hf", "vllm"],
    )
    vllm_gpu_memory_utilization: float = _option(
        0.3, "Share of the GPU's memory that vLLM takes while it samples, (0, 1]."
    )
    reward_scale: str = _option(
        "none",
        "How una_score maps rewards to [0, 1]: none (they are), sigmoid, or minmax over the round.",
        choices=["none", "sigmoid", "minmax"],
    )
    reward_threshold: float = _option(0.5, "Reward above which a completion counts as thumbs up.")

    def __post_init__(self):
        super().__post_init__()
        if self.objective.data == "pairs":
            raise ValueError(f"{self.loss_type} needs pairs; online training samples completions one by one")
        if self.ref_adapter is not None:
            raise ValueError("ref_adapter: online training keeps its reference in memory, pass ref_model= instead")
        if self.max_completion_length is not None:
            raise ValueError(
                "online training samples its completions: give max_new_tokens instead of max_completion_length"
            )
        if self.tokens_per_batch is not None:
            raise ValueError("online training cuts its batches by rows: leave tokens_per_batch out")
        if self.max_steps <= 0:
            raise ValueError("online training has no epochs: give max_steps")
        counts = ("steps_per_round", "samples_per_prompt", "replay_epochs", "max_new_tokens", "generation_batch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (0 < self.temperature < float("inf") and 0 < self.top_p <= 1):
            raise ValueError(f"temperature must be > 0 and top_p in (0, 1], not {self.temperature} and {self.top_p}")
        if not -float("inf") < self.reward_threshold < float("inf"):
            raise ValueError(f"reward_threshold must be a finite number, not {self.reward_threshold}")
        if self.generator not in ("hf", "vllm"):
            raise ValueError(f"generator must be hf or vllm, not {self.generator!r}")
        if not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ValueError(f"vllm_gpu_memory_utilization must be in (0, 1], not {self.vllm_gpu_memory_utilization}")
        unread = type(self).__dataclass_fields__["vllm_gpu_memory_utilization"].default
        if self.generator != "vllm" and self.vllm_gpu_memory_utilization != unread:
            raise ValueError(f"generator {self.generator} does not read vllm_gpu_memory_utilization")
        if self.reward_scale != "none" and self.loss_type != "una_score":
            raise ValueError(f"{self.loss_type} does not read reward_scale (given: {self.reward_scale!r})")
