# What type checkers and editors see of the names that __init__.py loads on first use.

from .data.sources import FeedbackError
from .data.tokenize import load_feedback
from .head.linear_logps import fused_linear_logps
from .head.types import HeadStats
from .losses import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bce_loss,
    bco_loss,
    bco_pair_loss,
    bnf_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    orpo_loss,
    rdpo_loss,
    robust_loss,
    sft_loss,
    sigmoid_norm_loss,
    simpo_loss,
    slic_loss,
    sppo_hard_loss,
    una_binary_bce_loss,
    una_binary_mse_loss,
    una_pair_loss,
    una_reward_loss,
    una_score_loss,
)
from .losses.custom import register_objective
from .losses.fused import fused_bco_loss, fused_bnf_loss
from .losses.output import LossOutput
from .losses.reward_shift import RewardShift
from .losses.sequence import sequence_logps
from .models.patch import patch_model
from .online.config import OnlineConfig
from .online.trainer import OnlineFeedbackTrainer
from .reference.cache import CacheError, ReferenceCache
from .training.config import FeedbackConfig
from .training.trainer import FeedbackTrainer
from .training.trl_compat import BCOConfig, BCOTrainer

__version__: str
__all__ = [
    "BCOConfig",
    "BCOTrainer",
    "CacheError",
    "FeedbackConfig",
    "FeedbackError",
    "FeedbackTrainer",
    "HeadStats",
    "LossOutput",
    "OnlineConfig",
    "OnlineFeedbackTrainer",
    "ReferenceCache",
    "RewardShift",
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "apo_zero_unpaired_loss",
    "bce_loss",
    "bco_loss",
    "bco_pair_loss",
    "bnf_loss",
    "cpo_loss",
    "discopop_loss",
    "dpo_loss",
    "exo_pair_loss",
    "fused_bco_loss",
    "fused_bnf_loss",
    "fused_linear_logps",
    "hinge_loss",
    "ipo_loss",
    "kto_loss",
    "load_feedback",
    "nca_loss",
    "orpo_loss",
    "patch_model",
    "rdpo_loss",
    "register_objective",
    "robust_loss",
    "sequence_logps",
    "sft_loss",
    "sigmoid_norm_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_hard_loss",
    "una_binary_bce_loss",
    "una_binary_mse_loss",
    "una_pair_loss",
    "una_reward_loss",
    "una_score_loss",
]
