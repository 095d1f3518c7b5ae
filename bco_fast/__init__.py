"""bco_fast: align language models from thumbs up and down.

The names below load on first use; importing the package loads torch and nothing heavier.
"""

from __future__ import annotations

import importlib

from . import _moved

__version__ = "0.1.0"

_HOMES = {
    "fused_linear_logps": "head.linear_logps",
    "sequence_logps": "losses.sequence",
    "HeadStats": "head.types",
    "fused_bco_loss": "losses.fused",
    "fused_bnf_loss": "losses.fused",
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
    "robust_loss": "losses",
    "exo_pair_loss": "losses",
    "sppo_hard_loss": "losses",
    "bco_pair_loss": "losses",
    "apo_zero_loss": "losses",
    "apo_down_loss": "losses",
    "discopop_loss": "losses",
    "hinge_loss": "losses",
    "sigmoid_norm_loss": "losses",
    "aot_loss": "losses",
    "aot_unpaired_loss": "losses",
    "cpo_loss": "losses",
    "apo_zero_unpaired_loss": "losses",
    "sft_loss": "losses",
    "register_objective": "losses.custom",
    "LossOutput": "losses.output",
    "RewardShift": "losses.reward_shift",
    "ReferenceCache": "reference.cache",
    "CacheError": "reference.cache",
    "FeedbackError": "data.sources",
    "load_feedback": "data.tokenize",
    "patch_model": "models.patch",
    "FeedbackConfig": "training.config",
    "FeedbackTrainer": "training.trainer",
    "OnlineConfig": "online.config",
    "OnlineFeedbackTrainer": "online.trainer",
    "BCOConfig": "training.trl_compat",
    "BCOTrainer": "training.trl_compat",
}
__all__ = sorted(_HOMES)
_moved.install()


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
