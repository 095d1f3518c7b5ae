"""Training on completions that the policy samples and a reward judges."""

from .._moved import old_names

__getattr__ = old_names(
    __name__,
    {
        "OnlineConfig": "online.config",
        "OnlineFeedbackTrainer": "online.trainer",
        "HuggingFaceGenerator": "online.generators",
        "read_prompts": "data.prompts",
    },
)
