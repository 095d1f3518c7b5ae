"""bco_fast: align language models from thumbs up and down.

The names below load on first use; importing the package loads torch and nothing heavier.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "fused_linear_logps": "logps",
    "sequence_logps": "sequences",
    "HeadStats": "logps",
    "frequency_order": "logps",
    "fused_bco_loss": "fused",
    "fused_bnf_loss": "fused",
    "bco_loss": "losses",
    "bce_loss": "losses",
    "kto_loss": "losses",
    "una_binary_mse_loss": "losses",
    "una_binary_bce_loss": "losses",
    "una_score_loss": "losses",
    "una_reward_loss": "losses",
    "una_pair_loss": "losses",
    "dpo_loss": "losses",
    "bnf_loss": "losses",
    "ipo_loss": "losses",
    "slic_loss": "losses",
    "simpo_loss": "losses",
    "orpo_loss": "losses",
    "rdpo_loss": "losses",
    "nca_loss": "losses",
    "sft_loss": "losses",
    "LossOutput": "loss_output",
    "RewardShift": "reward_shift",
    "ReferenceCache": "cache",
    "CacheError": "cache",
    "FeedbackError": "data",
    "load_feedback": "data",
    "patch_model": "models",
    "FeedbackConfig": "config",
    "FeedbackTrainer": "trainer",
    "OnlineConfig": "online",
    "OnlineFeedbackTrainer": "online",
    "BCOConfig": "trl_compat",
    "BCOTrainer": "trl_compat",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
